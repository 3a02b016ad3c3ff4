"""Rounding as PTX does it (PTX ISA 4.5, 9.7.3 to 9.7.5, 9.7.9.21 cvt), on NumPy arrays.

Everything below float64 is computed in float64 rounded to odd and then rounded once more in the mode asked for
(`tilewright.runtime.emulator.rounding`).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tilewright.runtime.emulator.exact import directed, total
from tilewright.runtime.emulator.nvidia.types import Array, Type
from tilewright.runtime.emulator.rounding import round_from_odd, round_to_odd, sum_to_odd

_U16, _U32, _U64, _I64 = np.uint16, np.uint32, np.uint64, np.int64
#: what the hardware gives for every NaN result of f32 and f16 arithmetic, and of bf16
NAN32, NAN16 = np.uint32(0x7FFFFFFF), np.uint16(0x7FFF)

# --- formats --------------------------------------------------------------------------------------


def bf16_to_f32(bits: Array) -> Array:
    """uint16 patterns of bfloat16 -> float32 (exact)."""
    value: Array = (bits.astype(_U32) << _U32(16)).view(np.float32)
    return value


def f32_to_bf16(value: Array) -> Array:
    """float32 -> uint16 patterns of bfloat16, to nearest even; NaN becomes 0x7FFF."""
    bits = np.asarray(value, np.float32).view(_U32)
    rounded = (bits + (_U32(0x7FFF) + ((bits >> _U32(16)) & _U32(1)))) >> _U32(16)
    result: Array = np.where(np.isnan(value), _U32(0x7FFF), rounded).astype(_U16)
    return result


_FP8_TYPES: dict[str, Any] = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
_FP8_TABLES = {
    name: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for name, dtype in _FP8_TYPES.items()
}
_FP8_MAXIMUM = {"e4m3": 448.0, "e5m2": 57344.0}


def fp8_to_f32(octets: Array, name: str) -> Array:
    """uint8 -> float32 (exact); ``name`` is e4m3 or e5m2."""
    value: Array = _FP8_TABLES[name][octets]
    return value


def f32_to_fp8(value: Array, name: str) -> Array:
    """float32 -> uint8, to nearest even, saturating to the largest number (cvt .satfinite); NaN stays."""
    bound = _FP8_MAXIMUM[name]
    clipped = np.clip(value, -bound, bound)  # passes NaN
    octets: Array = clipped.astype(_FP8_TYPES[name]).view(np.uint8)
    return np.where(np.isnan(value), np.uint8(0x7F), octets).astype(np.uint8)


def to_f64(value: Array, type_: Type) -> Array:
    """A value of a float type (bf16 as its bits) as float64, exact."""
    if type_.name == "bf16":
        return bf16_to_f32(value).astype(np.float64)
    return value.astype(np.float64)


def flush(value: Array) -> Array:
    """float32 subnormals -> zeros of their sign (``.ftz``)."""
    result: Array = np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)
    return result


def flush16(value: Array) -> Array:
    """float16 subnormals -> zeros of their sign."""
    result: Array = np.where(np.abs(value) < np.float16(2.0**-14), np.copysign(np.float16(0), value), value)
    return result


# --- exact arithmetic ------------------------------------------------------------------------------


def quotient_to_odd(a: Array, b: Array) -> Array:
    """a / b of float32 or float16 values, rounded to odd: the remainder is exact in float64."""
    a, b = np.broadcast_arrays(a.astype(np.float64), b.astype(np.float64))
    quotient = a / b
    high = quotient.astype(np.float32).astype(np.float64)
    remainder = (a - high * b) - (quotient - high) * b
    error = np.where(np.isfinite(remainder), np.sign(remainder) * np.sign(b), 0.0)
    return round_to_odd(quotient, error)


def root_to_odd(a: Array) -> Array:
    """The square root of float32 values, rounded to odd."""
    wide = a.astype(np.float64)
    root = np.sqrt(wide)
    high = root.astype(np.float32).astype(np.float64)
    remainder = ((wide - high * high) - 2 * high * (root - high)) - (root - high) ** 2
    return round_to_odd(root, np.where(np.isfinite(remainder), remainder, 0.0))


# --- rounding --------------------------------------------------------------------------------------


def narrow(value: Array, type_: Type, mode: str = "rn") -> Array:
    """float64 (rounded to odd, or exact) -> a smaller type, in mode rn, rz, rm, rp or rna (away)."""
    if type_.name == "f64":
        return value
    if type_.name == "bf16":
        return _narrow_bf16(value, mode)
    if type_.name not in ("f32", "f16"):
        raise AssertionError(type_.name)
    return round_from_odd(value, type_.dtype, mode)


def _narrow_bf16(value: Array, mode: str) -> Array:
    """Through float32 rounded to odd, which bfloat16's 8 bits leave room for."""
    nearest = narrow_odd32(value)
    bits = nearest.view(_U32)
    inexact, negative = (bits & _U32(0xFFFF)) != 0, np.signbit(nearest)
    if mode == "rn":
        return f32_to_bf16(nearest)
    up = {
        "rz": np.zeros_like(negative),
        "rm": inexact & negative,
        "rp": inexact & ~negative,
        "rna": (bits & _U32(0x8000)) != 0,
    }
    rounded = (bits >> _U32(16)) + up[mode].astype(_U32)
    return np.where(np.isnan(value), _U32(0x7FFF), rounded).astype(_U16)


def narrow_odd32(value: Array) -> Array:
    """float64 -> float32 rounded to odd."""
    truncated = narrow(value, _F32, "rz")
    bits = truncated.view(_U32)
    inexact = np.isfinite(value) & (truncated.astype(np.float64) != value)
    result: Array = np.where(inexact, bits | _U32(1), bits).view(np.float32)
    return result


def to_tf32(value: Array, mode: str) -> Array:
    """float32 -> tf32 bits in a uint32: 10 bits of mantissa, the low 13 zero."""
    bits = value.view(_U32)
    if mode == "rn":
        bits = bits + _U32(0xFFF) + ((bits >> _U32(13)) & _U32(1))
    elif mode == "rna":
        bits = bits + _U32(0x1000)
    nan = np.isnan(value)
    result: Array = np.where(nan, value.view(_U32), bits) & _U32(0xFFFFE000)
    return result


def canonical_nan(value: Array) -> Array:
    """float32, float16 or bf16 patterns with every NaN replaced by the canonical one (PTX ISA 9.7.3)."""
    if value.dtype == np.float32:
        nan = np.isnan(value)
        return np.where(nan, NAN32, value.view(_U32)).view(np.float32) if nan.any() else value
    if value.dtype == np.float16:
        nan = np.isnan(value)
        return np.where(nan, NAN16, value.view(_U16)).view(np.float16) if nan.any() else value
    return value


_F32 = Type("f32", 32, np.float32, "f")
_INTEGER_ROUNDING: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def round_to_integer(value: Array, mode: str) -> Array:
    """A float rounded to an integral float, in mode rni, rzi, rmi or rpi."""
    result: Array = _INTEGER_ROUNDING[mode](value)
    return result


def float_to_int(value: Array, mode: str, type_: Type, wide: bool) -> Array:
    """Saturating conversion of a float64 array (PTX ISA 9.7.9.21).

    NaN gives 0, or only the top bit where the source is f64 (``wide``) or the result has 64 bits.
    """
    info = np.iinfo(type_.dtype)
    whole = _INTEGER_ROUNDING[mode](value)
    low, high = whole <= float(info.min), whole >= float(info.max)
    inside = np.where(low | high | np.isnan(whole), 0.0, whole).astype(type_.dtype)
    result: Array = np.where(low, type_.dtype(info.min), np.where(high, type_.dtype(info.max), inside))
    if wide or type_.bits == 64:
        top = np.array(1 << (type_.bits - 1), f"u{type_.bits // 8}").view(type_.dtype)
        result = np.where(np.isnan(value), top, result)
    return result.astype(type_.dtype)


def int_to_float(value: Array, type_: Type, mode: str) -> Array:
    """An integer array -> a float type; 64-bit integers go through float64 rounded to odd."""
    nearest = value.astype(np.float64)
    if value.dtype.itemsize == 8:
        low = value & value.dtype.type(0x7FF)
        high = (value - low).astype(np.float64)  # at most 53 significant bits: exact
        if type_.name == "f64":
            return directed(nearest, total, mode, high, low.astype(np.float64))
        nearest = sum_to_odd(high, low.astype(np.float64))
    return narrow(nearest, type_, mode)
