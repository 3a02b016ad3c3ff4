"""Questions about data flow that several passes ask."""

from __future__ import annotations

from collections.abc import Iterable

from tilewright.ir.comm_ops import Put, ReducePut, view_root
from tilewright.ir.core import Block, Function, Operation, Region, Value
from tilewright.ir.indexed_ops import Atomic, Scatter
from tilewright.ir.tile_ops import (
    For,
    If,
    Load,
    ProgramId,
    Store,
    Transpose,
    While,
    Yield,
)


def producers(value: Value, loops: dict[Block, Operation]) -> list[Value]:
    """The values that ``value`` is computed from directly, through loops and conditionals.

    ``loops`` maps each body block to its operation; see `enclosing_operations`.
    """
    op = value.op
    if op is None:
        return _argument_sources(value, loops)
    if isinstance(op, For | While):
        position = op.results.index(value)
        return [op.inits[position], *_yielded(op.regions[-1], position), *_loop_control(op)]
    if isinstance(op, If):
        position = op.results.index(value)
        return [op.condition, *_yielded(op.then_body, position), *_yielded(op.else_body, position)]
    return op.operands


def _argument_sources(value: Value, loops: dict[Block, Operation]) -> list[Value]:
    owner = loops.get(value.owner) if isinstance(value.owner, Block) else None
    if owner is None:
        return []  # a parameter
    assert isinstance(value.owner, Block)
    position = value.owner.args.index(value)
    if isinstance(owner, For):
        if position == 0:
            return [owner.lo, owner.hi, owner.step]
        return [owner.inits[position - 1], *_yielded(owner.body, position - 1)]
    if isinstance(owner, While):
        return [owner.inits[position], *_yielded(owner.body, position)]
    return []


def _loop_control(op: Operation) -> list[Value]:
    return [op.lo, op.hi, op.step] if isinstance(op, For) else [v for r in op.regions[:1] for v in _yielded(r, 0)]


def _yielded(region: Region, position: int) -> list[Value]:
    terminator = region.block.terminator
    return [terminator.values[position]] if isinstance(terminator, Yield) else []


def enclosing_operations(function: Function) -> dict[Block, Operation]:
    """Each nested block's operation."""
    return {r.block: op for op in function.walk() for r in op.regions}


def backward_slice(values: Iterable[Value], loops: dict[Block, Operation]) -> set[Value]:
    """``values`` and everything that they are computed from."""
    seen: set[Value] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if value not in seen:
            seen.add(value)
            pending += producers(value, loops)
    return seen


def control_values(block: Block, loops: dict[Block, Operation]) -> list[Value]:
    """The bounds and conditions that decide how often ``block`` runs."""
    values: list[Value] = []
    while block in loops:
        op = loops[block]
        if isinstance(op, For | While):
            values += _loop_control(op)
        elif isinstance(op, If):
            values.append(op.condition)
        assert op.parent is not None
        block = op.parent
    return values


def written_tensors(function: Function) -> set[Value]:
    """The kernel parameters that the program writes."""
    return {view_root(op.view) for op in function.walk() if isinstance(op, Store | Scatter | Atomic | Put | ReducePut)}


def program_axes(value: Value, loops: dict[Block, Operation]) -> frozenset[int]:
    """The grid axes that ``value`` depends on."""
    return frozenset(v.op.axis for v in backward_slice([value], loops) if isinstance(v.op, ProgramId))


def ancestor_in(op: Operation, block: Block) -> Operation | None:
    """The operation of ``block`` that is or contains ``op``; None where ``op`` lies elsewhere."""
    current: Operation | None = op
    while current is not None and current.parent is not block:
        region = current.parent.parent if current.parent is not None else None
        owner = region.parent if region is not None else None
        current = owner if isinstance(owner, Operation) else None
    return current


def trace_load(value: Value) -> tuple[Load | None, tuple[int, ...] | None]:
    """The load behind a dot operand and the transposition between them."""
    perm: tuple[int, ...] | None = None
    while isinstance(value.op, Transpose):
        outer, perm_ = perm, value.op.perm
        perm = perm_ if outer is None else tuple(perm_[p] for p in outer)
        value = value.op.source
    return (value.op, perm) if isinstance(value.op, Load) else (None, None)
