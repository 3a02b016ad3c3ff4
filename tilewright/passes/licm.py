"""Loop-invariant code motion: pure operations whose operands come from outside move before the loop.

The body of a loop may run zero times, so only operations that cannot fail move: an integer division
stays unless its divisor is a constant other than zero. Loads stay: a store may change what they read.
"""

from __future__ import annotations

from tilewright.ir.core import Function, Operation, Region, Value
from tilewright.ir.tile_ops import Binary, Constant, For, While
from tilewright.ir.types import element_type
from tilewright.passes.cse import reads_nothing
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("licm")
class LoopInvariantCodeMotion(FunctionPass):
    """Move invariant pure operations out of ``tile.for`` and ``tile.while``."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        hoist_invariants(function.body)


def hoist_invariants(region: Region) -> bool:
    """Hoist out of all loops in ``region``, inner loops first; whether anything changed."""
    ops: list[Operation] = []
    changed = False
    for op in region.block.ops:
        for nested in op.regions:
            changed |= hoist_invariants(nested)
        if isinstance(op, For | While):
            ops += _take_invariants(op)
        ops.append(op)
    if len(ops) != len(region.block.ops):
        region.block.set_ops(ops)
        changed = True
    return changed


def is_speculatable(op: Operation) -> bool:
    """Whether the operation may run where the program would not have run it."""
    if op.regions or op.terminator or not op.results or not reads_nothing(op):
        return False
    if isinstance(op, Binary) and op.fn in ("floordiv", "mod") and not element_type(op.rhs.type).is_float:
        return isinstance(op.rhs.op, Constant) and op.rhs.op.value != 0
    return True


def _take_invariants(loop: Operation) -> list[Operation]:
    inside: set[Value] = set()
    for op in loop.walk():
        inside.update(v for r in op.regions for v in r.block.args)
        if op is not loop:
            inside.update(op.results)
    taken: list[Operation] = []
    for region in loop.regions:
        kept: list[Operation] = []
        for op in region.block.ops:
            if is_speculatable(op) and inside.isdisjoint(op.operands):
                taken.append(op)
                inside.difference_update(op.results)
            else:
                kept.append(op)
        if len(kept) != len(region.block.ops):
            region.block.set_ops(kept)
    return taken
