"""launch-overlap: a launch may begin before the one before it in its stream has ended.

Between two launches of a stream the GPU drains, and the second one is set up only when what the first one wrote has
become visible. On hardware that lets a launch begin earlier ("programmatic dependent launch") each function waits
itself for the one before, in front of its first access to global memory::

    async.alloc, async.ring                // shared memory and its barriers are set up meanwhile
    async.await_grid                       // every thread
    tile.load ...

All threads of all blocks wait, so that a launch which has ended knows that those before it have ended, too: it is
enough that each waits for the one before. No function lets the next begin before its own blocks have ended.

Functions that communicate begin behind the one before: they wait for other GPUs, which may wait for work in other
streams of this one, and blocks that have begun would hold its room.
"""

from __future__ import annotations

from tilewright.ir.async_ops import Alloc, AwaitGrid, MakeRing
from tilewright.ir.builder import Builder
from tilewright.ir.check_ops import Assume
from tilewright.ir.core import Effect, Function, Operation
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("launch-overlap")
class LaunchOverlap(FunctionPass):
    """Behind everything that moves operations."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if not context.target.has("dependent_launch") or function.attributes.get("communicates"):
            return
        block = function.body.block
        first = next((i for i, op in enumerate(block.ops) if not _precedes(op)), len(block.ops))
        builder = Builder(block)
        with builder.at(block, first):
            builder.insert(AwaitGrid())


def _precedes(op: Operation) -> bool:
    """Whether neither an operation nor what it encloses can touch global memory."""
    return all(isinstance(each, Alloc | MakeRing | Assume) or each.effect == Effect.PURE for each in op.walk())
