"""rank-order: the barriers and fences that make the threads of a block one party towards other ranks.

A signal is one thread's, and what it publishes is the work of all: they meet in front of it. A wait is one thread's or
one warp's, and all use what has arrived: they meet behind it. Copies by an engine come after a fence between the
threads' view of memory and the engine's::

    async.barrier {scope = "role"}
    comm.signal %flag, %peer, after(%put)

    %arrived = comm.wait %flags : token<flag>
    async.barrier {scope = "role"}
    async.fence {proxy = "async_global"}
    %copy = async.copy %parts, ..., after(%arrived)

On AMD a barrier does not make one thread's order that of others, so that each thread has fences of its own around it.
"""

from __future__ import annotations

from tilewright.ir.async_ops import Barrier, BulkStore, Copy, Fence, Role
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import Credit, Leave, Signal, WaitEarlier, WaitFlags
from tilewright.ir.core import Block, Function, Operation, uses_of
from tilewright.ir.types import TokenType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: behind these a program sees what others have written
WAITS = WaitFlags | WaitEarlier | Credit


@register_pass("rank-order")
class RankOrder(FunctionPass):
    """Behind everything that moves operations or splits them among roles."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if not function.attributes.get("communicates"):
            return
        uses = uses_of(function.body)
        waits = [op for op in function.walk() if isinstance(op, WAITS)]
        for_engines: set[Operation] = {op for op in waits if any(map(_is_engine_copy, uses.get(op.result, [])))}
        _Order(for_engines, each_thread=context.target.vendor == "amd").block(function.body.block, alone=False)


class _Order:
    """``for_engines``: waits that a copy engine comes after. ``each_thread``: barriers do not pass order on."""

    def __init__(self, for_engines: set[Operation], each_thread: bool):
        self.for_engines, self.each_thread = for_engines, each_thread

    def block(self, block: Block, alone: bool) -> None:
        """``alone``: one thread runs it."""
        old = list(block.ops)
        block.set_ops([])
        b = Builder(block)
        for op in old:
            b.loc = op.loc
            for region in op.regions:
                self.block(region.block, alone or (isinstance(op, Role) and op.single_thread))
            if isinstance(op, Signal | Leave) and not alone:
                self._fence(b, "release")
                b.insert(Barrier(scope="role" if isinstance(op, Signal) else "block"))
            b.insert(op)
            if isinstance(op, WAITS):
                if not alone:
                    b.insert(Barrier(scope="role"))
                    self._fence(b, "acquire")
                if op in self.for_engines:
                    b.insert(Fence(proxy="async_global"))

    def _fence(self, b: Builder, order: str) -> None:
        if self.each_thread:
            b.insert(Fence(proxy=order))


def _is_engine_copy(op: Operation) -> bool:
    return isinstance(op, BulkStore) or (
        isinstance(op, Copy) and isinstance(op.result.type, TokenType) and op.result.type.kind == "tma"
    )
