"""mailboxes: the places where the blocks of a cluster leave each other messages, and the counts of their uses.

Each exchange has a mailbox of its own, and a running count through all loops around it numbers its uses, as those of
rings are numbered (`tilewright.passes.pipeline`)::

    %box = async.mailbox : mailbox<4 x tile<1xf32>>
    ...
    async.await_mailboxes                                   // once: the other blocks' exist
    tile.for ... iter(%uses = %0) {
      %all = tile.cluster_reduce.sum %own, mailbox(%box), count(%uses) : tile<1xf32>
      tile.yield [%uses + 1] }

The wait for the others' mailboxes stands as late as it can, so that a program's first loads run while its blocks start.
"""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.cluster_ops import AwaitMailboxes, ClusterReduce, MakeMailbox
from tilewright.ir.core import Block, Function, IRError, Operation, Region, Value
from tilewright.ir.tile_ops import For, If, While, Yield
from tilewright.ir.types import MailboxType, ScalarType, TileType, i32
from tilewright.passes.analysis import ancestor_in, enclosing_operations
from tilewright.passes.clusters import cluster_size
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.spread import HINT


@register_pass("mailboxes")
class Mailboxes(FunctionPass):
    """Runs when nothing copies operations or changes loops any more."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        exchanges = [op for op in function.walk() if isinstance(op, ClusterReduce) and op.mailbox is None]
        if not exchanges:
            return
        body = function.body.block
        first = ancestor_in(exchanges[0], body)
        assert first is not None
        b = Builder(body, function.loc)
        with b.at(body, body.ops.index(first)):
            b.insert(AwaitMailboxes())
        loops = enclosing_operations(function)
        with b.at(body, 0):
            zero = b.index(0)
            for exchange in exchanges:
                type_ = exchange.source.type
                message = type_.with_layout(None) if isinstance(type_, TileType) else type_
                assert isinstance(message, ScalarType | TileType)
                made = MakeMailbox(types=[MailboxType(cluster_size(function), message)], hints=["mailbox"])
                exchange.mailbox = b.insert(made).result
                _count(exchange, zero, loops)


def _count(exchange: ClusterReduce, zero: Value, loops: dict[Block, Operation]) -> None:
    """Give an exchange the number of its uses before."""
    block, around = exchange.parent, list[Operation]()
    assert block is not None
    while block in loops:
        around.insert(0, loops[block])
        parent = loops[block].parent
        assert parent is not None
        block = parent
    if any(isinstance(op, For | While) for op in around):
        _carry(exchange, around, zero)
    else:
        exchange.count = zero


def _carry(exchange: ClusterReduce, around: list[Operation], count: Value) -> Value:
    """Carry a count through the operations ``around`` the exchange, outermost first; what it is behind them."""
    if not around:
        exchange.count = count
        return _next(exchange, count)
    op, inside = around[0], (around[1] if len(around) > 1 else exchange).parent
    result = Value(ScalarType(i32), op, "uses")
    if isinstance(op, If):
        for region in op.regions:
            _extend(region, _carry(exchange, around[1:], count) if region.block is inside else count)
        op.results.append(result)
        return result
    assert isinstance(op, For | While)
    op.inits = [*op.inits, count]
    arguments = [Value(ScalarType(i32), region.block, "uses") for region in op.regions]
    for region, argument in zip(op.regions, arguments, strict=True):
        region.block.args.append(argument)
    op.results.append(result)
    if inside is op.regions[-1].block:
        _extend(op.regions[-1], _carry(exchange, around[1:], arguments[-1]))
        return result
    if len(around) > 1:
        raise IRError("a loop's condition exchanges results of blocks in a branch or loop", exchange.loc, HINT)
    # the condition runs before each iteration, and once more
    exchange.count = arguments[0]
    body = op.regions[-1].block
    b = Builder(body, exchange.loc)
    with b.at(body, 0):
        _extend(op.regions[-1], b.add(arguments[-1], b.index(1)))
    return _next(op, result)


def _next(op: Operation, count: Value) -> Value:
    """One more, computed behind an operation."""
    assert op.parent is not None
    b = Builder(op.parent, op.loc)
    with b.at(op.parent, op.parent.ops.index(op) + 1):
        return b.add(count, b.index(1))


def _extend(region: Region, value: Value) -> None:
    """Let a region yield one more value."""
    terminator = region.block.terminator
    assert isinstance(terminator, Yield)
    terminator.values = [*terminator.values, value]
