"""Vector conversions between number formats (ISA chapter 12; CDNA4 adds bf16 and more packed forms)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.mode import ADD, CONVERT, FUSED, MULTIPLY, Exactly
from tilewright.runtime.emulator.amd.mode import compute as compute_in_mode
from tilewright.runtime.emulator.amd.numerics import (
    bf16_to_f32,
    f32_to_bf16,
    f32_to_f16_toward_zero,
    float_to_int,
    fma16,
    fma32,
    fp8_to_f32,
)
from tilewright.runtime.emulator.amd.operands import KINDS, Array, Operand, Where
from tilewright.runtime.emulator.amd.registry import define, instruction
from tilewright.runtime.emulator.amd.small_floats import encode
from tilewright.runtime.emulator.amd.state import WaveState
from tilewright.runtime.emulator.amd.valu import Function, clamped, saturating, valu

_U16, _U32, _F16, _F32, _F64 = np.uint16, np.uint32, np.float16, np.float32, np.float64
_GFX950 = ("gfx950",)


def _pack16(low: Array, high: Array) -> Array:
    """Two 16-bit arrays of any dtype -> uint32."""
    packed: Array = low.view(_U16).astype(_U32) | (high.view(_U16).astype(_U32) << _U32(16))
    return packed


def _packed(convert: Function) -> Function:
    return lambda a, b: _pack16(convert(a), convert(b))


def _to_int(dtype: type) -> Function:
    return lambda a: float_to_int(a, dtype)


def _normalised(scale: float, dtype: type) -> Function:
    low = 0.0 if dtype is _U16 else -1.0
    return lambda a: np.rint(np.clip(np.nan_to_num(a.astype(_F64)), low, 1.0) * scale).astype(dtype)


#: what MODE rounds
_ROUNDED = ("v_cvt_f32_u32", "v_cvt_f32_i32", "v_cvt_f32_f64", "v_cvt_f16_f32", "v_cvt_f16_u16", "v_cvt_f16_i16")
_TABLE: list[tuple[str, str, Function]] = [
    ("v_cvt_f32_u32", "u32 -> f32", lambda a: a.astype(_F32)),
    ("v_cvt_f32_i32", "i32 -> f32", lambda a: a.astype(_F32)),
    ("v_cvt_u32_f32", "f32 -> u32", _to_int(np.uint32)),
    ("v_cvt_i32_f32", "f32 -> i32", _to_int(np.int32)),
    ("v_cvt_rpi_i32_f32", "f32 -> i32", lambda a: float_to_int(np.floor(a.astype(_F64) + 0.5), np.int32)),
    ("v_cvt_flr_i32_f32", "f32 -> i32", lambda a: float_to_int(np.floor(a), np.int32)),
    ("v_cvt_f64_u32", "u32 -> f64", lambda a: a.astype(_F64)),
    ("v_cvt_f64_i32", "i32 -> f64", lambda a: a.astype(_F64)),
    ("v_cvt_u32_f64", "f64 -> u32", _to_int(np.uint32)),
    ("v_cvt_i32_f64", "f64 -> i32", _to_int(np.int32)),
    ("v_cvt_f64_f32", "f32 -> f64", lambda a: a.astype(_F64)),
    ("v_cvt_f32_f64", "f64 -> f32", lambda a: a.astype(_F32)),
    ("v_cvt_f16_f32", "f32 -> f16", lambda a: a.astype(_F16)),
    ("v_cvt_f32_f16", "f16 -> f32", lambda a: a.astype(_F32)),
    ("v_cvt_f16_u16", "u16 -> f16", lambda a: a.astype(_F16)),
    ("v_cvt_f16_i16", "i16 -> f16", lambda a: a.astype(_F16)),
    ("v_cvt_u16_f16", "f16 -> u16", _to_int(np.uint16)),
    ("v_cvt_i16_f16", "f16 -> i16", _to_int(np.int16)),
    ("v_cvt_pkrtz_f16_f32", "f32 f32 -> b32", _packed(f32_to_f16_toward_zero)),
    ("v_cvt_pk_u16_u32", "u32 u32 -> b32", _packed(lambda a: np.minimum(a, _U32(0xFFFF)).astype(_U16))),
    ("v_cvt_pk_i16_i32", "i32 i32 -> b32", _packed(lambda a: np.clip(a, -32768, 32767).astype(np.int16))),
    ("v_cvt_pknorm_i16_f32", "f32 f32 -> b32", _packed(_normalised(32767.0, np.int16))),
    ("v_cvt_pknorm_u16_f32", "f32 f32 -> b32", _packed(_normalised(65535.0, np.uint16))),
]
for _name, _signature, _function in _TABLE:
    valu(_name, _signature, _function, exactly=CONVERT if _name in _ROUNDED else None)
for _byte in range(4):
    valu(
        f"v_cvt_f32_ubyte{_byte}",
        "u32 -> f32",
        lambda a, shift=8 * _byte: ((a >> _U32(shift)) & _U32(255)).astype(_F32),
    )
valu("v_cvt_pk_bf16_f32", "f32 f32 -> b32", _packed(f32_to_bf16), archs=_GFX950)
valu("v_cvt_pk_f16_f32", "f32 f32 -> b32", _packed(lambda a: a.astype(_F16)), archs=_GFX950)
# CDNA4: the low half of the source is a bfloat16; SDWA selection may have moved another half there
valu("v_cvt_f32_bf16", "u16 -> f32", bf16_to_f32, archs=_GFX950)
valu("v_pack_b32_f16", "f16 f16 -> b32", _pack16)


def _pack_fp8(name: str) -> Callable[[WaveState, Instruction], None]:
    """v_cvt_pk_fp8_f32 / bf8: two octets into the half that OP_SEL[3] (printed last) names; the other is kept."""

    def execute(state: WaveState, inst: Instruction) -> None:
        destination, first, second = inst.operands
        low, high = (encode(state, state.vector(operand, KINDS["f32"]), name) for operand in (first, second))
        pair = low.astype(_U16) | (high.astype(_U16) << _U16(8))
        upper = bool(inst.bits("op_sel", 3, 0)[-1])
        state.write_vector(destination, KINDS["b16"], np.broadcast_to(pair, state.lanes.shape), upper)

    return execute


def _unpack_fp8_pair(name: str) -> Callable[[WaveState, Instruction], None]:
    """v_cvt_pk_f32_fp8 / bf8: the low (or OP_SEL/SDWA-selected) two octets -> two f32."""

    def execute(state: WaveState, inst: Instruction) -> None:
        high = bool(inst.bits("op_sel", 1, 0)[0])
        pair = state.vector(inst.operands[1], KINDS["b16"], high)
        for part, octet in enumerate((pair & _U16(255), pair >> _U16(8))):
            value = fp8_to_f32(octet, name, state.memory.fnuz)
            state.write_vgpr(inst.operands[0].index + part, value.view(_U32))

    return execute


def _unpack_fp8(name: str) -> Callable[[WaveState, Instruction], None]:
    """v_cvt_f32_fp8 / bf8: octet 0 (or the one that OP_SEL or SDWA names) -> f32."""

    def execute(state: WaveState, inst: Instruction) -> None:
        select = inst.bits("op_sel", 2, 0)
        shift = _U32(8 * (2 * select[0] + select[1]))
        octet = (state.raw(inst.operands[1]) >> shift) & _U32(255)
        value = fp8_to_f32(octet, name, state.memory.fnuz)
        state.write_vector(inst.operands[0], KINDS["f32"], value)

    return execute


for _name in ("fp8", "bf8"):
    define(f"v_cvt_pk_{_name}_f32", _pack_fp8(_name))
    define(f"v_cvt_pk_f32_{_name}", _unpack_fp8_pair(_name))
    define(f"v_cvt_f32_{_name}", _unpack_fp8(_name))


def _packed_halves(state: WaveState, inst: Instruction, kind: str) -> list[tuple[Array, Array]]:
    """The (low lane, high lane) sources of a VOP3P 16-bit instruction: OP_SEL, OP_SEL_HI, NEG_LO, NEG_HI."""
    count = len(inst.operands) - 1
    low_select, high_select = inst.bits("op_sel", count, 0), inst.bits("op_sel_hi", count, 1)
    negate_low, negate_high = inst.bits("neg_lo", count, 0), inst.bits("neg_hi", count, 0)
    sources = []
    for i, operand in enumerate(inst.operands[1:]):
        pair = []
        for select, negate in ((low_select[i], negate_low[i]), (high_select[i], negate_high[i])):
            constant = operand.where is Where.CONSTANT
            value = state.vector(operand, KINDS[kind], bool(select))
            if constant and select:
                # an inline constant fills the low half; the upper holds the sign of an integer
                fill = -1 if operand.real is None and operand.value < 0 else 0
                if operand.real is None and not -16 <= operand.value <= 64:
                    value = np.array([[operand.value >> 16 & 0xFFFF]], _U16).view(KINDS[kind].dtype)
                else:
                    value = np.array([[fill]], np.int16).view(KINDS[kind].dtype)
            pair.append(-value if negate else value)
        sources.append((pair[0], pair[1]))
    return sources


def _packed16(
    kind: str, function: Function, saturating: Function | None = None, exactly: Exactly | None = None
) -> Callable[[WaveState, Instruction], None]:
    """A VOP3P 16-bit instruction; ``saturating`` is what an integer one computes under CLAMP."""
    number = KINDS[kind]

    def execute(state: WaveState, inst: Instruction) -> None:
        sources = _packed_halves(state, inst, kind)
        halves = []
        for side in (0, 1):
            compute = saturating if saturating is not None and inst.flag("clamp") else function
            values = [source[side] for source in sources]
            value = compute_in_mode(state, [number] * len(values), number, compute, exactly, values)
            value = value.astype(number.dtype, copy=False)
            halves.append(clamped(state, value) if inst.flag("clamp") and number.is_float else value)
        state.write_vgpr(inst.operands[0].index, _pack16(halves[0], halves[1]))

    return execute


def _reverse_shift(function: Function) -> Function:
    return lambda amount, value: function(value, amount & amount.dtype.type(15))


define("v_pk_add_f16", _packed16("f16", np.add, exactly=ADD))
define("v_pk_mul_f16", _packed16("f16", np.multiply, exactly=MULTIPLY))
define("v_pk_fma_f16", _packed16("f16", fma16, exactly=FUSED))
_PACKED16: list[tuple[str, str, Function]] = [
    ("v_pk_max_f16", "f16", np.fmax),
    ("v_pk_min_f16", "f16", np.fmin),
    ("v_pk_lshlrev_b16", "u16", _reverse_shift(np.left_shift)),
    ("v_pk_lshrrev_b16", "u16", _reverse_shift(np.right_shift)),
    ("v_pk_ashrrev_i16", "i16", _reverse_shift(np.right_shift)),
    ("v_pk_mul_lo_u16", "u16", np.multiply),
]
for _name, _kind, _function in _PACKED16:
    define(_name, _packed16(_kind, _function))
for _kind in ("u16", "i16"):
    _dtype = KINDS[_kind].dtype
    define(f"v_pk_add_{_kind}", _packed16(_kind, np.add, saturating(np.add, _dtype)))
    define(f"v_pk_sub_{_kind}", _packed16(_kind, np.subtract, saturating(np.subtract, _dtype)))
    define(f"v_pk_mad_{_kind}", _packed16(_kind, lambda a, b, c: a * b + c))
    define(f"v_pk_max_{_kind}", _packed16(_kind, np.maximum))
    define(f"v_pk_min_{_kind}", _packed16(_kind, np.minimum))
for _name, _function in (("maximum", np.maximum), ("minimum", np.minimum)):
    define(
        f"v_pk_{_name}3_f16",
        _packed16("f16", lambda a, b, c, f=_function: f(f(a, b), c)),
        archs=_GFX950,
    )


def _half_of_pair(state: WaveState, operand: Operand, half: int) -> Array:
    """Register ``half`` of a pair; a constant is the same in both."""
    return state.raw(operand, half if operand.where in (Where.VECTOR, Where.SCALAR) else 0)


def _packed32(function: Function, exactly: Exactly) -> Callable[[WaveState, Instruction], None]:
    """v_pk_*_f32: each source is a pair of registers; OP_SEL picks the half for the low result (ISA chapter 6)."""

    def execute(state: WaveState, inst: Instruction) -> None:
        count = len(inst.operands) - 1
        select = inst.bits("op_sel", count, 0), inst.bits("op_sel_hi", count, 1)
        negate = inst.bits("neg_lo", count, 0), inst.bits("neg_hi", count, 0)
        results = []
        for side in (0, 1):
            arguments = []
            for i, operand in enumerate(inst.operands[1:]):
                value = _half_of_pair(state, operand, select[side][i]).view(_F32)
                arguments.append(-value if negate[side][i] else value)
            value = compute_in_mode(state, [KINDS["f32"]] * count, KINDS["f32"], function, exactly, arguments)
            results.append(clamped(state, value) if inst.flag("clamp") else value)
        for side in (0, 1):
            state.write_vgpr(inst.operands[0].index + side, results[side].astype(_F32, copy=False).view(_U32))

    return execute


define("v_pk_fma_f32", _packed32(fma32, FUSED))
define("v_pk_mul_f32", _packed32(np.multiply, MULTIPLY))
define("v_pk_add_f32", _packed32(np.add, ADD))


@instruction("v_pk_mov_b32")
def _packed32_move(state: WaveState, inst: Instruction) -> None:
    """v_pk_mov_b32: D0 = half OP_SEL[0] of S0, D1 = half OP_SEL[1] of S1."""
    select = inst.bits("op_sel", 2, 0)
    values = [_half_of_pair(state, operand, select[i]).copy() for i, operand in enumerate(inst.operands[1:3])]
    for side in (0, 1):
        state.write_vgpr(inst.operands[0].index + side, values[side])


def _dot2(to_float: Function, accumulate: bool) -> Callable[[WaveState, Instruction], None]:
    """v_dot2_f32_f16 / bf16: two products and an addend."""

    def execute(state: WaveState, inst: Instruction) -> None:
        operands = (inst.operands[1], inst.operands[2])
        raws = [state.raw(operand) for operand in operands]
        addend = state.vector(inst.operands[0] if accumulate else inst.operands[3], KINDS["f32"])
        total = addend.astype(_F64)
        for shift in (0, 16):
            left, right = (to_float((raw >> _U32(shift)).astype(_U16)).astype(_F64) for raw in raws)
            total = total + left * right
        state.write_vector(inst.operands[0], KINDS["f32"], total.astype(_F32))

    return execute


define("v_dot2_f32_f16", _dot2(lambda bits: bits.view(_F16), False))
define("v_dot2c_f32_f16", _dot2(lambda bits: bits.view(_F16), True))
define("v_dot2_f32_bf16", _dot2(bf16_to_f32, False), archs=_GFX950)
define("v_dot2c_f32_bf16", _dot2(bf16_to_f32, True), archs=_GFX950)
