"""Launches: from the arguments of a call to a started kernel.

The first call with arguments of some kinds makes a `Plan`: which arguments are run-time values, and
which binary takes them. Later calls with arguments of the same kinds only look the plan up. Where the extension of
`tilewright.runtime.native` is, a table in front of the kernel starts what it has seen before, whatever the addresses;
else a call that repeats an earlier one exactly (the same GPU memory, shapes, numbers and grid) goes straight to the
driver.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.compiler.arrays import give_back, host_array, tensor_view, view_type, where
from tilewright.compiler.environment import INTERPRET
from tilewright.compiler.errors import ExecutionError
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.recording import launch_table, recordings
from tilewright.frontend.arguments import BoundArguments, bind_arguments
from tilewright.frontend.errors import ArgumentError, suggestion
from tilewright.frontend.promotion import fits
from tilewright.ir.abi import TensorParam
from tilewright.ir.core import UNKNOWN, Function, IRError
from tilewright.runtime import native
from tilewright.runtime.arguments import Viewed, breaks_lines
from tilewright.runtime.device import Device, open_device
from tilewright.runtime.errors import DeviceError

if TYPE_CHECKING:
    from tilewright.compiler.artifact import Artifact
    from tilewright.compiler.kernel import Kernel
    from tilewright.runtime.launching import LaunchForm

Grid = int | Sequence[int] | Callable[[Mapping[str, Any]], int | Sequence[int]]

#: plans kept per kernel; a program with more kinds of arguments makes some of them again
MOST_PLANS = 4096
#: launches kept per kernel in their final form
MOST_REPEATS = 1024
_INT32 = range(-(2**31), 2**31)
#: rounds to an infinite float32, as all above it
_BEYOND_SINGLE = 2.0**128 - 2.0**103

Starter = Callable[[tuple[int, int, int], list[Any], Any], None]


@dataclass(frozen=True)
class Plan:
    """A launch but for the grid and the values. ``start`` takes the grid, the run-time values and a stream."""

    constexprs: Mapping[str, Any]
    #: where to find each run-time value: position, keyword, or None for the default in ``defaults``
    sources: tuple[int | str | None, ...]
    defaults: tuple[Any, ...]
    start: Starter
    #: the compiled kernel and where it runs; None in the interpreter
    artifact: Artifact | None = None
    device: Device | None = None

    def run(self, grid: Grid, args: tuple[Any, ...], kwargs: Mapping[str, Any], stream: Any) -> None:
        """Launch with these arguments, which are of the kinds that the plan was made for."""
        self.start(resolve_grid(grid, self.constexprs), self.values(args, kwargs), stream)

    def repeat(self, grid: Grid, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Any], None] | None:
        """This launch as a function of the stream alone, where the device has such a form."""
        if self.artifact is None or self.device is None:
            return None
        return self.artifact.prepare(self.device, resolve_grid(grid, self.constexprs), self.values(args, kwargs))

    def complete(self, grid: Grid, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Any], None]:
        """This launch as a function of the stream that does nothing but start the kernel."""
        counts, values = resolve_grid(grid, self.constexprs), self.values(args, kwargs)
        if self.artifact is None or self.device is None:
            return lambda stream: self.start(counts, values, stream)
        return self.artifact.ready(self.device, counts, values)

    def form(self, grid: Grid, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LaunchForm | None:
        """This launch as data, where the device has such a form."""
        if self.artifact is None or self.device is None:
            return None
        return self.artifact.form(self.device, resolve_grid(grid, self.constexprs), self.values(args, kwargs))

    def values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The run-time values, in the order of the kernel's parameters."""
        return [
            args[source] if isinstance(source, int) else default if source is None else kwargs[source]
            for source, default in zip(self.sources, self.defaults, strict=True)
        ]


class _Bound:
    """What the extension has a faster form of."""

    __slots__ = ("device", "grid", "kernel")

    def __init__(self, kernel: Kernel, grid: Grid, device: str | None = None):
        self.kernel, self.grid, self.device = kernel, grid, device

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.call(*args, **kwargs)  # type: ignore[attr-defined]


class Launch(_Bound if native.extension is None else native.extension.Bound):  # type: ignore[misc]
    """A kernel bound to a grid and a device (None: where the arrays live). Calling it launches.

    See `tilewright.kernel`. Raises ArgumentError, CompileError or DeviceError.
    """

    __slots__ = ()
    kernel: Kernel
    grid: Grid
    device: str | None

    def call(self, *args: Any, **kwargs: Any) -> None:
        """Launch, through the table of repeated launches where the kernel has one."""
        table = self.kernel.table
        if table is None or (recordings and get_ident() in recordings):
            self.start(*args, **kwargs)
        else:
            table(self.grid, self.device, *args, **kwargs)

    def start(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        """Launch without the table of repeated launches."""
        exact = repeat_key(self.grid, self.device, args, kwargs)
        again = None if exact is None else self.kernel.repeats.get(exact)
        recording = recordings.get(get_ident())
        if again is not None and recording is None:
            again(stream)
            return
        plan = self.plan(args, kwargs)
        if recording is not None:
            recording.launch(plan, self.grid, args, kwargs, stream)
        plan.run(self.grid, args, kwargs, stream)
        if self.kernel.table is None and plan.device is not None:
            self.kernel.table = launch_table(self.kernel, partial(Launch, self.kernel), plan.device)
        if exact is not None:
            again = plan.repeat(self.grid, args, kwargs)
            if again is not None:
                self._keep(exact, again)

    def complete(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[Any], None]:
        """The launch as a function of the stream, compiled, loaded and packed: calling it only starts the kernel."""
        exact = repeat_key(self.grid, self.device, args, kwargs)
        again = None if exact is None else self.kernel.repeats.get(exact)
        if again is not None:
            return again
        plan = self.plan(args, kwargs)
        again = None if exact is None else plan.repeat(self.grid, args, kwargs)
        if exact is None or again is None:
            return plan.complete(self.grid, args, kwargs)
        self._keep(exact, again)
        return again

    def _keep(self, exact: tuple[Any, ...], again: Callable[[Any], None]) -> None:
        if len(self.kernel.repeats) >= MOST_REPEATS:
            self.kernel.repeats.clear()
        self.kernel.repeats[exact] = again

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """The plan for arguments of these kinds, kept or made."""
        key = (self.device, INTERPRET.get(), *signature(self.kernel, args, kwargs))
        try:
            plan = self.kernel.plans.get(key)
        except TypeError:  # an unhashable compile-time value: binding says which
            key, plan = (), None
        if plan is None:
            plan = make_plan(self.kernel, self.device, args, kwargs)
            if len(self.kernel.plans) >= MOST_PLANS:
                self.kernel.plans.clear()
            if key:
                self.kernel.plans[key] = plan
        return plan


def repeat_key(
    grid: Grid, device: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """All that a launch on torch tensors and numbers depends on, cheaply; None for other arguments.

    Addresses of GPU memory are unique in a process, so they stand for the device too.
    """
    torch = sys.modules.get("torch")
    if torch is None or type(grid) is not tuple:
        return None
    tensor: Any = getattr(torch, "Tensor", None)
    parts: list[Any] = [grid, device]
    for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is tensor:
            parts += (value.data_ptr(), value.shape, value.stride(), value.dtype)
        elif isinstance(value, Viewed) and (view := value.view).symmetric is not None:
            parts += (view.symmetric, view.shape)
        elif kind is int:
            parts.append(value)
        elif kind is bool or kind is float:
            parts += (kind, value or repr(value))  # 1.0 and True are not 1, and 0.0 is not -0.0
        elif value is None:
            parts.append(None)
        elif _is_function(value) or (kind is tuple and all(map(_is_function, value))):
            parts.append(value)
        elif kind is str and value in kwargs:
            parts += (str, value)  # the name of a keyword; a text as an argument takes the long way below
        else:
            return None
    return tuple(parts)


def _is_function(value: Any) -> bool:
    """A compile-time value to call, which equals itself alone."""
    return callable(value) and type(value).__hash__ is object.__hash__


def signature(kernel: Kernel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a plan depends on: kinds of tensors and scalars, values of compile-time arguments."""
    torch = sys.modules.get("torch")
    tensor_type: Any = getattr(torch, "Tensor", ())
    constexprs = kernel.constexpr_names
    parts: list[Any] = []
    for name, value in [*zip(kernel.positional_names, args, strict=False), *kwargs.items()]:
        if type(value) is tensor_type:
            address = value.data_ptr() % 16
            parts.append((name, value.dtype, value.shape, value.stride(), address, value.get_device()))
        elif name in constexprs:
            parts.append((name, *_constexpr_kind(value)))
        else:
            parts.append((name, *_kind(value)))
    return (len(args), *parts)


def _constexpr_kind(value: Any) -> tuple[Any, ...]:
    """A compile-time value as a key that keeps 1, 1.0 and True apart, and 0.0 from -0.0."""
    if isinstance(value, tuple | list):
        return tuple(_constexpr_kind(item) for item in value)
    return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)


def _kind(value: Any) -> tuple[Any, ...]:
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.strides, value.ctypes.data % 16
    if isinstance(value, bool | float | np.generic) or value is None:
        return (type(value),) if value is not None else (None,)
    if isinstance(value, int):
        return int, value in _INT32
    if hasattr(value, "shape"):
        try:
            return type(value), view_type(value, ""), where({"": value})
        except (ArgumentError, DeviceError):  # binding says which
            pass
    return type(value), id(value)


def make_plan(kernel: Kernel, device: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
    """Check the arguments, choose the device, and compile for it."""
    options, arguments = CompileOptions.split(kwargs)
    for name in arguments:
        option = suggestion(name, CompileOptions.names() | {"stream"})
        if option and name not in kernel.definition.parameter:
            hint = suggestion(name, kernel.definition.parameter) or option
            raise ArgumentError(f"kernel '{kernel.__name__}' has no parameter '{name}'", kernel.definition.loc, hint)
    bound = bind_arguments(kernel.definition, args, arguments)
    place = device or where(bound.tensors)
    names = [p.name for p in kernel.definition.parameters if p.name in bound.tensors or p.name in bound.scalars]
    artifact: Artifact | None = None
    opened: Device | None = None
    if place == "cpu" or INTERPRET.get():
        starter = _interpreter(kernel, bound, names, from_gpu=INTERPRET.get())
    else:
        opened = open_device(place)
        artifact = _artifact(kernel, bound, opened.target, options)
        starter = partial(artifact.launch, opened)
    positions = {name: i for i, name in enumerate(kernel.positional_names[: len(args)])}
    sources = tuple(positions.get(name, name if name in kwargs else None) for name in names)
    defaults = tuple(bound.scalars.get(name) for name in names)
    return Plan(bound.constexprs, sources, defaults, starter, artifact, opened)


def _artifact(kernel: Kernel, bound: BoundArguments, target: str, options: CompileOptions) -> Artifact:
    """The artifact for the types of the arguments, as aligned as they are, if it may write to them so."""
    views = {name: view_type(value, name) for name, value in bound.tensors.items()}
    artifact = kernel.artifact(bound.types(views), target, options)
    broken = [
        p.name
        for p in artifact.abi.params
        if isinstance(p, TensorParam) and breaks_lines(p, tensor_view(bound.tensors[p.name], p.name))
    ]
    if not broken:
        return artifact
    for name in broken:
        views[name] = replace(views[name], align=views[name].dtype.bytes)
    return kernel.artifact(bound.types(views), target, options)


def _interpreter(kernel: Kernel, bound: BoundArguments, names: list[str], from_gpu: bool) -> Starter:
    """Runs in the interpreter. ``from_gpu``: tensors in GPU memory are copied here and back."""
    from tilewright.ir.interpreter import run

    views = {name: view_type(host_array(value, name, from_gpu), name) for name, value in bound.tensors.items()}
    function = kernel.function(bound.types(views))
    integers = {name: dtype for name, dtype in bound.dtypes.items() if dtype.is_int}
    singles = [name for name, dtype in bound.dtypes.items() if dtype.name == "f32"]

    def start(grid: tuple[int, int, int], values: list[Any], stream: Any) -> None:
        given = dict(zip(names, values, strict=True))
        for name, dtype in integers.items():
            if not fits(given[name], dtype):  # the interpreter's integers would wrap
                raise ArgumentError(f"kernel '{kernel.__name__}': argument '{name}': {given[name]} is no {dtype}")
        for name in singles:
            value = given[name].item() if isinstance(given[name], np.generic) else given[name]
            if _BEYOND_SINGLE <= abs(value) < float("inf"):  # a GPU's launch refuses it too
                raise ArgumentError(f"kernel '{kernel.__name__}': argument '{name}': {given[name]} is no f32")
        arrays = {name: host_array(given[name], name, from_gpu) for name in views}
        with _located(kernel, function):
            run(function, {**given, **arrays}, grid=grid)
        for name, array in arrays.items():
            give_back(given[name], array)

    return start


def interpret_ranks(
    kernel: Kernel,
    grid: Grid,
    arguments: Sequence[Sequence[Any]],
    keywords: Sequence[Mapping[str, Any]],
    blocks: int | None = None,
    seed: int | None = None,
    turn: int = 0,
) -> None:
    """Run a kernel that communicates in the interpreter, on all ranks of a world.

    ``arguments``, ``keywords``: for each rank what a launch takes; symmetric parameters get the rank's own array.
    Compile-time values and the types of arguments are those of rank 0 and must be the same on all ranks.
    ``blocks``, ``seed`` and ``turn`` as of `tilewright.ir.interpreter.run_ranks`.
    """
    from tilewright.ir.interpreter import run_ranks

    given, kinds = [], []
    for args, kwargs in zip(arguments, keywords, strict=True):
        _, values = CompileOptions.split(dict(kwargs))
        bound = bind_arguments(kernel.definition, tuple(args), values)
        arrays = {name: host_array(value, name) for name, value in bound.tensors.items()}
        kinds.append(bound.types({name: view_type(array, name) for name, array in arrays.items()}))
        given.append({**arrays, **bound.scalars})
        if kinds[-1] != kinds[0]:
            name = next(name for name, kind in kinds[-1].items() if kinds[0].get(name) != kind)
            message = f"kernel '{kernel.__name__}': argument '{name}' is of another kind on rank {len(kinds) - 1}"
            raise ArgumentError(message, kernel.definition.loc, "all ranks launch the same program")
    function = kernel.function(kinds[0])
    with _located(kernel, function):
        run_ranks(function, given, resolve_grid(grid, bound.constexprs), blocks, seed, turn)


@contextmanager
def _located(kernel: Kernel, function: Function) -> Iterator[None]:
    """Faults of the interpreted program as the user's errors."""
    try:
        yield
    except IRError as error:
        loc = error.loc if error.loc != UNKNOWN else function.loc
        raise ExecutionError(f"{error.message} (kernel '{kernel.__name__}')", loc, error.hint) from error


def resolve_grid(grid: Grid, meta: Mapping[str, Any]) -> tuple[int, int, int]:
    """Three sizes from an int, a tuple of up to three, or a function of the compile-time parameters."""
    try:
        given = grid(meta) if callable(grid) else grid
    except KeyError as error:
        if error.args and error.args[0] in meta:
            raise
        hint = f"compile-time parameters: {', '.join(meta) or 'none'}"
        raise ArgumentError(f"the grid asks for {error}, which is no parameter of the kernel", hint=hint) from error
    try:
        sizes = [operator.index(n) for n in (given if isinstance(given, Sequence) else (given,))]
    except TypeError:
        message = f"a grid is an integer, a tuple of integers, or a function that gives one; got {given!r}"
        raise ArgumentError(message, hint="divide with tw.cdiv") from None
    if not 1 <= len(sizes) <= 3:
        raise ArgumentError(f"a grid has one to three dimensions, got {len(sizes)}: {given!r}")
    if min(sizes) < 0:
        raise ArgumentError(f"grid {given!r} has a negative size")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z
