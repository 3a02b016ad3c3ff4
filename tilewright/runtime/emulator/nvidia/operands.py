"""Operands bound to what reads and writes them (PTX ISA chapter 6, "Instruction Operands")."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.decode import Instruction, Kernel, Problem
from tilewright.runtime.emulator.nvidia.numerics import f32_to_bf16
from tilewright.runtime.emulator.nvidia.special import special_reader
from tilewright.runtime.emulator.nvidia.types import LANES, TYPES, UNSIGNED, Array, Type, unsigned_of

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.state import State

#: the value of an operand, broadcastable to [selected, 32], in the NumPy type of the instruction's type
Reader = Callable[["State"], Array]
Writer = Callable[["State", Array], None]


def register(inst: Instruction, operand: syntax.Operand) -> int:
    """The number of a register operand."""
    if isinstance(operand, syntax.Name) and operand.text in inst.kernel.registers:
        return inst.kernel.registers[operand.text]
    raise Problem(f"operand {describe(operand)} is not a register")


def describe(operand: syntax.Operand) -> str:
    """An operand for messages."""
    return operand.text if isinstance(operand, syntax.Name) else str(operand)


def constant(value: int | float, type_: Type) -> Array:
    """An immediate as a [1, 1] array (PTX ISA 4.5: a constant has the type of the instruction)."""
    bits = constant_bits(value, type_)
    return np.full((1, 1), bits, UNSIGNED[type_.bits]).view(type_.dtype)


def constant_bits(value: int | float, type_: Type) -> int:
    """The bits of an immediate in a type. Integers given to a float type of 16 bits are its bits."""
    if type_.kind == "p":
        return int(bool(value))
    if isinstance(value, int):
        return value & ((1 << type_.bits) - 1)
    if type_.name == "f64" or type_.bits == 64:
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    if type_.bits == 32:
        if isinstance(value, syntax.Single):
            return value.bits
        return int(np.float32(value).view(np.uint32))
    if type_.name == "bf16":
        return int(f32_to_bf16(np.array(value, np.float32)))
    if type_.bits == 16:
        return int(np.float16(value).view(np.uint16))
    raise Problem(f"the constant {value} does not fit .{type_.name}")


def integer(operand: syntax.Operand) -> int:
    """An operand that must be an integer constant."""
    if isinstance(operand, syntax.Number) and isinstance(operand.value, int):
        return operand.value
    raise Problem(f"operand {describe(operand)} must be a constant")


def source(inst: Instruction, operand: syntax.Operand, type_: Type | str) -> Reader:
    """A reader of ``operand`` as ``type_``. Of a wider register the low bits are read."""
    type_ = TYPES[type_] if isinstance(type_, str) else type_
    if isinstance(operand, syntax.Number):
        value = constant(operand.value, type_)
        return lambda state: value
    if isinstance(operand, syntax.Negated):
        inner = source(inst, operand.operand, "pred")
        return lambda state: ~inner(state)
    if isinstance(operand, syntax.Name):
        if operand.text in inst.kernel.registers:
            return _register_source(inst.kernel, inst.kernel.registers[operand.text], type_)
        special = special_reader(operand.text)
        if special is not None:
            return lambda state: _as(special(state), type_)
        return _symbol_source(inst.kernel, operand, type_)
    raise Problem(f"operand {describe(operand)} is not a value")


def _as(value: Array, type_: Type) -> Array:
    result: Array = value.astype(type_.unsigned).view(type_.dtype)
    return result


def _register_source(kernel: Kernel, number: int, type_: Type) -> Reader:
    width, dtype, unsigned = kernel.widths[number], type_.dtype, type_.unsigned
    if width < type_.bits:
        raise Problem(f"register {kernel.names[number]} has {width} bits, too few for .{type_.name}")
    if width > type_.bits:
        if type_.bits == 1:
            raise Problem(f"register {kernel.names[number]} is no predicate")
        return lambda state: state.read(number).astype(unsigned).view(dtype)
    if dtype == unsigned:
        return lambda state: state.read(number)
    return lambda state: state.read(number).view(dtype)


def _symbol_source(kernel: Kernel, operand: syntax.Name, type_: Type) -> Reader:
    """The address of a variable in its own state space (PTX ISA 6.4.1)."""
    name, offset = operand.text, operand.offset
    for offsets in (kernel.shared_offsets, kernel.params, kernel.local_offsets):
        if name in offsets:
            value = constant(offsets[name] + offset, type_)
            return lambda state: value
    if name in kernel.constants:
        return lambda state: _as(np.full((1, 1), state.launch.symbols[name] + offset, np.uint64), type_)
    raise Problem(f"unknown name {name}")


def dest(inst: Instruction, operand: syntax.Operand, type_: Type | str) -> Writer:
    """A writer of values of ``type_``. A wider register is filled up by the sign of signed types, else zeros."""
    type_ = TYPES[type_] if isinstance(type_, str) else type_
    if isinstance(operand, syntax.Name) and operand.text == "_":
        return lambda state, value: None
    number = register(inst, operand)
    width = inst.kernel.widths[number]
    if width < type_.bits or (type_.bits == 1) != (width == 1):
        raise Problem(f"register {inst.kernel.names[number]} of {width} bits cannot take .{type_.name}")
    if width == type_.bits:
        return lambda state, value: state.write(number, unsigned_of(value))
    wide = TYPES[f"{'s' if type_.kind == 's' else 'u'}{width}"]
    if type_.kind == "s":
        return lambda state, value: state.write(number, value.astype(wide.dtype).view(wide.unsigned))
    return lambda state, value: state.write(number, unsigned_of(value).astype(wide.unsigned))


def parts(operand: syntax.Operand) -> Sequence[syntax.Operand]:
    """The elements of a vector operand; a scalar is a vector of one."""
    return operand.parts if isinstance(operand, syntax.Group) else (operand,)


def registers(inst: Instruction, operand: syntax.Operand, bits: int = 32) -> list[int]:
    """The numbers of the registers of a vector operand, of which each must have ``bits``."""
    numbers = [register(inst, part) for part in parts(operand)]
    for number in numbers:
        if inst.kernel.widths[number] != bits:
            raise Problem(f"register {inst.kernel.names[number]} must have {bits} bits")
    return numbers


def address(inst: Instruction, operand: syntax.Operand) -> Callable[[State], Array]:
    """A reader of ``[base + offset]`` as int64 [selected, 32] (PTX ISA 6.4.1); 32-bit bases are zero-extended."""
    if not isinstance(operand, syntax.Memory):
        raise Problem(f"operand {describe(operand)} is not an address")
    return location(inst, operand.base, operand.offset)


def location(inst: Instruction, base: syntax.Operand, offset: int = 0) -> Callable[[State], Array]:
    """A reader of the address that ``base`` plus a byte offset gives."""
    if isinstance(base, syntax.Number):
        fixed = np.full((1, 1), integer(base) + offset, np.int64)
        return lambda state: np.broadcast_to(fixed, (state.count, LANES))
    if not isinstance(base, syntax.Name):
        raise Problem(f"operand {describe(base)} is not an address")
    number = inst.kernel.registers.get(base.text)
    if number is None:
        symbol = _symbol_source(inst.kernel, base, TYPES["u64"])
        return lambda state: np.broadcast_to(symbol(state).view(np.int64) + offset, (state.count, LANES))
    if inst.kernel.widths[number] == 64:
        if offset:
            return lambda state: state.read(number).view(np.int64) + offset
        return lambda state: state.read(number).view(np.int64)
    if inst.kernel.widths[number] != 32:
        raise Problem(f"register {inst.kernel.names[number]} cannot hold an address")
    return lambda state: state.read(number).astype(np.int64) + offset
