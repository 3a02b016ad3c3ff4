"""Runs the roles' traces side by side and checks every step against every order in which they could have happened.

Each thread's course is fixed by the inputs, and each wait names the phase that it waits for. If every wait and
arrival provably meets its phase (checked here: parity must not alias, arrivals must add up), all interleavings
order the same events, and vector clocks of one of them speak for all: two accesses that are not ordered in the
clocks can meet in some interleaving. Units complete as late as the waits allow: what a unit does has an own component,
and only waits move other clocks along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tilewright.passes.checker.barriers import Clock, Meeting, Phases, merged
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.memory import Access, Memory, RaceFault
from tilewright.passes.checker.model import Agent, Model, RingModel
from tilewright.passes.checker.trace import Event, Run


@dataclass(eq=False)
class Thread:
    """The state of an agent."""

    agent: Agent
    events: list[Event]
    cut: bool
    clock: Clock
    proxy: Clock
    at: int = 0
    #: barriers that it arrived at and has not left
    waiting: tuple[Meeting, int] | None = None
    started: bool = False
    stores: list[Event] = field(default_factory=list)
    #: asynchronous copies that it has started, by kind of token
    copies: dict[str, list[Event]] = field(default_factory=dict)
    #: arrivals at other blocks' barriers, by block
    remote: dict[int, int] = field(default_factory=dict)
    #: clocks when it issued its groups of the matrix unit
    groups: list[tuple[Clock, Clock]] = field(default_factory=list)


class Machine:
    """One block, or the blocks of a cluster, on given inputs. ``runs``: for each block those of its roles by number."""

    #: what each kind of event does; false: it has to wait
    rules: ClassVar[dict[str, Callable[[Any, Thread, Event], bool]]]

    def __init__(self, model: Model, runs: Sequence[Sequence[Run] | dict[int, Run]], agents: Sequence[Agent] = ()):
        """``agents``: whom to follow if not those of one cluster."""
        self.model = model
        self.agents = agents = agents or model.agents
        count = len(agents)
        self.units: dict[object, int] = {}
        for agent in agents:
            events = runs[agent.cta][agent.role.number].events
            kinds = {(event.kind, event.other if event.kind == "start_copy" else "") for event in events}
            self._add_units(agent, kinds, count)
        blocks, rings = range(len(runs)), model.rings.values()
        for key in [("ring", cta, ring.number, n) for cta in blocks for ring in rings for n in range(ring.stages)]:
            self.units[key] = count + len(self.units)
        size = count + len(self.units)
        self.threads = []
        for agent in agents:
            run = runs[agent.cta][agent.role.number]
            self.threads.append(Thread(agent, run.events, run.cut, np.zeros(size, int), np.zeros(size, int)))
        self.everything = (1 << model.groups**2) - 1
        self.memory = [Memory(model.regions, self.everything) for _ in blocks]
        self.full = {(cta, r.number): self._barriers(r, cta, "full", r.producers) for cta in blocks for r in rings}
        self.empty = {(cta, r.number): self._barriers(r, cta, "empty", r.consumers) for cta in blocks for r in rings}
        self.meetings: dict[tuple[object, ...], Meeting] = {}
        self.log: list[tuple[int, int, Event]] = []
        self.size = size

    def _add_units(self, agent: Agent, kinds: set[tuple[str, str]], count: int) -> None:
        wanted: list[object] = []
        if ("dot", "") in kinds:
            wanted.append(("dots", agent.cta, agent.role.number, agent.group))
        if ("bulk_store", "") in kinds and agent.first:
            wanted.append(("stores", agent.number))
        wanted += [("copies", agent.number, token) for kind, token in sorted(kinds) if kind == "start_copy"]
        if ("release", "") in kinds and agent.first:
            wanted += [("arrivals", agent.number, cta) for cta in range(self.model.ctas) if cta != agent.cta]
        for key in wanted:
            self.units.setdefault(key, count + len(self.units))

    def _barriers(self, ring: RingModel, cta: int, which: str, expected: int) -> list[Phases]:
        where = f" of block {cta}" if self.model.ctas > 1 else ""
        return [Phases(f"the {which} barrier of {ring.label} stage {n}{where}", expected) for n in range(ring.stages)]

    # --- running ------------------------------------------------------------------------------------

    def run(self) -> int:
        """Until all threads are through or stuck; gives the number of steps. Raises Fault."""
        try:
            moved = True
            while moved:
                moved = False
                for thread in self.threads:
                    while thread.at < len(thread.events) and self._step(thread):
                        moved = True
        except RaceFault as fault:
            self._explain_race(fault)
            raise
        except Fault as fault:
            if not fault.events:
                fault.events = [(self.threads[n].agent.name, e) for n, _, e in self.log if self.threads[n].agent.first]
            raise
        stuck = [t for t in self.threads if t.at < len(t.events)]
        if any(t.cut and t not in stuck for t in self.threads):
            return len(self.log)  # what comes behind a cut may set the others free
        if stuck:
            raise self._deadlock(stuck)
        for thread in self.threads:
            self._finish(thread)
        for cta in range(self.model.ctas if self.model.ctas > 1 else 0):
            self._finish_block(cta)
        return len(self.log)

    def _step(self, thread: Thread) -> bool:
        """The thread's next event, unless it has to wait."""
        event = thread.events[thread.at]
        number = thread.agent.number
        if not thread.started:
            thread.started = True
            thread.clock[number] += 1
        if not self.rules[event.kind](self, thread, event):
            return False
        self.log.append((number, int(thread.clock[number]), event))
        thread.at += 1
        thread.started = False
        return True

    # --- rings --------------------------------------------------------------------------------------

    def _acquire(self, thread: Thread, event: Event) -> bool:
        ring = event.ring
        barrier = self.empty[thread.agent.cta, ring.number][event.count % ring.stages]
        return self._await(thread, event, barrier, event.count // ring.stages)

    def _await_full(self, thread: Thread, event: Event) -> bool:
        ring = event.ring
        stage, phase = event.count % ring.stages, event.count // ring.stages + 1
        cta = thread.agent.cta
        if not self._await(thread, event, self.full[cta, ring.number][stage], phase):
            return False
        unit = self.units["ring", cta, ring.number, stage]
        thread.clock[unit] = max(thread.clock[unit], phase)
        return True

    def _await(self, thread: Thread, event: Event, barrier: Phases, phase: int) -> bool:
        """Wait for a phase by its parity: that is the same thing only if no other phase can be mistaken for it."""
        if phase >= 2 and not self._knows(thread, barrier.arrivals, phase - 1):
            raise Fault(
                f"'{event.op.name}' of use {event.count} may come before {barrier.label} has seen the use before the "
                "last: its parity tells only odd and even uses apart",
                event.op,
                hint="wait for each use of a stage before the next",
                kind="ring order",
            )
        if barrier.done < phase:
            return False
        if barrier.done > phase:
            raise Fault(
                f"'{event.op.name}' of use {event.count} may come after {barrier.label} has gone on to the next use: "
                "it would wait forever",
                event.op,
                hint="release a stage only when all threads have awaited it",
                kind="ring order",
            )
        barrier.waits.append((thread.agent, thread.clock[thread.agent.number], event))
        if phase:
            self._join(thread, barrier.complete[phase - 1])
        return True

    def _knows(self, thread: Thread, arrivals: list[list[tuple[int, int]]], phase: int) -> bool:
        """Whether the thread knows that a phase is complete."""
        if phase >= len(arrivals) - 1:
            return False
        return all(thread.clock[agent] >= when for agent, when in arrivals[phase])

    def _bulk_copy(self, thread: Thread, event: Event) -> bool:
        """Bytes count for the barrier of each block that they go to; only there and then they are known to be there."""
        if not thread.agent.leads_role:
            return True
        ring, copy, own = event.ring, event.other, thread.agent.cta
        stage, phase = event.count % ring.stages, event.count // ring.stages + 1
        if copy.announced:
            self.full[own, ring.number][stage].bytes += copy.announced
        targets = range(self.model.ctas) if copy.multicast else [own]
        for cta in targets:
            barrier = self.full[cta, ring.number][stage]
            self._check_phase(thread, event, barrier, phase)
            unit = self.units["ring", cta, ring.number, stage]
            part = ("part", own) if copy.multicast else None
            self._touch(thread, event, event.access[0], (None, part), write=True, unit=unit, when=phase, cta=cta)
            barrier.bytes -= copy.brings
            if cta != own:  # it has been issued when they are there
                barrier.clock = merged(barrier.clock, thread.clock)
                barrier.proxy = np.zeros(self.size, int) if barrier.proxy is None else barrier.proxy
        if copy.arrives:
            self._arrive(thread, event, self.full[own, ring.number][stage], phase, 1)
        for cta in targets:
            self._complete(thread, event, self.full[cta, ring.number][stage], phase)
        return True

    def _publish(self, thread: Thread, event: Event) -> bool:
        ring, agent = event.ring, thread.agent
        if ring.producers > 1 or agent.leads_role:
            stage, phase = event.count % ring.stages, event.count // ring.stages + 1
            barrier = self.full[agent.cta, ring.number][stage]
            self._check_phase(thread, event, barrier, phase)
            self._arrive(thread, event, barrier, phase, agent.weight if ring.producers > 1 else 1)
            self._complete(thread, event, barrier, phase)
        return True

    def _release(self, thread: Thread, event: Event) -> bool:
        """One arrival of each warpgroup, at the barriers of all blocks that share copies (backends/nvidia/rings.py)."""
        ring, own = event.ring, thread.agent.cta
        if not thread.agent.first:
            return True
        phase = event.count // ring.stages + 1
        for cta in range(ring.ctas) if ring.ctas > 1 else [own]:
            barrier = self.empty[cta, ring.number][event.count % ring.stages]
            self._check_phase(thread, event, barrier, phase)
            self._arrive(thread, event, barrier, phase, 1, None if cta == own else cta)
            self._complete(thread, event, barrier, phase)
        return True

    def _check_phase(self, thread: Thread, event: Event, barrier: Phases, phase: int) -> None:
        if phase <= barrier.done:
            raise Fault(
                f"too many arrivals: '{event.op.name}' of use {event.count} arrives at {barrier.label}, which has had "
                f"its {barrier.expected} arrivals for this use",
                event.op,
                event.ring.op,
                "the ring's producers and consumers must be those who arrive",
                kind="arrivals",
            )
        if phase > barrier.done + 1 or (phase > 1 and not self._knows(thread, barrier.arrivals, phase - 1)):
            raise Fault(
                f"'{event.op.name}' of use {event.count} may arrive at {barrier.label} before the use before is "
                "complete, and would count for that",
                event.op,
                hint="acquire a stage before publishing it, await it before releasing it",
                kind="ring order",
            )

    def _arrive(
        self, thread: Thread, event: Event, barrier: Phases, phase: int, weight: int, remote: int | None = None
    ) -> None:
        """``remote``: the other block whose barrier it is. The arrival is on its way there until a wait shows it."""
        barrier.arrived += weight
        if barrier.arrived > barrier.expected:
            raise Fault(
                f"too many arrivals: '{event.op.name}' of use {event.count} is arrival {barrier.arrived} at "
                f"{barrier.label}, which expects {barrier.expected}",
                event.op,
                event.ring.op,
                "the ring's producers and consumers must be those who arrive",
                kind="arrivals",
            )
        clock, proxy = thread.clock, thread.proxy
        barrier.clock, barrier.proxy = merged(barrier.clock, clock), merged(barrier.proxy, proxy)
        number = thread.agent.number
        place = (number, clock[number])
        if remote is not None:
            thread.remote[remote] = thread.remote.get(remote, 0) + 1
            place = (self.units["arrivals", number, remote], thread.remote[remote])
            barrier.clock[place[0]] = place[1]
        barrier.arrivals[phase].append(place)

    def _complete(self, thread: Thread, event: Event, barrier: Phases, phase: int) -> None:
        """Complete the open phase if nothing is missing any more."""
        if barrier.arrived < barrier.expected or barrier.bytes:
            return
        assert barrier.clock is not None and barrier.proxy is not None
        for agent, when, waited in barrier.waits:
            if barrier.clock[agent.number] < when:
                raise Fault(
                    f"'{event.op.name}' of use {event.count} may complete {barrier.label} before {agent.name} has "
                    f"seen the use before ('{waited.op.name}' of use {waited.count}), which would then wait forever",
                    event.op,
                    waited.op,
                    "release a stage only when all threads have awaited it",
                    kind="ring order",
                )
        barrier.complete.append((barrier.clock, barrier.proxy))
        barrier.done, barrier.arrived, barrier.clock, barrier.proxy = phase, 0, None, None
        barrier.waits = []
        barrier.arrivals.append([])

    # --- memory -------------------------------------------------------------------------------------

    def _touch(
        self,
        thread: Thread,
        event: Event,
        number: int,
        spread: tuple[int | None, object],
        write: bool = False,
        unit: int | None = None,
        when: int = 0,
        generic: bool = False,
        cta: int | None = None,
    ) -> None:
        agent = thread.agent
        own, how = spread
        parts = self._parts(agent, own)
        now = thread.clock[agent.number]
        at, when = (agent.number, now) if unit is None else (unit, when)
        access = Access(at, when, parts, write, how, generic, agent, now, event, thread.clock.copy())
        self.memory[agent.cta if cta is None else cta].touch(number, access, thread.proxy)

    def _parts(self, agent: Agent, axis: int | None) -> int:
        """A bit for each part of a region that a warpgroup touches: its own along ``axis``, all of them if None.

        Regions are cut along two dims, into as many parts as there are warpgroups; a bit stands for a part of both.
        """
        groups = self.model.groups
        if axis is None or agent.role.groups != groups:
            return self.everything
        places = (agent.group * groups + n if axis == 0 else n * groups + agent.group for n in range(groups))
        return sum(1 << place for place in places)

    def _load(self, thread: Thread, event: Event) -> bool:
        number, own, spread = event.access
        self._touch(thread, event, number, (own, spread), generic=True)
        return True

    def _store(self, thread: Thread, event: Event) -> bool:
        number, own, spread = event.access
        self._touch(thread, event, number, (own, spread), write=True, generic=True)
        return True

    def _start_copy(self, thread: Thread, event: Event) -> bool:
        """Threads that copy asynchronously, each its part, and wait for it themselves."""
        number, own, spread = event.access
        started = thread.copies.setdefault(event.other, [])
        started.append(event)
        unit = self.units["copies", thread.agent.number, event.other]
        self._touch(thread, event, number, (own, spread), True, unit, len(started), True)
        return True

    def _wait_copies(self, thread: Thread, event: Event) -> bool:
        kind, pending = event.other
        started = thread.copies.get(kind)
        if started:
            unit = self.units["copies", thread.agent.number, kind]
            thread.clock[unit] = max(thread.clock[unit], len(started) - pending)
        return True

    def _fence(self, thread: Thread, event: Event) -> bool:
        number = thread.agent.number
        for unit in [number, *(self.units["copies", number, kind] for kind in thread.copies)]:
            thread.proxy[unit] = thread.clock[unit]
        return True

    def _bulk_store(self, thread: Thread, event: Event) -> bool:
        number, own, _ = event.access
        if thread.agent.leads_role or (own is not None and thread.agent.first):
            thread.stores.append(event)
            unit = self.units["stores", thread.agent.number]
            self._touch(thread, event, number, (own, None), unit=unit, when=len(thread.stores))
        return True

    def _bulk_wait(self, thread: Thread, event: Event) -> bool:
        """Each thread waits for the stores that it has started itself."""
        if thread.stores:
            unit = self.units["stores", thread.agent.number]
            thread.clock[unit] = max(thread.clock[unit], len(thread.stores) - event.other)
        return True

    # --- matrix unit --------------------------------------------------------------------------------

    def _dot(self, thread: Thread, event: Event) -> bool:
        agent = thread.agent
        unit = self.units["dots", agent.cta, agent.role.number, agent.group]
        thread.groups.append((thread.clock.copy(), thread.proxy.copy()))
        for number, own, _ in event.access:
            self._touch(thread, event, number, (own, None), unit=unit, when=len(thread.groups))
        return True

    def _wait(self, thread: Thread, event: Event) -> bool:
        """A group is the work of all warps of a warpgroup: when it is finished, all have issued it."""
        last, agent = event.count, thread.agent
        if last <= 0:
            return True
        unit = self.units["dots", agent.cta, agent.role.number, agent.group]
        if thread.clock[unit] >= last:
            return True
        key = (agent.cta, agent.role, agent.group)
        others = [t for t in self.threads if t is not thread and (t.agent.cta, t.agent.role, t.agent.group) == key]
        if any(len(t.groups) < last for t in others):
            return False
        for other in others:
            self._join(thread, other.groups[last - 1])
        thread.clock[unit] = max(thread.clock[unit], last)
        return True

    # --- barriers -----------------------------------------------------------------------------------

    def _barrier(self, thread: Thread, event: Event) -> bool:
        if event.other == "cluster" and thread.waiting is None:
            for cta, count in thread.remote.items():  # releases: what the thread sent to other blocks has arrived there
                thread.clock[self.units["arrivals", thread.agent.number, cta]] = count
        return self._meet(thread, self._meeting(thread.agent, event.other))

    def _meet(self, thread: Thread, meeting: Meeting) -> bool:
        """Come to a barrier, and wait until all have."""
        if thread.waiting is None:
            thread.waiting = meeting, len(meeting.complete)
            meeting.arrive(thread.agent.number, thread.clock, thread.proxy)
        generation = thread.waiting[1]
        if len(meeting.complete) <= generation:
            return False
        thread.waiting = None
        self._join(thread, meeting.complete[generation])
        return True

    def _meeting(self, agent: Agent, scope: str) -> Meeting:
        role = agent.role
        key: tuple[object, ...] = ("role", agent.cta, role.number)
        if scope == "cluster":
            key = ("cluster",)
        elif scope == "warpgroup" and role.groups > 1:
            key = ("warpgroup", agent.cta, role.number, agent.group)
        elif scope == "block" or role.op is None:
            key = ("block", agent.cta)
        found = self.meetings.get(key)
        if found is None:
            members = [x.number for x in self.agents if _identity(x, len(key)) == key[1:]]
            found = self.meetings[key] = Meeting(members)
        return found

    def _take_turn(self, thread: Thread, event: Event) -> bool:
        agent = thread.agent
        return agent.role.groups == 1 or self._meet(thread, self._turn(agent, agent.group))

    def _pass_turn(self, thread: Thread, event: Event) -> bool:
        """Come to the barrier of the next warpgroup's turn, without waiting: it must have taken the turn before."""
        agent = thread.agent
        if agent.role.groups == 1:
            return True
        turn = self._turn(agent, (agent.group + 1) % agent.role.groups)
        if agent.number in turn.arrived or any(thread.clock[number] < when for number, when in turn.last.items()):
            raise Fault(
                "the turn may be passed on before the next warpgroup has taken the one before",
                event.op,
                hint="async.take_turn, then async.pass_turn, equally often in all warpgroups",
                kind="turns",
            )
        turn.arrive(agent.number, thread.clock, thread.proxy)
        return True

    def _turn(self, agent: Agent, group: int) -> Meeting:
        """Where a warpgroup waits for the one before it to pass the turn on. The first one's first turn is open."""
        role = agent.role
        key = ("turn", agent.cta, role.number, group)
        found = self.meetings.get(key)
        if found is None:
            before = (group - 1) % role.groups
            mine = [x for x in self.agents if x.cta == agent.cta and x.role is role]
            pair = [x for x in mine if x.group in (before, group)]
            found = self.meetings[key] = Meeting([x.number for x in pair])
            if group == 0:
                found.arrived = {x.number: 0 for x in pair if x.group == before}
        return found

    def _join(self, thread: Thread, known: tuple[Clock, Clock]) -> None:
        thread.clock = np.maximum(thread.clock, known[0])
        thread.proxy = np.maximum(thread.proxy, known[1])

    # --- the end ------------------------------------------------------------------------------------

    def _finish(self, thread: Thread) -> None:
        if thread.stores and thread.clock[self.units["stores", thread.agent.number]] < len(thread.stores):
            raise Fault(
                "the block may end and give its shared memory back while a bulk store still reads it",
                thread.stores[-1].op,
                hint="async.bulk_wait with pending = 0 at the end of the role",
                kind="unfinished store",
                events=self._past([(thread.agent, thread.clock)]),
            )

        for kind, started in thread.copies.items():
            if thread.clock[self.units["copies", thread.agent.number, kind]] < len(started):
                raise Fault(
                    "the block may end while a copy into its shared memory is in flight",
                    started[-1].op,
                    hint="async.wait with pending = 0 at the end",
                    kind="unfinished copy",
                    events=self._past([(thread.agent, thread.clock)]),
                )

    def _finish_block(self, cta: int) -> None:
        """Nothing of other blocks may still be on its way to a block that ends with its last thread."""
        mine = [t for t in self.threads if t.agent.cta == cta]
        known = np.maximum.reduce([t.clock for t in mine])
        for thread in self.threads:
            sent = thread.remote.get(cta, 0)
            if sent and known[self.units["arrivals", thread.agent.number, cta]] < sent:
                releases = [event for event in thread.events if event.kind == "release"]
                raise Fault(
                    f"block {cta} may end while {thread.agent.name} arrives at its barriers",
                    releases[-1].op,
                    hint="async.barrier of the cluster behind the roles",
                    kind="unfinished cluster",
                    events=self._past([(thread.agent, thread.clock)]),
                )

    def _deadlock(self, stuck: list[Thread]) -> Fault:
        lines, seen = [], set()
        for thread in stuck:
            event = thread.events[thread.at]
            key = (thread.agent.cta, thread.agent.role, event.op)
            if key in seen:
                continue
            seen.add(key)
            lines.append(f"{thread.agent.name}: '{event.op.name}' waits for {self._what(thread, event)}")
        first = stuck[0].events[stuck[0].at].op
        last = stuck[-1].events[stuck[-1].at].op
        return Fault(
            "deadlock: nothing can go on\n  " + "\n  ".join(lines),
            first,
            last,
            "each stage that is awaited must be published, each that is acquired again must be released",
            [
                *self._past([(t.agent, t.clock) for t in self.threads if t.agent.first]),
                *((t.agent.name, t.events[t.at]) for t in stuck if t.agent.first),
            ],
            kind="deadlock",
        )

    def _what(self, thread: Thread, event: Event) -> str:
        if event.kind in ("acquire", "await"):
            ring, use = event.ring, event.count
            barriers = self.full if event.kind == "await" else self.empty
            barrier = barriers[thread.agent.cta, ring.number][use % ring.stages]
            verb, use = ("published", use) if event.kind == "await" else ("released", use - ring.stages)
            arrived = f"{barrier.arrived} of {barrier.expected} arrivals"
            arrived += f", {barrier.bytes} bytes missing" if barrier.bytes else ""
            return f"use {use} of {ring.label} to be {verb} ({arrived})"
        if event.kind in ("barrier", "take_turn"):
            meeting, _ = thread.waiting or (None, 0)
            missing = [] if meeting is None else [n for n in meeting.members if n not in meeting.arrived]
            where = "its turn" if event.kind == "take_turn" else "at a barrier"
            return f"{where}: " + ", ".join(self.threads[n].agent.name for n in missing)
        return "the other warps of its warpgroup"

    # --- sequences ----------------------------------------------------------------------------------

    def _explain_race(self, fault: RaceFault) -> None:
        """What must have happened for the two accesses to meet: the past of both, nothing else."""
        old, new = fault.old, fault.new
        fault.events = self._past([(old.agent, old.clock), (new.agent, new.clock)])
        fault.events.append((new.agent.name, new.event))

    def _past(self, ends: list[tuple[Agent, Clock]]) -> list[tuple[str, Event]]:
        """The events that happen before the ends, in an order in which they can; of threads alike, the first."""
        reach = np.maximum.reduce([clock for _, clock in ends])
        shown = {agent.number for agent, _ in ends}
        return [
            (self.threads[number].agent.name, event)
            for number, when, event in self.log
            if when <= reach[number] and (self.threads[number].agent.first or number in shown)
        ]


def _identity(agent: Agent, length: int) -> tuple[object, ...]:
    """An agent's place in the cluster, as exact as a meeting's key is: its block, role, warpgroup."""
    return (agent.cta, agent.role.number, agent.group)[: length - 1]


Machine.rules = {
    "acquire": Machine._acquire,
    "await": Machine._await_full,
    "bulk_copy": Machine._bulk_copy,
    "announced": lambda machine, thread, event: True,
    "publish": Machine._publish,
    "release": Machine._release,
    "load": Machine._load,
    "store": Machine._store,
    "start_copy": Machine._start_copy,
    "wait_copies": Machine._wait_copies,
    "fence": Machine._fence,
    "bulk_store": Machine._bulk_store,
    "bulk_wait": Machine._bulk_wait,
    "dot": Machine._dot,
    "wait": Machine._wait,
    "barrier": Machine._barrier,
    "take_turn": Machine._take_turn,
    "pass_turn": Machine._pass_turn,
}

__all__ = ["Machine"]
