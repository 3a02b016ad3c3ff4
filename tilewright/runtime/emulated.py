"""Devices that execute a kernel's assembly text on host arrays: ``emulate:sm_90a``, ``emulate:gfx942``, ...

A launch copies the memory that its arrays span into the emulator's address space, runs to the end
and copies it back. Strides, alignment and overlaps of the arrays are those of the host's memory;
an access outside it is a fault that names the instruction. Launches of several emulated GPUs may run
together, in one address space (see `emulated_group`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.ir.abi import KernelABI, TensorParam
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES
from tilewright.runtime.arguments import (
    ArgumentLayout,
    TensorView,
    Viewed,
    canonical_dtype,
    check_tensor,
    endpoint_of,
    normalize_grid,
    refuse_negative_strides,
)
from tilewright.runtime.device import Device, DeviceInfo, Module
from tilewright.runtime.emulated_peers import control_views, place_peers
from tilewright.runtime.errors import ArgumentError, DeviceError

if TYPE_CHECKING:
    from tilewright.runtime.emulated_functions import EmulatedFunction
    from tilewright.runtime.emulator.memory import GlobalMemory
    from tilewright.runtime.emulator.together import Machine, Setting

#: the text that each emulated target executes
EMULATED = {
    "gfx942": "amdgcn",
    "gfx950": "amdgcn",
    "sm_80": "ptx",
    "sm_89": "ptx",
    "sm_90a": "ptx",
    "sm_100a": "ptx",
    "sm_120a": "ptx",
}
#: the emulator aligns allocations to more than any kernel assumes of an address (bytes)
_ALIGNMENT = 256


def emulated_devices() -> list[DeviceInfo]:
    """The emulated devices, which every machine has."""
    return [DeviceInfo(f"emulate:{arch}", arch, "emulator of its assembly on NumPy arrays") for arch in EMULATED]


@dataclass(frozen=True)
class EmulationOptions:
    """How emulated kernels run, and as part of a device's name: ``emulate:sm_90a,races,seed=7``.

    ``seed`` picks a random legal interleaving, in which asynchronous work completes at random times;
    without one it completes as late as it may. ``races``: detect races, whatever the interleaving.
    ``progress``: show it on stderr (None: if that is a terminal and the run is long).
    """

    seed: int | None = None
    races: bool = False
    progress: bool | None = None

    def suffix(self) -> str:
        """The part of a device's name behind the target."""
        seed = "" if self.seed is None else f",seed={self.seed}"
        progress = {None: "", True: ",progress", False: ",progress=0"}[self.progress]
        return f"{',races' if self.races else ''}{seed}{progress}"

    @staticmethod
    def parse(text: str) -> tuple[str, EmulationOptions]:
        """``sm_90a,races,seed=7``: the target and the options. DeviceError for anything else."""
        target, *words = text.split(",")
        found: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            number = value or "1"
            if key not in ("seed", "races", "progress") or not number.isdecimal() or (key == "seed" and not value):
                raise DeviceError(
                    f"'emulate:{text}': {word!r} is no option of an emulated device; there are races, seed=NUMBER, "
                    "progress."
                )
            found[key] = int(number) if key == "seed" else number != "0"
        return target, EmulationOptions(**found)


@dataclass(frozen=True)
class PreparedLaunch:
    """A launch on an emulated device, checked but not started."""

    device: EmulatedDevice
    function: EmulatedFunction
    abi: KernelABI
    counts: tuple[int, int, int]
    views: list[TensorView]
    scalars: list[Any]
    #: arrays that must not change
    constant: list[np.ndarray[Any, Any]]


class EmulatedDevice(Device):
    """One emulated GPU. ``units`` compute units bound the grid of persistent kernels (default: the real part's).

    ``statistics`` tells what the last launch executed.
    """

    def __init__(
        self, target: str, units: int | None = None, seed: int | None = None, options: EmulationOptions | None = None
    ) -> None:
        if target not in EMULATED:
            known = ", ".join(f"emulate:{arch}" for arch in EMULATED)
            raise DeviceError(f"There is no emulator of {target!r}; there are: {known}.")
        self._target = target
        self.units = units or get_target(target).units
        self.options = options or EmulationOptions(seed)
        self.statistics: Any = None
        #: of a group: the number of this GPU, how many there are, and how its name says so
        self.rank, self.ranks, self.member = 0, 1, ""
        #: what a group's launches are collected in, while they are
        self.together: Callable[[PreparedLaunch], bool] = lambda launch: False

    @property
    def name(self) -> str:
        return f"emulate:{self._target}{self.member}{self.options.suffix()}"

    @property
    def target(self) -> str:
        return self._target

    def load(self, binary: bytes, asm: Mapping[str, str] | None = None) -> EmulatedModule:
        """Take the assembly ("ptx" or "amdgcn"). DeviceError without it.

        A code object must agree with its "amdgcn"; a cubin is not looked at.
        """
        kind = EMULATED[self._target]
        if asm is None or kind not in asm:
            raise DeviceError(f"{self.name} executes assembly text, but got a binary alone.")
        return EmulatedModule(self, asm[kind], binary)

    def view(self, argument: Any, name: str) -> TensorView:
        """The view of a NumPy array or a CPU torch tensor."""
        return host_view(argument, name)

    def launch(
        self,
        function: EmulatedFunction,
        abi: KernelABI,
        grid: int | Sequence[int],
        args: Sequence[Any],
        stream: Any = None,
    ) -> None:
        """Run to the end. Faults of the kernel are DeviceErrors that name the instruction.

        Inside a group's ``together`` the launch is only noted, and runs with the others at the end.
        """
        counts = normalize_grid(grid, abi.name)
        views, scalars = self._split(abi, args)
        constant = [a for a in args if isinstance(a, np.ndarray) and not a.flags.writeable]
        if 0 in counts:
            return
        launch = PreparedLaunch(self, function, abi, counts, views, scalars, constant)
        if not self.together(launch):
            run_launches([launch], self.options)

    def _split(self, abi: KernelABI, args: Sequence[Any]) -> tuple[list[TensorView], list[Any]]:
        if len(args) != len(abi.params):
            names = ", ".join(p.name for p in abi.params)
            raise ArgumentError(f"{abi.name} takes {len(abi.params)} arguments ({names}), not {len(args)}.")
        views, scalars = [], []
        for param, argument in zip(abi.params, args, strict=True):
            if isinstance(param, TensorParam):
                view = self.view(argument, param.name)
                check_tensor(param, view)
                if get_target(self.target).vendor == "amd":
                    refuse_negative_strides(param, view)
                views.append(view)
            else:
                scalars.append(argument)
        return views, scalars

    def synchronize(self) -> None:
        """Launches have finished when they return."""


class EmulatedModule(Module):
    """Assembly text; each kernel in it is decoded on first use."""

    def __init__(self, device: EmulatedDevice, asm: str, binary: bytes = b"") -> None:
        self.device = device
        self._asm, self._binary = asm, binary
        self._functions: dict[str, EmulatedFunction] = {}

    def function(self, name: str) -> EmulatedFunction:
        """The kernel ``name``. DeviceError lists instructions that the emulator does not know."""
        from tilewright.runtime.emulated_functions import AmdFunction, PtxFunction
        from tilewright.runtime.emulator.errors import EmulatorError

        if name not in self._functions:
            target = self.device.target
            try:
                if EMULATED[target] == "ptx":
                    self._functions[name] = PtxFunction(self._asm, name)
                else:
                    self._functions[name] = AmdFunction(self._asm, name, target, self._binary)
            except EmulatorError as error:
                raise DeviceError(f"Kernel '{name}' on {self.device.name}: {error}") from error
        return self._functions[name]


def run_launches(launches: Sequence[PreparedLaunch], options: EmulationOptions) -> None:
    """Run launches of different devices at the same time, to their ends, in one address space."""
    from tilewright.runtime.emulator.errors import EmulatorError
    from tilewright.runtime.emulator.memory import GlobalMemory
    from tilewright.runtime.emulator.together import Setting, run_together

    memory = GlobalMemory()
    several = len(launches) > 1
    names = [f"rank {one.device.rank}: {name}" if several else name for one in launches for name in _names(one.abi)]
    mapped = [view for one in launches for view in (*one.views, *control_views(one.abi, one.views))]
    regions = map_regions(mapped, names, memory)
    races = max((one.function.races() for one in launches), key=lambda r: r.proxies) if options.races else None
    machines: list[Machine] = []
    kernels = " and ".join(dict.fromkeys(f"'{one.abi.name}' on {one.device.name}" for one in launches))
    try:
        for one in launches:
            device = one.device
            resident = device.units * one.function.blocks_per_unit(one.abi)
            setting = Setting(options.seed, races, device.rank, device.ranks, resident)
            machines.append(_start(one, regions, memory, setting))
        run_together(machines, options.seed, options.progress)
    except EmulatorError as error:
        raise DeviceError(f"Kernel {kernels}: {error}") from error
    finally:
        for one, machine in zip(launches, machines, strict=False):
            one.device.statistics = machine.statistics
    for machine in machines:
        print("".join(getattr(machine.statistics, "printed", [])), end="")
    protected = [_span(host_view(array, "")) for one in launches for array in one.constant if array.size]
    for region in regions:
        if not region.copy_back(memory, protected):
            raise DeviceError(f"Kernel {kernels} wrote to a read-only array.")


def _start(launch: PreparedLaunch, regions: Sequence[Region], memory: GlobalMemory, setting: Setting) -> Machine:
    """Pack the arguments and start the kernel."""
    abi, counts = launch.abi, launch.counts
    layout = ArgumentLayout(abi)
    scalars = layout.pack_scalars(launch.scalars) if launch.scalars else b""
    placed = [view._replace(address=_translate(regions, view)) for view in launch.views]
    placed = place_peers(placed, lambda address: _find(regions, address), memory)
    maps = launch.function.tensor_maps(abi, placed, memory)
    arguments = layout.pack(placed, scalars, counts, maps, endpoint_of(abi, placed)).image(layout.size)
    resident = max(1, launch.device.units * abi.blocks_per_unit // abi.cluster_blocks)
    blocks = (abi.persistent_blocks(counts, resident), 1, 1) if abi.persistent else abi.direct_blocks(counts)
    return launch.function.start(memory, blocks, abi, arguments, setting)


# --- the memory of host arrays ----------------------------------------------------------------------


def host_view(argument: Any, name: str) -> TensorView:
    """Address, shape, strides (elements) and dtype of an array in host memory."""
    if isinstance(argument, np.ndarray):
        item = argument.itemsize
        if any(step % item for step in argument.strides):
            raise ArgumentError(f"Argument '{name}' has byte strides {argument.strides}, no multiples of {item} bytes.")
        steps = tuple(step // item for step in argument.strides)
        return TensorView(argument.ctypes.data, argument.shape, steps, argument.dtype.name, None)
    torch_tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
    if isinstance(argument, Viewed) and str(getattr(argument, "device", "")).startswith("emulate:"):
        return argument.view
    if isinstance(argument, torch_tensor) and argument.device.type == "cpu":
        return TensorView(argument.data_ptr(), tuple(argument.shape), argument.stride(), argument.dtype, None)
    raise ArgumentError(f"Argument '{name}' must be a NumPy array or a CPU torch tensor on an emulated device.")


@dataclass(frozen=True)
class Region:
    """Host memory from ``start`` to ``end`` (bytes) and its copy in the emulator, ``lead`` bytes into an allocation."""

    start: int
    end: int
    allocation: int
    lead: int

    def host(self) -> np.ndarray[Any, Any]:
        """The host's bytes, shared."""
        size = self.end - self.start
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.start))

    def copy_back(self, memory: GlobalMemory, protected: Sequence[tuple[int, int]]) -> bool:
        """Write what the kernel changed to the host's memory. False if that lies in a protected span."""
        ours, host = memory.read_back(self.allocation)[self.lead :], self.host()
        changed = np.nonzero(ours != host)[0]
        places = changed + self.start
        if any(((places >= start) & (places < end)).any() for start, end in protected):
            return False
        if changed.size:
            host[changed] = ours[changed]
        return True


def map_regions(views: Sequence[TensorView], names: Sequence[str], memory: GlobalMemory) -> list[Region]:
    """Copies of the memory that the views span; views that overlap share a region."""
    spans = sorted((*_span(view), name) for view, name in zip(views, names, strict=True) if 0 not in view.shape)
    merged: list[tuple[int, int, str]] = []
    for start, end, name in spans:
        if merged and start < merged[-1][1]:
            last_start, last_end, last_name = merged[-1]
            merged[-1] = (last_start, max(last_end, end), f"{last_name}, {name}")
        else:
            merged.append((start, end, name))
    regions = []
    for start, end, name in merged:
        lead = start % _ALIGNMENT  # kernels see the alignment that the array has
        contents = np.zeros(lead + end - start, np.uint8)
        contents[lead:] = Region(start, end, 0, 0).host()
        regions.append(Region(start, end, memory.allocate(contents, name), lead))
    return regions


def _span(view: TensorView) -> tuple[int, int]:
    """First byte and the one behind the last of a view that is not empty."""
    item = DTYPES[canonical_dtype(view.dtype)].bytes
    reach = [step * (extent - 1) * item for step, extent in zip(view.strides, view.shape, strict=True)]
    return view.address + sum(n for n in reach if n < 0), view.address + sum(n for n in reach if n > 0) + item


def _translate(regions: Sequence[Region], view: TensorView) -> int:
    """The emulator's address of a view's origin; of an empty one, any."""
    found = None if 0 in view.shape else _find(regions, view.address)
    return _ALIGNMENT if found is None else found


def _find(regions: Sequence[Region], address: int) -> int | None:
    """The emulator's address of a byte of the host's memory, None if that is not mapped."""
    for region in regions:
        if region.start <= address < region.end:
            return region.allocation + region.lead + address - region.start
    return None


def _names(abi: KernelABI) -> list[str]:
    """Names of what a launch maps."""
    control = ["control block"] if abi.communicates else []
    return [*(p.name for p in abi.params if isinstance(p, TensorParam)), *control]
