"""Arithmetic on compile-time constants with the bits that the program would compute at run time.

Integers wrap around; floats are rounded after each operation in their own type. A function gives
None where the result is not certain: division by zero, shifts by the width, NaN results (their
payload is the hardware's), transcendental functions (targets approximate them), conversions that
are out of range.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from tilewright.ir.types import DType

Number = int | float | bool

_FLOATS = {
    "f8e4m3": ml_dtypes.float8_e4m3fn, "f8e5m2": ml_dtypes.float8_e5m2, "bf16": ml_dtypes.bfloat16,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip

#: float type -> bits of the significand (with the hidden one), exponents of the smallest and largest binade
_FORMATS = {
    "f8e4m3": (4, -9, 8), "f8e5m2": (3, -16, 15), "bf16": (8, -133, 127),
    "f16": (11, -24, 15), "f32": (24, -149, 127), "f64": (53, -1074, 1023),
}  # fmt: skip


def normalize(value: Number, dtype: DType) -> Number:
    """``value`` as the dtype holds it: wrapped, or rounded, and of the matching Python type."""
    if dtype.is_float:
        return _round(float(value), dtype)
    return wrap(int(value), dtype) if dtype.is_int else bool(value)


def wrap(value: int, dtype: DType) -> int:
    """The signed integer of the dtype's width that is congruent to ``value``."""
    half = 1 << (dtype.bits - 1)
    return (value + half) % (2 * half) - half


def _round(value: float, dtype: DType) -> float:
    with np.errstate(all="ignore"):
        return float(np.asarray(value).astype(_FLOATS[dtype.name]))


# --- elementwise operations -----------------------------------------------------------------------

_INT_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "max": max,
    "min": min,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
}
_FLOAT_BINARY: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum,
}  # fmt: skip
_COMPARE: dict[str, Callable[[Number, Number], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def fold_binary(fn: str, a: Number, b: Number, dtype: DType) -> Number | None:
    """``fn(a, b)`` in ``dtype``, None when it must be left to run time."""
    if dtype.is_float:
        return _fold_float(fn, float(a), float(b), dtype)
    if not dtype.is_int:
        return bool(_INT_BINARY[fn](int(a), int(b))) if fn in ("and", "or", "xor") else None
    a, b = int(a), int(b)
    if fn in ("floordiv", "mod") and b == 0:
        return None
    if fn in ("shl", "shr") and not 0 <= b < dtype.bits:
        return None
    return wrap(_INT_BINARY[fn](a, b), dtype) if fn in _INT_BINARY else None


def _fold_float(fn: str, a: float, b: float, dtype: DType) -> float | None:
    if fn not in _FLOAT_BINARY or (fn == "div" and b == 0):
        return None
    if fn in ("max", "min") and a == b == 0:
        return None  # the sign of max(0.0, -0.0) is not defined
    kind = _FLOATS[dtype.name]
    with np.errstate(all="ignore"):
        result = float(np.asarray(_FLOAT_BINARY[fn](np.asarray(a).astype(kind), np.asarray(b).astype(kind))))
    return None if math.isnan(result) else result


def fold_unary(fn: str, a: Number, dtype: DType) -> Number | None:
    """``fn(a)`` in ``dtype``, None when it must be left to run time."""
    if dtype.is_float:
        if math.isnan(a):
            return None
        exact: dict[str, Callable[[float], float]] = {"neg": lambda x: -x, "abs": abs}
        if fn in ("floor", "ceil"):  # NumPy keeps infinities and the sign of zero
            return float(np.floor(a) if fn == "floor" else np.ceil(a))
        return exact[fn](float(a)) if fn in exact else None
    if not dtype.is_int:
        return not a if fn == "not" else None
    whole: dict[str, Callable[[int], int]] = {"neg": lambda x: -x, "abs": abs, "not": lambda x: ~x}
    return wrap(whole[fn](int(a)), dtype) if fn in whole else None


def fold_compare(fn: str, a: Number, b: Number) -> bool:
    """``a fn b``; comparisons with NaN are false, except ``ne``."""
    return bool(_COMPARE[fn](a, b))


# --- conversions ------------------------------------------------------------------------------------


def fold_cast(a: Number, source: DType, result: DType) -> Number | None:
    """The value converted, None when it must be left to run time."""
    if source.is_float:
        if result.is_float:
            return None if math.isnan(a) else _fold_float_cast(float(a), source, result)
        if not result.is_int or not math.isfinite(a) or wrap(int(a), result) != int(a):
            return None
        return int(a)
    if result.is_int:
        return wrap(int(a), result)
    if not result.is_float:
        return bool(a) if int(a) in (0, 1) else None
    rounded = _round(float(int(a)), result)
    return rounded if math.isfinite(rounded) and int(rounded) == int(a) else None


def _fold_float_cast(a: float, source: DType, result: DType) -> float | None:
    rounded = _round(a, result)
    if rounded == a:
        return rounded
    # Types narrower than f32 are reached through f32: from f64 that would round twice. What happens
    # beyond the largest f8 differs between targets (saturation).
    once = source.name != "f64" or result.name == "f32"
    return rounded if once and math.isfinite(rounded) and (result.bits > 8 or abs(a) < 256) else None


def fold_bitcast(a: Number, source: DType, result: DType) -> Number | None:
    """The bits of the value as another type, None for NaNs and i1."""
    if source.bits == 1 or result.bits == 1:
        return None
    bits = np.asarray(a).astype(_FLOATS.get(source.name, f"i{source.bytes}"))
    value = bits.view(_FLOATS.get(result.name, f"i{result.bytes}"))
    if not result.is_float:
        return int(value)
    return None if math.isnan(float(value)) or (source.is_float and math.isnan(a)) else float(value)


def converts_exactly(source: DType, result: DType) -> bool:
    """Whether every value of ``source`` is a value of ``result``."""
    if source == result:
        return True
    if result.is_float:
        digits, least, most = _FORMATS[result.name]
        if source.is_float:
            source_digits, source_least, source_most = _FORMATS[source.name]
            infinities = result.name != "f8e4m3"
            return source_digits <= digits and source_least >= least and source_most <= most and infinities
        # -2^(n-1) has one digit and needs the exponent n-1
        return max(1, source.bits - 1) <= digits and source.bits - 1 <= most
    if source.is_float:
        return False
    return source.bits < result.bits if result.is_int else False
