"""What the arithmetic of the IR means, in NumPy.

- Float operations on f16, bf16 and fp8 compute in float32 and round once to the dtype; f32 and f64 as they are.
- Integer arithmetic wraps. floordiv and mod round towards minus infinity; division by zero gives 0.
- max and min propagate NaN.
- Casts: float to int truncates towards zero and saturates, NaN gives 0; float to fp8 saturates to the largest
  finite value (infinities too), NaN stays NaN; everything else rounds to nearest even, overflow gives infinity.
- dot multiplies and adds in float32 (float64 for f64, exact integers for ints), then rounds to the accumulator's
  dtype. ``precision`` is a licence to round inputs, which the interpreter does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.ir.types import DTYPES, DType

#: element type -> NumPy dtype
NUMPY: dict[DType, np.dtype[Any]] = {
    DTYPES[name]: np.dtype(kind)
    for name, kind in (
        ("i1", np.bool_), ("i8", np.int8), ("i16", np.int16), ("i32", np.int32), ("i64", np.int64),
        ("f16", np.float16), ("bf16", ml_dtypes.bfloat16), ("f32", np.float32), ("f64", np.float64),
        ("f8e4m3", ml_dtypes.float8_e4m3fn), ("f8e5m2", ml_dtypes.float8_e5m2),
    )
}  # fmt: skip
_DTYPE_OF = {array: dtype for dtype, array in NUMPY.items()}
_BF16 = np.dtype(ml_dtypes.bfloat16)
_FP8_MAX = {DTYPES["f8e4m3"]: 448.0, DTYPES["f8e5m2"]: 57344.0}

Array = Any  # NumPy arrays and scalars


def dtype_of(array: Array) -> DType:
    """The IR's element type of a NumPy array; TypeError where it has none."""
    if array.dtype not in _DTYPE_OF:
        raise TypeError(f"no element type of the IR is {array.dtype}")
    return _DTYPE_OF[array.dtype]


def constant(value: float, dtype: DType) -> Array:
    """A NumPy scalar; integers wrap, floats round (fp8 saturates)."""
    if dtype.is_int:
        wrapped = (int(value) + (1 << dtype.bits - 1)) % (1 << dtype.bits) - (1 << dtype.bits - 1)
        return NUMPY[dtype].type(wrapped)
    if dtype in _FP8_MAX:
        return cast(np.float64(value), dtype)
    return NUMPY[dtype].type(value)


def poison(dtype: DType) -> Array:
    """What uninitialised memory holds: NaN, or an odd bit pattern for integers."""
    return NUMPY[dtype].type(math.nan) if dtype.is_float else constant(0x5A5A5A5A5A5A5A5A, dtype)


def widen(array: Array) -> Array:
    """Small floats as float32, everything else unchanged."""
    if array.dtype == _BF16:
        # a bf16 is the upper half of a float32; a shift is many times faster than ml_dtypes' cast
        return (
            (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(array.shape)
        )
    return array.astype(np.float32) if _DTYPE_OF[array.dtype].is_float and array.dtype.itemsize < 4 else array


def _rounded(result: Array, like: Array) -> Array:
    return result if result.dtype == like.dtype else cast(result, _DTYPE_OF[like.dtype])


# --- elementwise ----------------------------------------------------------------------------


def _erf(x: Array) -> Array:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), dtype=x.dtype)


def _not(x: Array) -> Array:
    return np.logical_not(x) if x.dtype == np.bool_ else np.invert(x)


_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "not": _not, "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "erf": _erf, "floor": np.floor, "ceil": np.ceil,
}  # fmt: skip

_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "floordiv": np.floor_divide,
    "mod": np.remainder, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip
#: arithmetic modulo two, which NumPy does not do on bools
_BOOLEAN: dict[str, Callable[[Array, Array], Array]] = {**_BINARY, "add": np.bitwise_xor, "sub": np.bitwise_xor}

_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def unary(fn: str, x: Array) -> Array:
    return _rounded(_UNARY[fn](widen(x)), x)


def binary(fn: str, x: Array, y: Array) -> Array:
    table = _BOOLEAN if x.dtype == np.bool_ else _BINARY
    return _rounded(table[fn](widen(x), widen(y)), x)


def compare(fn: str, x: Array, y: Array) -> Array:
    return _COMPARE[fn](widen(x), widen(y))


# --- reductions and products ------------------------------------------------------------------

_REDUCE: dict[str, Any] = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


def reduce(fn: str, x: Array, axis: int) -> Array:
    """Reduce one axis; small floats in float32, rounded once."""
    wide = widen(x)
    if x.dtype == np.bool_ and fn == "sum":
        return np.bitwise_xor.reduce(wide, axis=axis)
    return _rounded(_REDUCE[fn].reduce(wide, axis=axis, dtype=wide.dtype), x)


def scan(fn: str, x: Array, axis: int) -> Array:
    """Running totals along an axis; small floats in float32, rounded once."""
    wide = widen(x)
    table = {"sum": np.bitwise_xor if x.dtype == np.bool_ else np.add}
    return _rounded(table[fn].accumulate(wide, axis=axis, dtype=wide.dtype), x)


def dot(a: Array, b: Array, acc: Array) -> Array:
    """``acc + a @ b``, rounded once to the accumulator's dtype."""
    kind = _DTYPE_OF[acc.dtype]
    compute: Any
    if kind.is_float:
        compute = np.float64 if np.float64 in (acc.dtype, a.dtype) else np.float32
    else:
        # products of 16 bits sum exactly in float64, which BLAS has; wider ones need integers
        compute = np.float64 if a.dtype.itemsize <= 2 else np.int64
    product = np.matmul(widen(a).astype(compute, copy=False), widen(b).astype(compute, copy=False))
    if not kind.is_float:
        return (product.astype(np.int64) + acc).astype(acc.dtype)
    product += widen(acc)
    return _rounded(product, acc)


# --- casts ------------------------------------------------------------------------------------


def cast(x: Array, dtype: DType) -> Array:
    """Convert the element type by the rules at the head of this module."""
    source, target = _DTYPE_OF[x.dtype], NUMPY[dtype]
    if source is dtype:
        return x
    wide = widen(x)
    if dtype.kind == "bool":
        return wide != 0
    if dtype.is_int and source.is_float:
        return _truncate(wide, dtype)
    if dtype in _FP8_MAX:
        limit = _FP8_MAX[dtype]
        wide = _rounded_to_odd(wide) if wide.dtype == np.float64 else wide.astype(np.float32)
        return np.clip(wide, -limit, limit).astype(target)
    if target == _BF16 and wide.dtype == np.float64:
        wide = _rounded_to_odd(wide)  # ml_dtypes goes by way of float32 and would round twice
    return wide.astype(target)


def _rounded_to_odd(x: Array) -> Array:
    """float64 as float32 such that rounding further gives what rounding once would have."""
    near = np.asarray(x, np.float64).astype(np.float32)
    back = near.astype(np.float64)
    odd = (near.view(np.int32) - (np.abs(back) > np.abs(x))).astype(np.int32) | 1
    return np.where((back != x) & ~np.isnan(near), odd.view(np.float32), near)


def _truncate(x: Array, dtype: DType) -> Array:
    """Float to int: towards zero, saturating, NaN to 0."""
    limit = 2.0 ** (dtype.bits - 1)
    whole = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=limit, neginf=-limit)
    # the largest int64 is no float64: clip just below the limit, then put the maximum in
    inside = np.clip(whole, -limit, np.nextafter(limit, 0)).astype(NUMPY[dtype])
    return np.where(whole >= limit, constant(int(limit) - 1, dtype), inside)


def bitcast(x: Array, dtype: DType) -> Array:
    """The same bits as another dtype of the same width."""
    return np.ascontiguousarray(x).view(NUMPY[dtype]).reshape(x.shape)


__all__ = [
    "NUMPY", "Array", "binary", "bitcast", "cast", "compare", "constant", "dot", "dtype_of", "poison", "reduce",
    "scan", "unary", "widen",
]  # fmt: skip
