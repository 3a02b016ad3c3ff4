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

Loads from the rank's own tensors that a program begins with are issued before it enters, and come meanwhile. There is
one credit, for all ranks, in front of the loop or conditional with the first such access: ranks begin a launch at about
the same time, and waiting for each other anew at every tile costs more than it hides. Where all such accesses are to
tensors of which launches use the halves in turn, ranks need not have come further than the launch before.

Where ranks read each other's memory, none ends the launch before all have come to its end, which blocks count
themselves out for: what runs next may overwrite what others still read.
"""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import (
    FLAG,
    Credit,
    Enter,
    Leave,
    Put,
    ReducePut,
    Signal,
    Turn,
    peer_of,
    takes_turns,
    view_root,
)
from tilewright.ir.core import Block, Effect, Function, Operation, Value, uses_of
from tilewright.ir.indexed_ops import Gather
from tilewright.ir.packet_ops import Send
from tilewright.ir.tile_ops import Element, Load
from tilewright.ir.types import ViewType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: operations that read through a view
READS = Load | Element | Gather
PUTS = Put | ReducePut | Send


@register_pass("communicate")
class Communicate(FunctionPass):
    """For functions with the attribute ``communicates``. Behind `tile-order`, which moves the body into a loop."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if not function.attributes.get("communicates"):
            return
        reads_peers = any(isinstance(op, READS) and peer_of(op.view) is not None for op in function.walk())
        body = function.body.block
        _add_credit(function)
        b = Builder(body, function.loc)
        with b.at(body, _before_ranks(body)):
            b.insert(Enter())
        if reads_peers:
            b.insert(Leave())


def _before_ranks(body: Block) -> int:
    """Behind loads from the rank's own tensors that a body begins with: they are on their way while it enters."""
    for place, op in enumerate(body.ops):
        of_own = isinstance(op, Load) and not _is_symmetric(op.view)
        if op.regions or isinstance(op, Turn) or not (of_own or op.effect == Effect.PURE):
            return place
    return len(body.ops)


def _is_symmetric(view: Value) -> bool:
    type_ = view_root(view).type
    return isinstance(type_, ViewType) and type_.symmetric


def _add_credit(function: Function) -> None:
    """A credit in front of the first operation that reaches other ranks; all such accesses come after it."""
    body, uses = function.body.block, uses_of(function.body)
    accesses = [op for op in function.walk() if _reaches_ranks(op)]
    if not accesses:
        return
    in_turn = all(takes_turns(view_root(_view(op)), uses) for op in accesses)
    first = next(top for top in body.ops if any(op in accesses for op in top.walk()))
    b = Builder(body, accesses[0].loc)
    with b.at(body, body.ops.index(first)):
        entered = b.insert(Credit(types=[FLAG], hints=["entered"], in_turn=in_turn)).result
    for op in accesses:
        assert isinstance(op, READS | PUTS | Signal)
        op.after = [*op.after, entered]


def _view(op: Operation) -> Value:
    assert isinstance(op, READS | PUTS | Signal)
    return op.flag if isinstance(op, Signal) else op.view


def _reaches_ranks(op: Operation) -> bool:
    return isinstance(op, Signal) or (isinstance(op, READS | PUTS) and peer_of(op.view) is not None)
