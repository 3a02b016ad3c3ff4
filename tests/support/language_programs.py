"""One small program for each function and dtype of the language, with its NumPy reference.

`CASES` run on the emulated MI300 (tests/backends) and on a CUDA device (tests/gpu). A case's arrays are its kernel's
tensors in order; ``expected`` gives what they must hold afterwards (None: unchanged).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import tilewright as tw
from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir.types import DTYPES

Array = Any
NUMPY: dict[str, Any] = {str(dtype): array for dtype, array in numerics.NUMPY.items()}
INTEGERS = ("i8", "i16", "i32", "i64")
FLOATS = ("f16", "bf16", "f32", "f64")
#: relative and absolute error of one rounded operation
TOLERANCE = {"f16": (2**-10, 1e-6), "bf16": (2**-7, 1e-6), "f32": (4e-6, 2e-6), "f64": (1e-13, 1e-13)}


@dataclass
class Case:
    name: str
    kernel: Any
    arrays: Callable[[], list[Array]]
    expected: Callable[..., Sequence[Array | None]]
    grid: tuple[int, ...] = (1,)
    meta: dict[str, Any] = field(default_factory=dict)
    #: multiplies `TOLERANCE`; 0: exact
    slack: float = 1.0

    def check(self, got: Sequence[Array]) -> None:
        """Compare the tensors after a run with the reference, computed from fresh inputs."""
        before = self.arrays()
        with np.errstate(all="ignore"):
            wanted = self.expected(*[array.copy() for array in before])
        for number, (actual, want, old) in enumerate(zip(got, wanted, before, strict=True)):
            self._compare(actual, old if want is None else want, f"{self.name}: tensor {number}")
        assert any(a.tobytes() != b.tobytes() for a, b in zip(got, before, strict=True)), "nothing was written"

    def _compare(self, actual: Array, want: Array, message: str) -> None:
        name = str(numerics.dtype_of(actual))
        assert actual.shape == want.shape, message
        if name in ("i1", *INTEGERS):
            np.testing.assert_array_equal(actual, want.astype(actual.dtype), err_msg=message)
            return
        relative, absolute = (0.0, 0.0) if self.slack == 0 or name.startswith("f8") else TOLERANCE[name]
        wide, exact = actual.astype(np.float64), np.asarray(want).astype(np.float64)
        np.testing.assert_allclose(wide, exact, relative * self.slack, absolute * self.slack, err_msg=message)


CASES: list[Case] = []


def add(
    name: str,
    kernel: Any,
    arrays: Callable[[], list[Array]],
    expected: Any,
    grid: Any = (1,),
    slack: float = 1.0,
    **meta: Any,
) -> None:
    CASES.append(Case(name, kernel, arrays, expected, grid, meta, slack))


def numbers(name: str, *shape: int, seed: int = 0, low: float = -3.0, high: float = 3.0) -> Array:
    """Random values of a dtype; integers fill their range, but stay within 1000."""
    rng = np.random.default_rng(seed)
    if name == "i1":
        return rng.random(shape) < 0.5
    if name in INTEGERS:
        most = min(1000, 2 ** (DTYPES[name].bits - 1))
        return rng.integers(-most, most, shape).astype(NUMPY[name])
    return rng.uniform(low, high, shape).astype(NUMPY[name])


def blank(name: str, *shape: int) -> Array:
    """An output that nobody has written."""
    return np.full(shape, 77, NUMPY[name]) if name != "i1" else np.zeros(shape, bool)


# --- elementwise ----------------------------------------------------------------------------------


@tw.kernel
def unary(x: tw.Tensor, y: tw.Tensor, *, FN: tw.constexpr):
    tw.store(y, 0, FN(tw.load(x, 0, 256)))


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x)


UNARY: dict[str, tuple[Callable[[Array], Array], float, float]] = {
    "exp": (np.exp, -5, 5), "exp2": (np.exp2, -5, 5), "log": (np.log, 0.1, 9), "log2": (np.log2, 0.1, 9),
    "sqrt": (np.sqrt, 0, 9), "rsqrt": (lambda x: 1 / np.sqrt(x), 0.1, 9), "sin": (np.sin, -9, 9),
    "cos": (np.cos, -9, 9), "tanh": (np.tanh, -4, 4), "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -6, 6),
    "erf": (_erf, -3, 3), "floor": (np.floor, -9, 9), "ceil": (np.ceil, -9, 9), "abs": (np.abs, -9, 9),
}  # fmt: skip


def _unary_case(fn: str, name: str) -> None:
    reference, low, high = UNARY[fn]
    add(
        f"{fn}-{name}", unary, lambda: [numbers(name, 256, low=low, high=high), blank(name, 256)],
        lambda x, y: (None, reference(x.astype(np.float64))), FN=getattr(tw, fn),
    )  # fmt: skip


for _fn in UNARY:
    for _name in ("f16", "bf16", "f32"):
        _unary_case(_fn, _name)
for _fn in ("sqrt", "rsqrt", "floor", "ceil", "abs"):
    _unary_case(_fn, "f64")


@tw.kernel
def arithmetic(x: tw.Tensor, y: tw.Tensor, z: tw.Tensor):
    a, b = tw.load(x, 0, 256), tw.load(y, 0, 256)
    tw.store(z, (0, 0), (a + b)[None, :])
    tw.store(z, (1, 0), (a - b)[None, :])
    tw.store(z, (2, 0), (a * b)[None, :])
    tw.store(z, (3, 0), tw.maximum(a, b)[None, :])
    tw.store(z, (4, 0), tw.minimum(a, b)[None, :])
    tw.store(z, (5, 0), (-a)[None, :])
    tw.store(z, (6, 0), tw.where(a < b, a, b)[None, :])
    tw.store(z, (7, 0), (a // b)[None, :])
    tw.store(z, (8, 0), (a % b)[None, :])


def _arithmetic(x: Array, y: Array, z: Array) -> tuple[Array | None, ...]:
    a, b = (x, y) if x.dtype.kind == "i" else (x.astype(np.float64), y.astype(np.float64))
    rows = [a + b, a - b, a * b, np.maximum(a, b), np.minimum(a, b), -a, np.where(a < b, a, b)]
    return None, None, np.stack([*rows, numerics.binary("floordiv", a, b), numerics.binary("mod", a, b)])


for _name in (*INTEGERS, *FLOATS):
    add(
        f"arithmetic-{_name}", arithmetic,
        lambda n=_name: [numbers(n, 256), _apart(numbers(n, 256), numbers(n, 256, seed=1)), blank(n, 9, 256)],
        _arithmetic, slack=2,
    )  # fmt: skip


def _apart(a: Array, b: Array) -> Array:
    """``b`` without divisors near zero, nor quotients near an integer where rounding decides the floor."""
    if a.dtype.kind == "i":
        return b
    wide = np.where(np.abs(b.astype(np.float64)) < 0.5, 1.5, b.astype(np.float64))
    quotient = a.astype(np.float64) / wide.astype(a.dtype).astype(np.float64)
    near = np.abs(quotient - np.round(quotient)) < 0.05
    number = a.astype(np.float64)
    moved = np.where(np.abs(number) < 0.2, 4 * np.sign(number) + (number == 0), number * 0.8)
    return np.where(near, moved, wide).astype(a.dtype)


@tw.kernel
def divide(x: tw.Tensor, y: tw.Tensor, z: tw.Tensor):
    tw.store(z, 0, tw.load(x, 0, 256) / tw.load(y, 0, 256))


for _name in FLOATS:
    add(
        f"divide-{_name}", divide, lambda n=_name: [numbers(n, 256), numbers(n, 256, seed=1), blank(n, 256)],
        lambda x, y, z: (None, None, x.astype(np.float64) / y.astype(np.float64)),
    )  # fmt: skip


@tw.kernel
def bits(x: tw.Tensor, y: tw.Tensor, z: tw.Tensor):
    a, b = tw.load(x, 0, 256), tw.load(y, 0, 256)
    tw.store(z, (0, 0), (a & b)[None, :])
    tw.store(z, (1, 0), (a | b)[None, :])
    tw.store(z, (2, 0), (a ^ b)[None, :])
    tw.store(z, (3, 0), (~a)[None, :])


@tw.kernel
def shifts(x: tw.Tensor, y: tw.Tensor, z: tw.Tensor):
    a, b = tw.load(x, 0, 256), tw.load(y, 0, 256)
    tw.store(z, (0, 0), (a << b)[None, :])
    tw.store(z, (1, 0), (a >> b)[None, :])
    tw.store(z, (2, 0), (a << 3)[None, :])
    tw.store(z, (3, 0), (a >> 3)[None, :])


def _shift_rows(x: Array, y: Array, z: Array) -> tuple[Array | None, ...]:
    three = np.full_like(x, 3)
    rows = (("shl", y), ("shr", y), ("shl", three), ("shr", three))
    return None, None, np.stack([numerics.binary(f, x, s) for f, s in rows])


for _name in ("i1", *INTEGERS):
    add(
        f"bits-{_name}", bits, lambda n=_name: [numbers(n, 256), numbers(n, 256, seed=1), blank(n, 4, 256)],
        lambda x, y, z: (None, None, np.stack([x & y, x | y, x ^ y, ~x])),
    )  # fmt: skip
for _name in INTEGERS:
    add(
        f"shifts-{_name}", shifts,
        lambda n=_name: [numbers(n, 256), np.arange(256).astype(NUMPY[n]) % (DTYPES[n].bits + 2), blank(n, 4, 256)],
        _shift_rows,
    )  # fmt: skip


@tw.kernel
def comparisons(x: tw.Tensor, y: tw.Tensor, z: tw.Tensor):
    a, b = tw.load(x, 0, 256), tw.load(y, 0, 256)
    tw.store(z, (0, 0), (a == b)[None, :])
    tw.store(z, (1, 0), (a != b)[None, :])
    tw.store(z, (2, 0), (a < b)[None, :])
    tw.store(z, (3, 0), (a <= b)[None, :])
    tw.store(z, (4, 0), (a > b)[None, :])
    tw.store(z, (5, 0), (a >= b)[None, :])


def _with_nan(name: str, x: Array) -> Array:
    if name not in ("i1", *INTEGERS):
        x[::7] = np.nan
    return x


for _name in ("i1", *INTEGERS, *FLOATS):
    add(
        f"comparisons-{_name}", comparisons,
        lambda n=_name: [
            _with_nan(n, np.round(numbers(n, 256)).astype(NUMPY[n])),
            np.round(numbers(n, 256, seed=1)).astype(NUMPY[n]),
            blank("i1", 6, 256),
        ],
        lambda x, y, z: (None, None, np.stack([x == y, x != y, x < y, x <= y, x > y, x >= y])),
    )  # fmt: skip


# --- conversions ------------------------------------------------------------------------------------


@tw.kernel
def casts(x: tw.Tensor, a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, d: tw.Tensor, e: tw.Tensor, f: tw.Tensor,
          g: tw.Tensor, h: tw.Tensor, i: tw.Tensor, j: tw.Tensor, k: tw.Tensor):  # fmt: skip
    t = tw.load(x, 0, 1024)
    for y in (a, b, c, d, e, f, g, h, i, j, k):
        tw.store(y, 0, t.to(y.dtype))


def extremes(name: str) -> Array:
    """Every 8-bit pattern; elsewhere random numbers of all magnitudes, ties, and the special ones."""
    dtype = DTYPES[name]
    if dtype.bits == 8:
        return np.tile(np.arange(256, dtype=np.uint8), 4).view(NUMPY[name])
    if not dtype.is_float:
        return numbers(name, 1024) if name != "i64" else np.random.default_rng(0).integers(-(2**20), 2**20, 1024)
    rng = np.random.default_rng(3)
    values = rng.standard_normal(1024) * 2.0 ** rng.integers(-20, 17, 1024)
    values[:64] = (rng.integers(0, 512, 64) + 0.5) * 2.0 ** rng.integers(-12, 3, 64)
    values[64:72] = [0.0, -0.0, np.inf, -np.inf, np.nan, 448.0, 464.0, 61440.0]
    if name == "f64":  # a hair above a tie of every smaller format
        values[72:80] = 1 + 2.0 ** -np.array([4, 3, 8, 11, 9, 24, 5, 12]) + 2.0**-40
    with np.errstate(over="ignore"):
        return values.astype(NUMPY[name])


def _cast_all(x: Array, *outputs: Array) -> list[Array | None]:
    return [None, *(numerics.cast(x, numerics.dtype_of(y)) for y in outputs)]


for _name in DTYPES:
    add(
        f"casts-{_name}", casts, lambda n=_name: [extremes(n), *(blank(other, 1024) for other in DTYPES)],
        _cast_all, slack=0,
    )  # fmt: skip


@tw.kernel
def bitcasts(x: tw.Tensor, y: tw.Tensor):
    tw.store(y, 0, tw.bitcast(tw.load(x, 0, 256), y.dtype))


for _name, _other in (
    ("f32", "i32"), ("i32", "f32"), ("bf16", "i16"), ("f16", "bf16"), ("f64", "i64"), ("f8e4m3", "i8"),
    ("i8", "f8e5m2"),
):  # fmt: skip
    add(
        f"bitcast-{_name}-{_other}", bitcasts,
        lambda n=_name, o=_other: [numbers(n, 256, low=1), blank(o, 256)],
        lambda x, y: (None, x.view(y.dtype)), slack=0,
    )  # fmt: skip


# --- reductions and scans -----------------------------------------------------------------------------


@tw.kernel
def reductions(x: tw.Tensor, rows: tw.Tensor, columns: tw.Tensor, everything: tw.Tensor, *, FN: tw.constexpr):
    t = tw.load(x, (0, 0), (32, 64))
    tw.store(columns, 0, FN(t, axis=0))
    tw.store(rows, 0, FN(t, axis=1))
    tw.store(everything, 0, FN(t))


def _reduction(fn: str, name: str) -> None:
    result = "i32" if (fn in ("sum", "prod") and name in ("i1", "i8", "i16")) or fn.startswith("arg") else name

    def arrays() -> list[Array]:
        x = numbers(name, 32, 64, low=0.9, high=1.1) if fn == "prod" else numbers(name, 32, 64)
        if fn == "prod" and name in INTEGERS:
            x = np.where(x % 5 == 0, 3, 1).astype(x.dtype)
        if fn.startswith("arg"):
            x = np.round(x).astype(x.dtype)
            if name in FLOATS:
                x[3, 5] = x[3, 9] = np.nan
        return [x, blank(result, 32), blank(result, 64), blank(result, 1)]

    def expected(x: Array, *outputs: Array) -> tuple[Array | None, ...]:
        wide = x.astype(np.float64) if name in FLOATS else x.astype(np.int64)
        reduce = getattr(np, fn)
        return None, reduce(wide, axis=1), reduce(wide, axis=0), reduce(wide).reshape(1)

    add(f"{fn}-{name}", reductions, arrays, expected, FN=getattr(tw, fn), slack=8)


for _name in ("i1", *INTEGERS, *FLOATS):
    for _fn in ("sum", "prod", "max", "min", "argmax", "argmin"):
        if not (_name == "i1" and _fn in ("prod", "max", "min")):
            _reduction(_fn, _name)


@tw.kernel
def running(x: tw.Tensor, y: tw.Tensor, *, AXIS: tw.constexpr, SHAPE: tw.constexpr):
    tw.store(y, (0, 0), tw.cumsum(tw.load(x, (0, 0), SHAPE), AXIS))


def _cumsum(name: str, shape: tuple[int, int], axis: int) -> None:
    result = "i32" if name in ("i1", "i8", "i16") else name
    add(
        f"cumsum-{name}-{shape[0]}x{shape[1]}-{axis}", running,
        lambda: [numbers(name, *shape, low=0), blank(result, *shape)],
        lambda x, y: (None, np.cumsum(x.astype(np.float64 if name in FLOATS else np.int64), axis=axis)),
        AXIS=axis, SHAPE=shape, slack=4,
    )  # fmt: skip


for _name in ("i1", *INTEGERS, *FLOATS):
    _cumsum(_name, (16, 64), 1)
for _shape in ((1, 2048), (96, 48), (64, 3), (512, 2), (1, 7)):
    for _axis in (0, 1):
        _cumsum("f32", _shape, _axis)


@tw.kernel
def joined(x: tw.Tensor, y: tw.Tensor, z: tw.Tensor, *, AXIS: tw.constexpr, A: tw.constexpr, B: tw.constexpr):
    a, b = tw.load(x, (0, 0), A), tw.load(y, (0, 0), B)
    tw.store(z, (0, 0), tw.cat([a, b * 2, a], axis=AXIS))


for _name, _a, _b, _axis in (
    ("f32", (16, 32), (16, 32), 0), ("f32", (16, 32), (16, 32), 1), ("f32", (64, 32), (32, 32), 0),
    ("i32", (8, 48), (8, 16), 1), ("bf16", (3, 64), (5, 64), 0), ("f64", (1, 128), (1, 64), -1),
    ("i8", (16, 1), (16, 3), 1),
):  # fmt: skip
    add(
        f"cat-{_name}-{_a[0]}x{_a[1]}-{_b[0]}x{_b[1]}-{_axis}", joined,
        lambda n=_name, a=_a, b=_b, axis=_axis: [
            numbers(n, *a), numbers(n, *b, seed=1),
            blank(n, *np.concatenate([np.zeros(a), np.zeros(b), np.zeros(a)], axis).shape),
        ],
        lambda x, y, z, axis=_axis: (None, None, np.concatenate([x, y * y.dtype.type(2), x], axis)),
        AXIS=_axis, A=_a, B=_b, slack=0,
    )  # fmt: skip


@tw.kernel
def reshaped(x: tw.Tensor, y: tw.Tensor, *, SHAPE: tw.constexpr, OTHER: tw.constexpr):
    tw.store(y, (0, 0), tw.load(x, (0, 0), SHAPE).reshape(OTHER))


for _name, _a, _b in (("bf16", (256, 5), (5, 256)), ("i1", (7, 5), (5, 7))):  # no layout of one is one of the other
    add(
        f"reshape-{_name}-{_a[0]}x{_a[1]}", reshaped,
        lambda n=_name, a=_a, b=_b: [numbers(n, *a), blank(n, *b)],
        lambda x, y: (None, x.reshape(y.shape)), SHAPE=_a, OTHER=_b, slack=0,
    )  # fmt: skip


# --- gather and scatter ---------------------------------------------------------------------------------


def indices(name: str, *shape: int, most: int, seed: int = 5) -> Array:
    """Coordinates of which some are outside, on both sides."""
    return np.random.default_rng(seed).integers(-3, most + 3, shape).astype(NUMPY[name])


def taken(x: Array, index: Array, axis: int, pad: float) -> Array:
    """NumPy's take along an axis with ``pad`` for what is outside."""
    inside = (index >= 0) & (index < x.shape[axis])
    found = np.take(x, np.where(inside, index, 0), axis)
    mask = inside.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return np.where(mask, found, np.asarray(pad, x.dtype)).astype(x.dtype)


@tw.kernel
def gather_rows(
    x: tw.Tensor, i: tw.Tensor, y: tw.Tensor, *, AXIS: tw.constexpr, SHAPE: tw.constexpr, PAD: tw.constexpr
):
    rows = tw.load(i, 0, SHAPE[AXIS], pad=-1)
    for j in tw.range(tw.cdiv(x.shape[1 - AXIS], SHAPE[1 - AXIS])):
        place = (0, j) if AXIS == 0 else (j, 0)
        tw.store(y, place, tw.gather(x, rows, AXIS, tile=place, shape=SHAPE, pad=PAD))


for _name in DTYPES:
    for _axis, _size in ((0, (50, 128)), (0, (50, 100)), (1, (70, 40))):
        if _name in ("f32", "i64", "bf16") or (_axis, _size) == (0, (50, 128)):
            add(
                f"gather-rows-{_name}-{_axis}-{_size[1]}", gather_rows,
                lambda n=_name, a=_axis, s=_size: [
                    numbers(n, *s), indices("i64" if n == "i64" else "i32", 32, most=s[a]),
                    blank(n, *[32 if axis == a else size for axis, size in enumerate(s)]),
                ],
                lambda x, i, y, a=_axis, p=1 if _name == "i1" else 5: (None, None, taken(x, i, a, p)),
                PAD=1 if _name == "i1" else 5, AXIS=_axis, SHAPE=(32, 64) if _axis == 0 else (64, 32), slack=0,
            )  # fmt: skip


@tw.kernel
def gather_along(x: tw.Tensor, i: tw.Tensor, y: tw.Tensor):
    """take_along_axis, from a transposed view whose origin moved by two rows."""
    index = tw.load(i, (0, 0), (16, 32))
    tw.store(y, (0, 0), tw.gather(x.T.offset(2, 0), index, axis=0, pad=-1))


def _along(x: Array, i: Array, y: Array) -> tuple[Array | None, ...]:
    view, row = x.T, i + 2
    inside = (row >= 0) & (row < view.shape[0]) & (np.arange(32) < view.shape[1])
    found = view[np.clip(row, 0, view.shape[0] - 1), np.minimum(np.arange(32), view.shape[1] - 1)]
    return None, None, np.where(inside, found, -1)


add(
    "gather-along-axis", gather_along,
    lambda: [numbers("f32", 30, 20), indices("i32", 16, 32, most=20), blank("f32", 16, 32)], _along, slack=0,
)  # fmt: skip


@tw.kernel
def gather_points(x: tw.Tensor, i: tw.Tensor, j: tw.Tensor, y: tw.Tensor):
    rows, columns = tw.load(i, 0, 64), tw.load(j, 0, 8)
    tw.store(y, (0, 0), tw.gather(x, (rows[:, None], columns[None, :])))


def _points(x: Array, i: Array, j: Array, y: Array) -> tuple[Array | None, ...]:
    inside = ((i >= 0) & (i < x.shape[0]))[:, None] & ((j >= 0) & (j < x.shape[1]))[None, :]
    rows, columns = np.clip(i, 0, x.shape[0] - 1), np.clip(j, 0, x.shape[1] - 1)
    return None, None, None, np.where(inside, x[rows[:, None], columns[None, :]], 0)


add(
    "gather-points", gather_points,
    lambda: [numbers("f16", 20, 30), indices("i32", 64, most=20), indices("i64", 8, most=30), blank("f16", 64, 8)],
    _points, slack=0,
)  # fmt: skip


@tw.kernel
def look_up(table: tw.Tensor, i: tw.Tensor, y: tw.Tensor):
    """A table of rank one and indices of rank two."""
    tw.store(y, (0, 0), tw.gather(table, tw.load(i, (0, 0), (8, 16)), pad=9))


add(
    "gather-table", look_up, lambda: [numbers("i16", 40), indices("i16", 8, 16, most=40), blank("i16", 8, 16)],
    lambda t, i, y: (None, None, taken(t, i.reshape(-1), 0, 9).reshape(i.shape)),
)  # fmt: skip


@tw.kernel
def scatter_rows(x: tw.Tensor, i: tw.Tensor, y: tw.Tensor, *, AXIS: tw.constexpr, SHAPE: tw.constexpr):
    rows = tw.load(i, 0, SHAPE[AXIS], pad=-1)
    place = (0, tw.program_id(0)) if AXIS == 0 else (tw.program_id(0), 0)
    tw.scatter(y, rows, tw.load(x, place, SHAPE), AXIS, tile=place)


def _scattered(x: Array, i: Array, y: Array, axis: int) -> tuple[Array | None, ...]:
    for position, place in enumerate(i):
        if 0 <= place < y.shape[axis]:
            np.moveaxis(y, axis, 0)[place] = np.moveaxis(x, axis, 0)[position]
    return None, None, y


for _name in ("f32", "bf16", "i1", "f8e4m3", "f64"):
    for _axis, _size in ((0, (32, 128)), (0, (32, 100)), (1, (70, 32))):
        add(
            f"scatter-rows-{_name}-{_axis}-{_size[1]}", scatter_rows,
            lambda n=_name, a=_axis, s=_size: [
                numbers(n, *s), (np.random.default_rng(1).permutation(60)[:32] - 4).astype(np.int32),
                blank(n, *[50 if axis == a else size for axis, size in enumerate(s)]),
            ],
            lambda x, i, y, a=_axis: _scattered(x, i, y, a),
            grid=(2,), AXIS=_axis, SHAPE=(32, 64) if _axis == 0 else (64, 32), slack=0,
        )  # fmt: skip


# --- atomic updates ---------------------------------------------------------------------------------------


@tw.kernel
def atomic_scatter(y: tw.Tensor, i: tw.Tensor, x: tw.Tensor, *, FN: tw.constexpr):
    FN(y, tw.load(i, tw.program_id(0), 256, pad=-1), tw.load(x, tw.program_id(0), 256))


def _updated(fn: str) -> Callable[..., tuple[Array | None, ...]]:
    def expected(y: Array, i: Array, x: Array) -> tuple[Array | None, ...]:
        for place, value in zip(i, x, strict=True):
            if 0 <= place < y.shape[0]:
                y[place] = numerics.binary(fn, y[place], value)
        return y, None, None

    return expected


def _atomic(fn: str, name: str) -> None:
    def arrays() -> list[Array]:
        # sums of small integers are exact in any order, in every dtype
        x = np.random.default_rng(2).integers(-4, 5, 512).astype(NUMPY[name])
        return [np.round(numbers(name, 40)).astype(NUMPY[name]), indices("i32", 512, most=40), x]

    add(f"atomic-{fn}-{name}", atomic_scatter, arrays, _updated(fn), (2,), 0, FN=getattr(tw, f"atomic_{fn}"))


for _name in ("i32", "i64", "f16", "bf16", "f32", "f64"):
    _atomic("add", _name)
for _name in ("i32", "i64", "f32", "f64"):
    _atomic("max", _name)
    _atomic("min", _name)
for _name in ("i32", "i64"):
    for _fn in ("and", "or", "xor"):
        _atomic(_fn, _name)


@tw.kernel
def atomic_tiles(y: tw.Tensor, old: tw.Tensor):
    """Every program adds to one tile that sticks out, and keeps what it saw."""
    n = tw.program_id(0)
    seen = tw.atomic_add(y, (0, 0), tw.full((8, 16), 1, y.dtype))
    tw.store(old, (n, 0), seen)


def _tiles(y: Array, old: Array) -> tuple[Array, Array]:
    new = np.zeros_like(old)
    new[:6, :13] = y
    new[8:14, :13] = y + 1
    return y + 2, new


add(
    "atomic-tile-index", atomic_tiles, lambda: [np.zeros((6, 13), np.int32), blank("i32", 16, 16)],
    _tiles, (2,), num_warps=4,
)  # fmt: skip


@tw.kernel
def tickets(counter: tw.Tensor, best: tw.Tensor, order: tw.Tensor):
    """A scalar counter whose old value every thread needs, and a lock taken by compare and swap."""
    mine = tw.atomic_add(counter, 0, 1)
    tw.store(order, mine, tw.program_id(0) * 0 + mine)
    taken = tw.atomic_cas(best, 0, -1, 9)  # by whichever program comes first
    first = tw.atomic_exchange(best, 1, 5)
    tw.atomic_add(best, 2, (taken == -1).to(tw.int32) + (first == 7).to(tw.int32))


add(
    "atomic-scalars", tickets,
    lambda: [np.zeros(1, np.int32), np.array([-1, 7, 0], np.int32), blank("i32", 6)],
    lambda c, b, o: (np.array([6]), np.array([9, 5, 2]), np.arange(6)), (6,),
)  # fmt: skip


@tw.kernel
def last_arrival(x: tw.Tensor, parts: tw.Tensor, arrived: tw.Tensor, total: tw.Tensor):
    """Each program stores a part; the last to arrive, whichever it is, reads them all."""
    p = tw.program_id(0)
    tw.store(parts, (p, 0), tw.load(x, (p, 0), (1, 256)) * 2.0)
    if tw.atomic_add(arrived, 0, 1, order="acq_rel") == tw.num_programs(0) - 1:
        tw.store(total, 0, tw.sum(tw.load(parts, (0, 0), (4, 256)), axis=0))
        tw.store(arrived, 0, 0)


add(
    "atomic-arrival", last_arrival,
    lambda: [numbers("f32", 4, 256), blank("f32", 4, 256), np.zeros(1, np.int32), blank("f32", 256)],
    lambda x, p, a, t: (None, 2 * x, None, 2 * x.astype(np.float64).sum(0)), (4,),
)  # fmt: skip
