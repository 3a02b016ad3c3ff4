"""Comparison, selection and moves (PTX ISA 9.7.6, 9.7.7 and 9.7.9.1 mov)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.integer import elementwise, halves
from tilewright.runtime.emulator.nvidia.numerics import bf16_to_f32, flush, flush16
from tilewright.runtime.emulator.nvidia.operands import Reader, dest, parts, source
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import TYPES, Array, Type

_U64 = np.uint64


def _unordered(a: Array, b: Array) -> Array:
    result: Array = np.isnan(a) | np.isnan(b)
    return result


_ORDERED: dict[str, Callable[[Array, Array], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(name: str, type_: Type) -> Callable[[Array, Array], Any]:
    """A comparison operator (PTX ISA 9.3.1): ordered ones are false on NaN, ``..u`` ones true."""
    is_float = type_.kind == "f"
    if name in ("num", "nan"):
        return _unordered if name == "nan" else lambda a, b: ~_unordered(a, b)
    if name in _UNSIGNED and not is_float:
        return _ORDERED[_UNSIGNED[name]]
    if name in _ORDERED:
        if name == "ne" and is_float:
            return lambda a, b: (a != b) & ~_unordered(a, b)
        return _ORDERED[name]
    if name.endswith("u") and name[:-1] in _ORDERED:
        plain = _ORDERED[name[:-1]]
        return lambda a, b: plain(a, b) | _unordered(a, b)
    raise Problem(f"unknown comparison .{name}")


_NAMES = (*_ORDERED, *_UNSIGNED, *(f"{n}u" for n in _ORDERED), "num", "nan")
_COMBINE: dict[str, Callable[[Array, Array], Any]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _comparer(inst: Instruction, types: list[Type]) -> Callable[[Array, Array], Any]:
    name, ftz = inst.one_of(*_NAMES), inst.flag("ftz")
    type_ = types[-1]
    compare = comparison(name, type_)
    if type_.name == "bf16":
        return lambda a, b: compare(bf16_to_f32(a), bf16_to_f32(b))
    flushes = {"f32": flush, "f16": flush16}.get(type_.name)
    if ftz and flushes is not None:
        return lambda a, b: compare(flushes(a), flushes(b))
    return compare


def _halves(words: Array, type_: Type) -> list[Array]:
    """The lower and the upper halves of pairs."""
    single = TYPES[type_.name.removesuffix("x2")]
    return [(words >> np.uint32(shift)).astype(np.uint16).view(single.dtype) for shift in (0, 16)]


@instruction("setp")
def _setp(inst: Instruction) -> Execute:
    """setp.CmpOp{.BoolOp} p{|q}, a, b{, {!}c}: p = (a op b) bool c, q = !(a op b) bool c.

    Of pairs p is for the lower halves, q for the upper ones.
    """
    types = inst.types()
    if len(types) != 1:
        raise Problem("needs one type")
    combine = inst.one_of(*_COMBINE, default="")
    pairs = types[0].name.endswith("x2")
    compare = _comparer(inst, [TYPES[types[0].name.removesuffix("x2")]])
    inst.need(4 if combine else 3)
    destination = inst.operands[0]
    pair = (destination.first, destination.second) if isinstance(destination, syntax.Pair) else (destination,)
    if pairs and len(pair) == 1:
        raise Problem("a comparison of pairs needs two predicates")
    writes = [dest(inst, operand, "pred") for operand in pair]
    first, second = (source(inst, operand, types[0]) for operand in inst.operands[1:3])
    third = source(inst, inst.operands[3], "pred") if combine else None

    def execute(state: State) -> None:
        a, b = first(state), second(state)
        if pairs:
            results = [compare(x, y) for x, y in zip(_halves(a, types[0]), _halves(b, types[0]), strict=True)]
        else:
            holds = compare(a, b)
            results = [holds, ~holds] if len(writes) == 2 else [holds]
        if third is not None:
            condition = third(state)
            results = [_COMBINE[combine](value, condition) for value in results]
        for write, value in zip(writes, results, strict=True):
            write(state, value)

    return execute


#: the bits of 1.0
_ONE = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000}


@instruction("set")
def _set(inst: Instruction) -> Execute:
    """set.CmpOp{.BoolOp}.dtype.stype d, a, b{, c}: all ones, or 1.0 of a float type, where it holds."""
    result, type_ = inst.types()
    if type_.name.endswith("x2"):
        return _set_pairs(inst, result, type_)
    combine = inst.one_of(*_COMBINE, default="")
    compare = _comparer(inst, [type_])
    bits = TYPES[f"b{result.bits}"]
    one = bits.dtype(_ONE[result.name] if result.kind == "f" else (1 << result.bits) - 1)

    def compute(a: Array, b: Array, c: Array | None = None) -> Array:
        holds = compare(a, b)
        return np.where(holds if c is None else _COMBINE[combine](holds, c), one, bits.dtype(0))

    return elementwise(inst, bits, [type_, type_, *(["pred"] if combine else [])], compute)


def _set_pairs(inst: Instruction, result: Type, type_: Type) -> Execute:
    """The same of both halves, into halves."""
    if result is not type_:
        raise Problem("a comparison of pairs into another type is not implemented")
    single = TYPES[type_.name.removesuffix("x2")]
    compare, one = _comparer(inst, [single]), np.uint16(_ONE[single.name])
    both = halves(lambda a, b: np.where(compare(a, b), one, np.uint16(0)), single)
    return elementwise(inst, "b32", ["b32", "b32"], both)


@instruction("selp")
def _selp(inst: Instruction) -> Execute:
    """Only the operand that is selected need be defined."""
    type_ = inst.type()
    bits = TYPES[f"b{type_.bits}"]
    inst.need(4)
    write = dest(inst, inst.operands[0], bits)
    yes, no = (source(inst, operand, bits) for operand in inst.operands[1:3])
    condition = source(inst, inst.operands[3], "pred")

    def execute(state: State) -> None:
        chosen = condition(state)
        unknown = state.take_taint()
        a = yes(state)
        taint_a = state.take_taint()
        b = no(state)
        taint_b = state.take_taint()
        state.taint = unknown
        if taint_a is not None:
            state.add_taint(taint_a & chosen)
        if taint_b is not None:
            state.add_taint(taint_b & ~chosen)
        write(state, np.where(chosen, a, b))

    return execute


@instruction("slct")
def _slct(inst: Instruction) -> Execute:
    ftz = inst.flag("ftz")
    type_, control = inst.types()
    bits = TYPES[f"b{type_.bits}"]
    prepare: Callable[[Array], Array] = flush if ftz and control.name == "f32" else lambda c: c
    return elementwise(inst, bits, [bits, bits, control], lambda a, b, c: np.where(prepare(c) >= 0, a, b))


@instruction("mov")
def _mov(inst: Instruction) -> Execute:
    """Moves; a vector on one side packs into or unpacks from the bits of the other (9.7.9.1)."""
    inst.flag("u")
    type_ = inst.type()
    inst.need(2)
    to, from_ = inst.operands
    if isinstance(to, syntax.Group) and isinstance(from_, syntax.Group):
        raise Problem("moves between vectors are not implemented")
    if isinstance(to, syntax.Group):
        return _unpack(inst, to, from_, type_)
    if isinstance(from_, syntax.Group):
        return _pack(inst, to, from_, type_)
    bits = TYPES[f"b{type_.bits}"] if type_.kind != "p" else type_
    write, read = dest(inst, to, bits), source(inst, from_, bits if _is_register(inst, from_) else type_)
    if bits is type_ or _is_register(inst, from_):
        return lambda state: write(state, read(state))
    return lambda state: write(state, read(state).view(bits.dtype))


def _is_register(inst: Instruction, operand: syntax.Operand) -> bool:
    return isinstance(operand, syntax.Name) and operand.text in inst.kernel.registers


def _unpack(inst: Instruction, to: syntax.Group, from_: syntax.Operand, type_: Type) -> Execute:
    part = TYPES[f"b{type_.bits // len(to.parts)}"]
    writes = [dest(inst, operand, part) for operand in parts(to)]
    read = source(inst, from_, TYPES[f"b{type_.bits}"])

    def execute(state: State) -> None:
        value = read(state)
        values = [(value >> value.dtype.type(part.bits * i)).astype(part.dtype) for i in range(len(writes))]
        for write, one in zip(writes, values, strict=True):
            write(state, one)

    return execute


def _pack(inst: Instruction, to: syntax.Operand, from_: syntax.Group, type_: Type) -> Execute:
    bits = TYPES[f"b{type_.bits}"]
    part = TYPES[f"b{type_.bits // len(from_.parts)}"]
    write = dest(inst, to, bits)
    reads: list[Reader] = [source(inst, operand, part) for operand in parts(from_)]

    def execute(state: State) -> None:
        value = reads[0](state).astype(bits.dtype)
        for i, read in enumerate(reads[1:], 1):
            value = value | read(state).astype(bits.dtype) << bits.dtype(part.bits * i)
        write(state, value)

    return execute
