"""Timing a kernel and its rivals on random tensors, for ``tilewright bench``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from tilewright.compiler.api import device as bound_device
from tilewright.compiler.checking import grid_function, make_case, parse_grid_expression
from tilewright.compiler.cli_arguments import Arguments, to_device
from tilewright.runtime.bench import Comparison, compare, on_device, pick_clock
from tilewright.runtime.device import Device, open_device

if TYPE_CHECKING:
    from tilewright.compiler.kernel import Kernel


class Benchmark:
    """A kernel with tensors on a device. ``bytes_moved`` counts each tensor once."""

    def __init__(
        self, kernel: Kernel, given: Arguments, grid: str, device: str, sizes: Mapping[str, int], seed: int
    ) -> None:
        parse_grid_expression(grid)
        names = {n for spec in given.tensors.values() for n in spec.shape if isinstance(n, str)}
        unset = sorted(names - {*sizes})
        if unset:
            raise click.UsageError(f"bench needs the size of every dimension: --size {unset[0]}=4096")
        self.kernel, self.grid, self.device, self.sizes = kernel, grid, device, dict(sizes)
        self._where = bound_device(device)
        case = make_case(kernel, given, seed, 1, sizes)
        self._scalars, self._dtypes = case.scalars, {n: spec.dtype for n, spec in given.tensors.items()}
        self._arrays = case.arrays
        self.bytes_moved = sum(array.nbytes for array in case.arrays.values())

    def number(self, text: str) -> float:
        """The value of an expression of sizes and constexprs."""
        constexprs = {p.name: p.default for p in self.kernel.definition.parameters if p.kind == "constexpr"}
        return float(grid_function(text, self.sizes)({**constexprs, **self._scalars}))

    def run(
        self,
        rivals: Mapping[str, Callable[..., Any]],
        repeats: int,
        warmup: int,
        flush: bool,
        options: Mapping[str, Any],
    ) -> Comparison:
        """Times of the kernel, under its own name, and of each rival."""
        ours = self._tensors()
        launch = self.kernel.bind(grid_function(self.grid, self.sizes), self.device)
        given = {**self._scalars, **options}
        calls: dict[str, Callable[[], Any]] = {self.kernel.__name__: lambda: launch(**ours, **given)}
        for name, rival in rivals.items():
            if name in calls:
                raise click.UsageError(f"the rival {name!r} has the kernel's or another rival's name")
            calls[name] = self._call(name, rival)
        device = _opened(self.device)
        if device is None:
            return compare(calls, repeats, warmup=warmup, flush_l2=flush)
        with on_device(device):
            return compare(calls, repeats, warmup=warmup, flush_l2=flush, clock=pick_clock(device))

    def _tensors(self) -> dict[str, Any]:
        return {n: to_device(array.copy(), self._dtypes[n], self.device) for n, array in self._arrays.items()}

    def _call(self, name: str, rival: Callable[..., Any]) -> Callable[[], Any]:
        """A call of a rival with tensors of its own, by the names of its parameters."""
        parameters = inspect.signature(rival).parameters
        values = {**self._tensors(), **self._scalars}
        unknown = [n for n, p in parameters.items() if n not in values and p.default is inspect.Parameter.empty]
        if unknown:
            raise click.UsageError(f"the rival {name!r} takes {unknown[0]!r}, which is no argument of the kernel")
        chosen = {n: value for n, value in values.items() if n in parameters}
        return lambda: rival(**chosen)


def _opened(name: str) -> Device | None:
    return None if name == "cpu" else open_device(name)
