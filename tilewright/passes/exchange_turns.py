"""exchange-turns: reductions in loops whose threads meet once an iteration instead of twice.

Warps that combine parts of a reduction through shared memory meet before they write, since others may still read what
was exchanged last, and once more before they read. Where a loop's body has one such exchange, iterations take turns
with two places, and the first meeting goes::

    write place i % 2, meet, read place i % 2

Whoever writes in iteration i + 2 has met all others in iteration i + 1, where they came when they had read in iteration
i. `check-schedule` proves it of the places, whoever chose them.
"""

from __future__ import annotations

from tilewright.ir.async_ops import Barrier, MakeRing, Role
from tilewright.ir.builder import Builder
from tilewright.ir.core import Function, Operation, Value
from tilewright.ir.scratch import scratch_bytes
from tilewright.ir.tile_ops import Binary, Constant, For, Reduce, Yield, yielded
from tilewright.ir.types import ScalarType, i32
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.prefetch import carry

#: of shared memory, that one place may take
MOST_BYTES = 2048


@register_pass("exchange-turns")
class ExchangeTurns(FunctionPass):
    """Sets ``turn`` of reductions in functions without roles, once layouts say who holds what."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        ops = list(function.walk())
        if any(isinstance(op, Role | MakeRing) for op in ops):
            return
        exchanges = [op for op in ops if scratch_bytes(op)]
        for loop in [op for op in ops if isinstance(op, For)]:
            inside = [op for op in loop.body.walk() if op in exchanges]
            if len(inside) != 1 or inside[0] not in loop.body.block.ops:
                continue
            reduction = inside[0]
            if not isinstance(reduction, Reduce) or scratch_bytes(reduction) > MOST_BYTES:
                continue
            reduction.turn = _count(loop)
            if exchanges != inside or loop not in function.body.block.ops:
                _meet_before(loop)


def _count(loop: For) -> Value:
    """A value of the body that grows by one with each iteration: one that is there, or a new one."""
    following = yielded(loop.body)
    for carried, value in zip(loop.carried, following, strict=True):
        add = value.op if value.type == ScalarType(i32) else None
        if isinstance(add, Binary) and add.fn == "add" and add.lhs is carried and _is_one(add.rhs):
            return carried
    terminator = loop.body.block.terminator
    assert loop.parent is not None and isinstance(terminator, Yield)
    b = Builder(loop.parent, loop.loc)
    with b.at(loop.parent, loop.parent.ops.index(loop)):
        zero = b.index(0)
    count = carry(loop, zero, "turn")
    block = loop.body.block
    with b.at(block, len(block.ops) - 1):
        terminator.values = [*following, b.add(count, b.index(1))]
    return count


def _is_one(value: Value) -> bool:
    return isinstance(value.op, Constant) and value.op.value == 1


def _meet_before(loop: Operation) -> None:
    """Others may read from the places still, or threads that ran the loop before and ended with a like turn."""
    assert loop.parent is not None
    b = Builder(loop.parent, loop.loc)
    with b.at(loop.parent, loop.parent.ops.index(loop)):
        b.insert(Barrier())
