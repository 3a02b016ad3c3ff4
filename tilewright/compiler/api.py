"""The tools that users call besides the language: `tw.kernel`, `tw.compile`, `tw.device`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

from tilewright.compiler.arrays import where
from tilewright.compiler.artifact import Artifact
from tilewright.compiler.environment import INTERPRET
from tilewright.compiler.kernel import Kernel
from tilewright.compiler.launch import Grid
from tilewright.compiler.lookup import obtain
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.errors import ArgumentError, suggestion
from tilewright.ir.target import TARGETS, get_target
from tilewright.runtime.device import open_device

if TYPE_CHECKING:
    from tilewright.runtime.emulated_group import EmulatedGroup


def kernel(fn: Callable[..., Any]) -> Kernel:
    """Make a tile program of a Python function; launch it with ``fn[grid](*args, **meta)``.

    It runs where its arrays live: NumPy arrays and CPU tensors in the interpreter, CUDA tensors on
    their GPU. Options by name: ``num_warps``, ``num_stages``, ``num_ctas``, ``schedule``, ``persistent``,
    ``maxnreg``, ``stream``.
    """
    return Kernel(fn)


def compile(
    kernel: Kernel, target: str, args: Mapping[str, Any], *, name: str | None = None, **options: Any
) -> Artifact:
    """Compile ahead of time for ``target`` ("sm_90a", "gfx942", "gfx950").

    ``args`` maps parameters to ``tw.spec`` (tensors), dtypes (scalars) or values (constexprs with no
    default). ``options`` as on a launch. Raises CompileError with the place in the kernel's source.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"tw.compile takes a function under @tw.kernel, got {type(kernel).__name__}")
    if name is not None and not name.isidentifier():
        raise ArgumentError(f"name={name!r} cannot name an entry point", hint="use letters, digits and underscores")
    try:
        get_target(target)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    chosen, rest = CompileOptions.split(options)
    if rest:
        unknown, names = next(iter(rest)), CompileOptions.names()
        hint = suggestion(unknown, names) or f"options: {', '.join(sorted(names))}; a constexpr goes into args"
        raise ArgumentError(f"tw.compile has no option {unknown!r}", hint=hint)
    return obtain(kernel.definition, target, args, chosen, name)


class BoundDevice:
    """A device by name; `launch` runs a kernel there whatever the default would be."""

    def __init__(self, name: str):
        self.name = name

    def launch(self, kernel: Kernel, grid: Grid, *args: Any, **meta: Any) -> None:
        """``kernel[grid](*args, **meta)`` on this device."""
        kernel.bind(grid, self.name)(*args, **meta)

    def synchronize(self) -> None:
        """Wait for everything launched on this device."""
        if self.name != "cpu":
            open_device(self.name).synchronize()

    def __repr__(self) -> str:
        return f"tw.device({self.name!r})"


def device(name: str) -> BoundDevice:
    """The device called ``name``: "cpu", "cuda:0", "hip:0", "emulate:gfx942". DeviceError when it does not exist."""
    if name != "cpu":
        open_device(name)
    return BoundDevice(name)


def supports(array: Any, feature: str) -> bool:
    """Whether launches on an array run on hardware with a feature, by which a caller chooses among kernels.

    ``array``: of NumPy or torch; ``feature``: a name of `tilewright.ir.target.Target.has`, such as "clusters". False
    where the interpreter runs. Raises ArgumentError for a feature that no target has.
    """
    if not any(target.has(feature) for target in TARGETS.values()):
        raise ArgumentError(f"no target has a feature {feature!r}")
    place = where({"array": array})
    return place != "cpu" and not INTERPRET.get() and get_target(open_device(place).target).has(feature)


class BoundGroup:
    """Several emulated GPUs with one address space: ``group[rank].launch(...)`` inside ``with group.together():``.

    Launches inside the block start together at its end, one for each rank; an array that two ranks are
    given is the same memory to both. Outside of it a launch runs alone, at once.
    """

    def __init__(self, group: EmulatedGroup):
        self._group = group

    def __len__(self) -> int:
        return len(self._group)

    def __getitem__(self, rank: int) -> BoundDevice:
        return BoundDevice(self._group[rank].name)

    def together(self) -> AbstractContextManager[None]:
        """The launches within run at the same time. DeviceError for a fault of any, and for a deadlock among them."""
        return self._group.together()


@overload
def emulate(
    target: str, ranks: None = None, *, seed: int | None = None, races: bool = False, progress: bool | None = None
) -> BoundDevice: ...


@overload
def emulate(
    target: str, ranks: int, *, seed: int | None = None, races: bool = False, progress: bool | None = None
) -> BoundGroup: ...


def emulate(
    target: str,
    ranks: int | None = None,
    *,
    seed: int | None = None,
    races: bool = False,
    progress: bool | None = None,
) -> BoundDevice | BoundGroup:
    """The emulated device of a target, which takes NumPy arrays: ``emulate("gfx942")``; a group of GPUs with ``ranks``.

    ``seed`` picks a random legal interleaving of warps, and random times at which asynchronous work
    completes (without one: as late as allowed). ``races``: every pair of conflicting accesses must be
    ordered, whatever the interleaving; a DeviceError names both. ``progress``: show it on stderr (default:
    of long runs in a terminal).
    """
    from tilewright.runtime.emulated import EmulationOptions
    from tilewright.runtime.emulated_group import EmulatedGroup

    options = EmulationOptions(seed, races, progress)
    if ranks is None:
        return device(f"emulate:{target}{options.suffix()}")
    return BoundGroup(EmulatedGroup(target, ranks, options))
