"""Vector integer and bit instructions, carries, compares and selects (ISA chapters 6 and 12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.mode import sources as sources_in_mode
from tilewright.runtime.emulator.amd.operands import KINDS, Array, Where
from tilewright.runtime.emulator.amd.registry import define, instruction
from tilewright.runtime.emulator.amd.salu import bit_field, leading_signs, leading_zeros, reverse_bits
from tilewright.runtime.emulator.amd.state import WaveState
from tilewright.runtime.emulator.amd.valu import Function, saturating, valu

_U16, _U32, _U64, _I32, _I64 = np.uint16, np.uint32, np.uint64, np.int32, np.int64
_GFX950 = ("gfx950",)


def _reversed(operation: Function) -> Function:
    return lambda a, b: operation(b, a)


def _shift(operation: Function, limit: int) -> Function:
    """A "rev" shift: the first source is the amount."""
    return lambda amount, value: operation(value, (amount & amount.dtype.type(limit)).astype(value.dtype))


def _multiply_high(a: Array, b: Array) -> Array:
    wide = _I64 if a.dtype == _I32 else _U64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def _low24(a: Array) -> Array:
    """The low 24 bits of uint32, zero-extended; of int32, sign-extended."""
    if a.dtype == _U32:
        return a & _U32(0xFFFFFF)
    return (a << _I32(8)) >> _I32(8)


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """v_perm_b32: bytes 0..3 come from the second source, 4..7 from the first; 8..13 are signs, 0 and 0xff."""
    shape = np.broadcast_shapes(a.shape, b.shape, selector.shape)
    pair = np.empty((*shape, 2), _U32)
    pair[..., 0], pair[..., 1] = b, a
    octets = pair.view(np.uint8)
    table = np.zeros((*shape, 16), np.uint8)
    table[..., :8] = octets
    for position, source in enumerate((1, 3, 5, 7)):
        table[..., 8 + position] = np.where(octets[..., source] & 0x80, 0xFF, 0)
    table[..., 13:] = 0xFF
    chosen = np.broadcast_to(selector, shape)[..., None].astype(_U32)
    select = np.minimum(np.ascontiguousarray(chosen).view(np.uint8), 13)
    return np.take_along_axis(table, select.astype(np.intp), axis=-1).view(_U32)[..., 0]


def _align(unit: int) -> Function:
    """v_alignbit/v_alignbyte: the 64-bit pair shifted right by ``amount`` bits or bytes."""

    def compute(a: Array, b: Array, amount: Array) -> Array:
        pair = (a.astype(_U64) << _U64(32)) | b
        shift = (amount & _U32(31 if unit == 1 else 3)).astype(_U64) * _U64(unit)
        return (pair >> shift).astype(_U32)

    return compute


def _bfe(value: Array, offset: Array, width: Array) -> Array:
    packed = (offset.view(_U32) & _U32(31)) | ((width.view(_U32) & _U32(31)) << _U32(16))
    shape = np.broadcast_shapes(value.shape, packed.shape)
    return bit_field(np.broadcast_to(value, shape), np.broadcast_to(packed, shape))


def _median(a: Array, b: Array, c: Array) -> Array:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def _sad_u8(a: Array, b: Array, c: Array) -> Array:
    total = c.astype(_U32)
    for shift in (0, 8, 16, 24):
        left, right = (((x >> _U32(shift)) & _U32(255)).astype(_I32) for x in (a, b))
        total = total + np.abs(left - right).astype(_U32)
    return total


def _count_below(a: Array, b: Array, half: int) -> Array:
    """v_mbcnt_lo/hi: set bits of ``a`` that belong to lower lanes, plus ``b``."""
    lanes = np.arange(64) - 32 * half
    below = ((1 << lanes.clip(0, 32)) - 1).astype(_U64).astype(_U32)[None]
    return np.bitwise_count(a & below).astype(_U32) + b


def _dot4(a: Array, b: Array, c: Array) -> Array:
    """v_dot4_i32_i8 / u32_u8: four 8-bit products and an addend."""
    small = np.int8 if c.dtype == _I32 else np.uint8
    total = c.astype(_I64)
    for shift in (0, 8, 16, 24):
        left, right = ((x.view(_U32) >> _U32(shift)).astype(np.uint8).view(small).astype(_I64) for x in (a, b))
        total = total + left * right
    return total.astype(c.dtype)


_SHL, _SHR = np.left_shift, np.right_shift
_TABLE: list[tuple[str, str, Function]] = [
    ("v_mov_b32", "b32 -> b32", lambda a: a),
    ("v_mov_b64", "b64 -> b64", lambda a: a),
    ("v_accvgpr_read_b32", "b32 -> b32", lambda a: a),
    ("v_accvgpr_write_b32", "b32 -> b32", lambda a: a),
    ("v_accvgpr_mov_b32", "b32 -> b32", lambda a: a),
    ("v_not_b32", "b32 -> b32", lambda a: ~a),
    ("v_bfrev_b32", "b32 -> b32", reverse_bits),
    ("v_ffbh_u32", "u32 -> i32", leading_zeros),
    ("v_ffbh_i32", "i32 -> i32", leading_signs),
    ("v_ffbl_b32", "b32 -> i32", lambda a: np.where(a == 0, -1, np.bitwise_count((a & (~a + _U32(1))) - _U32(1)))),
    ("v_bcnt_u32_b32", "b32 u32 -> u32", lambda a, b: np.bitwise_count(a).astype(_U32) + b),
    ("v_mbcnt_lo_u32_b32", "b32 u32 -> u32", lambda a, b: _count_below(a, b, 0)),
    ("v_mbcnt_hi_u32_b32", "b32 u32 -> u32", lambda a, b: _count_below(a, b, 1)),
    ("v_mul_lo_u32", "u32 u32 -> u32", np.multiply),
    ("v_mul_hi_u32", "u32 u32 -> u32", _multiply_high),
    ("v_mul_hi_i32", "i32 i32 -> i32", _multiply_high),
    ("v_mul_u32_u24", "u32 u32 -> u32", lambda a, b: _low24(a) * _low24(b)),
    ("v_mul_i32_i24", "i32 i32 -> i32", lambda a, b: _low24(a) * _low24(b)),
    ("v_mul_hi_u32_u24", "u32 u32 -> u32", lambda a, b: _multiply_high(_low24(a), _low24(b))),
    ("v_mul_hi_i32_i24", "i32 i32 -> i32", lambda a, b: _multiply_high(_low24(a), _low24(b))),
    ("v_mad_u32_u24", "u32 u32 u32 -> u32", lambda a, b, c: _low24(a) * _low24(b) + c),
    ("v_mad_i32_i24", "i32 i32 i32 -> i32", lambda a, b, c: _low24(a) * _low24(b) + c),
    ("v_lshlrev_b32", "u32 b32 -> b32", _shift(_SHL, 31)),
    ("v_lshrrev_b32", "u32 b32 -> b32", _shift(_SHR, 31)),
    ("v_ashrrev_i32", "u32 i32 -> i32", _shift(_SHR, 31)),
    ("v_lshlrev_b64", "u32 b64 -> b64", _shift(_SHL, 63)),
    ("v_lshrrev_b64", "u32 b64 -> b64", _shift(_SHR, 63)),
    ("v_ashrrev_i64", "u32 i64 -> i64", _shift(_SHR, 63)),
    ("v_lshlrev_b16", "u16 u16 -> u16", _shift(_SHL, 15)),
    ("v_lshrrev_b16", "u16 u16 -> u16", _shift(_SHR, 15)),
    ("v_ashrrev_i16", "u16 i16 -> i16", _shift(_SHR, 15)),
    ("v_lshl_add_u32", "u32 u32 u32 -> u32", lambda a, b, c: (a << (b & _U32(31))) + c),
    ("v_lshl_add_u64", "u64 u32 u64 -> u64", lambda a, b, c: (a << (b & _U32(7)).astype(_U64)) + c),
    ("v_add_lshl_u32", "u32 u32 u32 -> u32", lambda a, b, c: (a + b) << (c & _U32(31))),
    ("v_lshl_or_b32", "b32 u32 b32 -> b32", lambda a, b, c: (a << (b & _U32(31))) | c),
    ("v_and_or_b32", "b32 b32 b32 -> b32", lambda a, b, c: (a & b) | c),
    ("v_or3_b32", "b32 b32 b32 -> b32", lambda a, b, c: a | b | c),
    ("v_xad_u32", "u32 u32 u32 -> u32", lambda a, b, c: (a ^ b) + c),
    ("v_add3_u32", "u32 u32 u32 -> u32", lambda a, b, c: a + b + c),
    ("v_bfe_u32", "u32 u32 u32 -> u32", _bfe),
    ("v_bfe_i32", "i32 u32 u32 -> i32", _bfe),
    ("v_bfi_b32", "b32 b32 b32 -> b32", lambda a, b, c: (a & b) | (~a & c)),
    ("v_bfm_b32", "u32 u32 -> b32", lambda a, b: ((_U32(1) << (a & _U32(31))) - _U32(1)) << (b & _U32(31))),
    ("v_perm_b32", "b32 b32 b32 -> b32", _permute_bytes),
    ("v_alignbit_b32", "b32 b32 u32 -> b32", _align(1)),
    ("v_alignbyte_b32", "b32 b32 u32 -> b32", _align(8)),
    ("v_sad_u8", "u32 u32 u32 -> u32", _sad_u8),
    ("v_dot4_i32_i8", "i32 i32 i32 -> i32", _dot4),
    ("v_dot4c_i32_i8", "i32 i32 old -> i32", _dot4),
    ("v_dot4_u32_u8", "u32 u32 u32 -> u32", _dot4),
    ("v_mul_lo_u16", "u16 u16 -> u16", np.multiply),
    ("v_mad_legacy_u16", "u16 u16 u16 -> u16", lambda a, b, c: a * b + c),
    ("v_and_b32", "b32 b32 -> b32", np.bitwise_and),
    ("v_or_b32", "b32 b32 -> b32", np.bitwise_or),
    ("v_xor_b32", "b32 b32 -> b32", np.bitwise_xor),
    ("v_xnor_b32", "b32 b32 -> b32", lambda a, b: ~(a ^ b)),
]
_HALVES = {"v_mov_b64": "apart", "v_lshlrev_b64": "up", "v_lshl_add_u64": "up"}
for _name, _signature, _function in _TABLE:
    valu(_name, _signature, _function, halves=_HALVES.get(_name, "mixed"))

for _kind, _dtype in (("u32", _U32), ("i32", _I32), ("u16", _U16), ("i16", np.int16)):
    _pair = f"{_kind} {_kind} -> {_kind}"
    _triple = f"{_kind} {_kind} {_kind} -> {_kind}"
    _preserve = _kind == "i16"
    valu(f"v_add_{_kind}", _pair, np.add, clamp=saturating(np.add, _dtype), preserves_high=_preserve)
    valu(f"v_sub_{_kind}", _pair, np.subtract, clamp=saturating(np.subtract, _dtype), preserves_high=_preserve)
    if _kind[0] == "u":
        valu(
            f"v_subrev_{_kind}",
            _pair,
            _reversed(np.subtract),
            clamp=_reversed(saturating(np.subtract, _dtype)),
        )
    for _name, _function in (("min", np.minimum), ("max", np.maximum)):
        valu(f"v_{_name}_{_kind}", _pair, _function)
        valu(
            f"v_{_name}3_{_kind}",
            _triple,
            lambda a, b, c, f=_function: f(f(a, b), c),
            preserves_high="16" in _kind,
        )
    valu(f"v_med3_{_kind}", _triple, _median, preserves_high="16" in _kind)
for _kind in ("u16", "i16"):
    valu(f"v_mad_{_kind}", f"{_kind} {_kind} {_kind} -> {_kind}", lambda a, b, c: a * b + c, preserves_high=True)
valu("v_mad_u32_u16", "u16 u16 u32 -> u32", lambda a, b, c: a.astype(_U32) * b + c)
valu("v_mad_i32_i16", "i16 i16 i32 -> i32", lambda a, b, c: a.astype(_I32) * b + c)


def _carry(operation: str, reverse: bool, with_carry: bool) -> Callable[[WaveState, Instruction], None]:
    """v_add_co / v_addc_co and the subtractions: operands D, carry out, S0, S1 [, carry in]."""
    sign = 1 if operation == "add" else -1

    def execute(state: WaveState, inst: Instruction) -> None:
        left, right = (state.vector(inst.operands[i], KINDS["u32"]).astype(_I64) for i in (2, 3))
        if reverse:
            left, right = right, left
        wide = left + sign * right
        if with_carry:
            wide = wide + sign * state.lane_mask(inst.operands[4]).astype(_I64)
        value = wide.astype(_U32)
        flag = (wide < 0) | (wide > 0xFFFFFFFF)
        state.write_vector(inst.operands[0], KINDS["u32"], value)
        state.write_lane_mask(inst.operands[1], flag)

    return execute


for _operation, _plain, _with in (("add", "add_co", "addc_co"), ("sub", "sub_co", "subb_co")):
    define(f"v_{_plain}_u32", _carry(_operation, False, False))
    define(f"v_{_with}_u32", _carry(_operation, False, True))
define("v_subrev_co_u32", _carry("sub", True, False))
define("v_subbrev_co_u32", _carry("sub", True, True))


def _mad64(kind: str, wide_kind: str) -> Callable[[WaveState, Instruction], None]:
    """v_mad_u64_u32 / v_mad_i64_i32: D, carry out, S0, S1, S2 (64-bit)."""

    def execute(state: WaveState, inst: Instruction) -> None:
        wide = KINDS[wide_kind]
        a, b = (state.vector(inst.operands[i], KINDS[kind]).astype(wide.dtype) for i in (2, 3))
        c = state.vector(inst.operands[4], wide)
        value = a * b + c
        # LLVM leaves the high half of S2 undefined where it wants the low half of D alone
        state.write_vector(inst.operands[0], wide, value, halves="up")
        unsigned = value.view(_U64) < c.view(_U64)
        state.write_lane_mask(inst.operands[1], unsigned)

    return execute


define("v_mad_u64_u32", _mad64("u32", "u64"))
define("v_mad_i64_i32", _mad64("i32", "i64"))


def _select(kind: str) -> Callable[[WaveState, Instruction], None]:
    """v_cndmask: S1 where the mask is set, else S0. Sign modifiers act on the 32 bits as a float."""

    def execute(state: WaveState, inst: Instruction) -> None:
        modified = any(operand.negate or operand.absolute for operand in inst.operands[1:3])
        source_kind = KINDS["f32" if modified else kind]
        zero, one = (state.vector(inst.operands[i], source_kind) for i in (1, 2))
        value = np.where(state.lane_mask(inst.operands[3]), one, zero)
        state.write_vector(inst.operands[0], KINDS[kind], value.view(KINDS[kind].dtype))

    return execute


define("v_cndmask_b32", _select("b32"))


@instruction("v_swap_b32")
def _swap(state: WaveState, inst: Instruction) -> None:
    first, second = (state.raw(operand).copy() for operand in inst.operands)
    state.write_vgpr(inst.operands[0].index, second)
    state.write_vgpr(inst.operands[1].index, first)


@instruction("v_nop")
def _nop(state: WaveState, inst: Instruction) -> None:
    """Nothing."""


_ORDER: dict[str, Function] = {
    "f": lambda a, b: np.zeros(np.broadcast_shapes(a.shape, b.shape), np.bool_),
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_INTEGER_COMPARE: dict[str, Function] = {
    **_ORDER,
    "ne": np.not_equal,
    "t": lambda a, b: np.ones(np.broadcast_shapes(a.shape, b.shape), np.bool_),
}


def _unordered(a: Array, b: Array) -> Array:
    result: Array = np.isnan(a) | np.isnan(b)
    return result


def _inverted(function: Function) -> Function:
    return lambda a, b: ~function(a, b)


_FLOAT_COMPARE: dict[str, Function] = {
    **_ORDER,
    "lg": lambda a, b: (a < b) | (a > b),
    "o": lambda a, b: ~_unordered(a, b),
    "u": _unordered,
    "nge": _inverted(np.greater_equal),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": _inverted(np.greater),
    "nle": _inverted(np.less_equal),
    "neq": np.not_equal,
    "nlt": _inverted(np.less),
    "tru": _INTEGER_COMPARE["t"],
}


def _class(value: Array, mask: Array) -> Array:
    """v_cmp_class: bits 0.. are sNaN, qNaN, -inf, -normal, -denormal, -0, +0, +denormal, +normal, +inf."""
    bits = value.view(f"u{value.dtype.itemsize}")
    mantissa_bits = {2: 10, 4: 23, 8: 52}[value.dtype.itemsize]
    quiet = ((bits >> bits.dtype.type(mantissa_bits - 1)) & bits.dtype.type(1)) != 0
    nan, negative = np.isnan(value), np.signbit(value)
    tiny = np.abs(value) < np.finfo(value.dtype).smallest_normal
    positive_rank = np.select([value == 0, tiny, np.isinf(value)], [6, 7, 9], 8)
    rank = np.where(negative, 11 - positive_rank, positive_rank)
    rank = np.where(nan, np.where(quiet, 1, 0), rank)
    result: Array = ((mask >> rank.astype(_U32)) & _U32(1)) != 0
    return result


def _vector_compare(kind: str, function: Function, sets_exec: bool, right_kind: str = "") -> Any:
    """VOPC: a lane mask to VCC or an SGPR pair; v_cmpx also to EXEC (ISA chapter 6)."""

    def execute(state: WaveState, inst: Instruction) -> None:
        destination, left, right = inst.operands
        a = state.vector(left, KINDS[kind])
        b = state.vector(right, KINDS[right_kind or kind])
        if function is not _class:
            a, b = sources_in_mode(state, KINDS[kind], a, b)
        flag = np.broadcast_to(function(a, b), state.lanes.shape)
        assert destination.where is Where.SCALAR
        active = flag & state.lanes
        state.write_lane_mask(destination, active)
        if sets_exec:
            octets = np.packbits(active, axis=1, bitorder="little").view(_U64)[:, 0]
            state.write_exec(octets)

    return execute


for _prefix, _sets_exec in (("v_cmp", False), ("v_cmpx", True)):
    for _kind in ("u16", "i16", "u32", "i32", "u64", "i64"):
        for _condition, _function in _INTEGER_COMPARE.items():
            define(f"{_prefix}_{_condition}_{_kind}", _vector_compare(_kind, _function, _sets_exec))
    for _kind in ("f16", "f32", "f64"):
        for _condition, _function in _FLOAT_COMPARE.items():
            define(f"{_prefix}_{_condition}_{_kind}", _vector_compare(_kind, _function, _sets_exec))
        define(f"{_prefix}_class_{_kind}", _vector_compare(_kind, _class, _sets_exec, "b32"))


def _bitop3(bits: int) -> Callable[[WaveState, Instruction], None]:
    """CDNA4 v_bitop3: bit i of the 8-bit truth table for i = 4*a + 2*b + c."""

    def execute(state: WaveState, inst: Instruction) -> None:
        kind = KINDS[f"b{bits}"]
        a, b, c = (state.vector(inst.operands[i], kind) for i in (1, 2, 3))
        table = inst.number("bitop3")
        value = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), kind.dtype)
        for term in range(8):
            if table >> term & 1:
                value |= (a if term & 4 else ~a) & (b if term & 2 else ~b) & (c if term & 1 else ~c)
        state.write_vector(inst.operands[0], kind, value)

    return execute


define("v_bitop3_b32", _bitop3(32), archs=_GFX950)
define("v_bitop3_b16", _bitop3(16), archs=_GFX950)
