"""Conversions with a block scale, with stochastic rounding, and the random numbers for it (CDNA4 ISA chapter 12).

``v_cvt_scalef32_*`` multiply or divide by a power of two: the exponent of an f32 (an E8M0 octet in
its bits 30:23), in the last operand. Narrow results go to the octets or the half that OP_SEL names, and the
rest of the destination stays. Finite values too large for fp8, bf8 or fp4 become the largest.

Missing: the forms of 32 elements (pk32, 2xpk16: fp6, bf6), the stochastic ones with a scale or to f16 and bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.numerics import bf16_to_f32, f32_to_bf16, f32_to_fp8, fp8_to_f32
from tilewright.runtime.emulator.amd.operands import KINDS, Array, Operand
from tilewright.runtime.emulator.amd.registry import Handler, define
from tilewright.runtime.emulator.amd.state import WaveState
from tilewright.runtime.emulator.amd.valu import valu

_U8, _U16, _U32, _F32 = np.uint8, np.uint16, np.uint32, np.float32
_GFX950 = ("gfx950",)
_FP4 = ml_dtypes.float4_e2m1fn
_FP4_VALUES = np.arange(16, dtype=_U8).view(_FP4).astype(_F32)
#: largest finite values of the OCP formats
_LARGEST = {"fp8": 448.0, "bf8": 57344.0, "fp4": 6.0}


def _scale(state: WaveState, operand: Operand) -> Array:
    """The factor that the exponent of an f32 names."""
    exponent = ((state.raw(operand) >> _U32(23)) & _U32(255)).astype(np.int32)
    factor: Array = np.where(exponent == 255, np.nan, np.ldexp(1.0, exponent - 127))
    return factor


def _encode(value: Array, name: str) -> Array:
    """float64 -> octets (fp8, bf8) or nibbles (fp4), as uint8."""
    largest = _LARGEST[name]
    clipped = np.where(np.isfinite(value), np.clip(value, -largest, largest), value).astype(_F32)
    return np.asarray(clipped.astype(_FP4).view(_U8) if name == "fp4" else f32_to_fp8(clipped, name, False))


def _decode(octets: Array, name: str) -> Array:
    """Octets or nibbles -> float32."""
    return np.asarray(_FP4_VALUES[octets & _U8(15)] if name == "fp4" else fp8_to_f32(octets, name, False))


def _wide(state: WaveState, operands: tuple[Operand, ...], name: str) -> list[Array]:
    """The two sources of a packed conversion: of two operands of f32, or the halves of one."""
    if name == "f32":
        return [state.vector(operand, KINDS["f32"]) for operand in operands]
    raw = state.raw(operands[0])
    halves = [(raw >> _U32(shift)).astype(_U16) for shift in (0, 16)]
    return [bf16_to_f32(half) if name == "bf16" else half.view(np.float16).astype(_F32) for half in halves]


def _replace(state: WaveState, register: int, value: Array, shift: int, bits: int) -> None:
    """Put ``bits`` bits into a register, keeping the others."""
    field = _U32(((1 << bits) - 1) << shift)
    old = state.vgprs[register][state.w]
    state.write_vgpr(register, (old & ~field) | (value.astype(_U32) << _U32(shift)))


def _narrow(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_pk_{fp8,bf8,fp4}_{f32,f16,bf16}: D = sources / scale."""

    def execute(state: WaveState, inst: Instruction) -> None:
        factor = _scale(state, inst.operands[-1])
        low, high = (_encode(x / factor, name) for x in _wide(state, inst.operands[1:-1], wide))
        select = inst.bits("op_sel", 4, 0)
        if name == "fp4":
            _replace(state, inst.operands[0].index, low | (high << _U8(4)), 8 * (select[2] + 2 * select[3]), 8)
        else:
            pair = low.astype(_U16) | (high.astype(_U16) << _U16(8))
            _replace(state, inst.operands[0].index, pair, 16 * select[len(inst.operands) - 1], 16)

    return execute


def _store_wide(state: WaveState, register: int, values: list[Array], wide: str) -> None:
    """Two results: registers of f32, or the halves of one."""
    if wide == "f32":
        for part, value in enumerate(values):
            state.write_vgpr(register + part, value.astype(_F32).view(_U32))
        return
    low, high = (_half(value, wide).astype(_U32) for value in values)
    state.write_vgpr(register, low | (high << _U32(16)))


def _half(value: Array, wide: str) -> Array:
    rounded = value.astype(_F32)
    return f32_to_bf16(rounded) if wide == "bf16" else np.asarray(value.astype(np.float16).view(_U16))


def _widen(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_pk_{f32,f16,bf16}_{fp8,bf8,fp4}: D = source * scale; OP_SEL picks the half or octet."""

    def execute(state: WaveState, inst: Instruction) -> None:
        raw, factor = state.raw(inst.operands[1]), _scale(state, inst.operands[2])
        select = inst.bits("op_sel", 2, 0)
        if name == "fp4":
            octet = (raw >> _U32(8 * (select[0] + 2 * select[1]))).astype(_U8)
            parts = [octet & _U8(15), octet >> _U8(4)]
        else:
            pair = raw >> _U32(16 * select[0])
            parts = [pair.astype(_U8), (pair >> _U32(8)).astype(_U8)]
        _store_wide(state, inst.operands[0].index, [_decode(part, name) * factor for part in parts], wide)

    return execute


def _widen_one(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_{f32,f16}_{fp8,bf8}: one octet; an f16 goes to the half that OP_SEL[3] names."""

    def execute(state: WaveState, inst: Instruction) -> None:
        raw, factor = state.raw(inst.operands[1]), _scale(state, inst.operands[2])
        select = inst.bits("op_sel", 4, 0)
        octet = (raw >> _U32(8 * (select[0] + 2 * select[1]))).astype(_U8)
        value = _decode(octet, name) * factor
        if wide == "f32":
            state.write_vector(inst.operands[0], KINDS["f32"], value.astype(_F32))
        else:
            _replace(state, inst.operands[0].index, _half(value, wide), 16 * select[3], 16)

    return execute


for _name in ("fp8", "bf8", "fp4"):
    for _wide_name in ("f32", "f16", "bf16"):
        define(f"v_cvt_scalef32_pk_{_name}_{_wide_name}", _narrow(_name, _wide_name), archs=_GFX950)
        define(f"v_cvt_scalef32_pk_{_wide_name}_{_name}", _widen(_name, _wide_name), archs=_GFX950)
for _name in ("fp8", "bf8"):
    for _wide_name in ("f32", "f16"):
        define(f"v_cvt_scalef32_{_wide_name}_{_name}", _widen_one(_name, _wide_name), archs=_GFX950)


# ---- stochastic rounding ----------------------------------------------------------------------------


def _stochastic_fp8(name: str) -> Callable[[WaveState, Instruction], None]:
    """v_cvt_sr_fp8_f32 / bf8: random bits 31.. are added below the last place of the result (CDNA3 ISA chapter 12).

    The octet goes where OP_SEL[3:2] says. Results that would be denormal are rounded at the place of the
    smallest denormal.
    """

    def execute(state: WaveState, inst: Instruction) -> None:
        value = state.vector(inst.operands[1], KINDS["f32"])
        random = state.raw(inst.operands[2])
        mantissa = 3 if name == "fp8" else 2
        dtype: Any = {
            ("fp8", True): ml_dtypes.float8_e4m3fnuz,
            ("bf8", True): ml_dtypes.float8_e5m2fnuz,
            ("fp8", False): ml_dtypes.float8_e4m3fn,
            ("bf8", False): ml_dtypes.float8_e5m2,
        }[name, state.memory.fnuz]
        info = ml_dtypes.finfo(dtype)
        magnitude = np.abs(value.astype(np.float64))
        _, exponent = np.frexp(magnitude)
        place = np.ldexp(1.0, np.maximum(exponent - 1, int(info.minexp)) - mantissa)
        steps = np.floor(magnitude / place + random / 2.0**32)
        rounded = np.minimum(steps * place, float(info.max)) * np.sign(value)
        finite = np.where(np.isfinite(value), rounded, value).astype(_F32)
        select = inst.bits("op_sel", 4, 0)
        octet = f32_to_fp8(finite, name, state.memory.fnuz)
        _replace(state, inst.operands[0].index, octet, 8 * (select[2] + 2 * select[3]), 8)

    return execute


for _name in ("fp8", "bf8"):
    define(f"v_cvt_sr_{_name}_f32", _stochastic_fp8(_name))


def _random(a: Array) -> Array:
    """One step of the generator: shift left, and the taps where the bit shifted out was set."""
    return np.asarray((a << _U32(1)) ^ np.where(a >> _U32(31), _U32(197), _U32(0)))


valu("v_prng_b32", "u32 -> b32", _random, archs=_GFX950)


def _shift_and_saturate(low: int, high: int) -> Callable[[Array, Array, Array], Array]:
    """Two arithmetic shifts right, saturated to octets; the others of the half are zero."""

    def compute(a: Array, b: Array, amount: Array) -> Array:
        parts = [np.clip(x >> (amount & np.int32(31)), low, high).astype(_U32) & _U32(255) for x in (a, b)]
        return np.asarray((parts[0] | (parts[1] << _U32(8))).astype(_U16))

    return compute


valu("v_ashr_pk_i8_i32", "i32 i32 i32 -> b16", _shift_and_saturate(-128, 127), archs=_GFX950, preserves_high=True)
valu("v_ashr_pk_u8_i32", "i32 i32 i32 -> b16", _shift_and_saturate(0, 255), archs=_GFX950, preserves_high=True)
