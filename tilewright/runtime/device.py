"""What every device offers, and which devices this machine has."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from threading import RLock
from typing import Any

from tilewright.ir.abi import KernelABI
from tilewright.runtime.arguments import TensorView, read_tensor
from tilewright.runtime.errors import DeviceError

#: held while a device is opened: threads that ask at once get one object
_opening = RLock()


class Module(ABC):
    """A binary loaded on a device."""

    @abstractmethod
    def function(self, name: str) -> Any:
        """The entry point ``name``, in the form that the device's `launch` takes."""


class Device(ABC):
    """One place where compiled kernels run."""

    @property
    @abstractmethod
    def name(self) -> str:
        """How users write it: "cuda:0", "hip:0", "cpu", "emulate:gfx942"."""

    @property
    @abstractmethod
    def target(self) -> str:
        """What the compiler must target for it: "sm_90a", "gfx942"."""

    @abstractmethod
    def load(self, binary: bytes, asm: Mapping[str, str] | None = None) -> Module:
        """Put a binary on the device.

        ``asm``: its texts by kind ("ptx", "amdgcn"), which emulated devices execute in its stead.
        """

    def view(self, argument: Any, name: str) -> TensorView:
        """Address, shape and strides of a tensor argument. ArgumentError names the parameter ``name``."""
        return read_tensor(argument, name, sys.modules.get("torch"))[0]

    @abstractmethod
    def launch(
        self,
        function: Any,
        abi: KernelABI,
        grid: int | Sequence[int],
        args: Sequence[Any],
        stream: Any = None,
    ) -> None:
        """Start ``function`` over ``grid`` with one argument per parameter of ``abi``.

        Returns before the kernel has finished. A grid with a zero in it starts nothing.
        """

    def ready(
        self, function: Any, abi: KernelABI, grid: int | Sequence[int], args: Sequence[Any]
    ) -> Callable[[Any], None]:
        """The launch as a function of the stream, with all done that could wait for kernels which run already.

        Kernels that wait for each other are started after all of them are ready.
        """
        return lambda stream: self.launch(function, abi, grid, args, stream)

    def prepare(
        self, function: Any, abi: KernelABI, grid: int | Sequence[int], args: Sequence[Any]
    ) -> Callable[[Any], None] | None:
        """The launch with these arguments as a function of the stream alone, for repeating it; None: not offered."""
        return None

    def form(self, function: Any, abi: KernelABI, grid: int | Sequence[int], args: Sequence[Any]) -> Any:
        """The launch as a `LaunchForm`, for repeating it with other addresses and numbers; None: not offered."""
        return None

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything launched on this device has finished; its late errors raise here."""


@dataclass(frozen=True)
class DeviceInfo:
    """A device that exists, described without opening it.

    ``units`` counts its SMs or CUs, ``memory`` its bytes; 0 where that means nothing.
    """

    name: str
    target: str
    description: str
    units: int = 0
    memory: int = 0


def nvidia_target(major: int, minor: int) -> str:
    """The compiler target of a compute capability.

    From 9.0 on the architecture-specific set ("a": wgmma, tcgen05, setmaxnreg) is what we use.
    """
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def devices() -> list[DeviceInfo]:
    """The devices of this machine, GPUs first, emulated ones last. Never raises and creates no context."""
    from tilewright.runtime.emulated import emulated_devices

    gpus = [*_found("cuda"), *_found("hip")]
    return [*gpus, DeviceInfo("cpu", "cpu", "interpreter on NumPy arrays"), *emulated_devices()]


def _found(kind: str) -> list[DeviceInfo]:
    try:
        return list(import_module(f"tilewright.runtime.{kind}").enumerate_devices())
    except DeviceError:
        return []


def open_device(name: str) -> Device:
    """The device called ``name`` ("cuda" means "cuda:0"), the same object at every call."""
    kind, _, index = name.partition(":")
    if kind == "emulate":
        with _opening:
            return _open_member(index) if "#" in index else _open_emulated(index)
    if kind not in ("cuda", "hip"):
        raise DeviceError(f"No runtime opens the device '{name}'. This machine has: {_names()}.")
    if index and not index.isdecimal():
        raise DeviceError(f"'{name}' names no device: write {kind}:0, {kind}:1, ...")
    with _opening:
        return _open_cuda(int(index or 0)) if kind == "cuda" else _open_hip(int(index or 0))


@cache
def _open_cuda(ordinal: int) -> Device:
    from tilewright.runtime import cuda

    return cuda.CudaDevice(ordinal)


@cache
def _open_hip(ordinal: int) -> Device:
    from tilewright.runtime.hip import HipDevice

    return HipDevice(ordinal)


@cache
def _open_emulated(text: str) -> Device:
    from tilewright.runtime.emulated import EmulatedDevice, EmulationOptions

    target, options = EmulationOptions.parse(text)
    return EmulatedDevice(target, options=options)


def _open_member(text: str) -> Device:
    from tilewright.runtime.emulated_group import member

    return member(text.partition("#")[2].partition(",")[0])


def _names() -> str:
    return ", ".join(info.name for info in devices())
