"""late-signals: a tile's signal is sent while the next tile is computed, when its puts have long arrived.

A signal comes after the puts that it publishes have arrived on the other rank, a way over the link and back. Where a
consumer role walks over tiles, its warps would stand still meanwhile. So the loop carries the signal, or a loop of
signals to several ranks, to its next iteration, in front of the first operation there that stores, waits for ranks or
signals::

    %pending, %peer, %token = tile.for %tile = ... iter(%pending = false, ...) {
      products
      tile.if %pending { comm.signal %flag, %peer, after(%token) }
      tile.if %remote { %put = comm.put ... ; yield true, %owner, %put } else { yield false, ... }
      tile.yield }
    tile.if %pending { comm.signal ... }

Where the products are in a conditional with what follows them, the signal goes into its branches. Nobody waits in vain
for a late signal: the role sends it before it waits itself. Signals stay where they are if the role waits later in the
same iteration, or if another role of the block waits for ranks: the next iteration may need stages of a producer, or
the turn of consumers that alternate, which come behind such a wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tilewright.ir.async_ops import Role
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import FLAG, PUT, Put, ReducePut, Signal, WaitEarlier, WaitFlags, view_root
from tilewright.ir.core import Block, Effect, Function, Operation, Region, Value
from tilewright.ir.indexed_ops import Atomic, Scatter
from tilewright.ir.packet_ops import Receive, Send
from tilewright.ir.tile_ops import For, If, Store, Yield
from tilewright.ir.types import ScalarType, Type, ViewType, i1
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.prefetch import carry

#: what may wait for other ranks, and what comes after a signal of the iteration before
WAITS = WaitFlags | WaitEarlier | Receive
LATER = Put | ReducePut | Send | Signal | WAITS | Store | Scatter | Atomic


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
    return any(isinstance(op, WAITS) for op in role.body.walk())


@dataclass
class _Late:
    """Signals on their way: whether there are any, and what they need of the iteration that they belong to.

    ``op``: the signal, or the loop of signals; ``derived``: what is computed anew for it, views above all; ``needs``:
    the values that the loop carries; ``values``: whether there is one, and those values at the end of the loop's body.
    """

    op: Operation
    derived: list[Operation]
    needs: list[Value]
    values: list[Value]

    def send(self, b: Builder, values: Sequence[Value]) -> None:
        """Where there is one: signal. ``values`` as `values`, at this place."""
        pending, *needs = values
        b.loc = self.op.loc
        branch = b.if_else(pending)
        with b.at(branch.then_body.block):
            mapping = dict(zip(self.needs, needs, strict=True))
            for op in [*self.derived, self.op]:
                b.insert(op.clone(mapping))
            b.yield_()
        with b.at(branch.else_body.block):
            b.yield_()


def _delay(function: Function, loop: For) -> None:
    block = loop.body.block
    signals = [op for op in loop.body.walk() if isinstance(op, Signal)]
    ops = [op for op in dict.fromkeys(_with_loop(op, loop) for op in signals) if _may_wait(function, op, loop)]
    if not any(isinstance(op, LATER) and not isinstance(op, Signal) for op in loop.body.walk()):
        return
    late = [_take_out(op, loop) for op in ops]
    outer = loop.parent
    assert outer is not None
    b = Builder(outer, loop.loc)
    for one in late:
        with b.at(outer, outer.ops.index(loop)):
            inits = [_nothing(b, value.type) for value in one.values]
        carried = [carry(loop, value, hint) for value, hint in zip(inits, _hints(one), strict=True)]
        for place in list(_places(block)):
            assert place.parent is not None
            with b.at(place.parent, place.parent.ops.index(place)):
                one.send(b, carried)
        terminator = block.terminator
        assert isinstance(terminator, Yield)
        terminator.values = [*terminator.values, *one.values]
        with b.at(outer, outer.ops.index(loop) + 1):
            one.send(b, loop.results[-len(one.values) :])


def _with_loop(signal: Signal, tiles: For) -> Operation:
    """A signal, or the loop around it if that does nothing but signal."""
    assert signal.parent is not None
    loop = _owner(signal.parent)
    if not isinstance(loop, For) or loop is tiles or loop.results:
        return signal
    others = [op for op in loop.body.block.ops if not isinstance(op, Signal | Yield)]
    return signal if any(op.regions or op.effect != Effect.PURE for op in others) else loop


def _places(block: Block) -> Iterator[Operation]:
    """In front of what a late signal is sent: once, whichever way control goes."""
    first = next((op for op in block.ops if any(isinstance(inner, LATER) for inner in op.walk())), block.ops[-1])
    if isinstance(first, If) and any(_computes_first(region.block) for region in first.regions):
        for region in first.regions:
            yield from _places(region.block)
    else:
        yield first


def _computes_first(block: Block) -> bool:
    """Whether a block has a loop in front of what a late signal must not come behind."""
    first: Operation = next(_places(block))
    while first.parent is not block:
        assert first.parent is not None
        owner = _owner(first.parent)
        assert owner is not None
        first = owner
    return any(isinstance(op, For) for op in block.ops[: block.ops.index(first)])


def _may_wait(function: Function, op: Operation, loop: For) -> bool:
    """Whether signals are of puts, are sent once in an iteration at most and with no wait behind them there.

    And their flags can be named again elsewhere.
    """
    for signal in (inner for inner in op.walk() if isinstance(inner, Signal)):
        if view_root(signal.flag) not in function.params or all(token.type != PUT for token in signal.after):
            return False
    place: Operation | None = op
    while place is op or isinstance(place, If):
        if _waits_behind(place):
            return False
        if place.parent is loop.body.block:
            return True
        assert place.parent is not None
        place = _owner(place.parent)
    return False


def _waits_behind(op: Operation) -> bool:
    """Whether the operations behind one in its block wait for ranks, which may wait for the signal themselves."""
    assert op.parent is not None
    behind = op.parent.ops[op.parent.ops.index(op) + 1 :]
    return any(isinstance(inner, WAITS) for other in behind for inner in other.walk())


def _take_out(op: Operation, loop: For) -> _Late:
    """Remove signals; what they need, as values of the loop's body, through the conditionals around them."""
    block, body = op.parent, loop.body.block
    assert block is not None
    derived, needs = _needs(op, loop)
    b = Builder(block, op.loc)
    with b.at(block, block.ops.index(op)):
        values = [b.constant(True, i1), *needs]
    block.ops.remove(op)
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
    return _Late(op, derived, needs, values)


def _needs(op: Operation, loop: For) -> tuple[list[Operation], list[Value]]:
    """What a late operation needs of the loop's iteration: operations that are repeated for it, and values."""
    inside = _defined(loop.body)
    own = {arg for region in op.regions for arg in _defined(region)}
    for inner in op.walk():
        if isinstance(inner, Signal):  # what has been waited for in this iteration is behind it anyway
            inner.after = [token for token in inner.after if token.type != FLAG or token not in inside]
    derived: list[Operation] = []
    needs: list[Value] = []

    def visit(value: Value) -> None:
        if value in own or value not in inside:
            return
        if value.op is not None and (isinstance(value.type, ViewType) or not value.op.operands):
            if value.op not in derived:
                for operand in value.op.operands:
                    visit(operand)
                derived.append(value.op)
        elif value not in needs:
            needs.append(value)

    for inner in op.walk():
        for operand in inner.operands:
            visit(operand)
    return derived, needs


def _defined(region: Region) -> set[Value]:
    """The values that a region defines."""
    found = set(region.block.args)
    for op in region.walk():
        found |= set(op.results) | {arg for inner in op.regions for arg in inner.block.args}
    return found


def _owner(block: Block) -> Operation | None:
    region = block.parent
    owner = region.parent if isinstance(region, Region) else None
    return owner if isinstance(owner, Operation) else None


def _nothing(b: Builder, type_: Type) -> Value:
    """What stands for a signal that there is none of."""
    return b.constant(0, type_) if isinstance(type_, ScalarType) else b.join()


def _hints(late: _Late) -> list[str]:
    return ["pending", *(value.hint or ("put" if value.type == PUT else "late") for value in late.needs)]
