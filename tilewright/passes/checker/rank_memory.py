"""Who touched which memory that ranks share, and whether two accesses are ordered.

As in `memory`, an access has a place on one component of the vector clocks. What another rank does to a rank's memory
must lie between the begin and the end of that rank's own launch: what it runs before and behind, other launches too,
may use the memory for anything. So launches cannot meet, whatever their sizes, and the check of one speaks for any
sequence of them. To the half of a tensor that launches take turns at it may begin with that rank's launch before: the
half is not used then (`tilewright.ir.comm_ops.takes_turns`), and the launch that used it is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.ir.core import Value
from tilewright.passes.checker.barriers import Clock
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.model import Agent
from tilewright.passes.checker.places import Box, Place, overlap
from tilewright.passes.checker.trace import Event

READ, WRITE, UPDATE = "reads", "writes", "adds to"


@dataclass(slots=True, eq=False)
class FarAccess:
    """The latest access of a unit to a box. ``unit``: the clock's component; ``when``: its place there."""

    unit: int
    when: int
    kind: str
    #: by the threads' own loads and stores, not through the async proxy
    generic: bool
    #: sees only what a fence of its thread has let it see: of what other blocks did, or of all where it is not generic
    fenced: bool
    #: how elements are spread over the threads of a role; the same spread: the same thread for each element
    spread: Any
    agent: Agent
    #: the agent's rank
    rank: int
    event: Event
    #: what the agent knew then
    clock: Clock


class RankMemory:
    """The accesses to all tensors of all ranks in one launch."""

    def __init__(self) -> None:
        #: by tensor and rank, then by box, and whether that is exact
        self.accesses: dict[tuple[Value, int], dict[tuple[Box, bool], dict[Any, FarAccess]]] = {}

    def touch(self, place: Place, new: FarAccess, proxy: Clock) -> None:
        """Check an access against those before it, and remember it. Raises Fault."""
        boxes = self.accesses.setdefault((place.root, place.rank), {})
        for (box, exact), accesses in boxes.items():
            # what data decides, the checker guesses, and boxes of two writers may meet that never do
            if ((exact and place.exact) or new.kind == READ) and overlap(box, place.box):
                for old in accesses.values():
                    _compare(place, old, new, proxy)
        boxes.setdefault((place.box, place.exact), {})[new.unit, new.kind, new.generic] = new

    def check_end(self, rank: int, known: Clock) -> None:
        """``known``: what is over for certain when the launch of ``rank`` ends. Raises Fault."""
        for (root, owner), boxes in self.accesses.items():
            for access in (access for accesses in boxes.values() for access in accesses.values()):
                if owner == rank != access.rank and known[access.unit] < access.when:
                    raise _too_late(Place(root, owner, ()), access)


def _compare(place: Place, old: FarAccess, new: FarAccess, proxy: Clock) -> None:
    if old.kind == new.kind != WRITE:
        return  # two reads; two updates, whose order is open
    same_role = (old.agent.cta, old.agent.role) == (new.agent.cta, new.agent.role)
    if same_role and old.generic and new.generic and (old.agent is new.agent or old.spread == new.spread is not None):
        return  # one thread, in program order
    if same_role and old.agent is not new.agent and old.event.op is new.event.op and old.kind == new.kind:
        return  # warpgroups that store their parts of one tile
    if new.clock[old.unit] < old.when:
        raise _race(place, old, new)
    by_fence = new.fenced and (not new.generic or old.agent.cta != new.agent.cta)
    if by_fence and old.kind != READ and proxy[old.unit] < old.when:
        raise _no_fence(place, old, new)


def _race(place: Place, old: FarAccess, new: FarAccess) -> Fault:
    started = new.clock[old.agent.number] >= old.clock[old.agent.number]
    before = f"'{old.event.op.name}' ({old.agent.name})"
    how = f"and nothing orders it with {before}, which {old.kind} it"
    hint = "a flag between the two: signal(flag, peer, after=...) behind the first, wait(flag) before the second"
    if started:
        how = f"while {before} may still be at work on it"
        hint = "async.bulk_wait for the writes, not the reads alone, then a barrier, before the signal"
        if old.generic:
            hint = "a release fence of each thread, then a barrier, before the signal"
    text = f"race: '{new.event.op.name}' ({new.agent.name}) {new.kind} {place.label} {how}"
    return FarFault(text, old, new, hint, "race")


def _no_fence(place: Place, old: FarAccess, new: FarAccess) -> Fault:
    how = "" if new.generic else " through the async proxy"
    text = (
        f"missing fence: '{new.event.op.name}' ({new.agent.name}) {new.kind} {place.label}{how}, which "
        f"'{old.event.op.name}' ({old.agent.name}) wrote"
    )
    return FarFault(text, old, new, fence_hint(new.generic), "fence")


def fence_hint(generic: bool) -> str:
    """What an access without a fence lacks."""
    if generic:
        return "an acquire fence of each thread, behind the barrier behind the wait"
    return "async.fence {proxy = async_global} of the copying thread, behind its wait"


def _too_late(place: Place, access: FarAccess) -> Fault:
    does = "read" if access.kind == READ else "write"
    text = (
        f"unfinished: '{access.event.op.name}' ({access.agent.name}) may {does} {place.label} when the launch of rank "
        f"{place.rank} has ended"
    )
    hint = "signal(flag, peer, after=token), and let a program of that rank wait for the flag"
    if access.kind == READ:
        hint = "comm.leave at the end"
    return FarFault(text, access, access, hint, "late read" if access.kind == READ else "late write")


class FarFault(Fault):
    """An access that something else may meet; the machine adds the sequence."""

    def __init__(self, message: str, old: FarAccess, new: FarAccess, hint: str, kind: str):
        super().__init__(message, new.event.op, old.event.op, hint, kind=kind)
        self.old, self.new = old, new


__all__ = ["READ", "UPDATE", "WRITE", "FarAccess", "FarFault", "RankMemory", "fence_hint"]
