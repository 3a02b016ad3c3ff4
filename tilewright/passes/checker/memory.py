"""Who touched which shared memory, and whether two accesses are ordered.

Time is a vector clock with a component for each thread that the checker follows and for each unit that works beside
the threads. An access has a place on one component; a later one is safe if its thread's clock has reached that place.
A second clock holds what is known to the async proxy (copy engine, matrix unit): ordinary writes get there by a
fence of the thread that wrote. PTX ISA, "Memory Consistency Model: Proxies".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.ir import async_ops as a
from tilewright.ir.core import Operation
from tilewright.passes.checker.barriers import Clock
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.model import Agent, Region
from tilewright.passes.checker.trace import Event


@dataclass(slots=True, eq=False)
class Access:
    """The latest access of one kind. ``unit``: the clock's component; ``when``: its place there."""

    unit: int
    when: int
    #: a bit for each part of the region (`Machine._parts`)
    parts: int
    write: bool
    #: how elements are spread over threads: two threads with the same spread touch different elements
    spread: Any
    #: by the threads' own loads and stores, not through the async proxy
    generic: bool
    agent: Agent
    #: the agent's own place in time when it started this
    issued: int
    event: Event
    #: what the agent knew then
    clock: Clock


class Memory:
    """The accesses to each region since it was last written as a whole."""

    def __init__(self, regions: list[Region], everything: int):
        self.everything = everything
        self.accesses: list[dict[Any, Access]] = [{} for _ in regions]
        self.written = [0] * len(regions)
        self.taken: list[Event | None] = [None] * len(regions)
        self.regions = regions

    def touch(self, number: int, new: Access, proxy: Clock) -> None:
        """Check an access against those before it, and remember it. Raises Fault."""
        region = self.regions[number]
        self._compare(region, region, new, proxy)
        for other in region.overlaps:
            self._compare(other, region, new, proxy)
        if not new.write:
            missing = new.parts & ~self.written[number]
            if missing:
                self._unwritten(region, new)
        else:
            self.written[number] |= new.parts
            for other in region.overlaps:
                self.written[other.number] = 0
                self.taken[other.number] = new.event
        accesses = self.accesses[number]
        if new.write and new.parts == self.everything and not new.generic and new.spread is None:
            accesses.clear()  # ordered behind all of them: what is ordered behind it is behind them too
        accesses[new.unit, new.write, new.parts, new.spread] = new

    def _compare(self, region: Region, own: Region, new: Access, proxy: Clock) -> None:
        write, generic, parts, clock = new.write, new.generic, new.parts, new.clock
        for old in self.accesses[region.number].values():
            if not (write or old.write) or (region is own and not parts & old.parts):
                continue
            if write and old.write and new.event.op is old.event.op and new.spread != old.spread and not generic:
                continue  # parts of one tile, from different blocks of a cluster
            if old.generic:
                if generic:
                    if old.unit == new.unit == new.agent.number:
                        continue  # one thread, in program order
                    waits = old.unit != old.agent.number and old.agent is new.agent  # for a copy of its own
                    if region is own and old.spread is not None and old.spread == new.spread and not waits:
                        continue  # different elements, or the same thread's
                elif old.write and clock[old.unit] >= old.when > proxy[old.unit]:
                    raise _no_fence(own, old, new)
            if clock[old.unit] < old.when:
                raise _race(region, own, old, new)

    def _unwritten(self, region: Region, new: Access) -> None:
        other = self.taken[region.number]
        text = f"{region.label} is read, but nothing was written to it"
        if other is not None:
            text = f"{region.label} is read, but other data was written over it"
        raise Fault(
            text, new.event.op, None if other is None else other.op, "await the copy that fills it", kind="unwritten"
        )


def _verb(access: Access) -> str:
    return "writes" if access.write else "reads"


def _no_fence(region: Region, old: Access, new: Access) -> Fault:
    text = (
        f"missing proxy fence: '{new.event.op.name}' {_verb(new)} {region.label} through the async proxy, "
        f"'{old.event.op.name}' wrote it by ordinary stores"
    )
    return RaceFault(
        text, old, new, "async.fence behind the stores, in the threads that made them, before the barrier", "fence"
    )


def _race(region: Region, own: Region, old: Access, new: Access) -> Fault:
    what = own.label if region is own else f"{own.label}, which shares bytes with {region.label},"
    before, started = f"'{old.event.op.name}' ({old.agent.name})", bool(new.clock[old.agent.number] >= old.issued)
    how = (
        f"while {before} may still be at work"
        if started
        else f"and nothing orders it with {before}, which {_verb(old)}"
    )
    text = f"race: '{new.event.op.name}' ({new.agent.name}) {_verb(new)} {what} {how} {'on ' * started}it"
    return RaceFault(text, old, new, _hint(old, new, started), "race")


def _hint(old: Access, new: Access, started: bool) -> str:
    ops: list[Operation] = [old.event.op, new.event.op]
    if isinstance(old.event.op, a.AsyncDot) and started:
        return "async.wait for the dot, then release the stage or pass the barrier"
    if isinstance(old.event.op, a.BulkStore) and started:
        return "async.bulk_wait in the thread that stored, then a barrier"
    if any(isinstance(op, a.Copy) for op in ops):
        return "acquire the stage before filling it, await it before reading, release it when the reads are over"
    return "a barrier of all threads that take part, between the two"


class RaceFault(Fault):
    """Two accesses that nothing orders; the machine adds the sequence."""

    def __init__(self, message: str, old: Access, new: Access, hint: str, kind: str):
        super().__init__(message, new.event.op, old.event.op, hint, kind=kind)
        self.old, self.new = old, new
