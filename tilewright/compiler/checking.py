"""Comparing what a kernel writes with a reference, on random sizes and values."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from tilewright.compiler.api import device as bound_device
from tilewright.compiler.arrays import host_array, view_type
from tilewright.compiler.cli_arguments import Arguments, to_device
from tilewright.compiler.user_program import UserProgramError
from tilewright.frontend.arguments import bind_arguments
from tilewright.frontend.errors import ArgumentError
from tilewright.frontend.markers import TensorSpec
from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.types import DTYPES, DType

if TYPE_CHECKING:
    from tilewright.compiler.kernel import Kernel

Array = np.ndarray[Any, Any]
#: the largest error allowed, relative to the largest exact value: several roundings of the result's dtype,
#: and for float32 those of tf32 and of sums in another order
TOLERANCES = {"f64": 1e-10, "f32": 1e-3, "f16": 4e-3, "bf16": 2e-2, "f8e4m3": 0.13, "f8e5m2": 0.25}


@dataclass(frozen=True)
class Case:
    """One trial: sizes of the named dimensions, and arguments as host arrays and numbers by parameter."""

    seed: int
    sizes: Mapping[str, int]
    arrays: dict[str, Array]
    scalars: dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """How far one tensor is off. ``error`` is relative to the largest exact value; ``index`` is the worst element."""

    error: float
    tolerance: float
    index: tuple[int, ...] | None = None
    got: float | None = None
    expected: float | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        finite = {k: v if v is None or np.isfinite(v) else str(v) for k, v in vars(self).items() if k != "index"}
        return {**finite, "index": self.index, "ok": self.ok}


@dataclass
class Checker:
    """Runs cases of a kernel on a device against ``reference`` (None: against the interpreter)."""

    kernel: Kernel
    given: Arguments
    grid: str
    device: str
    reference: Callable[..., Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None

    def run(self, case: Case) -> dict[str, Difference]:
        """The differences by tensor. UserProgramError where the reference fails."""
        written = self._written(case)
        if self.reference is None:
            return self._against_interpreter(case, written)
        inputs = inspect.signature(self.reference).parameters
        for name in written:
            if name not in inputs:  # what a kernel leaves unwritten must not pass for a result
                _poison(case.arrays[name])
        expected = _named(self._call_reference(case, inputs), written)
        results = self._launch(case, self.device)
        return {name: self._compare(results[name], expected[name]) for name in written}

    def _against_interpreter(self, case: Case, written: list[str]) -> dict[str, Difference]:
        expected = self._launch(case, "cpu")
        results = self._launch(case, self.device)
        return {name: self._compare(results[name], expected[name]) for name in written}

    def _launch(self, case: Case, device: str) -> dict[str, Array]:
        """The tensors after a launch on copies of them."""
        tensors = {
            name: to_device(array.copy(), self.given.tensors[name].dtype, device) for name, array in case.arrays.items()
        }
        where = bound_device(device)
        where.launch(self.kernel, grid_function(self.grid, case.sizes), **tensors, **case.scalars, **self.options)
        where.synchronize()
        return {n: host_array(t if isinstance(t, np.ndarray) else t.cpu(), n) for n, t in tensors.items()}

    def _call_reference(self, case: Case, inputs: Mapping[str, inspect.Parameter]) -> Any:
        assert self.reference is not None
        values = {**case.arrays, **case.scalars}
        unknown = [n for n, p in inputs.items() if n not in values and p.default is inspect.Parameter.empty]
        if unknown:
            raise click.UsageError(
                f"the reference takes {unknown[0]!r}, which is no argument of {self.kernel.__name__!r}"
            )
        copies = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in values.items() if n in inputs}
        try:
            return self.reference(**copies)
        except Exception as error:
            raise UserProgramError(f"the reference failed: {type(error).__name__}: {error}") from error

    def _written(self, case: Case) -> list[str]:
        from tilewright.compiler.tuner import written_tensors

        meta = self.kernel.configs[0].meta if hasattr(self.kernel, "configs") else {}
        bound = bind_arguments(self.kernel.definition, (), {**case.arrays, **case.scalars, **meta})
        names = written_tensors(self.kernel, bound)
        return [name for name in bound.tensors if name in names]

    def _compare(self, got: Array, expected: Any) -> Difference:
        dtype = view_type(got).dtype
        wanted = np.asarray(expected)
        if wanted.shape != got.shape:
            raise UserProgramError(f"the reference gives an array of shape {wanted.shape}; the tensor has {got.shape}")
        tolerance = self.tolerance if self.tolerance is not None else TOLERANCES.get(dtype.name, 0.0)
        return difference(got, wanted, tolerance)


def difference(got: Array, expected: Array, tolerance: float) -> Difference:
    """The worst element. Infinities and NaNs must be where they are expected; else the error is infinite."""
    if got.size == 0:
        return Difference(0.0, tolerance)
    mine, exact = got.astype(np.float64), expected.astype(np.float64)
    odd = ~(np.isfinite(mine) & np.isfinite(exact))
    same = (mine == exact) | (np.isnan(mine) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.where(odd, np.inf, np.abs(mine - exact)))
    scale = np.abs(exact[np.isfinite(exact)]).max(initial=0.0) or 1.0
    index = tuple(int(i) for i in np.unravel_index(int(distance.argmax()), distance.shape))
    return Difference(float(distance[index] / scale), tolerance, index, float(mine[index]), float(exact[index]))


def _named(result: Any, written: list[str]) -> dict[str, Any]:
    """What the reference returned, by tensor: an array for a single one, a tuple in order, or a dict."""
    if isinstance(result, Mapping):
        values = dict(result)
    else:
        values = dict(zip(written, result if isinstance(result, tuple) else (result,), strict=False))
    missing = [name for name in written if name not in values]
    if missing:
        raise UserProgramError(
            f"the kernel writes {', '.join(written)}, and the reference returns nothing for {missing[0]!r}: "
            "return a tuple in this order, or a dict"
        )
    return values


def _poison(array: Array) -> None:
    """Values that no kernel computes: NaN, or a pattern of bits."""
    if array.dtype.kind in "iub":
        array[...] = array.dtype.type(1) if array.dtype.kind == "b" else 85
    else:
        array[...] = np.nan


# --- cases ------------------------------------------------------------------------------------------


def make_case(kernel: Kernel, given: Arguments, seed: int, limit: int, fixed: Mapping[str, int]) -> Case:
    """Random values, and random sizes up to ``limit`` for the named dimensions that ``fixed`` leaves open."""
    rng = np.random.default_rng(seed)
    names = sorted({n for spec in given.tensors.values() for n in spec.shape if isinstance(n, str)})
    sizes = {name: fixed.get(name) or _size(rng, limit) for name in names}
    arrays = {name: _values(rng, spec, sizes) for name, spec in given.tensors.items()}
    scalars = dict(given.values)
    for parameter in kernel.definition.parameters:
        dtype = given.dtypes.get(parameter.name, parameter.dtype)
        known = parameter.name in scalars or parameter.name in arrays or not parameter.required
        if parameter.kind in ("scalar", "plain") and dtype is not None and not known:
            scalars[parameter.name] = _scalar(rng, dtype)
    return Case(seed, sizes, arrays, scalars)


def _size(rng: np.random.Generator, limit: int) -> int:
    """Often one, a power of two or next to one: where tiles end."""
    kind = rng.integers(4)
    if kind == 0:
        return int(rng.integers(1, limit + 1))
    power = 2 ** int(rng.integers(0, max(1, limit.bit_length())))
    return int(np.clip(power + (0, 0, 1, -1)[kind], 1, limit))


def _values(rng: np.random.Generator, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    shape = [sizes[n] if isinstance(n, str) else n for n in spec.shape]
    values = rng.standard_normal(shape)
    if spec.dtype == DTYPES["i1"]:
        return values > 0
    result: Array = (values if spec.dtype.is_float else values * 10).astype(NUMPY[spec.dtype])
    return result


def _scalar(rng: np.random.Generator, dtype: DType) -> Any:
    if dtype == DTYPES["i1"]:
        return bool(rng.integers(2))
    return float(rng.standard_normal()) if dtype.is_float else int(rng.integers(0, 100))


# --- grids ------------------------------------------------------------------------------------------

_GRID_NODES = (ast.Expression, ast.Tuple, ast.BinOp, ast.UnaryOp, ast.Name, ast.Constant, ast.Call, ast.Load)
_GRID_FUNCTIONS: dict[str, Callable[..., int]] = {"cdiv": lambda a, b: -(-a // b), "min": min, "max": max}


def parse_grid_expression(text: str) -> ast.Expression:
    """The syntax tree of a grid: one to three numbers or expressions. UsageError for anything else."""
    usage = "expected numbers or expressions separated by commas, as in cdiv(M,BM),cdiv(N,BN)"
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        raise click.UsageError(f"--grid {text}: {usage}") from None
    for node in ast.walk(tree):
        if not isinstance(node, (*_GRID_NODES, ast.operator, ast.unaryop)):
            raise click.UsageError(f"--grid {text}: {usage}")
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _GRID_FUNCTIONS):
            raise click.UsageError(f"--grid {text}: a grid may call {', '.join(_GRID_FUNCTIONS)}")
    return tree


def grid_function(text: str, sizes: Mapping[str, int]) -> Callable[[Mapping[str, Any]], Any]:
    """The grid as a function of the constexprs, given the sizes of named dimensions."""
    code = compile(parse_grid_expression(text), "<grid>", "eval")

    def grid(meta: Mapping[str, Any]) -> Any:
        names = {**_GRID_FUNCTIONS, **sizes, **meta}
        try:
            return eval(code, {"__builtins__": {}}, names)
        except NameError as error:
            known = ", ".join([*sizes, *meta]) or "none"
            raise ArgumentError(f"--grid {text}: {error}", hint=f"names: {known}") from None

    return grid
