"""barriers: drop the ones between which nothing meets.

Passes that pass tiles through shared memory put a barrier on both sides of the writes: behind earlier readers, and in
front of later ones. Behind the warps' last barrier there is often nothing left that the next must hold apart. An access
to a buffer is open from where it may begin (a product that reads it: from its issue until a wait) to the next barrier
of its scope; a barrier stays if an open access conflicts with one behind it, up to the barrier after. Waits for the
copy engine move in front of an earlier barrier, which then speaks for them too.

Rings are left alone: their stages are handed over by barriers of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilewright.ir.async_ops import (
    Alloc,
    AsyncDot,
    Barrier,
    BulkStore,
    BulkWait,
    LocalLoad,
    LocalStore,
    Release,
    Role,
    Wait,
    buffer_of,
)
from tilewright.ir.core import Block, Function, Operation, Value
from tilewright.ir.tile_ops import For, While
from tilewright.ir.types import SlotType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: barriers by how many threads they join
SCOPES = ("warpgroup", "role", "block", "cluster")
#: as many younger pieces of work of an asynchronous unit are told apart
MOST_YOUNGER = 8


@dataclass(frozen=True)
class Access:
    """``unit``: the asynchronous one that is not known to be done, which got ``younger`` pieces of work since."""

    buffer: Value
    writes: bool
    unit: str = ""
    younger: int = 0


Open = frozenset[Access]


@register_pass("barriers")
class Barriers(FunctionPass):
    """Runs when all tiles that travel through shared memory do so."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        for role in [op for op in function.walk() if isinstance(op, Role) and not op.single_thread]:
            for wait in [op for op in role.body.walk() if isinstance(op, BulkWait)]:
                _wait_earlier(wait)
            barriers = [op for op in role.body.walk() if isinstance(op, Barrier) and op.scope in ("role", "warpgroup")]
            for barrier in [op for op in barriers if not _serves_release(op)]:
                if not _Search(barrier).needed(role.body.block):
                    assert barrier.parent is not None
                    barrier.parent.ops.remove(barrier)


def _serves_release(barrier: Barrier) -> bool:
    """A release speaks for all warps: what joins them before stays (`tilewright.passes.hand_back`)."""
    assert barrier.parent is not None
    ops = barrier.parent.ops
    return any(isinstance(op, Release) for op in ops[ops.index(barrier) + 1 :][:1])


def _wait_earlier(wait: BulkWait) -> None:
    """Move a wait for the copy engine in front of the barrier before, if nothing is given to the engine in between."""
    block = wait.parent
    assert block is not None
    position = block.ops.index(wait)
    for earlier in reversed(range(position)):
        op = block.ops[earlier]
        if op.regions or isinstance(op, BulkStore | BulkWait):
            return
        if isinstance(op, Barrier) and SCOPES.index(op.scope) >= SCOPES.index(wait.scope):
            block.ops.remove(wait)
            block.insert(earlier, wait)
            return


class _Search:
    """Follows open accesses through a role, as if one barrier were not there."""

    def __init__(self, barrier: Barrier):
        self.barrier = barrier
        self.found = False

    def needed(self, block: Block) -> bool:
        self.block(block, frozenset(), frozenset())
        return self.found

    def block(self, block: Block, open_: Open, behind: Open) -> tuple[Open, Open]:
        """``behind``: accesses held apart by the barrier in question alone, from those behind it."""
        for op in block.ops:
            if op.regions:
                open_, behind = self.regions(op, open_, behind)
                continue
            if op is self.barrier:
                behind |= {access for access in open_ if not access.unit}
                continue
            open_, behind = (settle(op, state, self.barrier.scope) for state in (open_, behind))
            for access in accesses(op):
                self.found |= any(e.buffer is access.buffer and (e.writes or access.writes) for e in behind)
                open_ |= {access}
        return open_, behind

    def regions(self, op: Operation, open_: Open, behind: Open) -> tuple[Open, Open]:
        if not isinstance(op, For | While):
            ends = [self.block(r.block, open_, behind) for r in op.regions]
            return frozenset().union(*(e[0] for e in ends)), frozenset().union(*(e[1] for e in ends))
        while True:
            before = open_, behind
            for region in op.regions:
                after = self.block(region.block, open_, behind)
                open_, behind = open_ | after[0], behind | after[1]
            if (open_, behind) == before:
                return open_, behind


def accesses(op: Operation) -> list[Access]:
    """What an operation reads and writes in buffers that no ring hands over."""
    slots: list[Value] = []
    if isinstance(op, LocalStore | LocalLoad | BulkStore):
        slots = [op.slot]
    elif isinstance(op, AsyncDot):
        slots = [value for value in (op.a, op.b) if isinstance(value.type, SlotType)]
    buffers = [buffer_of(slot) for slot in slots]
    free = [b for b in buffers if not isinstance(b.op, Alloc) or b.op.ring is None]
    return [Access(buffer, isinstance(op, LocalStore), _unit(op)) for buffer in free]


def _unit(op: Operation) -> str:
    """The unit that does an operation's work, or is waited for. The copy engine knows each thread's own stores."""
    if isinstance(op, AsyncDot | Wait):
        return "products"
    return f"engine, for a {op.scope}" if isinstance(op, BulkStore | BulkWait) else ""


def settle(op: Operation, state: Open, scope: str) -> Open:
    """The open accesses at an operation: waits end what units do, barriers close what has ended."""
    if isinstance(op, AsyncDot | BulkStore):
        unit = _unit(op)
        return frozenset(replace(a, younger=min(a.younger + 1, MOST_YOUNGER)) if a.unit == unit else a for a in state)
    if isinstance(op, Wait | BulkWait):
        ended = [a for a in state if a.unit == _unit(op) and a.younger >= op.pending]
        return state.difference(ended) | {Access(a.buffer, a.writes) for a in ended}
    joins = isinstance(op, Barrier) and SCOPES.index(op.scope) >= SCOPES.index(scope)
    return frozenset(a for a in state if a.unit) if joins else state
