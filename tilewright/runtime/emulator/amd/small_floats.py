"""Narrow floats as conversions treat them: scales, saturation, stochastic rounding (CDNA4 ISA section 7.3).

What is too large for fp4, fp6 or bf6 becomes the largest number. For fp8 and bf8 that is so, infinities included, where
MODE.FP16_OVFL is set; else it becomes NaN or infinity (the FP16_OVFL rule). fp4, fp6 and bf6 have no NaN: the ISA does
not say what becomes of one; here it is the largest number.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tilewright.runtime.emulator.amd.mode import FP16_OVFL
from tilewright.runtime.emulator.amd.numerics import bf16_to_f32, f32_to_bf16, f32_to_fp8, fp8_to_f32
from tilewright.runtime.emulator.amd.operands import Array, Operand
from tilewright.runtime.emulator.amd.state import WaveState

_U8, _U16, _U32, _F32 = np.uint8, np.uint16, np.uint32, np.float32


@dataclass(frozen=True)
class Small:
    """Bits of the mantissa, exponent of the smallest normal number, and the largest one (CDNA4 ISA table 30)."""

    mantissa: int
    exponent: int
    largest: float


_OCP = {
    "fp8": Small(3, -6, 448.0), "bf8": Small(2, -14, 57344.0), "fp6": Small(3, 0, 7.5), "bf6": Small(2, -2, 28.0),
    "fp4": Small(1, 0, 6.0), "f16": Small(10, -14, 65504.0), "bf16": Small(7, -126, 3.3895313892515355e38),
}  # fmt: skip
_FNUZ = {"fp8": Small(3, -7, 240.0), "bf8": Small(2, -15, 57344.0)}
_NARROW = {"fp6": ml_dtypes.float6_e2m3fn, "bf6": ml_dtypes.float6_e3m2fn, "fp4": ml_dtypes.float4_e2m1fn}
BITS = {"fp8": 8, "bf8": 8, "fp6": 6, "bf6": 6, "fp4": 4}
_VALUES = {
    name: np.arange(1 << BITS[name], dtype=_U8).view(dtype).astype(_F32) for name, dtype in _NARROW.items()
}  # fmt: skip


def scale_factor(state: WaveState, operand: Operand) -> Array:
    """The power of two that the exponent of an f32 names: an E8M0 octet in bits 30:23."""
    exponent = ((state.raw(operand) >> _U32(23)) & _U32(255)).astype(np.int32)
    factor: Array = np.where(exponent == 255, np.nan, np.ldexp(1.0, exponent - 127))
    return factor


def encode(state: WaveState, value: Array, name: str) -> Array:
    """float64 -> the codes of an 8, 6 or 4-bit format, uint8, to nearest even."""
    form = (_FNUZ if state.memory.fnuz and name in _FNUZ else _OCP)[name]
    clipped = np.clip(value, -form.largest, form.largest)
    if name in _FNUZ:
        bounded = np.where(state.mode_bit(FP16_OVFL), clipped, value)
        return f32_to_fp8(bounded.astype(_F32), name, state.memory.fnuz)
    finite = np.where(np.isnan(clipped), form.largest, clipped).astype(_F32)
    return np.asarray(finite.astype(_NARROW[name]).view(_U8))


def decode(codes: Array, name: str) -> Array:
    """Codes of an OCP format -> float32 (exact)."""
    return np.asarray(_VALUES[name][codes] if name in _VALUES else fp8_to_f32(codes, name, False))


def stochastic(state: WaveState, value: Array, random: Array, name: str) -> Array:
    """float64 -> float64 of the format's precision: random bits are added below the last place, and the rest is cut.

    Below the smallest normal number the last place is that of the denormals.
    """
    form = (_FNUZ if state.memory.fnuz and name in _FNUZ else _OCP)[name]
    magnitude = np.abs(value)
    _, exponent = np.frexp(magnitude)
    place = np.ldexp(1.0, np.maximum(exponent - 1, form.exponent) - form.mantissa)
    steps = np.floor(magnitude / place + random / 2.0**32)
    return np.where(np.isfinite(value), np.copysign(steps * place, value), value)


def next_random(value: Array) -> Array:
    """One step of v_prng_b32: shift left, and the taps where the bit shifted out was set."""
    return np.asarray((value << _U32(1)) ^ np.where(value >> _U32(31), _U32(197), _U32(0)))


def from_half(bits: Array, name: str) -> Array:
    """uint16 of f16 or bf16 -> float32."""
    return bf16_to_f32(bits) if name == "bf16" else np.asarray(bits.view(np.float16).astype(_F32))


def to_half(value: Array, name: str) -> Array:
    """float64 -> uint16 of f16 or bf16, to nearest even."""
    return f32_to_bf16(value.astype(_F32)) if name == "bf16" else np.asarray(value.astype(np.float16).view(_U16))
