"""communicate: what a launch on several ranks needs beside what the program says, so that no rank overtakes another.

The memory of a launch is that of the launch before, and of whatever a rank runs in between. So at its beginning a rank
tells all others that it has entered the launch, and nobody touches its memory, flags included, before::

    comm.enter
    ...
    %there = comm.peer %x, %r
    %entered = comm.credit peer(%r)
    %put = comm.put %there, [...], %tile, after(%entered)

At its end each block counts itself out; with the last one the rank leaves the launch. Where ranks read each other's
memory, none ends the launch before all have come that far: what runs next may overwrite what others still read.

A credit stands once in front of the first access to a rank in its block or in a loop around it, right behind the
comm.peer; `licm` has moved that out of loops.
"""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import FLAG, Credit, Enter, Leave, Peer, Put, ReducePut, Signal, peer_of
from tilewright.ir.core import Block, Function, IRError, Operation, Value
from tilewright.ir.indexed_ops import Atomic, Gather, Scatter
from tilewright.ir.tile_ops import Element, Load, Store
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: operations that read through a view
READS = Load | Element | Gather


@register_pass("communicate")
class Communicate(FunctionPass):
    """For functions with the attribute ``communicates``. Behind `tile-order`, which moves the body into a loop."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if not function.attributes.get("communicates"):
            return
        if (context.options.num_ctas or 1) != 1 or function.attributes.get("num_ctas", 1) != 1:
            hint = "leave out num_ctas"
            raise IRError("kernels that communicate do not run in clusters", function.loc, hint)
        for op in function.walk():
            if isinstance(op, Store | Scatter | Atomic) and peer_of(op.view) is not None:
                raise IRError(f"'{op.name}' writes to the tensor of another rank", op.loc, "use tw.put")
        reads_peers = any(isinstance(op, READS) and peer_of(op.view) is not None for op in function.walk())
        body = function.body.block
        _add_credits(body, {})
        b = Builder(body, function.loc)
        with b.at(body, 0):
            b.insert(Enter())
        b.insert(Leave(after_all=reads_peers))


def _add_credits(block: Block, known: dict[Value, Value]) -> None:
    """Insert credits into a block and those inside. ``known``: the token of each rank that has been waited for."""
    known = dict(known)
    for op in list(block.ops):
        if isinstance(op, Peer):
            _credit(block, block.ops.index(op) + 1, op, op.rank, known)
        elif isinstance(op, Signal):
            op.after = [*op.after, _credit(block, block.ops.index(op), op, op.peer, known)]
        elif isinstance(op, READS | Put | ReducePut):
            peer = peer_of(op.view)
            if peer is not None:
                op.after = [*op.after, known[peer]]
        for region in op.regions:
            _add_credits(region.block, known)


def _credit(block: Block, position: int, op: Operation, peer: Value, known: dict[Value, Value]) -> Value:
    """The token of the credit for a rank, made at ``position`` where there is none yet."""
    if peer not in known:
        b = Builder(block, op.loc)
        with b.at(block, position):
            known[peer] = b.insert(Credit(peer, types=[FLAG], hints=["entered"])).result
    return known[peer]
