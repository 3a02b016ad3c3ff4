"""Integer arithmetic, logic, shifts and comparisons (PTX ISA 9.7.1, 9.7.2, 9.7.6 to 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.operands import dest, integer, source
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import TYPES, Array, Type

_U16, _U32, _U64, _I64 = np.uint16, np.uint32, np.uint64, np.int64
Function = Callable[..., Any]


def elementwise(inst: Instruction, result: Type | str, types: list[Type | str], function: Function) -> Execute:
    """D = function(operands...), each in its type."""
    result = TYPES[result] if isinstance(result, str) else result
    inst.need(len(types) + 1)
    write = dest(inst, inst.operands[0], result)
    reads = [source(inst, operand, t) for operand, t in zip(inst.operands[1:], types, strict=True)]
    dtype = result.dtype

    def finish(state: State, value: Any) -> None:
        write(state, value if value.dtype == dtype else value.astype(dtype))

    if len(reads) == 1:
        (first,) = reads
        return lambda state: finish(state, function(first(state)))
    if len(reads) == 2:
        first, second = reads
        return lambda state: finish(state, function(first(state), second(state)))
    return lambda state: finish(state, function(*[read(state) for read in reads]))


def halves(function: Function, type_: Type) -> Function:
    """A function of 16-bit values applied to both halves of uint32 words."""
    dtype = type_.dtype

    def compute(*words: Array) -> Array:
        low = function(*[word.astype(_U16).view(dtype) for word in words])
        high = function(*[(word >> _U32(16)).astype(_U16).view(dtype) for word in words])
        return low.view(_U16).astype(_U32) | high.view(_U16).astype(_U32) << _U32(16)

    return compute


# --- arithmetic ------------------------------------------------------------------------------------


def wide_type(type_: Type) -> Type:
    """The type of twice the width."""
    return TYPES[f"{type_.kind}{2 * type_.bits}"]


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}").type
        result: Array = (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
        return result
    half, low_mask = _U64(32), _U64(0xFFFFFFFF)
    x, y = a.view(_U64), b.view(_U64)
    x0, x1, y0, y1 = x & low_mask, x >> half, y & low_mask, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    carry = (middle & low_mask) + x0 * y1
    high = x1 * y1 + (middle >> half) + (carry >> half)
    if a.dtype == _I64:
        high = high - np.where(a < 0, y, _U64(0)) - np.where(b < 0, x, _U64(0))
    return high.view(a.dtype)


def divide(a: Array, b: Array) -> Array:
    """Quotient toward zero; by zero: all ones (PTX leaves it open)."""
    if a.dtype.kind == "u":
        safe = np.where(b == 0, b.dtype.type(1), b)
        return np.where(b == 0, ~b.dtype.type(0), a // safe)
    unsigned = np.dtype(f"u{a.dtype.itemsize}").type
    magnitude = _magnitude(a, unsigned) // np.maximum(_magnitude(b, unsigned), unsigned(1))
    value = magnitude.view(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), np.where((a < 0) != (b < 0), -value, value))


def remainder(a: Array, b: Array) -> Array:
    """The remainder with the sign of ``a``; by zero: ``a``."""
    if a.dtype.kind == "u":
        return np.where(b == 0, a, a % np.where(b == 0, b.dtype.type(1), b))
    return np.where(b == 0, a, a - divide(a, b) * b)


def _magnitude(value: Array, unsigned: Any) -> Array:
    result: Array = np.where(value < 0, -value, value).view(unsigned)
    return result


def _saturate_add(a: Array, b: Array, sign: int) -> Array:
    wide = a.astype(_I64) + sign * b.astype(_I64)
    return np.clip(wide, -(1 << 31), (1 << 31) - 1).astype(np.int32)


def integer_add(inst: Instruction, sign: int) -> Execute:
    """add and sub, with .sat and .cc (9.7.1, 9.7.2)."""
    saturate, sets_carry = inst.flag("sat"), inst.flag("cc")
    type_ = inst.type()
    if saturate:
        return elementwise(inst, type_, [type_, type_], lambda a, b: _saturate_add(a, b, sign))
    if sets_carry:
        return _with_carry(inst, type_, sign, False)
    compute: Function = (lambda a, b: a + b) if sign > 0 else (lambda a, b: a - b)
    if type_.name.endswith("x2"):
        compute = halves(compute, TYPES[type_.name.removesuffix("x2")])
    return elementwise(inst, type_, [type_, type_], compute)


def _with_carry(inst: Instruction, type_: Type, sign: int, uses: bool) -> Execute:
    """Addition and subtraction with CC.CF, which subtraction reads and sets as a borrow."""
    bits = TYPES[f"u{type_.bits}"]
    write = dest(inst, inst.operands[0], bits)
    first, second = (source(inst, operand, bits) for operand in inst.operands[1:])

    def execute(state: State) -> None:
        a, b = np.broadcast_arrays(first(state), second(state))
        carry = state.carry[state.w] if uses else np.zeros(state.lanes.shape, np.bool_)
        one = carry.astype(bits.dtype)
        if sign > 0:
            value = a + b
            out = value < a
            total = value + one
            out = out | (total < value)
        else:
            value = a - b
            out = a < b
            total = value - one
            out = out | (value < one)
        state.carry[state.w] = np.where(state.lanes, out, state.carry[state.w])
        write(state, total)

    return execute


@instruction("addc", "subc")
def _add_with_carry(inst: Instruction) -> Execute:
    inst.flag("cc")
    return _with_carry(inst, inst.type(), 1 if inst.name == "addc" else -1, True)


def integer_multiply(inst: Instruction, adds: bool) -> Execute:
    """mul and mad: .lo, .hi or .wide."""
    part = inst.one_of("lo", "hi", "wide")
    saturate = inst.flag("sat")
    type_ = inst.type()
    if part == "wide":
        wide = wide_type(type_)
        dtype = wide.dtype
        if adds:
            return elementwise(inst, wide, [type_, type_, wide], lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c)
        return elementwise(inst, wide, [type_, type_], lambda a, b: a.astype(dtype) * b.astype(dtype))
    product: Function = multiply_high if part == "hi" else lambda a, b: a * b
    if saturate:
        return elementwise(inst, type_, [type_] * 3, lambda a, b, c: _saturate_add(product(a, b), c, 1))
    if adds:
        return elementwise(inst, type_, [type_] * 3, lambda a, b, c: product(a, b) + c)
    return elementwise(inst, type_, [type_, type_], product)


@instruction("mul24", "mad24")
def _multiply24(inst: Instruction) -> Execute:
    part = inst.one_of("lo", "hi")
    type_ = inst.type("u32", "s32")
    shift = _I64(0 if part == "lo" else 16)

    def low24(a: Array) -> Array:
        wide = a.astype(_I64) & 0xFFFFFF
        return wide - ((wide >> 23) << 24) if type_.kind == "s" else wide

    def product(a: Array, b: Array) -> Array:
        return (low24(a) * low24(b) >> shift).astype(_U32).view(type_.dtype)

    if inst.name == "mul24":
        return elementwise(inst, type_, [type_, type_], product)
    return elementwise(inst, type_, [type_] * 3, lambda a, b, c: product(a, b) + c)


@instruction("rem")
def _rem(inst: Instruction) -> Execute:
    type_ = inst.type()
    return elementwise(inst, type_, [type_, type_], remainder)


@instruction("sad")
def _sad(inst: Instruction) -> Execute:
    type_ = inst.type()
    return elementwise(inst, type_, [type_] * 3, lambda a, b, c: c + np.where(a < b, b - a, a - b))


@instruction("dp4a")
def _dot4(inst: Instruction) -> Execute:
    a_type, b_type = inst.types()
    result = TYPES["u32" if a_type.kind == b_type.kind == "u" else "s32"]

    def octets(value: Array, type_: Type) -> Array:
        data = np.ascontiguousarray(value)[..., None].view(np.int8 if type_.kind == "s" else np.uint8)
        return data.astype(_I64)

    def compute(a: Array, b: Array, c: Array) -> Array:
        return ((octets(a, a_type) * octets(b, b_type)).sum(-1) + c).astype(_U32).view(result.dtype)

    return elementwise(inst, result, ["b32", "b32", result], compute)


@instruction("dp2a")
def _dot2(inst: Instruction) -> Execute:
    """c + the products of a's halves with the lower (.lo) or upper (.hi) two octets of b (9.7.1.24)."""
    upper = inst.one_of("lo", "hi") == "hi"
    a_type, b_type = inst.types()
    result = TYPES["u32" if a_type.kind == b_type.kind == "u" else "s32"]

    def compute(a: Array, b: Array, c: Array) -> Array:
        left = np.ascontiguousarray(a)[..., None].view(np.int16 if a_type.kind == "s" else np.uint16)
        right = np.ascontiguousarray(b)[..., None].view(np.int8 if b_type.kind == "s" else np.uint8)
        chosen = right[..., 2:] if upper else right[..., :2]
        return ((left.astype(_I64) * chosen).sum(-1) + c).astype(_U32).view(result.dtype)

    return elementwise(inst, result, ["b32", "b32", result], compute)


# --- bits ------------------------------------------------------------------------------------------


def _logic(function: Function) -> Callable[[Instruction], Execute]:
    def bind(inst: Instruction) -> Execute:
        type_ = inst.type()
        if type_.kind == "p":
            return _predicate_logic(inst, function)
        return elementwise(inst, type_, [type_, type_], function)

    return bind


def _predicate_logic(inst: Instruction, function: Function) -> Execute:
    """A known operand that decides the result makes it known, as `freeze`-less LLVM code relies on."""
    write = dest(inst, inst.operands[0], "pred")
    first, second = (source(inst, operand, "pred") for operand in inst.operands[1:])
    absorbing = {"and": False, "or": True}.get(inst.name)

    def execute(state: State) -> None:
        a = first(state)
        taint_a = state.take_taint()
        b = second(state)
        taint_b = state.taint
        if absorbing is not None and (taint_a is not None or taint_b is not None):
            none = np.zeros(state.lanes.shape, np.bool_)
            unknown_a, unknown_b = (none if t is None else t for t in (taint_a, taint_b))
            state.taint = None
            state.add_taint(unknown_a & unknown_b | unknown_a & (b != absorbing) | unknown_b & (a != absorbing))
        elif taint_a is not None:
            state.add_taint(taint_a)
        write(state, function(a, b))

    return execute


for _name, _function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
    instruction(_name)(_logic(_function))


@instruction("not")
def _not(inst: Instruction) -> Execute:
    type_ = inst.type()
    return elementwise(inst, type_, [type_], lambda a: ~a)


@instruction("cnot")
def _cnot(inst: Instruction) -> Execute:
    type_ = inst.type()
    return elementwise(inst, type_, [type_], lambda a: a == 0)


@instruction("lop3")
def _lop3(inst: Instruction) -> Execute:
    """Any function of three inputs: bit a*4 + b*2 + c of the table (9.7.8.6)."""
    type_ = inst.type("b32")
    table = integer(inst.operands[4])
    inst.operands = inst.operands[:4]

    def compute(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), _U32)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return elementwise(inst, type_, [type_] * 3, compute)


def shift_left(a: Array, b: Array) -> Array:
    """Amounts beyond the width are clamped to it."""
    bits = a.dtype.itemsize * 8
    amount = np.minimum(b, _U32(bits - 1)).astype(a.dtype)
    return np.where(b >= bits, a.dtype.type(0), a << amount)


def shift_right(a: Array, b: Array) -> Array:
    """Arithmetic for signed types; amounts beyond the width are clamped to it."""
    bits = a.dtype.itemsize * 8
    shifted: Array = a >> np.minimum(b, _U32(bits - 1)).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(b >= bits, a.dtype.type(0), shifted)


@instruction("shl")
def _shl(inst: Instruction) -> Execute:
    type_ = inst.type()
    return elementwise(inst, type_, [type_, "u32"], shift_left)


@instruction("shr")
def _shr(inst: Instruction) -> Execute:
    type_ = inst.type()
    return elementwise(inst, type_, [type_, "u32"], shift_right)


@instruction("shf")
def _funnel(inst: Instruction) -> Execute:
    """shf.{l,r}.{clamp,wrap}.b32 d, lo, hi, amount (9.7.8.8)."""
    left, clamp = inst.one_of("l", "r") == "l", inst.one_of("clamp", "wrap") == "clamp"
    type_ = inst.type("b32")

    def compute(low: Array, high: Array, amount: Array) -> Array:
        n = (np.minimum(amount, _U32(32)) if clamp else amount & _U32(31)).astype(_U64)
        both = high.astype(_U64) << _U64(32) | low
        return ((both << n) >> _U64(32) if left else both >> n).astype(_U32)

    return elementwise(inst, type_, [type_, type_, "u32"], compute)


def _low_mask(count: Array, bits: int) -> Array:
    wide = np.minimum(count, bits).astype(_U64)
    one = np.where(wide >= 64, _U64(0), _U64(1) << np.minimum(wide, _U64(63)))
    return one - _U64(1)


@instruction("bfe")
def _bit_field_extract(inst: Instruction) -> Execute:
    """Bits pos .. pos+len-1; beyond the top: the sign bit of the field for signed types (9.7.1.19)."""
    type_ = inst.type("u32", "s32", "u64", "s64")
    bits, signed = type_.bits, type_.kind == "s"
    unsigned = TYPES[f"u{bits}"]

    def compute(a: Array, b: Array, c: Array) -> Array:
        position, length = b & _U32(0xFF), c & _U32(0xFF)
        mask = _low_mask(length, bits)
        value = shift_right(a.astype(_U64), position) & mask
        if signed:
            last = np.minimum(position + length - _U32(1), _U32(bits - 1))
            sign = (shift_right(a.astype(_U64), last) & _U64(1)).astype(np.bool_) & (length != 0)
            known = np.minimum(
                length, np.where(position > bits, _U32(0), _U32(bits) - np.minimum(position, _U32(bits)))
            )
            value = np.where(sign, value | ~_low_mask(known, bits), value)
        return value.astype(unsigned.dtype).view(type_.dtype)

    return elementwise(inst, type_, [unsigned, "u32", "u32"], compute)


@instruction("bfi")
def _bit_field_insert(inst: Instruction) -> Execute:
    type_ = inst.type("b32", "b64")
    bits = type_.bits

    def compute(a: Array, b: Array, c: Array, d: Array) -> Array:
        position, length = c & _U32(0xFF), d & _U32(0xFF)
        mask = shift_left(_low_mask(length, bits), position)
        return (b.astype(_U64) & ~mask | shift_left(a.astype(_U64), position) & mask).astype(type_.dtype)

    return elementwise(inst, type_, [type_, type_, "u32", "u32"], compute)


@instruction("bmsk")
def _bit_mask(inst: Instruction) -> Execute:
    clamp = inst.one_of("clamp", "wrap") == "clamp"
    inst.type("b32")

    def compute(a: Array, b: Array) -> Array:
        position, length = (a, b) if clamp else (a & _U32(31), b & _U32(31))
        return (shift_left(_low_mask(length, 32), position)).astype(_U32)

    return elementwise(inst, "b32", ["u32", "u32"], compute)


@instruction("popc")
def _popc(inst: Instruction) -> Execute:
    type_ = inst.type("b32", "b64")
    return elementwise(inst, "u32", [type_], np.bitwise_count)


def leading_zeros(a: Array) -> Array:
    """Count of zeros above the highest one."""
    bits = a.dtype.itemsize * 8
    filled = a.copy()
    for shift in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        filled |= filled >> a.dtype.type(shift)
    return (bits - np.bitwise_count(filled)).astype(_U32)


@instruction("clz")
def _clz(inst: Instruction) -> Execute:
    return elementwise(inst, "u32", [inst.type("b32", "b64")], leading_zeros)


@instruction("bfind")
def _bfind(inst: Instruction) -> Execute:
    """The highest bit that differs from the sign; 0xffffffff if there is none (9.7.1.17)."""
    shift_amount = inst.flag("shiftamt")
    type_ = inst.type()
    unsigned, bits = TYPES[f"u{type_.bits}"], type_.bits

    def compute(a: Array) -> Array:
        pattern = np.where(a < 0, ~a, a).view(unsigned.dtype) if type_.kind == "s" else a
        position = _U32(bits - 1) - leading_zeros(pattern)
        if shift_amount:
            position = _U32(bits - 1) - position
        return np.where(pattern == 0, _U32(0xFFFFFFFF), position)

    return elementwise(inst, "u32", [type_], compute)


@instruction("brev")
def _brev(inst: Instruction) -> Execute:
    type_ = inst.type("b32", "b64")

    def compute(a: Array) -> Array:
        octets = np.ascontiguousarray(a)[..., None].view(np.uint8)
        bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., ::-1]
        packed = np.ascontiguousarray(np.packbits(bits, axis=-1, bitorder="little"))
        return packed.view(type_.dtype)[..., 0]

    return elementwise(inst, type_, [type_], compute)


_PRMT_MODES: dict[str, list[list[int]]] = {
    "f4e": [[s, s + 1, s + 2, s + 3] for s in range(4)],
    "b4e": [[s, (s - 1) % 8, (s - 2) % 8, (s - 3) % 8] for s in range(4)],
    "rc8": [[s] * 4 for s in range(4)],
    "ecl": [[max(s, i) for i in range(4)] for s in range(4)],
    "ecr": [[min(s, i) for i in range(4)] for s in range(4)],
    "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
}


@instruction("prmt")
def _permute(inst: Instruction) -> Execute:
    """Bytes of {b, a} by selectors; bit 3 of a selector replicates the byte's sign (9.7.8.7)."""
    inst.type("b32")
    mode = inst.one_of(*_PRMT_MODES, default="")
    table = np.array(_PRMT_MODES[mode]) if mode else None

    def compute(a: Array, b: Array, c: Array) -> Array:
        a, b, c = np.broadcast_arrays(a, b, c)
        octets = np.stack([word >> _U32(8 * i) & _U32(0xFF) for word in (a, b) for i in range(4)], axis=-1)
        if table is not None:
            selected = table[c & _U32(3)]
            signs = np.zeros(selected.shape, np.bool_)
        else:
            nibbles = np.stack([c >> _U32(4 * i) & _U32(15) for i in range(4)], axis=-1)
            selected, signs = (nibbles & _U32(7)).astype(_I64), (nibbles & _U32(8)) != 0
        picked = np.take_along_axis(octets, selected, axis=-1)
        picked = np.where(signs, np.where(picked & _U32(0x80), _U32(0xFF), _U32(0)), picked)
        return picked[..., 0] | picked[..., 1] << _U32(8) | picked[..., 2] << _U32(16) | picked[..., 3] << _U32(24)

    return elementwise(inst, "b32", ["b32"] * 3, compute)


__all__ = ["Problem", "divide", "elementwise", "integer_add", "integer_multiply", "remainder"]
