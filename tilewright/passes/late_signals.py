"""late-signals: a tile's signal is sent while the next tile is computed, when its puts have long arrived.

A signal comes after the puts that it publishes have arrived on the other rank, a way over the link and back. Where a
consumer role walks over tiles, its warps would stand still meanwhile. So the loop carries the signal to its next
iteration, in front of the first operation there that stores, waits for ranks or signals::

    %pending, %peer, %token = tile.for %tile = ... iter(%pending = false, ...) {
      products
      tile.if %pending { comm.signal %flag, %peer, after(%token) }
      tile.if %remote { %put = comm.put ... ; yield true, %owner, %put } else { yield false, ... }
      tile.yield }
    tile.if %pending { comm.signal ... }

Nobody waits in vain for a late signal: the role sends it before it waits itself. Signals stay where they are if the
role waits later in the same iteration, or if another role of the block waits for ranks: the next iteration may need
stages of a producer, or the turn of consumers that alternate, which come behind such a wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.ir.async_ops import Role
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import PUT, Put, ReducePut, Signal, WaitFlags
from tilewright.ir.core import Block, Function, Operation, Region, Value
from tilewright.ir.indexed_ops import Atomic, Scatter
from tilewright.ir.tile_ops import For, If, Store, Subview, Yield
from tilewright.ir.types import ScalarType, Type, i1
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.prefetch import carry

#: what comes after a signal of the iteration before
LATER = Put | ReducePut | Signal | WaitFlags | Store | Scatter | Atomic


@register_pass("late-signals")
class LateSignals(FunctionPass):
    """In front of `staging`, which lets each signal wait for its puts."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        roles = [op for op in function.body.block.ops if isinstance(op, Role)]
        for role in roles:
            if role.kind.startswith("consumer") and not any(_waits(other) for other in roles if other is not role):
                for loop in [op for op in role.body.block.ops if isinstance(op, For)]:
                    _delay(function, loop)


def _waits(role: Role) -> bool:
    return any(isinstance(op, WaitFlags) for op in role.body.walk())


@dataclass
class _Late:
    """A signal on its way: whether there is one, the peer, the flag's index and the token of the puts."""

    signal: Signal
    tensor: Value
    values: list[Value]

    def send(self, b: Builder, values: Sequence[Value]) -> None:
        """Where there is one: signal. ``values`` as `values`, at this place."""
        pending, peer, *index, token = values
        b.loc = self.signal.loc
        branch = b.if_else(pending)
        with b.at(branch.then_body.block):
            b.signal(b.subview(self.tensor, index), peer, [token])
            b.yield_()
        with b.at(branch.else_body.block):
            b.yield_()


def _delay(function: Function, loop: For) -> None:
    block = loop.body.block
    signals = [op for op in loop.body.walk() if isinstance(op, Signal) and _may_wait(function, op, loop)]
    first = next((op for op in block.ops if any(isinstance(inner, LATER) for inner in op.walk())), None)
    if not signals or first is None or first in signals:
        return
    late = [_take_out(signal, block) for signal in signals]
    outer = loop.parent
    assert outer is not None
    b = Builder(outer, loop.loc)
    for one in late:
        with b.at(outer, outer.ops.index(loop)):
            inits = [_nothing(b, value.type) for value in one.values]
        carried = [carry(loop, value, hint) for value, hint in zip(inits, _hints(one), strict=True)]
        with b.at(block, block.ops.index(first)):
            one.send(b, carried)
        terminator = block.terminator
        assert isinstance(terminator, Yield)
        terminator.values = [*terminator.values, *one.values]
        with b.at(outer, outer.ops.index(loop) + 1):
            one.send(b, loop.results[-len(one.values) :])


def _may_wait(function: Function, signal: Signal, loop: For) -> bool:
    """Whether a signal is of puts, is sent once in an iteration at most and with no wait behind it there.

    And its flag can be named again elsewhere.
    """
    flag = signal.flag.op
    named = isinstance(flag, Subview) and flag.view in function.params
    place: Operation | None = signal
    while isinstance(place, Signal | If) and not _waits_behind(place):
        if place.parent is loop.body.block:
            return named and any(token.type == PUT for token in signal.after)
        assert place.parent is not None
        place = _owner(place.parent)
    return False


def _waits_behind(op: Operation) -> bool:
    """Whether the operations behind one in its block wait for ranks, which may wait for the signal themselves."""
    assert op.parent is not None
    behind = op.parent.ops[op.parent.ops.index(op) + 1 :]
    return any(isinstance(inner, WaitFlags) for other in behind for inner in other.walk())


def _take_out(signal: Signal, body: Block) -> _Late:
    """Remove a signal; what it needs, as values of the loop's body, through the conditionals around it."""
    block, flag = signal.parent, signal.flag.op
    assert block is not None and isinstance(flag, Subview)
    b = Builder(block, signal.loc)
    with b.at(block, block.ops.index(signal)):
        token = b.join([token for token in signal.after if token.type == PUT])
        values = [b.constant(True, i1), signal.peer, *flag.index, token]
    block.ops.remove(signal)
    while block is not body:
        branch = _owner(block)
        assert isinstance(branch, If) and branch.parent is not None
        for region in branch.regions:
            terminator = region.block.terminator
            assert isinstance(terminator, Yield)
            given = values
            if region.block is not block:
                with b.at(region.block, len(region.block.ops) - 1):
                    given = [_nothing(b, value.type) for value in values]
            terminator.values = [*terminator.values, *given]
        values = [Value(value.type, branch) for value in values]
        branch.results += values
        block = branch.parent
    return _Late(signal, flag.view, values)


def _owner(block: Block) -> Operation | None:
    region = block.parent
    owner = region.parent if isinstance(region, Region) else None
    return owner if isinstance(owner, Operation) else None


def _nothing(b: Builder, type_: Type) -> Value:
    """What stands for a signal that there is none of."""
    return b.constant(0, type_) if isinstance(type_, ScalarType) else b.join()


def _hints(late: _Late) -> list[str]:
    return ["pending", "peer", *["flag"] * (len(late.values) - 3), "put"]
