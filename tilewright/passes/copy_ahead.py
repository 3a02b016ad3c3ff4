"""copy-ahead: placed loads as asynchronous copies of the computing threads, several iterations ahead of their use.

For targets with ``cp.async``, and loads that `placement` (operands of dots, with ``schedule="prefetch"``) or
`row_copies` gives to that engine. In a loop whose load addresses depend on nothing but the loop's index and values from
outside, the copies of iteration i + stages - 1 are started when those of iteration i are needed::

    async.wait [] token(%last) {pending = (stages - 2) * copies}   // this thread's part of stage i is there
    async.barrier                                                  // everybody's is, and stage i - 1 has been read
    %t = async.copy ... [i + stages - 1], %slot[i + stages - 1]
    %a = async.local_load %slot[i]
    %acc1 = tile.dot %a, ...

Where threads turn out to read their own copies alone, `tilewright.passes.own_copies` takes the loop's barrier out.

Copies run past the end of the loop: they are bounds-checked, and the wait behind the loop covers them. Every copy is
a group of its own, so that waits count copies. The other loads are left to `tilewright.passes.prefetch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tilewright.ir.async_ops import Barrier
from tilewright.ir.builder import Builder
from tilewright.ir.core import Function, Operation, Value
from tilewright.ir.tile_ops import Dot, For, Load, Yield
from tilewright.passes.analysis import enclosing_operations
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import PREFETCH, schedule_of
from tilewright.passes.prefetch import (
    Group,
    address_slice,
    allocate,
    carry,
    clone_address,
    find_groups,
    needed_bytes,
    read_slot,
    read_slots,
    transit,
)
from tilewright.passes.shared_needs import SharedNeeds

ENGINE = "cp_async"
#: stages beyond hide no more latency
MOST_STAGES = 4
#: threads of a block that may have all shared memory, where no products share it out
ROOMY_THREADS = 512


@register_pass("copy-ahead")
class CopyAhead(FunctionPass):
    """``num_stages``: slots of each load; None: up to four, as many as shared memory allows. Not for fewer than two."""

    num_stages: int | None = None

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if schedule_of(function, context.target) != PREFETCH:
            return
        warps, loops = int(function.attributes.get("num_warps", 0)), enclosing_operations(function)
        placed = [op for op in function.walk() if isinstance(op, Load) and op.shared is not None]
        again = _repeats(placed)
        transits = [transit(load, warps, context.target) for load in placed]
        wanted = [t for t in transits if t.load.engine == ENGINE and t.load not in again]
        mine = [g for g in find_groups(wanted, loops) if g.ahead]
        ours = {t.load for g in mine for t in g.transits}
        theirs = find_groups([t for t in transits if again.get(t.load, t.load) not in ours], loops)
        self._choose_stages(function, mine, theirs, context)
        for group in mine:
            if group.stages < 2:
                continue
            loop = loops[group.block]
            assert isinstance(loop, For)
            allocate(function, [group])
            _rotate(function, loop, group, again)
        if not any(isinstance(op, Dot) for op in function.walk()):
            for load in placed:
                load.shared = None  # where too few stages fit: into registers

    def _choose_stages(self, function: Function, mine: list[Group], theirs: list[Group], context: PassContext) -> None:
        """As many stages as fit, the first loop first; the others' loads keep at least one."""
        wanted = self.num_stages or context.options.num_stages
        needs, limit = SharedNeeds(function), context.target.shared_bytes
        if not any(isinstance(op, Dot) for op in function.walk()):  # few threads leave room for other blocks
            threads = int(function.attributes.get("num_warps", 0)) * context.target.warp_size
            limit = limit * min(threads, ROOMY_THREADS) // ROOMY_THREADS
        for group in mine:
            group.stages = wanted or MOST_STAGES
            while wanted is None and group.stages > 1 and needed_bytes(function, needs, [*mine, *theirs]) > limit:
                group.stages -= 1


def _repeats(loads: list[Load]) -> dict[Load, Load]:
    """For each load that repeats another of its block, that one: they share a slot.

    What is read again behind a reduction need not wait in registers. Nobody writes to these tensors.
    """
    first: dict[Any, Load] = {}
    again: dict[Load, Load] = {}
    for load in loads:
        tile = load.result.type
        key = (id(load.parent), load.view, tuple(load.index), tile, load.pad, load.evict, tuple(load.after))
        earlier = first.setdefault(key, load)
        if earlier is not load:
            again[load] = earlier
    return again


def _rotate(function: Function, loop: For, group: Group, again: dict[Load, Load]) -> None:
    block, outer, stages = loop.body.block, loop.parent, group.stages
    assert outer is not None
    loads = [t.load for t in group.transits]
    repeats = [replace(t, load=load) for t in group.transits for load, earlier in again.items() if earlier is t.load]
    slices = [op for op in block.ops if any(op in (address_slice(load) or []) for load in loads)]
    b = Builder(outer, loop.loc)
    with b.at(outer, outer.ops.index(loop)):
        zero, index, token = b.index(0), loop.lo, None
        for stage in range(stages - 1):
            token = _start(b, group, slices, {loop.index: index}, b.index(stage))
            index = b.add(index, loop.step)
    assert token is not None
    count, last = carry(loop, zero, "count"), carry(loop, token, "copied")
    taken = {*loads, *(t.load for t in repeats)}
    block.set_ops([op for op in block.ops if op not in taken])
    with b.at(block, 0):
        b.wait([], last, pending=(stages - 2) * len(loads))
        b.insert(Barrier())
        distance = b.mul(loop.step, b.index(stages - 1))
        token = _start(b, group, slices, {loop.index: b.add(loop.index, distance)}, b.add(count, b.index(stages - 1)))
    terminator = block.terminator
    assert isinstance(terminator, Yield)
    with b.at(block, len(block.ops) - 1):
        terminator.values = [*terminator.values, b.add(count, b.index(1)), token]
    with b.at(outer, outer.ops.index(loop) + 1):
        b.wait([], loop.results[-1], pending=0)
        b.insert(Barrier())  # whoever fills the slots next may do so
    read = read_slots if any(isinstance(op, Dot) for op in function.walk()) else read_slot
    for t in [*group.transits, *repeats]:
        read(function, t, block, count)


def _start(b: Builder, group: Group, slices: Sequence[Operation], mapping: dict[Value, Value], count: Value) -> Value:
    """Start the copies of one iteration; the token of the last."""
    mapping, token = clone_address(b, slices, mapping), None
    for t in group.transits:
        b.loc = t.load.loc
        assert t.buffer is not None
        view, index = mapping.get(t.load.view, t.load.view), [mapping.get(v, v) for v in t.load.index]
        after = [mapping.get(v, v) for v in t.load.after]
        token = b.copy(view, index, b.slot(t.buffer, count), ENGINE, t.load.pad, after=after, evict=t.load.evict)
    assert token is not None
    return token
