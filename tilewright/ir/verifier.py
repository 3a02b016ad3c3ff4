"""Checks that a module obeys the rules of the IR. Every pass must leave a module that passes.

What an operation declares (operands, attributes, regions) is checked from the declaration, types by its own
``verify``; the rest here is structure: dominance, terminators, roles.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from tilewright.ir.async_ops import Role
from tilewright.ir.core import UNKNOWN, Block, Function, IRError, Location, Module, Operation, Region, Value
from tilewright.ir.tile_ops import For
from tilewright.ir.types import BufferType, MailboxType, SlotType, TileType, Type, ViewType
from tilewright.ir.verifier_comm import verify_communication

#: what op-specific ``verify`` methods raise when counts or kinds are so wrong that they cannot look further
_MALFORMED = (TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)


def verify(module: Module) -> None:
    """Raise `IRError`, with the operation's location, where the module breaks a rule."""
    names: set[str] = set()
    for function in module.functions:
        if function.name in names:
            raise IRError(f"two functions are named @{function.name}", function.loc)
        names.add(function.name)
        verify_function(function)


def verify_function(function: Function) -> None:
    """`verify` for one function."""
    _Verifier(function).run()


class _Verifier:
    """Walks a function in program order and keeps the set of values that may be used at that point."""

    def __init__(self, function: Function):
        self.function = function
        self.visible: set[Value] = set()
        self.ended: dict[Value, Operation] = {}  # values of regions that have ended, with the owner of the region
        self.seen: set[Operation] = set()
        self.role: Role | None = None

    def run(self) -> None:
        block = self.function.body.block
        self.arguments(block, self.function.loc)
        self.block(block)
        self.terminator(block, required=False, owner=f"function @{self.function.name}", loc=self.function.loc)
        verify_communication(self.function)

    def block(self, block: Block) -> None:
        for position, op in enumerate(block.ops):
            self.operation(op, block)
            if op.terminator and position != len(block.ops) - 1:
                raise IRError(f"'{op.name}' is not the last operation of its block", op.loc)

    def operation(self, op: Operation, block: Block) -> None:
        op.require(op.parent is block, "its parent is another block (was it moved without Block.append or insert?)")
        op.require(op not in self.seen, "stands in the function twice")
        self.seen.add(op)
        check_declaration(op)
        for value in op.operands:
            self.use(op, value)
        if isinstance(op, Role):
            self.role_rules(op)
        for region in op.regions:
            self.region(op, region)
        for result in op.results:
            check_type(result.type, op.loc)
        call_verify(op)
        for result in op.results:
            op.require(result.owner is op, "a result belongs to another operation")
            self.define(result, op.loc)

    def region(self, op: Operation, region: Region) -> None:
        op.require(region.parent is op, "a region belongs to another operation")
        with self.nested(op):
            self.arguments(region.block, op.loc)
            self.block(region.block)
            is_role = isinstance(op, Role)
            self.terminator(region.block, required=not is_role, owner=f"a region of '{op.name}'", loc=op.loc)

    @contextmanager
    def nested(self, op: Operation) -> Iterator[None]:
        """Values defined inside are out of sight afterwards."""
        outside, role = self.visible, self.role
        self.visible = set(outside)
        self.role = op if isinstance(op, Role) else role
        yield
        self.ended.update((value, op) for value in self.visible - outside)
        self.visible, self.role = outside, role

    # --- values -----------------------------------------------------------------------------

    def arguments(self, block: Block, loc: Location) -> None:
        for arg in block.args:
            if arg.owner is not block:
                raise IRError(f"block argument {_name(arg)} belongs to another block", loc)
            check_type(arg.type, loc)
            self.define(arg, loc)

    def define(self, value: Value, loc: Location) -> None:
        if value in self.visible or value in self.ended:
            raise IRError(f"{_name(value)} is defined twice", loc)
        self.visible.add(value)

    def use(self, op: Operation, value: Value) -> None:
        if value in self.visible:
            return
        owner = self.ended.get(value)
        if isinstance(owner, Role):
            op.require(False, f"uses {_name(value)} of async.role @{owner.kind}; what a role computes stays inside it")
        if owner is not None:
            op.require(False, f"uses {_name(value)}, whose region of '{owner.name}' has ended; yield it from there")
        op.require(False, f"uses {_name(value)} before it is defined")

    # --- structure --------------------------------------------------------------------------

    def terminator(self, block: Block, required: bool, owner: str, loc: Location) -> None:
        last = block.terminator
        if required and last is None:
            raise IRError(f"{owner} does not end in 'tile.yield'", block.ops[-1].loc if block.ops else loc)
        if not required and last is not None:
            raise IRError(f"{owner} passes no values on, but ends in '{last.name}'", last.loc)

    def role_rules(self, op: Role) -> None:
        op.require(self.role is None, f"@{op.kind} stands inside another role")
        op.require(op.parent is self.function.body.block, f"@{op.kind} stands inside control flow")
        op.require(op.warps > 0, f"@{op.kind} has {op.warps} warps")


# --- declarations ---------------------------------------------------------------------------


def check_declaration(op: Operation) -> None:
    """Counts and kinds of operands, attributes, regions and block arguments, as the class declares them."""
    op.require(len(op.groups) == len(op.operand_fields), f"has {len(op.groups)} operand groups")
    for f, group in zip(op.operand_fields, op.groups, strict=True):
        op.require(f.kind != "operand" or len(group) == 1, f"operand '{f.name}' stands for {len(group)} values, not 1")
        op.require(f.kind != "optional" or len(group) <= 1, f"operand '{f.name}' stands for {len(group)} values")
    if op.family:
        op.require(op.attributes.get("fn") in op.family, f"is none of {', '.join(op.family)}")
    _check_attributes(op)
    op.require(len(op.regions) == len(op.region_fields), f"has {len(op.regions)} regions, not {len(op.region_fields)}")
    if isinstance(op, For):
        count = len(op.body.block.args)
        op.require(count == 1 + len(op.inits), f"body takes {count} arguments for an index and {len(op.inits)} values")
    if op.terminator:
        op.require(not op.results, "has results")
    elif not op.effect and not op.regions:
        op.require(len(op.results) == 1, f"has {len(op.results)} results, not 1")


def _check_attributes(op: Operation) -> None:
    cls: Any = type(op)  # mypy takes no class for a Hashable
    kinds = _attribute_kinds(cls)
    for name in op.attributes:
        op.require(name in kinds or (name == "fn" and bool(op.family)), f"has no attribute '{name}'")
    for f in op.attribute_fields:
        op.require(f.name in op.attributes or not f.required, f"needs the attribute '{f.name}'")
        if f.name in op.attributes:
            value = op.attributes[f.name]
            op.require(_is_kind(value, kinds[f.name]), f"attribute '{f.name}' cannot be {value!r}")


@cache
def _attribute_kinds(cls: type[Operation]) -> dict[str, Any]:
    """The annotated type of each declared attribute."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints.get(f.name, Any) for f in cls.attribute_fields}


def _is_kind(value: Any, kind: Any) -> bool:
    """Whether an attribute value is of an annotated type: a class, a union, ``tuple[int, ...]`` or Any."""
    if kind is Any:
        return True
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_kind(value, k) for k in typing.get_args(kind))
    if origin is tuple:
        args = typing.get_args(kind)
        return isinstance(value, tuple) and all(_is_kind(v, args[0]) for v in value)
    if origin is not None:
        return isinstance(value, origin)
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def call_verify(op: Operation) -> None:
    """The operation's own checks, with errors that are always `IRError`."""
    try:
        op.verify()
    except _MALFORMED as error:
        raise IRError(f"'{op.name}': {error}", op.loc) from error


@lru_cache(maxsize=4096)
def _type_fault(type_: Type) -> str:
    """What is wrong with a type, or the empty string."""
    if isinstance(type_, BufferType):
        return _type_fault(type_.slot)
    if isinstance(type_, MailboxType):
        return _type_fault(type_.message) if type_.blocks > 1 else "has one block only"
    if isinstance(type_, TileType | SlotType) and any(n < 1 for n in type_.shape):
        return "has an empty dimension"
    if isinstance(type_, TileType) and type_.layout is not None and type_.layout.tile_shape != type_.shape:
        return f"has a layout for shape {list(type_.layout.tile_shape)}"
    if isinstance(type_, SlotType):
        if tuple(type_.layout.shape) != type_.shape:
            return f"has a layout for shape {list(type_.layout.shape)}"
        if type_.layout.element_bits != 8 * type_.dtype.bytes:
            return f"has a layout for elements of {type_.layout.element_bits} bits"
    if isinstance(type_, ViewType) and len(type_.strides) != len(type_.shape):
        return "has another number of strides than of dimensions"
    return ""


def check_type(type_: Type, loc: Location = UNKNOWN) -> None:
    """Raise `IRError` for a type that contradicts itself."""
    if not isinstance(type_, Type):
        raise IRError(f"{type_!r} is not a type", loc)
    if fault := _type_fault(type_):
        raise IRError(f"type {type_} {fault}", loc)


def _name(value: Value) -> str:
    return f"%{value.hint}" if value.hint else f"a value of type {value.type}"


__all__ = ["check_declaration", "check_type", "verify", "verify_function"]
