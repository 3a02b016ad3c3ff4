"""AMD GPUs through the HIP runtime (the ``rocm-bindings-hip`` package, imported on first use).

The device's primary context is used, which is torch's as well. Where torch for ROCm is loaded, its
own copy of the runtime library is taken, since two copies in a process do not share memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tilewright.ir.abi import KernelABI, TensorParam
from tilewright.runtime.arguments import TensorView, refuse_negative_strides
from tilewright.runtime.device import DeviceInfo
from tilewright.runtime.driver_module import DriverDevice, DriverFunction, DriverModule, check_status
from tilewright.runtime.errors import ArgumentError, DeviceError
from tilewright.runtime.launching import Launcher, ReadyLaunch

__all__ = ["HipDevice", "HipFunction", "HipModule", "enumerate_devices"]

#: work-items along one axis of a launch (hipModuleLaunchKernel)
_MAX_ITEMS = 2**32 - 1

_ADVICE = {
    "hipErrorNoDevice": "No AMD GPU is visible: look at rocm-smi, HIP_VISIBLE_DEVICES and the rights on /dev/kfd.",
    "hipErrorInvalidDevice": "There is no GPU of that number: look at rocm-smi and HIP_VISIBLE_DEVICES.",
    "hipErrorOutOfMemory": "The GPU's memory is full: free tensors, or call torch.cuda.empty_cache().",
    "hipErrorNoBinaryForGpu": "The binary is for another architecture: compile it for this device's target.",
    "hipErrorInvalidImage": "The bytes are no code object: was a text or another vendor's binary passed?",
    "hipErrorNotFound": "The binary has no kernel of that name.",
    "hipErrorLaunchOutOfResources": "The workgroup needs more than a CU has: use fewer warps or smaller tiles.",
    "hipErrorIllegalAddress": "A kernel touched memory outside its tensors, perhaps one launched earlier; restart the "
    "process.",
    "hipErrorLaunchFailure": "A kernel failed on the device, perhaps one launched earlier; restart the process.",
}


def load_runtime() -> Any:
    """The ``rocm.bindings.hip`` module, initialised; `DeviceError` where there is no runtime library."""
    try:
        from rocm.bindings import hip
    except ImportError as error:
        raise DeviceError(
            f"The HIP bindings cannot be imported ({error}): install them with `pip install 'tilewright[amd]'`."
        ) from error
    initialize(hip)
    return hip


def initialize(hip: Any) -> None:
    """hipInit, with its several ways of failing turned into a `DeviceError`."""
    try:
        with _library_of_torch():
            (status,) = hip.hipInit(0)
    except (RuntimeError, OSError) as error:
        raise DeviceError(
            "No HIP runtime (libamdhip64.so) on this machine: install ROCm, or launch on the cpu device or an emulated "
            f"one ({error})."
        ) from error
    _check(status, "hipInit")


@contextmanager
def _library_of_torch() -> Iterator[None]:
    """While the bindings look for the runtime library (once), point them to the one torch has loaded."""
    torch = sys.modules.get("torch")
    root = Path(getattr(torch, "__file__", None) or "").parent
    if torch is None or not (root / "lib" / "libamdhip64.so").exists():
        yield
        return
    before = os.environ.get("ROCM_PATH")
    os.environ["ROCM_PATH"] = str(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ["ROCM_PATH"]
        else:
            os.environ["ROCM_PATH"] = before


def _check(status: Any, doing: str) -> None:
    check_status(status, doing, _ADVICE)


def enumerate_devices(hip: Any = None) -> list[DeviceInfo]:
    """Every visible AMD GPU; `DeviceError` where there is no runtime."""
    hip = load_runtime() if hip is None else hip
    status, count = hip.hipGetDeviceCount()
    _check(status, "hipGetDeviceCount")
    return [_describe(hip, ordinal) for ordinal in range(count)]


def _describe(hip: Any, ordinal: int) -> DeviceInfo:
    status, properties = hip.hipGetDeviceProperties(ordinal)
    _check(status, f"Opening hip:{ordinal}")
    return DeviceInfo(
        name=f"hip:{ordinal}",
        target=amd_target(_text(properties.gcnArchName)),
        description=_text(properties.name),
        units=properties.multiProcessorCount,
        memory=properties.totalGlobalMem,
    )


def amd_target(arch: str) -> str:
    """The compiler target of a gcnArchName: "gfx942:sramecc+:xnack-" is "gfx942"."""
    return arch.partition(":")[0]


def _text(value: bytes | str) -> str:
    return value.rstrip(b"\0").decode() if isinstance(value, bytes) else value


class HipDevice(DriverDevice):
    """One AMD GPU, by its ordinal among the visible ones. ``hip`` is a stand-in for the bindings (tests)."""

    advice = _ADVICE

    def __init__(self, ordinal: int = 0, hip: Any = None) -> None:
        hip = load_runtime() if hip is None else hip
        infos = enumerate_devices(hip)
        if not 0 <= ordinal < len(infos):
            raise DeviceError(
                f"hip:{ordinal} does not exist: {len(infos)} AMD GPUs are visible. Look at rocm-smi and "
                "HIP_VISIBLE_DEVICES.",
                "hipErrorInvalidDevice",
            )
        super().__init__(hip, ordinal, infos[ordinal])

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this device the calling thread's, and restore the one it had."""
        found = self.call("hipGetDevice")
        if found == self.ordinal:
            yield
            return
        self.call("hipSetDevice", self.ordinal)
        try:
            yield
        finally:
            self.call("hipSetDevice", found)

    def load(self, binary: bytes, asm: Mapping[str, str] | None = None) -> HipModule:
        """Load an HSACO. Functions found in it stay valid."""
        with self.current():
            doing = f"Loading a {len(binary)}-byte binary on {self.name} ({self.target})"
            return HipModule(self, self.call("hipModuleLoadData", binary, doing=doing), binary)

    def blocks_per_unit(self, function: HipFunction, threads: int) -> int:
        """How many workgroups of ``threads`` fit on one CU at once."""
        with self.current():
            name = "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor"
            return int(self.call(name, function.handle, threads, 0))

    def synchronize(self) -> None:
        with self.current():
            self.call("hipDeviceSynchronize", doing=f"Waiting for {self.name}")


class HipFunction(DriverFunction[HipDevice, "HipLauncher"]):
    """A kernel of a loaded module. ``handle`` is the hipFunction_t."""

    def make_launcher(self, abi: KernelABI) -> HipLauncher:
        return HipLauncher(self, abi)


class HipModule(DriverModule[HipDevice, HipFunction]):
    """A loaded code object. It keeps the bytes, which HIP may read again later."""

    find_call, function_class = "hipModuleGetFunction", HipFunction

    def __init__(self, device: HipDevice, handle: Any, binary: bytes) -> None:
        super().__init__(device, handle)
        self._binary = binary


class HipLauncher(Launcher):
    """Launches one function with one ABI through hipModuleLaunchKernel.

    LDS is static in our code objects, so a launch asks for no dynamic shared memory.
    """

    device: HipDevice

    def __init__(self, function: HipFunction, abi: KernelABI) -> None:
        super().__init__(function.device, function.device.ordinal, abi)
        self.function = function
        # blocks that wait for other GPUs' must all be resident, or those that others wait for may never start
        cooperative, hip = abi.communicates and abi.persistent, self.device._driver
        self._launch_kernel = hip.hipModuleLaunchCooperativeKernel if cooperative else hip.hipModuleLaunchKernel
        self._extra = () if cooperative else (None,)

    def check(self, param: TensorParam, view: TensorView) -> None:
        super().check(param, view)
        refuse_negative_strides(param, view)

    def units(self) -> int:
        return self.device.info.units

    def check_grid(self, counts: tuple[int, int, int]) -> None:
        if counts[0] * self.abi.threads > _MAX_ITEMS:
            raise ArgumentError(
                f"The grid of {self.abi.name}, {counts}, has 2**32 threads or more along its first dimension, which "
                "is more than HIP takes: spread it over several dimensions."
            )

    def start(self, ready: ReadyLaunch, stream: int) -> None:
        with self.device.current():
            x, y, z = ready.blocks
            assert ready.arguments is not None
            (status,) = self._launch_kernel(
                self.function.handle, x, y, z, self.abi.threads, 1, 1, 0, stream, ready.arguments.pointers, *self._extra
            )
        if int(status):
            self.device.fail(
                status,
                f"Launching '{self.abi.name}' on {self.device.name} with {x}x{y}x{z} workgroups of {self.abi.threads} "
                f"threads and {self.abi.shared_bytes} bytes of LDS",
            )

    def wait_for(self, stream: int) -> None:
        with self.device.current():
            self.device.call("hipStreamSynchronize", stream)
