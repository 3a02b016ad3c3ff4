"""fences: order ordinary shared-memory writes before the asynchronous units that read them.

The copy engine and the matrix unit read shared memory through the async proxy. Writes of threads
become visible to it by a proxy fence in the writing thread, followed by the synchronisation that
hands the data over: a barrier, or publishing a ring stage whose token is of kind ``threads``.
Copies by the engine itself (kind ``tma``) need none. PTX ISA, "Memory Consistency Model: Proxies".
"""

from __future__ import annotations

from tilewright.ir.async_ops import AsyncDot, Barrier, BulkStore, Fence, LocalStore, Publish, buffer_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Operation, Value
from tilewright.ir.types import SlotType, TokenType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("fences")
class Fences(FunctionPass):
    """Insert `async.fence` where token kinds and slots ask for it."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        read_by_units = {
            buffer_of(v)
            for op in function.walk()
            if isinstance(op, AsyncDot | BulkStore)
            for v in op.operands
            if isinstance(v.type, SlotType)
        }
        if read_by_units:
            _visit(function.body.block, read_by_units, False)


def _visit(block: Block, buffers: set[Value], pending: bool) -> bool:
    """``pending``: this thread has writes that no fence has ordered yet. Returns it for the block's end.

    A fence stands right behind the last of the writes: it takes its time while the thread waits for other things.
    """
    last: Operation | None = None  # the write or the control flow with writes inside; None: in front of the block
    for op in list(block.ops):
        if isinstance(op, LocalStore) and buffer_of(op.slot) in buffers:
            pending, last = True, op
        for r in op.regions:
            if _visit(r.block, buffers, pending):
                pending, last = True, op
        by_threads = isinstance(op, Publish) and any(_by_threads(t) for t in op.tokens)
        if by_threads:
            _insert_fence(block, block.ops.index(op), op)
            pending = False
        elif pending and isinstance(op, Barrier | Publish):
            _insert_fence(block, 0 if last is None else block.ops.index(last) + 1, op)
            pending = False
    return pending


def _by_threads(token: Value) -> bool:
    return isinstance(token.type, TokenType) and token.type.kind == "threads"


def _insert_fence(block: Block, position: int, served: Operation) -> None:
    b = Builder(block, served.loc)
    with b.at(block, position):
        b.insert(Fence(proxy="async"))
