"""Number formats and single-rounding arithmetic that NumPy lacks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.rounding import fma64

_U16, _U32, _U64 = np.uint16, np.uint32, np.uint64


def bf16_to_f32(bits: Array) -> Array:
    """uint16 bit patterns of bfloat16 -> float32 (exact)."""
    value: Array = (bits.astype(_U32) << _U32(16)).view(np.float32)
    return value


def f32_to_bf16(value: Array) -> Array:
    """float32 -> uint16 bit patterns of bfloat16, to nearest even, NaN quiet."""
    bits = np.ascontiguousarray(value, np.float32).view(_U32)
    rounded = (bits + (_U32(0x7FFF) + ((bits >> _U32(16)) & _U32(1)))) >> _U32(16)
    result: Array = np.where(np.isnan(value), (bits >> _U32(16)) | _U32(0x40), rounded).astype(_U16)
    return result


def f32_to_f16_toward_zero(value: Array) -> Array:
    """float32 -> float16 rounding toward zero (v_cvt_pkrtz_f16_f32): overflow gives the largest number."""
    value = np.asarray(value, np.float32)
    nearest = value.astype(np.float16)
    too_far = np.abs(nearest.astype(np.float32)) > np.abs(value)
    result: Array = np.where(too_far, (nearest.view(_U16) - _U16(1)), nearest.view(_U16)).view(np.float16)
    return result


_FP8_TYPES: dict[tuple[str, bool], Any] = {
    ("fp8", True): ml_dtypes.float8_e4m3fnuz,
    ("bf8", True): ml_dtypes.float8_e5m2fnuz,
    ("fp8", False): ml_dtypes.float8_e4m3fn,
    ("bf8", False): ml_dtypes.float8_e5m2,
}
_FP8_TABLES = {key: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for key, dtype in _FP8_TYPES.items()}


def fp8_to_f32(octets: Array, name: str, fnuz: bool) -> Array:
    """uint8 -> float32; ``name`` is fp8 (e4m3) or bf8 (e5m2); FNUZ on gfx942, OCP on gfx950."""
    value: Array = _FP8_TABLES[name, fnuz][octets]
    return value


def f32_to_fp8(value: Array, name: str, fnuz: bool) -> Array:
    """float32 -> uint8, to nearest even, no saturation (MODE.FP16_OVFL = 0)."""
    octets: Array = np.asarray(value, np.float32).astype(_FP8_TYPES[name, fnuz]).view(np.uint8)
    return octets


def fma32(a: Array, b: Array, c: Array) -> Array:
    """float32 fused multiply-add with one rounding.

    The float64 product is exact; the float64 sum rounds once more only where it falls on the
    midpoint of two float32, which is then nudged by the sign of the sum's own error.
    """
    product = a.astype(np.float64) * b
    wide = product + c
    halfway = (wide.view(_U64) & _U64(0x1FFFFFFF)) == _U64(0x10000000)
    if halfway.any():
        addend = np.asarray(c, np.float64)
        other = wide - product
        error = (product - (wide - other)) + (addend - other)
        away = np.where((error > 0) == (wide > 0), 1, -1).astype(np.int64)
        nudged = (wide.view(np.int64) + away).view(np.float64)
        wide = np.where(halfway & (error != 0) & np.isfinite(error), nudged, wide)
    result: Array = wide.astype(np.float32)
    return result


def fma16(a: Array, b: Array, c: Array) -> Array:
    """float16 fused multiply-add (float64 holds product and sum exactly but for far exponents)."""
    result: Array = (a.astype(np.float64) * b + c.astype(np.float64)).astype(np.float16)
    return result


def float_to_int(value: Array, dtype: Any) -> Array:
    """Truncating conversion that saturates and gives 0 for NaN (ISA v_cvt_i32_f32, v_cvt_u32_f32)."""
    info = np.iinfo(dtype)
    wide = np.trunc(np.nan_to_num(np.asarray(value, np.float64), nan=0.0, posinf=2.0**63, neginf=-(2.0**63)))
    result: Array = np.clip(wide, float(info.min), float(info.max)).astype(np.int64).astype(dtype)
    return result


def biased_exponent(value: Array) -> Array:
    """The exponent field of float32 or float64 values, as int64."""
    if value.dtype == np.float32:
        return ((value.view(_U32) >> _U32(23)) & _U32(0xFF)).astype(np.int64)
    return ((value.view(_U64) >> _U64(52)) & _U64(0x7FF)).astype(np.int64)


def is_denormal(value: Array) -> Array:
    """Nonzero with a zero exponent field."""
    result: Array = (biased_exponent(value) == 0) & (value != 0)
    return result


def div_scale(a: Array, denominator: Array, numerator: Array) -> tuple[Array, Array]:
    """v_div_scale_f32/f64 (ISA chapter 12): the scaled operand and the VCC bit of each lane.

    Where 1/denominator and the quotient are both denormal the ISA's text scales the denominator up,
    which overflows it; it is scaled down here, as the undoing by `div_fmas` presupposes.
    """
    single = a.dtype == np.float32
    step, far, tiny = (64, 96, 23) if single else (128, 768, 53)
    shape = np.broadcast_shapes(a.shape, denominator.shape, numerator.shape)
    a, denominator, numerator = (np.broadcast_to(x, shape) for x in (a, denominator, numerator))
    gap = biased_exponent(numerator) - biased_exponent(denominator)
    is_denominator, is_numerator = a == denominator, a == numerator
    up, down = np.ldexp(a, step), np.ldexp(a, -step)
    reciprocal_denormal = is_denormal((1 / denominator).astype(a.dtype))
    quotient_denormal = is_denormal((numerator / denominator).astype(a.dtype))
    cases: list[tuple[Array, Array, Any]] = [
        ((numerator == 0) | (denominator == 0), np.full(shape, np.nan, a.dtype), False),
        (gap >= far, np.where(is_denominator, up, a), True),
        (is_denormal(denominator), up, False),
        (reciprocal_denormal & quotient_denormal, np.where(is_denominator, down, a), True),
        (reciprocal_denormal, down, False),
        (quotient_denormal, np.where(is_numerator, up, a), True),
        (biased_exponent(numerator) <= tiny, up, False),
    ]
    conditions = [case[0] for case in cases]
    value = np.select(conditions, [case[1] for case in cases], a).astype(a.dtype)
    flag = np.select(conditions, [np.full(shape, case[2]) for case in cases], False)
    return value, flag.astype(np.bool_)


def div_fmas(a: Array, b: Array, c: Array, vcc: Array) -> Array:
    """v_div_fmas_f32/f64: fma, then undo the scaling of `div_scale` where VCC is set."""
    single = a.dtype == np.float32
    fused = fma32(a, b, c) if single else fma64(a, b, c)
    step, bias = (64, 127) if single else (128, 1023)
    shift = np.where(biased_exponent(np.asarray(c)) > bias, step, -step)
    result: Array = np.where(vcc, np.ldexp(fused, shift), fused).astype(a.dtype)
    return result


def div_fixup(quotient: Array, denominator: Array, numerator: Array) -> Array:
    """v_div_fixup_f16/f32/f64: the special cases of division."""
    negative = np.signbit(denominator) ^ np.signbit(numerator)
    sign = np.where(negative, -1.0, 1.0)
    nan = np.isnan(numerator) | np.isnan(denominator)
    nan |= (denominator == 0) & (numerator == 0)
    nan |= np.isinf(denominator) & np.isinf(numerator)
    infinite = (denominator == 0) | np.isinf(numerator)
    zero = np.isinf(denominator) | (numerator == 0)
    magnitude = np.abs(quotient.astype(np.float64))
    if quotient.dtype != np.float16:
        gap = biased_exponent(np.asarray(numerator)) - biased_exponent(np.asarray(denominator))
        zero |= gap < (-150 if quotient.dtype == np.float32 else -1075)
        # the approximation overflows on its way to a quotient that does
        magnitude = np.where(np.isnan(magnitude), np.inf, magnitude)
    magnitude = np.select([nan, infinite, zero], [np.nan, np.inf, 0.0], magnitude)
    result: Array = (sign * magnitude).astype(quotient.dtype)
    return result
