"""Conversions with a block scale, with stochastic rounding, and the random numbers for it (CDNA4 ISA chapter 12).

``v_cvt_scalef32_*`` multiply or divide by the power of two that the last operand names. Narrow results go to the octets
or the half that OP_SEL names, and the rest of the destination stays. Those of 32 elements are in `valu_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.operands import KINDS, Array, Operand
from tilewright.runtime.emulator.amd.registry import Handler, define
from tilewright.runtime.emulator.amd.small_floats import (
    decode,
    encode,
    from_half,
    next_random,
    scale_factor,
    stochastic,
    to_half,
)
from tilewright.runtime.emulator.amd.state import WaveState
from tilewright.runtime.emulator.amd.valu import valu

_U8, _U16, _U32, _F32, _F64 = np.uint8, np.uint16, np.uint32, np.float32, np.float64
_GFX950 = ("gfx950",)


def _wide(state: WaveState, operands: tuple[Operand, ...], name: str) -> list[Array]:
    """The two sources of a packed conversion: of two operands of f32, or the halves of one."""
    if name == "f32":
        return [state.vector(operand, KINDS["f32"]) for operand in operands]
    raw = state.raw(operands[0])
    return [from_half((raw >> _U32(shift)).astype(_U16), name) for shift in (0, 16)]


def _replace(state: WaveState, register: int, value: Array, shift: int, bits: int) -> None:
    """Put ``bits`` bits into a register, keeping the others."""
    field = _U32(((1 << bits) - 1) << shift)
    old = state.vgprs[register][state.w]
    state.write_vgpr(register, (old & ~field) | (value.astype(_U32) << _U32(shift)))


def _octet_place(inst: Instruction) -> int:
    """The lowest bit of the octet of the destination that OP_SEL[3:2] names."""
    select = inst.bits("op_sel", 4, 0)
    return 8 * (select[2] + 2 * select[3])


def _narrow(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_pk_{fp8,bf8,fp4}_{f32,f16,bf16}: D = sources / scale."""

    def execute(state: WaveState, inst: Instruction) -> None:
        factor = scale_factor(state, inst.operands[-1])
        low, high = (encode(state, x / factor, name) for x in _wide(state, inst.operands[1:-1], wide))
        register = inst.operands[0].index
        if name == "fp4":
            _replace(state, register, low | (high << _U8(4)), _octet_place(inst), 8)
        else:
            pair = low.astype(_U16) | (high.astype(_U16) << _U16(8))
            upper = inst.bits("op_sel", 4, 0)[len(inst.operands) - 1]
            _replace(state, register, pair, 16 * upper, 16)

    return execute


def _store_wide(state: WaveState, register: int, values: list[Array], wide: str) -> None:
    """Two results: registers of f32, or the halves of one."""
    if wide == "f32":
        for part, value in enumerate(values):
            state.write_vgpr(register + part, value.astype(_F32).view(_U32))
        return
    low, high = (to_half(value, wide).astype(_U32) for value in values)
    state.write_vgpr(register, low | (high << _U32(16)))


def _widen(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_pk_{f32,f16,bf16}_{fp8,bf8,fp4}: D = source * scale; OP_SEL picks the half or octet."""

    def execute(state: WaveState, inst: Instruction) -> None:
        raw, factor = state.raw(inst.operands[1]), scale_factor(state, inst.operands[2])
        select = inst.bits("op_sel", 2, 0)
        if name == "fp4":
            octet = (raw >> _U32(8 * (select[0] + 2 * select[1]))).astype(_U8)
            parts = [octet & _U8(15), octet >> _U8(4)]
        else:
            pair = raw >> _U32(16 * select[0])
            parts = [pair.astype(_U8), (pair >> _U32(8)).astype(_U8)]
        _store_wide(state, inst.operands[0].index, [decode(part, name) * factor for part in parts], wide)

    return execute


def _widen_one(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_{f32,f16}_{fp8,bf8}: one octet; an f16 goes to the half that OP_SEL[3] names."""

    def execute(state: WaveState, inst: Instruction) -> None:
        raw, factor = state.raw(inst.operands[1]), scale_factor(state, inst.operands[2])
        select = inst.bits("op_sel", 4, 0)
        octet = (raw >> _U32(8 * (select[0] + 2 * select[1]))).astype(_U8)
        value = decode(octet, name) * factor
        if wide == "f32":
            state.write_vector(inst.operands[0], KINDS["f32"], value.astype(_F32))
        else:
            _replace(state, inst.operands[0].index, to_half(value, wide), 16 * select[3], 16)

    return execute


for _name in ("fp8", "bf8", "fp4"):
    for _wide_name in ("f32", "f16", "bf16"):
        define(f"v_cvt_scalef32_pk_{_name}_{_wide_name}", _narrow(_name, _wide_name), archs=_GFX950)
        define(f"v_cvt_scalef32_pk_{_wide_name}_{_name}", _widen(_name, _wide_name), archs=_GFX950)
for _name in ("fp8", "bf8"):
    for _wide_name in ("f32", "f16"):
        define(f"v_cvt_scalef32_{_wide_name}_{_name}", _widen_one(_name, _wide_name), archs=_GFX950)


# ---- stochastic rounding ----------------------------------------------------------------------------


def _stochastic_one(name: str, wide: str, scaled: bool) -> Handler:
    """v_cvt_sr_{fp8,bf8}_f32 and v_cvt_scalef32_sr_{fp8,bf8}_{f32,f16,bf16}: to the octet that OP_SEL[3:2] names."""

    def execute(state: WaveState, inst: Instruction) -> None:
        value = _wide(state, inst.operands[1:2], wide)[0].astype(_F64)
        if scaled:
            value = value / scale_factor(state, inst.operands[3])
        rounded = stochastic(state, value, state.raw(inst.operands[2]), name)
        _replace(state, inst.operands[0].index, encode(state, rounded, name), _octet_place(inst), 8)

    return execute


def _stochastic_fp4(wide: str) -> Handler:
    """v_cvt_scalef32_sr_pk_fp4_{f32,f16,bf16}: the second element takes the next random number."""

    def execute(state: WaveState, inst: Instruction) -> None:
        source, seed, scale = inst.operands[1:]
        factor, random = scale_factor(state, scale), state.raw(seed)
        pair = [state.raw(source, part).view(_F32) for part in (0, 1)] if wide == "f32" else None
        codes = []
        for value in pair or _wide(state, (source,), wide):
            codes.append(encode(state, stochastic(state, value / factor, random, "fp4"), "fp4"))
            random = next_random(random)
        _replace(state, inst.operands[0].index, codes[0] | (codes[1] << _U8(4)), _octet_place(inst), 8)

    return execute


def _stochastic_half(name: str) -> Handler:
    """v_cvt_sr_{f16,bf16}_f32: to the half that the last bit of OP_SEL names."""

    def execute(state: WaveState, inst: Instruction) -> None:
        value = state.vector(inst.operands[1], KINDS["f32"]).astype(_F64)
        rounded = stochastic(state, value, state.raw(inst.operands[2]), name)
        upper = inst.bits("op_sel", 3, 0)[2]
        _replace(state, inst.operands[0].index, to_half(rounded, name), 16 * upper, 16)

    return execute


for _name in ("fp8", "bf8"):
    define(f"v_cvt_sr_{_name}_f32", _stochastic_one(_name, "f32", False))
    for _wide_name in ("f32", "f16", "bf16"):
        define(f"v_cvt_scalef32_sr_{_name}_{_wide_name}", _stochastic_one(_name, _wide_name, True), archs=_GFX950)
for _wide_name in ("f32", "f16", "bf16"):
    define(f"v_cvt_scalef32_sr_pk_fp4_{_wide_name}", _stochastic_fp4(_wide_name), archs=_GFX950)
for _name in ("f16", "bf16"):
    define(f"v_cvt_sr_{_name}_f32", _stochastic_half(_name), archs=_GFX950)
valu("v_prng_b32", "u32 -> b32", next_random, archs=_GFX950)


def _shift_and_saturate(low: int, high: int) -> Callable[[Array, Array, Array], Array]:
    """Two arithmetic shifts right, saturated to octets; the others of the half are zero."""

    def compute(a: Array, b: Array, amount: Array) -> Array:
        parts = [np.clip(x >> (amount & np.int32(31)), low, high).astype(_U32) & _U32(255) for x in (a, b)]
        return np.asarray((parts[0] | (parts[1] << _U32(8))).astype(_U16))

    return compute


valu("v_ashr_pk_i8_i32", "i32 i32 i32 -> b16", _shift_and_saturate(-128, 127), archs=_GFX950, preserves_high=True)
valu("v_ashr_pk_u8_i32", "i32 i32 i32 -> b16", _shift_and_saturate(0, 255), archs=_GFX950, preserves_high=True)
