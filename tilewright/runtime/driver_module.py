"""Modules and functions as drivers load them: CUDA and HIP differ in the names of the calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tilewright.ir.abi import KernelABI
from tilewright.runtime.device import Module


class DriverDevice(Protocol):
    """What modules ask of their device."""

    def call(self, function: str, *args: Any, doing: str = "") -> Any:
        """Call a driver function: its value, or a `DeviceError`."""

    def current(self) -> AbstractContextManager[None]:
        """Make the device's context the calling thread's."""


DeviceType = TypeVar("DeviceType", bound=DriverDevice)
LauncherType = TypeVar("LauncherType")
FunctionType = TypeVar("FunctionType", bound="DriverFunction[Any, Any]")


class DriverFunction(ABC, Generic[DeviceType, LauncherType]):
    """A kernel of a loaded module. ``handle`` is the driver's."""

    def __init__(self, device: DeviceType, name: str, handle: Any) -> None:
        self.device = device
        self.name = name
        self.handle = handle
        # by identity: hashing an ABI would cost more than the launch. A launcher keeps its ABI alive.
        self._launchers: dict[int, LauncherType] = {}

    def launcher(self, abi: KernelABI) -> LauncherType:
        """The launcher for one ABI, made at the first call."""
        launcher = self._launchers.get(id(abi))
        if launcher is None:
            launcher = self._launchers[id(abi)] = self.make_launcher(abi)
        return launcher

    @abstractmethod
    def make_launcher(self, abi: KernelABI) -> LauncherType:
        """A launcher for the ABI."""


class DriverModule(Module, Generic[DeviceType, FunctionType]):
    """A loaded binary, as long as the process lives. Subclasses name the driver's call that finds a kernel in it."""

    find_call: ClassVar[str]
    function_class: ClassVar[Any]

    def __init__(self, device: DeviceType, handle: Any) -> None:
        self.device = device
        self._handle = handle
        self._functions: dict[str, FunctionType] = {}

    def function(self, name: str) -> FunctionType:
        """The kernel ``name``, the same object at every call."""
        if name not in self._functions:
            with self.device.current():
                doing = f"Looking up kernel '{name}'"
                handle = self.device.call(self.find_call, self._handle, name.encode(), doing=doing)
            self._functions[name] = self.function_class(self.device, name, handle)
        return self._functions[name]
