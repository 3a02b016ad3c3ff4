"""Arithmetic on compile-time constants: the bits that `tilewright.ir.interpreter_numerics` gives.

A function gives None where targets may differ, and the operation is left to run time: division by
zero, shifts by the width or more, NaN results (their payload is the hardware's), transcendental
functions (targets approximate them), conversions out of range or rounded twice.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir.types import DType

Number = int | float | bool

#: float type -> bits of the significand (with the hidden one), exponents of the smallest and the largest power of two
_FORMATS = {
    "f8e4m3": (4, -9, 8), "f8e5m2": (3, -16, 15), "bf16": (8, -133, 127),
    "f16": (11, -24, 15), "f32": (24, -149, 127), "f64": (53, -1074, 1023),
}  # fmt: skip

_EXACT_UNARY = frozenset({"neg", "abs", "not", "floor", "ceil"})


def normalize(value: Number, dtype: DType) -> Number:
    """``value`` as the dtype holds it, wrapped or rounded, and of the matching Python type."""
    with np.errstate(all="ignore"):
        return _number(numerics.constant(value, dtype), dtype)


def _number(array: Any, dtype: DType) -> Number:
    return float(array) if dtype.is_float else int(array) if dtype.is_int else bool(array)


def _known(array: Any, dtype: DType) -> Number | None:
    number = _number(array, dtype)
    return None if math.isnan(number) else number


def fold_binary(fn: str, a: Number, b: Number, dtype: DType) -> Number | None:
    """``fn(a, b)`` in ``dtype``, None when it must be left to run time."""
    if fn in ("floordiv", "mod", "div") and (b == 0 or (dtype.is_float and fn != "div")):
        return None
    if fn in ("shl", "shr") and not 0 <= b < dtype.bits:
        return None
    if fn in ("max", "min") and dtype.is_float and a == b == 0:
        return None  # the sign of max(0.0, -0.0) is not defined
    if dtype.kind == "bool" and fn not in ("and", "or", "xor"):
        return None
    with np.errstate(all="ignore"):
        return _known(numerics.binary(fn, numerics.constant(a, dtype), numerics.constant(b, dtype)), dtype)


def fold_unary(fn: str, a: Number, dtype: DType) -> Number | None:
    """``fn(a)`` in ``dtype``, None when it must be left to run time."""
    if fn not in _EXACT_UNARY or (dtype.kind == "bool" and fn != "not"):
        return None
    with np.errstate(all="ignore"):
        return _known(numerics.unary(fn, numerics.constant(a, dtype)), dtype)


def fold_compare(fn: str, a: Number, b: Number, dtype: DType) -> bool:
    """``a fn b``; comparisons with NaN are false, except ``ne``."""
    return bool(numerics.compare(fn, numerics.constant(a, dtype), numerics.constant(b, dtype)))


def fold_cast(a: Number, source: DType, result: DType) -> Number | None:
    """The value converted, None when it must be left to run time."""
    if math.isnan(a):
        return None
    with np.errstate(all="ignore"):
        value = _number(numerics.cast(numerics.constant(a, source), result), result)
    if not result.is_float:
        saturates = result.is_int and source.is_float and not (math.isfinite(a) and value == math.trunc(a))
        return None if saturates else value
    if value == a:
        return value
    # Types narrower than f32 are reached through f32: from f64 or large integers that would round twice.
    rounds_once = source.is_float and (source.name != "f64" or result.name == "f32")
    return value if rounds_once and math.isfinite(value) and (result.bits > 8 or abs(a) < 256) else None


def fold_bitcast(a: Number, source: DType, result: DType) -> Number | None:
    """The bits of the value as another type, None for NaNs and i1."""
    if source.bits == 1 or math.isnan(a):
        return None
    return _known(numerics.bitcast(numerics.constant(a, source), result), result)


def converts_exactly(source: DType, result: DType) -> bool:
    """Whether every value of ``source`` is a value of ``result``, and a conversion from any wider type keeps it.

    Conversions to 8-bit floats saturate, so f8e5m2 with its infinities is no such result.
    """
    if source == result:
        return source.name != "f8e5m2"
    if result.is_float:
        digits, least, most = _FORMATS[result.name]
        if source.is_float:
            source_digits, source_least, source_most = _FORMATS[source.name]
            return source_digits <= digits and source_least >= least and source_most <= most and result.bits > 8
        # -2^(n-1) has one digit and needs the exponent n-1
        return max(1, source.bits - 1) <= digits and source.bits - 1 <= most
    return result.is_int and not source.is_float and source.bits < result.bits
