"""Scalar ALU: integer arithmetic, compares, masks (ISA chapter 5, "Scalar ALU Operations")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.amd.counters import Counter
from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.operands import EXEC, KINDS, Array, Operand, Where
from tilewright.runtime.emulator.amd.registry import define, instruction
from tilewright.runtime.emulator.amd.state import WaveState

_U32, _U64 = np.uint32, np.uint64
Function = Callable[..., Any]


#: with EXEC as an operand they give active lanes a constant; what others have, a lane mask's readers do not see
_SETS_ACTIVE = ("s_or_b64", "s_andn2_b64")


def _is_exec(operand: Operand) -> bool:
    return operand.where is Where.SCALAR and operand.index == EXEC


def _salu(name: str, signature: str, function: Function, scc: str = "", halves: str = "mixed") -> None:
    """Enter ``name`` with a signature such as "u32 u32 -> u32".

    ``scc``: "" leaves SCC alone, "nonzero" sets it to result != 0, "given" takes it from the
    function, which then returns (result, scc). A source "scc" is the current SCC. ``halves``: which
    halves of 64-bit sources those of the result depend on (`WaveState`).
    """
    sources, _, result = (part.strip() for part in signature.partition("->"))
    kinds = sources.split()
    result_kind = KINDS[result]

    def execute(state: WaveState, inst: Instruction) -> None:
        arguments: list[Array] = []
        position = 1
        for kind in kinds:
            if kind == "scc":
                arguments.append(state.scc_selected)
            elif kind == "old":
                arguments.append(state.scalar(inst.operands[0], result_kind))
            else:
                arguments.append(state.scalar(inst.operands[position], KINDS[kind]))
                position += 1
        if name in _SETS_ACTIVE and any(_is_exec(operand) for operand in inst.operands[1:]):
            state.forget_taint()
        value = function(*arguments)
        if scc == "given":
            value, flag = value
            state.write_scalar(inst.operands[0], result_kind, value)
            state.write_scc(flag)
            return
        state.write_scalar(inst.operands[0], result_kind, value, halves)
        if scc == "nonzero":
            state.write_scc(value != 0)

    define(name, execute)


def _carry_add(a: Array, b: Array, carry: Any = 0) -> tuple[Array, Array]:
    wide = a.astype(_U64) + b + np.asarray(carry, _U64)
    return wide.astype(_U32), wide > _U64(0xFFFFFFFF)


def _borrow_sub(a: Array, b: Array, borrow: Any = 0) -> tuple[Array, Array]:
    wide = a.astype(np.int64) - b.astype(np.int64) - np.asarray(borrow, np.int64)
    return wide.astype(_U32), wide < 0


def _signed(operation: Function) -> Function:
    """Signed add or subtract: SCC is the overflow."""

    def compute(a: Array, b: Array) -> tuple[Array, Array]:
        wide = operation(a.astype(np.int64), b.astype(np.int64))
        narrow = wide.astype(np.int32)
        return narrow, narrow != wide

    return compute


def _popcount(a: Array) -> Array:
    return np.bitwise_count(a)


def _find_first(a: Array, bits: int) -> Array:
    """Index of the lowest set bit, -1 if none."""
    lowest = a & (~a + a.dtype.type(1))
    return np.where(a == 0, -1, np.bitwise_count(lowest - a.dtype.type(1)).astype(np.int32))


def reverse_bits(a: Array) -> Array:
    """Bit reversal of uint32 or uint64."""
    octets = np.ascontiguousarray(a)[..., None].view(np.uint8)
    flipped = np.packbits(np.unpackbits(octets, axis=-1), axis=-1, bitorder="little")
    return np.ascontiguousarray(flipped[..., ::-1]).view(a.dtype)[..., 0]


def leading_zeros(a: Array) -> Array:
    """Leading zeros of uint32 or uint64, -1 for zero (s_flbit, v_ffbh)."""
    bits = a.dtype.itemsize * 8
    smeared = a.copy()
    shift = 1
    while shift < bits:
        smeared = smeared | (smeared >> a.dtype.type(shift))
        shift *= 2
    return np.where(a == 0, -1, bits - np.bitwise_count(smeared).astype(np.int32))


def leading_signs(a: Array) -> Array:
    """Bits before the first that differs from the sign, -1 if all are equal (s_flbit_i32, v_ffbh_i32)."""
    unsigned = np.where(a < 0, ~a, a).view(_U32)
    return leading_zeros(unsigned)


def bit_field(a: Array, packed: Array) -> Array:
    """s_bfe: offset in bits 5:0 (64-bit) or 4:0, width in bits 22:16; sign-extends signed dtypes."""
    bits = a.dtype.itemsize * 8
    offset = (packed & _U32(bits - 1)).astype(np.int64)
    width = np.minimum((packed >> _U32(16)) & _U32(0x7F), _U32(bits)).astype(np.int64)
    width = np.minimum(width, bits - offset)
    unsigned = a.view(f"u{a.dtype.itemsize}").astype(_U64)
    top = (unsigned << (64 - offset - width).clip(0, 63).astype(_U64)).view(np.int64 if a.dtype.kind == "i" else _U64)
    value = top >> (64 - width).clip(0, 63).astype(top.dtype)
    return np.where(width == 0, 0, value).astype(a.dtype)


def _bit_mask(width: Array, offset: Array, dtype: Any, limit: int) -> Array:
    one = dtype(1)
    return ((one << (width & _U32(limit)).astype(dtype)) - one) << (offset & _U32(limit)).astype(dtype)


def _single_bit(position: Array, dtype: Any) -> Array:
    result: Array = dtype(1) << (position & _U32(dtype(0).nbytes * 8 - 1)).astype(dtype)
    return result


def _shift(operation: Function, limit: int) -> Function:
    return lambda a, b: operation(a, (b & _U32(limit)).astype(a.dtype))


def _multiply_high(a: Array, b: Array) -> Array:
    wide = np.int64 if a.dtype == np.int32 else _U64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def _shift_add(amount: int) -> Function:
    def compute(a: Array, b: Array) -> tuple[Array, Array]:
        wide = (a.astype(_U64) << _U64(amount)) + b
        return wide.astype(_U32), wide > _U64(0xFFFFFFFF)

    return compute


def _absolute_difference(a: Array, b: Array) -> Array:
    return np.abs(a - b)


def _choose(operation: Function) -> Function:
    """min or max: SCC says that the first operand won."""
    return lambda a, b: (operation(a, b), operation(a, b) == a)


_SHL, _SHR = np.left_shift, np.right_shift
_TABLE: list[tuple[str, str, Function, str]] = [
    ("s_mov_b32", "b32 -> b32", lambda a: a, ""),
    ("s_mov_b64", "b64 -> b64", lambda a: a, ""),
    ("s_add_u32", "u32 u32 -> u32", _carry_add, "given"),
    ("s_addc_u32", "u32 u32 scc -> u32", _carry_add, "given"),
    ("s_sub_u32", "u32 u32 -> u32", _borrow_sub, "given"),
    ("s_subb_u32", "u32 u32 scc -> u32", _borrow_sub, "given"),
    ("s_add_i32", "i32 i32 -> i32", _signed(np.add), "given"),
    ("s_sub_i32", "i32 i32 -> i32", _signed(np.subtract), "given"),
    ("s_mul_i32", "i32 i32 -> i32", np.multiply, ""),
    ("s_mul_hi_u32", "u32 u32 -> u32", _multiply_high, ""),
    ("s_mul_hi_i32", "i32 i32 -> i32", _multiply_high, ""),
    ("s_abs_i32", "i32 -> i32", np.abs, "nonzero"),
    ("s_absdiff_i32", "i32 i32 -> i32", _absolute_difference, "nonzero"),
    ("s_min_i32", "i32 i32 -> i32", _choose(np.minimum), "given"),
    ("s_min_u32", "u32 u32 -> u32", _choose(np.minimum), "given"),
    ("s_max_i32", "i32 i32 -> i32", _choose(np.maximum), "given"),
    ("s_max_u32", "u32 u32 -> u32", _choose(np.maximum), "given"),
    ("s_cselect_b32", "b32 b32 scc -> b32", lambda a, b, scc: np.where(scc, a, b), ""),
    ("s_cselect_b64", "b64 b64 scc -> b64", lambda a, b, scc: np.where(scc, a, b), ""),
    ("s_cmov_b32", "b32 old scc -> b32", lambda a, old, scc: np.where(scc, a, old), ""),
    ("s_cmov_b64", "b64 old scc -> b64", lambda a, old, scc: np.where(scc, a, old), ""),
    ("s_lshl_b32", "b32 u32 -> b32", _shift(_SHL, 31), "nonzero"),
    ("s_lshr_b32", "b32 u32 -> b32", _shift(_SHR, 31), "nonzero"),
    ("s_ashr_i32", "i32 u32 -> i32", _shift(_SHR, 31), "nonzero"),
    ("s_lshl_b64", "b64 u32 -> b64", _shift(_SHL, 63), "nonzero"),
    ("s_lshr_b64", "b64 u32 -> b64", _shift(_SHR, 63), "nonzero"),
    ("s_ashr_i64", "i64 u32 -> i64", _shift(_SHR, 63), "nonzero"),
    ("s_bfe_u32", "u32 u32 -> u32", bit_field, "nonzero"),
    ("s_bfe_i32", "i32 u32 -> i32", bit_field, "nonzero"),
    ("s_bfe_u64", "u64 u32 -> u64", bit_field, "nonzero"),
    ("s_bfe_i64", "i64 u32 -> i64", bit_field, "nonzero"),
    ("s_bfm_b32", "u32 u32 -> b32", lambda a, b: _bit_mask(a, b, _U32, 31), ""),
    ("s_bfm_b64", "u32 u32 -> b64", lambda a, b: _bit_mask(a, b, _U64, 63), ""),
    ("s_sext_i32_i8", "i32 -> i32", lambda a: a.astype(np.int8), ""),
    ("s_sext_i32_i16", "i32 -> i32", lambda a: a.astype(np.int16), ""),
    ("s_brev_b32", "b32 -> b32", reverse_bits, ""),
    ("s_brev_b64", "b64 -> b64", reverse_bits, ""),
    ("s_bcnt1_i32_b32", "b32 -> i32", _popcount, "nonzero"),
    ("s_bcnt1_i32_b64", "b64 -> i32", _popcount, "nonzero"),
    ("s_bcnt0_i32_b32", "b32 -> i32", lambda a: _popcount(~a), "nonzero"),
    ("s_bcnt0_i32_b64", "b64 -> i32", lambda a: _popcount(~a), "nonzero"),
    ("s_ff1_i32_b32", "b32 -> i32", lambda a: _find_first(a, 32), ""),
    ("s_ff1_i32_b64", "b64 -> i32", lambda a: _find_first(a, 64), ""),
    ("s_ff0_i32_b32", "b32 -> i32", lambda a: _find_first(~a, 32), ""),
    ("s_ff0_i32_b64", "b64 -> i32", lambda a: _find_first(~a, 64), ""),
    ("s_flbit_i32_b32", "b32 -> i32", leading_zeros, ""),
    ("s_flbit_i32_b64", "b64 -> i32", leading_zeros, ""),
    ("s_flbit_i32", "i32 -> i32", leading_signs, ""),
    ("s_bitset0_b32", "u32 old -> b32", lambda a, old: old & ~_single_bit(a, _U32), ""),
    ("s_bitset1_b32", "u32 old -> b32", lambda a, old: old | _single_bit(a, _U32), ""),
    ("s_bitset0_b64", "u32 old -> b64", lambda a, old: old & ~_single_bit(a, _U64), ""),
    ("s_bitset1_b64", "u32 old -> b64", lambda a, old: old | _single_bit(a, _U64), ""),
    ("s_pack_ll_b32_b16", "b32 b32 -> b32", lambda a, b: (a & _U32(0xFFFF)) | (b << _U32(16)), ""),
    ("s_pack_lh_b32_b16", "b32 b32 -> b32", lambda a, b: (a & _U32(0xFFFF)) | (b & _U32(0xFFFF0000)), ""),
    ("s_pack_hh_b32_b16", "b32 b32 -> b32", lambda a, b: (a >> _U32(16)) | (b & _U32(0xFFFF0000)), ""),
]


_HALVES = {"s_mov_b64": "apart", "s_cselect_b64": "apart", "s_cmov_b64": "apart", "s_lshl_b64": "up"}
for _name, _signature, _function, _scc in _TABLE:
    _salu(_name, _signature, _function, _scc, _HALVES.get(_name, "mixed"))
for _amount in (1, 2, 3, 4):
    _salu(f"s_lshl{_amount}_add_u32", "u32 u32 -> u32", _shift_add(_amount), "given")

_LOGIC: dict[str, Function] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
for _bits in (32, 64):
    for _name, _function in _LOGIC.items():
        _salu(f"s_{_name}_b{_bits}", f"b{_bits} b{_bits} -> b{_bits}", _function, "nonzero", "apart")
    _salu(f"s_not_b{_bits}", f"b{_bits} -> b{_bits}", lambda a: ~a, "nonzero")


def _quad_mask(a: Array) -> Array:
    shifts = np.arange(16, dtype=_U64) * _U64(4)
    quads = ((a[:, None] >> shifts) & _U64(15)) != 0
    return (quads.astype(_U64) << np.arange(16, dtype=_U64)).sum(axis=1, dtype=_U64)


def _replicate_bits(a: Array) -> Array:
    """Each bit twice."""
    shifts = np.arange(32, dtype=_U64)
    bits = (a.astype(_U64)[:, None] >> shifts) & _U64(1)
    return (bits * _U64(3) << shifts * _U64(2)).sum(axis=1, dtype=_U64)


_salu("s_bitreplicate_b64_b32", "b32 -> b64", _replicate_bits)
_salu("s_quadmask_b64", "b64 -> b64", _quad_mask, "nonzero")


def _whole_quads(a: Array) -> Array:
    shifts = np.arange(16, dtype=_U64) * _U64(4)
    quads = ((a[:, None] >> shifts) & _U64(15)) != 0
    return (np.where(quads, _U64(15), _U64(0)) << shifts).sum(axis=1, dtype=_U64)


_salu("s_wqm_b64", "b64 -> b64", _whole_quads, "nonzero")


def _save_exec(function: Function) -> Callable[[WaveState, Instruction], None]:
    """D = EXEC; EXEC = function(source, EXEC); SCC = EXEC != 0."""

    def execute(state: WaveState, inst: Instruction) -> None:
        source = state.scalar(inst.operands[1], KINDS["b64"])
        old = state.read_sgpr64(EXEC).copy()
        new = function(source, old)
        state.write_exec(new)
        state.write_sgpr64(inst.operands[0].index, old)
        state.write_scc(new != 0)

    return execute


for _name, _function in {
    **_LOGIC,
    "andn1": lambda a, b: ~a & b,
    "orn1": lambda a, b: ~a | b,
}.items():
    define(f"s_{_name}_saveexec_b64", _save_exec(_function))

_COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "lg": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
}


def _compare(kind: str, function: Function) -> Callable[[WaveState, Instruction], None]:
    def execute(state: WaveState, inst: Instruction) -> None:
        left, right = (state.scalar(operand, KINDS[kind]) for operand in inst.operands)
        state.require_defined_scalar("a scalar comparison")
        state.write_scc(function(left, right))

    return execute


def _compare_immediate(kind: str, function: Function) -> Callable[[WaveState, Instruction], None]:
    def execute(state: WaveState, inst: Instruction) -> None:
        left = state.scalar(inst.operands[0], KINDS[kind])
        state.require_defined_scalar("a scalar comparison")
        state.write_scc(function(left, _immediate16(inst, 1, signed=kind == "i32")))

    return execute


def _immediate16(inst: Instruction, position: int, signed: bool = True) -> Any:
    bits = inst.operands[position].value & 0xFFFF
    return np.int32(bits - 0x10000 if bits & 0x8000 else bits) if signed else np.uint32(bits)


for _condition, _function in _COMPARE.items():
    for _kind in ("i32", "u32"):
        define(f"s_cmp_{_condition}_{_kind}", _compare(_kind, _function))
        define(f"s_cmpk_{_condition}_{_kind}", _compare_immediate(_kind, _function))
define("s_cmp_eq_u64", _compare("u64", np.equal))
define("s_cmp_lg_u64", _compare("u64", np.not_equal))


def _bit_compare(bits: int, expected: int) -> Callable[[WaveState, Instruction], None]:
    def execute(state: WaveState, inst: Instruction) -> None:
        value = state.scalar(inst.operands[0], KINDS[f"b{bits}"])
        position = state.scalar(inst.operands[1], KINDS["u32"]) & _U32(bits - 1)
        state.require_defined_scalar("a scalar comparison")
        state.write_scc(((value >> position.astype(value.dtype)) & value.dtype.type(1)) == expected)

    return execute


for _bits in (32, 64):
    for _expected in (0, 1):
        define(f"s_bitcmp{_expected}_b{_bits}", _bit_compare(_bits, _expected))


@instruction("s_movk_i32")
def _movk(state: WaveState, inst: Instruction) -> None:
    state.write_scalar(inst.operands[0], KINDS["i32"], np.array([_immediate16(inst, 1)], np.int32))


@instruction("s_cmovk_i32")
def _cmovk(state: WaveState, inst: Instruction) -> None:
    old = state.scalar(inst.operands[0], KINDS["i32"])
    state.write_scalar(inst.operands[0], KINDS["i32"], np.where(state.scc_selected, _immediate16(inst, 1), old))


@instruction("s_addk_i32")
def _addk(state: WaveState, inst: Instruction) -> None:
    old = state.scalar(inst.operands[0], KINDS["i32"])
    value, overflow = _signed(np.add)(old, np.array([_immediate16(inst, 1)], np.int32))
    state.write_scalar(inst.operands[0], KINDS["i32"], value)
    state.write_scc(overflow)


@instruction("s_mulk_i32")
def _mulk(state: WaveState, inst: Instruction) -> None:
    old = state.scalar(inst.operands[0], KINDS["i32"])
    state.write_scalar(inst.operands[0], KINDS["i32"], old * _immediate16(inst, 1))


@instruction("s_memtime", "s_memrealtime")
def _time(state: WaveState, inst: Instruction) -> None:
    """A clock that counts executed instructions: deterministic, and it advances."""
    assert inst.operands[0].where is Where.SCALAR
    state.issue(Counter.SCALAR)
    state.write_scalar(inst.operands[0], KINDS["u64"], np.array([state.memory.clock], _U64))


@instruction(
    "s_waitcnt_depctr",
    "s_nop",
    "s_sleep",
    "s_setprio",
    "s_sethalt",
    "s_inst_prefetch",
    "s_sendmsg",
    "s_code_end",
    "s_dcache_inv",
    "s_dcache_wb",
    "s_icache_inv",
    "s_ttracedata",
    "s_set_gpr_idx_off",
    "buffer_wbinvl1",
    "buffer_wbinvl1_vol",
)
def _no_effect(state: WaveState, inst: Instruction) -> None:
    """No effect on values: priorities, hints, caches that hold nothing stale here."""
