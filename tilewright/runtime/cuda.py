"""NVIDIA GPUs through the CUDA driver API (the ``cuda-bindings`` package, imported on first use).

The device's primary context is used, which is torch's as well, so both see each other's memory
and streams. A launch that repeats earlier arguments reuses their packed block and costs about as
much as reading the arguments and calling the driver.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

from tilewright.ir.abi import KernelABI, TensorParam
from tilewright.runtime.arguments import (
    INT32_MAX,
    ArgumentBlock,
    ArgumentLayout,
    DevicePointer,
    TensorView,
    check_tensor,
    normalize_grid,
    read_tensor,
)
from tilewright.runtime.device import Device, DeviceInfo, Module, nvidia_target
from tilewright.runtime.errors import ArgumentError, DeviceError
from tilewright.runtime.tensor_maps import TensorMapEncoder

__all__ = ["CudaDevice", "CudaFunction", "CudaModule", "DevicePointer", "Launcher", "enumerate_devices"]

#: dynamic shared memory that a kernel may have without asking, in bytes
_DEFAULT_SHARED_BYTES = 48 * 1024
_MAX_GRID_YZ = 65535
#: launches of one function whose packed arguments are kept
_KEPT_LAUNCHES = 256

_ADVICE = {
    "CUDA_ERROR_NO_DEVICE": "No NVIDIA GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES.",
    "CUDA_ERROR_INVALID_DEVICE": "There is no GPU of that number: look at nvidia-smi and CUDA_VISIBLE_DEVICES.",
    "CUDA_ERROR_STUB_LIBRARY": "The toolkit's stub libcuda was loaded: take its folder out of LD_LIBRARY_PATH.",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "Kernel module and libcuda differ in version: reboot or reinstall the driver.",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "The forward-compatibility driver does not support this GPU.",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "Another process holds the GPU exclusively.",
    "CUDA_ERROR_OUT_OF_MEMORY": "The GPU's memory is full: free tensors, or call torch.cuda.empty_cache().",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "The binary is for another architecture: compile it for this device's target.",
    "CUDA_ERROR_INVALID_IMAGE": "The bytes are no cubin: was a text or another vendor's binary passed?",
    "CUDA_ERROR_INVALID_PTX": "The driver's assembler refused the PTX: assemble it with ptxas to see why.",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "The driver is older than the toolkit that made this: update the driver.",
    "CUDA_ERROR_NOT_FOUND": "The binary has no symbol of that name.",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "The block needs more registers or threads than an SM has: "
    "use fewer warps or smaller tiles.",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "A kernel touched memory outside its tensors, perhaps one launched earlier; the "
    "context is lost. Restart the process and run under compute-sanitizer.",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "A kernel made a misaligned access, perhaps one launched earlier; the context is "
    "lost. Restart the process and run under compute-sanitizer.",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": "A kernel ran an invalid instruction or gave one invalid operands, such as a bad "
    "descriptor; the context is lost. Restart the process and run under compute-sanitizer.",
    "CUDA_ERROR_LAUNCH_FAILED": "A kernel failed on the device, perhaps one launched earlier; the context is lost. "
    "Restart the process and run under compute-sanitizer.",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "The display watchdog stopped the kernel: use a GPU without a display.",
    "CUDA_ERROR_NOT_INITIALIZED": "A process forked after its parent used CUDA cannot use it: start it with 'spawn'.",
    "CUDA_ERROR_INVALID_VALUE": "The driver refused an argument of the call.",
}


def load_driver() -> Any:
    """The ``cuda.bindings.driver`` module, initialised; `DeviceError` where there is no driver."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            f"The CUDA bindings cannot be imported ({error}): install them with `pip install 'tilewright[cuda]'`."
        ) from error
    initialize(driver)
    return driver


def initialize(driver: Any) -> None:
    """cuInit, with its several ways of failing turned into a `DeviceError`."""
    try:
        (status,) = driver.cuInit(0)
    except (RuntimeError, ImportError, OSError) as error:  # no libcuda, or one without cuInit
        raise DeviceError(
            f"No NVIDIA driver (libcuda.so.1) on this machine: install the NVIDIA driver, or launch on the cpu "
            f"device or an emulated one ({type(error).__name__}: {error})."
        ) from error
    _check(status, "cuInit")


def _check(status: Any, doing: str) -> None:
    if status:
        code = getattr(status, "name", str(status))
        raise DeviceError(f"{doing}: {code}. {_ADVICE.get(code, '')}".rstrip(), code)


def _attribute(driver: Any, name: str, device: Any) -> int:
    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    status, value = driver.cuDeviceGetAttribute(attribute, device)
    _check(status, f"cuDeviceGetAttribute({name})")
    return int(value)


def enumerate_devices(driver: Any = None) -> list[DeviceInfo]:
    """Every visible NVIDIA GPU; `DeviceError` where there is no driver. Creates no context."""
    driver = load_driver() if driver is None else driver
    status, count = driver.cuDeviceGetCount()
    _check(status, "cuDeviceGetCount")
    return [_describe(driver, ordinal) for ordinal in range(count)]


def _describe(driver: Any, ordinal: int) -> DeviceInfo:
    status, device = driver.cuDeviceGet(ordinal)
    _check(status, f"Opening cuda:{ordinal}")
    status, name = driver.cuDeviceGetName(256, device)
    _check(status, "cuDeviceGetName")
    status, memory = driver.cuDeviceTotalMem(device)
    _check(status, "cuDeviceTotalMem")
    capability = [_attribute(driver, f"COMPUTE_CAPABILITY_{part}", device) for part in ("MAJOR", "MINOR")]
    return DeviceInfo(
        name=f"cuda:{ordinal}",
        target=nvidia_target(*capability),
        description=bytes(name).rstrip(b"\0").decode(),
        units=_attribute(driver, "MULTIPROCESSOR_COUNT", device),
        memory=int(memory),
    )


class CudaDevice(Device):
    """One NVIDIA GPU, by its ordinal among the visible ones.

    ``driver`` is a stand-in for ``cuda.bindings.driver`` (tests).
    """

    def __init__(self, ordinal: int = 0, driver: Any = None) -> None:
        self._driver = load_driver() if driver is None else driver
        self.ordinal = ordinal
        infos = enumerate_devices(self._driver)
        if not 0 <= ordinal < len(infos):
            raise DeviceError(
                f"cuda:{ordinal} does not exist: {len(infos)} NVIDIA GPUs are visible. Look at nvidia-smi and "
                "CUDA_VISIBLE_DEVICES.",
                "CUDA_ERROR_INVALID_DEVICE",
            )
        self.info = infos[ordinal]
        device = self.call("cuDeviceGet", ordinal)
        self.multiprocessors = self.info.units
        self.max_shared_bytes = _attribute(self._driver, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", device)
        self.l2_bytes = _attribute(self._driver, "L2_CACHE_SIZE", device)
        # The primary context is the one that torch and the CUDA runtime use. It is never released:
        # its functions and tensor maps live as long as the process.
        self._context = self.call("cuDevicePrimaryCtxRetain", device)
        self._context_handle = int(self._context)
        self._spare_address = 0
        self._lock = threading.Lock()
        self.tensor_maps = TensorMapEncoder(self._driver, self.call, self._spare_cell)

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def target(self) -> str:
        return self.info.target

    def call(self, function: str, *args: Any, doing: str = "") -> Any:
        """Call a driver function: its value (a list where it has several), or a `DeviceError`."""
        status, *values = getattr(self._driver, function)(*args)
        if status:
            _check(status, doing or function)
        return values[0] if len(values) == 1 else values

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this device's context the calling thread's, and restore the one it had.

        A thread without any keeps ours, as with the CUDA runtime.
        """
        found = int(self.call("cuCtxGetCurrent"))
        if found == self._context_handle:
            yield
        elif not found:
            self.call("cuCtxSetCurrent", self._context)
            yield
        else:
            self.call("cuCtxPushCurrent", self._context)
            try:
                yield
            finally:
                self.call("cuCtxPopCurrent")

    def load(self, binary: bytes, asm: Mapping[str, str] | None = None) -> CudaModule:
        """Load a cubin. Functions found in it stay valid until `CudaModule.unload`."""
        with self.current():
            doing = f"Loading a {len(binary)}-byte binary on {self.name} ({self.target})"
            return CudaModule(self, self.call("cuModuleLoadData", binary, doing=doing))

    def blocks_per_unit(self, function: CudaFunction, threads: int, shared_bytes: int) -> int:
        """How many blocks of ``threads`` with that dynamic shared memory fit on one SM at once."""
        function.allow_shared(shared_bytes)
        with self.current():
            return int(self.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function.handle, threads, shared_bytes))

    def launch(
        self,
        function: CudaFunction,
        abi: KernelABI,
        grid: int | Sequence[int],
        args: Sequence[Any],
        stream: Any = None,
    ) -> None:
        """See `Device.launch`.

        ``stream`` is a handle (int), a torch stream or anything with ``__cuda_stream__``. Without
        one it is torch's current stream where an argument is a torch tensor, else the legacy
        default stream.
        """
        function.launcher(abi)(grid, args, stream)

    def synchronize(self) -> None:
        with self.current():
            self.call("cuCtxSynchronize", doing=f"Waiting for {self.name}")

    def _spare_cell(self) -> int:
        """Address of 16 zeroed bytes that stand in for empty tensors in tensor maps."""
        with self._lock, self.current():
            if not self._spare_address:
                address = self.call("cuMemAlloc", 16)
                self.call("cuMemsetD8", address, 0, 16)
                self._spare_address = int(address)
        return self._spare_address


class CudaModule(Module):
    """A loaded cubin."""

    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self.device = device
        self._handle = handle
        self._functions: dict[str, CudaFunction] = {}

    def function(self, name: str) -> CudaFunction:
        """The kernel ``name``, the same object at every call."""
        if name not in self._functions:
            with self.device.current():
                doing = f"Looking up kernel '{name}'"
                handle = self.device.call("cuModuleGetFunction", self._handle, name.encode(), doing=doing)
            self._functions[name] = CudaFunction(self.device, name, handle)
        return self._functions[name]

    def unload(self) -> None:
        """Free the code. Its functions must not be running, nor be launched again."""
        with self.device.current():
            self.device.call("cuModuleUnload", self._handle)
        self._functions.clear()


class CudaFunction:
    """A kernel of a loaded module. ``handle`` is the driver's CUfunction."""

    def __init__(self, device: CudaDevice, name: str, handle: Any) -> None:
        self.device = device
        self.name = name
        self.handle = handle
        self._allowed_shared = _DEFAULT_SHARED_BYTES
        # by identity: hashing an ABI would cost more than the launch. A launcher keeps its ABI alive.
        self._launchers: dict[int, Launcher] = {}

    def allow_shared(self, size: int) -> None:
        """Permit launches with ``size`` bytes of dynamic shared memory."""
        if size <= self._allowed_shared:
            return
        if size > self.device.max_shared_bytes:
            raise DeviceError(
                f"Kernel '{self.name}' needs {size} bytes of shared memory; a block on {self.device.name} "
                f"({self.device.target}) has at most {self.device.max_shared_bytes}. Use smaller tiles or fewer stages."
            )
        attribute = self.device._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self.device.current():
            self.device.call("cuFuncSetAttribute", self.handle, attribute, size)
        self._allowed_shared = size

    def launcher(self, abi: KernelABI) -> Launcher:
        """The launcher for one ABI, made at the first call."""
        launcher = self._launchers.get(id(abi))
        if launcher is None:
            launcher = self._launchers[id(abi)] = Launcher(self, abi)
        return launcher


@dataclass(frozen=True)
class _ReadyLaunch:
    """Everything of a launch but the stream: checked, encoded, packed. ``arguments`` is None for an empty grid."""

    blocks: tuple[int, int, int]
    arguments: ArgumentBlock | None


class Launcher:
    """Launches one function with one ABI: ``launcher(grid, args, stream)``.

    Arguments already seen (same addresses, shapes, strides, scalar bits and grid) go straight to
    the driver; others are checked against the ABI and packed first.
    """

    def __init__(self, function: CudaFunction, abi: KernelABI) -> None:
        function.allow_shared(abi.shared_bytes)
        self.function = function
        self.device = function.device
        self.abi = abi
        self.layout = ArgumentLayout(abi)
        self._tensor_params = [p for p in abi.params if isinstance(p, TensorParam)]
        self._is_tensor = [isinstance(p, TensorParam) for p in abi.params]
        self._map_sources = [self._source(m.param) for m in abi.tensor_maps]
        self._ready: dict[Any, _ReadyLaunch] = {}
        self._cu_launch_kernel = self.device._driver.cuLaunchKernel
        self._get_current = self.device._driver.cuCtxGetCurrent

    def _source(self, name: str) -> int:
        for index, param in enumerate(self._tensor_params):
            if param.name == name:
                return index
        raise ArgumentError(f"{self.abi.name} has a tensor map of '{name}', which is none of its tensors.")

    def __call__(self, grid: int | Sequence[int], args: Sequence[Any], stream: Any = None) -> None:
        """Start the kernel; see `CudaDevice.launch`."""
        if len(args) != len(self._is_tensor):
            raise ArgumentError(
                f"{self.abi.name} takes {len(self._is_tensor)} arguments "
                f"({', '.join(p.name for p in self.abi.params)}), not {len(args)}."
            )
        torch = sys.modules.get("torch")
        views, scalars, producers, from_torch = self._split(args, torch)
        packed = self.layout.pack_scalars(scalars) if scalars else b""
        key = (tuple(grid) if isinstance(grid, list) else grid, packed, *views)
        ready = self._ready.get(key) or self._prepare(key)
        if ready.arguments is None:
            return
        handle = _stream_handle(stream, torch if from_torch else None, self.device.ordinal)
        for producer in producers:
            if producer != handle:  # the array interface, v3: wait for the producer's stream
                self._wait_for(producer)
        self._start(ready, handle)

    def _split(self, args: Sequence[Any], torch: ModuleType | None) -> tuple[list[Any], list[Any], list[int], bool]:
        """The views, scalars and producers' streams among ``args``; last, whether a torch tensor was there."""
        tensor_type: Any = getattr(torch, "Tensor", ())  # absent, too, from a torch that is being imported
        views: list[Any] = []
        scalars: list[Any] = []
        producers: list[int] = []
        from_torch = False
        for is_tensor, arg in zip(self._is_tensor, args, strict=True):
            if not is_tensor:
                scalars.append(arg)
            elif type(arg) is tensor_type and arg.is_cuda:
                # read_torch, without its cost: a plain tuple equals the TensorView as a key
                views.append((arg.data_ptr(), arg.shape, arg.stride(), arg.dtype, arg.get_device()))
                from_torch = True
            else:
                view, producer = self._read(arg, len(views), torch)
                views.append(view)
                from_torch = from_torch or isinstance(arg, tensor_type)
                if producer is not None:
                    producers.append(producer)
        return views, scalars, producers, from_torch

    def _read(self, argument: Any, index: int, torch: ModuleType | None) -> tuple[TensorView, int | None]:
        return read_tensor(argument, self._tensor_params[index].name, torch)

    def _prepare(self, key: tuple[Any, ...]) -> _ReadyLaunch:
        grid, packed, *entries = key
        counts = normalize_grid(grid, self.abi.name)
        views = [TensorView(*entry) for entry in entries]
        for param, view in zip(self._tensor_params, views, strict=True):
            check_tensor(param, view, self.device.ordinal)
        blocks = self._blocks(counts)
        if 0 in counts:
            ready = _ReadyLaunch(blocks, None)
        else:
            maps = [
                self.device.tensor_maps.encode(param, views[source])
                for param, source in zip(self.abi.tensor_maps, self._map_sources, strict=True)
            ]
            ready = _ReadyLaunch(blocks, self.layout.pack(views, packed, counts, maps))
        self._keep(key, ready)
        return ready

    def _keep(self, key: tuple[Any, ...], ready: _ReadyLaunch) -> None:
        """Remember a launch, first in first out; an exact LRU would cost every launch some time."""
        try:
            while len(self._ready) >= _KEPT_LAUNCHES:
                self._ready.pop(next(iter(self._ready)), None)
        except (StopIteration, RuntimeError):  # another thread changed the dictionary meanwhile
            pass
        self._ready[key] = ready

    def _blocks(self, counts: tuple[int, int, int]) -> tuple[int, int, int]:
        total = prod(counts)
        if self.abi.persistent:
            if total > INT32_MAX:
                raise ArgumentError(
                    f"The grid of {self.abi.name}, {counts}, has {total} programs; at most {INT32_MAX} can be counted."
                )
            return (min(total, self.device.multiprocessors * self.abi.blocks_per_unit), 1, 1)
        if max(counts[1:]) > _MAX_GRID_YZ:
            raise ArgumentError(
                f"The grid of {self.abi.name}, {counts}, exceeds {_MAX_GRID_YZ} in its second or third dimension, "
                "which is CUDA's limit: put the large dimension first."
            )
        return counts

    def _start(self, ready: _ReadyLaunch, stream: int) -> None:
        status, context = self._get_current()
        if not status and int(context) == self.device._context_handle:
            self._launch(ready, stream)
            return
        with self.device.current():
            self._launch(ready, stream)

    def _launch(self, ready: _ReadyLaunch, stream: int) -> None:
        x, y, z = ready.blocks
        assert ready.arguments is not None
        (status,) = self._cu_launch_kernel(
            self.function.handle,
            x,
            y,
            z,
            self.abi.threads,
            1,
            1,
            self.abi.shared_bytes,
            stream,
            ready.arguments.pointers,
            0,
        )
        if status:
            _check(
                status,
                f"Launching '{self.abi.name}' on {self.device.name} with {x}x{y}x{z} blocks of {self.abi.threads} "
                f"threads and {self.abi.shared_bytes} bytes of shared memory",
            )

    def _wait_for(self, stream: int) -> None:
        with self.device.current():
            self.device.call("cuStreamSynchronize", stream)


def _stream_handle(stream: Any, torch: ModuleType | None, ordinal: int) -> int:
    """The CUstream, as an integer, of what a caller passed; ``torch`` is None if no tensor is torch's."""
    if stream is None:
        return 0 if torch is None else _torch_stream(torch, ordinal)
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    try:
        return int(stream)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"A stream must be a CUDA handle (int), a torch stream or have __cuda_stream__, not {stream!r}."
        ) from None


def _torch_stream(torch: ModuleType, ordinal: int) -> int:
    try:
        # what torch.cuda.current_stream wraps, without making a Stream object
        return int(torch._C._cuda_getCurrentRawStream(ordinal))
    except AttributeError:
        return int(torch.cuda.current_stream(ordinal).cuda_stream)
