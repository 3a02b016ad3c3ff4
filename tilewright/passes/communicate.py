"""communicate: what a launch on several ranks needs beside what the program says, so that no rank overtakes another.

The memory of a launch is that of the launch before, and of whatever a rank runs in between. So at its beginning a rank
tells all others that it has entered the launch, and nobody touches its memory, flags included, before::

    comm.enter
    ...
    %entered = comm.credit : token<flag>
    tile.for ... {                               // over tiles, or peers
      %there = comm.peer %x, %r
      %put = comm.put %there, [...], %tile, after(%entered)
      comm.signal %flag, %r, after(%put, %entered) }

There is one credit, for all ranks, in front of the loop or conditional with the first such access: ranks begin a launch
at about the same time, and waiting for each other anew at every tile costs more than it hides.

At its end each block counts itself out; with the last one the rank leaves the launch. Where ranks read each other's
memory, none ends the launch before all have come that far: what runs next may overwrite what others still read.
"""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import FLAG, Credit, Enter, Leave, Put, ReducePut, Signal, peer_of
from tilewright.ir.core import Block, Function, Operation
from tilewright.ir.indexed_ops import Gather
from tilewright.ir.tile_ops import Element, Load
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: operations that read through a view
READS = Load | Element | Gather


@register_pass("communicate")
class Communicate(FunctionPass):
    """For functions with the attribute ``communicates``. Behind `tile-order`, which moves the body into a loop."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if not function.attributes.get("communicates"):
            return
        reads_peers = any(isinstance(op, READS) and peer_of(op.view) is not None for op in function.walk())
        body = function.body.block
        _add_credit(body)
        b = Builder(body, function.loc)
        with b.at(body, 0):
            b.insert(Enter())
        b.insert(Leave(after_all=reads_peers))


def _add_credit(body: Block) -> None:
    """A credit in front of the first operation that reaches other ranks; all such accesses come after it."""
    accesses = [op for top in body.ops for op in top.walk() if _reaches_ranks(op)]
    if not accesses:
        return
    first = next(top for top in body.ops if any(op in accesses for op in top.walk()))
    b = Builder(body, accesses[0].loc)
    with b.at(body, body.ops.index(first)):
        entered = b.insert(Credit(types=[FLAG], hints=["entered"])).result
    for op in accesses:
        assert isinstance(op, READS | Put | ReducePut | Signal)
        op.after = [*op.after, entered]


def _reaches_ranks(op: Operation) -> bool:
    return isinstance(op, Signal) or (isinstance(op, READS | Put | ReducePut) and peer_of(op.view) is not None)
