"""Launches: from the arguments of a call to a started kernel.

The first call with arguments of some kinds makes a `Plan`: which arguments are run-time values, and
which binary takes them. Later calls with arguments of the same kinds only look the plan up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.compiler.arrays import host_array, view_type, where
from tilewright.compiler.environment import INTERPRET
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.arguments import BoundArguments, bind_arguments
from tilewright.frontend.errors import ArgumentError
from tilewright.runtime.device import open_device

if TYPE_CHECKING:
    from tilewright.compiler.kernel import Kernel

Grid = int | Sequence[int] | Callable[[Mapping[str, Any]], int | Sequence[int]]

#: plans kept per kernel; a program with more kinds of arguments makes some of them again
MOST_PLANS = 4096
_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True)
class Plan:
    """A launch but for the grid and the values. ``start`` takes the grid, the run-time values and a stream."""

    constexprs: Mapping[str, Any]
    #: where to find each run-time value: position, keyword, or None for the default in ``defaults``
    sources: tuple[int | str | None, ...]
    defaults: tuple[Any, ...]
    start: Callable[[tuple[int, int, int], list[Any], Any], None]

    def run(self, grid: Grid, args: tuple[Any, ...], kwargs: Mapping[str, Any], stream: Any) -> None:
        """Launch with these arguments, which are of the kinds that the plan was made for."""
        values = [
            args[source] if isinstance(source, int) else default if source is None else kwargs[source]
            for source, default in zip(self.sources, self.defaults, strict=True)
        ]
        self.start(resolve_grid(grid, self.constexprs), values, stream)


class Launch:
    """A kernel bound to a grid and a device (None: where the arrays live)."""

    __slots__ = ("device", "grid", "kernel")

    def __init__(self, kernel: Kernel, grid: Grid, device: str | None = None):
        self.kernel, self.grid, self.device = kernel, grid, device

    def __call__(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        """Launch; see `tilewright.kernel`. Raises ArgumentError, CompileError or DeviceError."""
        key = (self.device, INTERPRET.get(), *signature(self.kernel, args, kwargs))
        plan = self.kernel.plans.get(key)
        if plan is None:
            plan = make_plan(self.kernel, self.device, args, kwargs)
            if len(self.kernel.plans) >= MOST_PLANS:
                self.kernel.plans.clear()
            self.kernel.plans[key] = plan
        plan.run(self.grid, args, kwargs, stream)


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
            parts.append((name, tuple(value) if isinstance(value, list) else value))
        else:
            parts.append((name, *_kind(value)))
    return (len(args), *parts)


def _kind(value: Any) -> tuple[Any, ...]:
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.strides, value.ctypes.data % 16
    if isinstance(value, bool | float | np.generic) or value is None:
        return (type(value),) if value is not None else (None,)
    if isinstance(value, int):
        return int, value in _INT32
    if hasattr(value, "shape"):
        return type(value), view_type(value), where({"": value})
    return type(value), id(value)


def make_plan(kernel: Kernel, device: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
    """Check the arguments, choose the device, and compile for it."""
    options, arguments = CompileOptions.split(kwargs)
    bound = bind_arguments(kernel.definition, args, arguments)
    place = device or where(bound.tensors)
    names = [p.name for p in kernel.definition.parameters if p.name in bound.tensors or p.name in bound.scalars]
    starter = _interpreter(kernel, bound, names) if place == "cpu" or INTERPRET.get() else None
    if starter is None:
        starter = _binary(kernel, bound, place, options)
    positions = {name: i for i, name in enumerate(kernel.positional_names[: len(args)])}
    sources = tuple(positions.get(name, name if name in kwargs else None) for name in names)
    return Plan(bound.constexprs, sources, tuple(bound.scalars.get(name) for name in names), starter)


Starter = Callable[[tuple[int, int, int], list[Any], Any], None]


def _binary(kernel: Kernel, bound: BoundArguments, place: str, options: CompileOptions) -> Starter:
    device = open_device(place)
    types = bound.types({name: view_type(value) for name, value in bound.tensors.items()})
    artifact = kernel.artifact(types, device.target, options)

    def start(grid: tuple[int, int, int], values: list[Any], stream: Any) -> None:
        artifact.launch(device, grid, values, stream)

    return start


def _interpreter(kernel: Kernel, bound: BoundArguments, names: list[str]) -> Starter:
    from tilewright.ir.interpreter import run

    views = {name: view_type(host_array(value)) for name, value in bound.tensors.items()}
    function = kernel.function(bound.types(views))

    def start(grid: tuple[int, int, int], values: list[Any], stream: Any) -> None:
        arguments = {n: host_array(v) if n in views else v for n, v in zip(names, values, strict=True)}
        run(function, arguments, grid=grid)

    return start


def resolve_grid(grid: Grid, meta: Mapping[str, Any]) -> tuple[int, int, int]:
    """Three sizes from an int, a tuple of up to three, or a function of the compile-time parameters."""
    given = grid(meta) if callable(grid) else grid
    sizes = (given,) if isinstance(given, int | np.integer) else tuple(given)
    if not 1 <= len(sizes) <= 3:
        raise ArgumentError(f"a grid has one to three dimensions, got {len(sizes)}")
    x, y, z = (*(int(n) for n in sizes), *(1,) * (3 - len(sizes)))
    if min(x, y, z) < 0:
        raise ArgumentError(f"grid {(x, y, z)} has a negative size")
    return x, y, z
