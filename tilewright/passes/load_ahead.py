"""load-ahead: in loops without matrix products, loads into registers one iteration ahead of their use.

A loop that loads a tile, works on it and comes round leaves the memory idle while it works. Where the address depends
on nothing but the loop's index and values from outside, the next iteration's tile is loaded first::

    %first = tile.load ... [lo]
    tile.for %i = ... iter(%now = %first) {
      %next = tile.load ... [i + step]       // in flight while this iteration works on %now
      ...
      tile.yield %next }

The last iteration loads a tile that nobody reads: loads are bounds-checked, so it may lie outside. Loops that meet
other programs (atomic updates, barriers) keep their order, and so do loads of tensors that the program writes.
"""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.cluster_ops import ClusterReduce
from tilewright.ir.comm_ops import view_root
from tilewright.ir.core import Effect, Function, Operation, Value
from tilewright.ir.indexed_ops import Atomic
from tilewright.ir.tile_ops import Dot, For, Load, Yield
from tilewright.ir.types import TileType
from tilewright.passes.analysis import written_tensors
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.prefetch import address_slice, carry, clone_address, follows_index
from tilewright.passes.warp_count import default_warps

#: 32-bit words that the tiles of one loop may take in each thread while they wait: more cost blocks on the SM, which
#: hide the latency too
MOST_WORDS = 16


@register_pass("load-ahead")
class LoadAhead(FunctionPass):
    """Not for functions with dots: there `placement` has decided how operands travel."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        ops = list(function.walk())
        if any(isinstance(op, Dot) for op in ops):
            return
        warps = context.options.num_warps or default_warps(function, context.target)
        written = written_tensors(function)
        for op in ops:
            if isinstance(op, For) and not any(map(_meets_others, op.walk())):
                loads = _movable(op, written, warps * context.target.warp_size)
                if loads:
                    _rotate(op, loads)


def _meets_others(op: Operation) -> bool:
    """Whether an operation keeps loads on its side; what blocks of a cluster exchange orders no memory."""
    return isinstance(op, Atomic) or bool(op.effect & Effect.SYNC and not isinstance(op, ClusterReduce))


def _movable(loop: For, written: set[Value], threads: int) -> list[Load]:
    """The loads of the loop that may run ahead; none where their registers would be too many."""
    found, words = [], 0.0
    for op in loop.body.block.ops:
        if not isinstance(op, Load) or op.shared is not None or op.after or view_root(op.view) in written:
            continue
        tile = op.result.type
        assert isinstance(tile, TileType)
        if follows_index(op, loop):
            found.append(op)
            words += tile.size * tile.dtype.bits / 32 / threads
    return found if words <= MOST_WORDS else []


def _rotate(loop: For, loads: list[Load]) -> None:
    block, outer = loop.body.block, loop.parent
    assert outer is not None
    slices = [op for op in block.ops if any(op in (address_slice(load) or []) for load in loads)]
    b = Builder(outer, loop.loc)
    with b.at(outer, outer.ops.index(loop)):
        first = _issue(b, loads, slices, {loop.index: loop.lo})
    with b.at(block, 0):
        following = _issue(b, loads, slices, {loop.index: b.add(loop.index, loop.step)})
    terminator = block.terminator
    assert isinstance(terminator, Yield)
    terminator.values = [*terminator.values, *following]
    ready = {load.result: carry(loop, value, load.result.hint) for load, value in zip(loads, first, strict=True)}
    block.set_ops([op for op in block.ops if op not in loads])
    for op in loop.walk():
        op.replace_operands(ready)


def _issue(b: Builder, loads: list[Load], slices: list[Operation], mapping: dict[Value, Value]) -> list[Value]:
    """The loads with their addresses computed for another index."""
    mapping = clone_address(b, slices, mapping)
    for op in loads:
        b.insert(op.clone(mapping))
    return [mapping[load.result] for load in loads]
