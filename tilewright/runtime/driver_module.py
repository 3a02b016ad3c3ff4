"""What GPUs behind a driver share: CUDA and HIP differ in the names of the calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar, cast

from tilewright.ir.abi import KernelABI
from tilewright.runtime.device import Device, DeviceInfo, Module
from tilewright.runtime.errors import DeviceError, explain_failure


def check_status(status: Any, doing: str, advice: Mapping[str, str]) -> None:
    """A `DeviceError` for a failed call of a driver. ``advice``: what to do, by the error's name."""
    if int(status):
        code = getattr(status, "name", str(status))
        raise DeviceError(f"{doing}: {code}. {advice.get(code, '')}".rstrip(), code)


class DriverDevice(Device):
    """A GPU behind a driver. Subclasses name what to do about its errors."""

    advice: ClassVar[Mapping[str, str]]

    def __init__(self, driver: Any, ordinal: int, info: DeviceInfo) -> None:
        """``driver``: the module of bindings, or a stand-in for it (tests)."""
        self._driver, self.ordinal, self.info = driver, ordinal, info
        #: asked for an explanation when a call fails: kernels that give up waiting for other GPUs leave one
        self.faults: list[Callable[[], str | None]] = []

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def target(self) -> str:
        return self.info.target

    def call(self, function: str, *args: Any, doing: str = "") -> Any:
        """Call a driver function: its value (a list where it has several), or a `DeviceError`."""
        status, *values = getattr(self._driver, function)(*args)
        if int(status):
            self.fail(status, doing or function)
        return values[0] if len(values) == 1 else values

    def fail(self, status: Any, doing: str) -> None:
        """Raise the DeviceError of a failed call, with the reason that a kernel left behind if one did."""
        explain_failure(self.faults, status)
        check_status(status, doing, self.advice)

    @abstractmethod
    def current(self) -> AbstractContextManager[None]:
        """Make the device the calling thread's, and restore the one it had."""

    def launch(
        self,
        function: DriverFunction[Any, Any],
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

    def ready(
        self, function: DriverFunction[Any, Any], abi: KernelABI, grid: int | Sequence[int], args: Sequence[Any]
    ) -> Callable[[Any], None]:
        """See `Device.ready`."""
        return cast("Callable[[Any], None]", function.launcher(abi).bound(grid, args))


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
