"""Runs one launch of all ranks side by side: flags, entries and exits, and what they order.

A flag is set once in a launch, by one program (checked here), so every wait meets its own signal, all interleavings
order the same events, and vector clocks of one of them speak for all, as in `machine`. Two things do depend on the
order in which blocks run, and are covered by the choice of blocks: programs of one block follow one another, so the
fewer blocks there are, the less can go on at the same time and the more can deadlock; and the more there are, the less
is ordered and the more can race. So one block for each program and one block for all of a rank are the two extremes;
two blocks on each rank show what a block does for one program while it is at another of its own.

PTX ISA, "Memory Consistency Model": a signal is a release at system scope by one thread, which speaks for others of
its block that it has met at a barrier; a wait is a poll by one thread with an acquire behind it. The copy engine's
writes are done for the thread that issued them once it has waited for the writes, not for the reads alone; what was
written before a flag is seen by the copy engine behind a proxy fence. On AMD a barrier tells threads of each other, but
other ranks see what a thread did only behind a release fence of its own, and it sees what they did behind an acquire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir.comm_ops import takes_turns
from tilewright.ir.core import Value, uses_of
from tilewright.ir.packet_ops import Receive, Send
from tilewright.passes.checker.barriers import Clock
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.machine import Machine, Thread
from tilewright.passes.checker.model import Agent, Model, find_agents
from tilewright.passes.checker.places import Place
from tilewright.passes.checker.protocol_program import is_shared_by_ranks
from tilewright.passes.checker.rank_memory import READ, UPDATE, WRITE, FarAccess, FarFault, RankMemory, fence_hint
from tilewright.passes.checker.trace import Event, Run

#: a flag: its tensor, whose rank it is, which element
Flag = tuple[Value, int, tuple[int, ...]]


@dataclass(eq=False)
class Signalled:
    """A flag that is set, with what its signaller knew."""

    agent: Agent
    event: Event
    clock: Clock
    proxy: Clock


class ProtocolMachine(Machine):
    """One launch of a world. ``runs``: for each block of each rank, rank by rank, those of its roles by number."""

    def __init__(self, model: Model, world: int, runs: Sequence[dict[int, Run]]):
        self.world, self.blocks = world, len(runs) // world
        #: each thread's accesses need fences of its own towards other ranks
        self.each_thread = model.target.vendor == "amd"
        names = [f"rank {n // self.blocks} block {n % self.blocks}" for n in range(len(runs))]
        super().__init__(model, runs, list(find_agents(model.roles, names)))
        self.far = RankMemory()
        self.flags: dict[Flag, Signalled] = {}
        self.entered: dict[int, Clock] = {}
        self.left: list[list[Clock]] = [[] for _ in range(world)]
        uses = uses_of(model.function.body)
        #: tensors that launches use in halves
        self.halved = {p for p in model.function.params if is_shared_by_ranks(p) and takes_turns(p, uses)}
        for thread in self.threads:  # a rank's threads begin behind the begin of its launch
            self._know_begun(thread, self._rank(thread), "begin", "begin before")
            thread.proxy = thread.clock.copy()

    def _add_units(self, agent: Agent, kinds: set[tuple[str, str]], count: int) -> None:
        super()._add_units(agent, kinds, count)
        wanted: list[object] = [(begin, agent.cta // self.blocks) for begin in ("begin", "begin before")]
        if self.each_thread:
            wanted.append(("released", agent.number))
        if ("bulk_store", "") in kinds and agent.first:
            wanted.append(("writes", agent.number))
        for key in wanted:
            self.units.setdefault(key, count + len(self.units))

    def _rank(self, thread: Thread) -> int:
        return thread.agent.cta // self.blocks

    def run(self) -> int:
        """As `Machine.run`. Raises Fault."""
        try:
            steps = super().run()
            self._check_ends()
            return steps
        except FarFault as fault:
            old, new = fault.old, fault.new
            fault.events = self._past([(old.agent, old.clock), (new.agent, new.clock)])
            if not any(event is new.event for _, event in fault.events):
                fault.events.append((new.agent.name, new.event))
            raise

    # --- memory of ranks ----------------------------------------------------------------------------

    def _touch(self, thread: Thread, event: Event, *_: object, **__: object) -> None:
        """Shared memory of the block: `check-schedule` looks after that."""

    def _touch_far(self, thread: Thread, event: Event, kind: str, unit: int | None = None, when: int = 0) -> None:
        """``unit``: what works beside the thread, if not the thread itself."""
        agent, place = thread.agent, event.place
        assert isinstance(place, Place)
        generic = unit is None or event.kind == "start_copy"
        self._check_begun(thread, event, place.rank, place.label, kind == READ, generic)
        if unit is None:
            unit, when = agent.number, int(thread.clock[agent.number])
            if self.each_thread:
                unit = self.units["released", agent.number]
        fenced = self.each_thread or not generic
        access = FarAccess(
            unit, when, kind, generic, fenced, _spread(event), agent, self._rank(thread), event, thread.clock.copy()
        )
        self.far.touch(place, access, thread.proxy)

    def _check_begun(
        self, thread: Thread, event: Event, rank: int, what: str, reads: bool = False, generic: bool = True
    ) -> None:
        if not 0 <= rank < self.world:
            raise Fault(f"'{event.op.name}' names rank {rank} of {self.world}", event.op, kind="no such rank")
        root, events = event.place.root, [(thread.agent.name, event)]
        begin = self.units["begin before" if root in self.halved else "begin", rank]
        if not thread.clock[begin]:
            raise Fault(
                f"missing credit: '{event.op.name}' ({thread.agent.name}) may touch {what} before rank {rank} has "
                f"begun the launch{' before' * (root in self.halved)}, while it still uses that for something else",
                event.op,
                hint="comm.credit of that rank before it",
                events=[*self._past([(thread.agent, thread.clock)]), *events],
                kind="credit",
            )
        if (not generic or (self.each_thread and reads)) and not thread.proxy[begin]:
            raise Fault(
                f"missing fence: '{event.op.name}' ({thread.agent.name}) {'reads' if reads else 'writes'} {what}, and "
                "what was done to it before the launch may come later for it",
                event.op,
                hint=fence_hint(generic),
                events=[*self._past([(thread.agent, thread.clock)]), *events],
                kind="fence",
            )

    def _far_read(self, thread: Thread, event: Event) -> bool:
        self._touch_far(thread, event, READ)
        return True

    def _far_write(self, thread: Thread, event: Event) -> bool:
        self._touch_far(thread, event, WRITE)
        return True

    def _far_update(self, thread: Thread, event: Event) -> bool:
        self._touch_far(thread, event, UPDATE)
        return True

    def _bulk_copy(self, thread: Thread, event: Event) -> bool:
        """A copy out of a tensor of ranks reads it until its bytes are counted in the ring."""
        if event.place is not None and thread.agent.leads_role:
            ring = event.ring
            unit = self.units["ring", thread.agent.cta, ring.number, event.count % ring.stages]
            self._touch_far(thread, event, READ, unit, event.count // ring.stages + 1)
        return super()._bulk_copy(thread, event)

    def _store(self, thread: Thread, event: Event) -> bool:
        """Threads that fill a stage of a ring themselves."""
        if event.place is not None:
            self._touch_far(thread, event, READ)
        return True

    def _start_copy(self, thread: Thread, event: Event) -> bool:
        super()._start_copy(thread, event)
        if event.place is not None:
            unit = self.units["copies", thread.agent.number, event.other]
            self._touch_far(thread, event, READ, unit, len(thread.copies[event.other]))
        return True

    def _bulk_store(self, thread: Thread, event: Event) -> bool:
        started = len(thread.stores)
        super()._bulk_store(thread, event)
        if event.place is not None and len(thread.stores) > started:
            kind = UPDATE if getattr(event.op, "reduce", None) else WRITE
            self._touch_far(thread, event, kind, self.units["writes", thread.agent.number], len(thread.stores))
        return True

    def _bulk_wait(self, thread: Thread, event: Event) -> bool:
        super()._bulk_wait(thread, event)
        if thread.stores and not event.op.read:  # type: ignore[attr-defined]
            unit = self.units["writes", thread.agent.number]
            thread.clock[unit] = max(thread.clock[unit], len(thread.stores) - event.other)
        return True

    # --- fences -------------------------------------------------------------------------------------

    def _join(self, thread: Thread, known: tuple[Clock, Clock]) -> None:
        if not self.each_thread:
            return super()._join(thread, known)
        thread.clock = np.maximum(thread.clock, known[0])
        return None

    def _acquire_fence(self, thread: Thread, event: Event) -> bool:
        """What the thread knows of, its copies or it itself now see."""
        thread.proxy = thread.clock.copy()
        return True

    def _release_fence(self, thread: Thread, event: Event) -> bool:
        self._release_all(thread)
        return True

    def _release_all(self, thread: Thread) -> None:
        if self.each_thread:
            number = thread.agent.number
            thread.clock[self.units["released", number]] = thread.clock[number]

    # --- flags --------------------------------------------------------------------------------------

    def _signal(self, thread: Thread, event: Event) -> bool:
        """One thread of the role sets the flag; packets are written by all."""
        place, leads = event.place, thread.agent.leads_role
        if leads or isinstance(event.op, Send):
            self._check_begun(thread, event, place.rank, f"flag {place}")
        if not leads:
            return True
        flag = (place.root, place.rank, place.elements()[0])
        first = self.flags.get(flag)
        if first is not None:
            raise Fault(
                f"double signal: flag {place} is signalled by {first.agent.name} and by {thread.agent.name}; a launch "
                "sets a flag once",
                event.op,
                first.event.op,
                "a flag for each program and rank that signals",
                [
                    *self._past([(thread.agent, thread.clock), (first.agent, first.clock)]),
                    (thread.agent.name, event),
                ],
                kind="double signal",
            )
        self._release_all(thread)
        self.flags[flag] = Signalled(thread.agent, event, thread.clock.copy(), thread.proxy.copy())
        return True

    def _wait_flags(self, thread: Thread, event: Event) -> bool:
        """One thread of the role polls."""
        if not thread.agent.leads_role:
            return True
        signals = [self.flags.get(flag) for flag in flags_of(event.place)]
        if any(signal is None for signal in signals):
            return False
        if isinstance(event.op, Receive):  # packets order nothing but themselves
            return True
        for signal in signals:
            assert signal is not None
            self._join(thread, (signal.clock, signal.proxy))
        return self._polled(thread)

    def _polled(self, thread: Thread) -> bool:
        """A poll ends with an acquire of the thread that polled."""
        if self.each_thread:
            thread.proxy = thread.clock.copy()
        return True

    # --- begin and end ------------------------------------------------------------------------------

    def _enter(self, thread: Thread, event: Event) -> bool:
        rank = self._rank(thread)
        if thread.agent.cta % self.blocks == 0 and self._acts(thread, event):
            self.entered.setdefault(rank, thread.clock.copy())
        return True

    def _acts(self, thread: Thread, event: Event) -> bool:
        """Of a block the first thread acts beside roles, of a role its own first one."""
        if event.op.parent is self.model.function.body.block:
            return thread.agent is next(x for x in self.agents if x.cta == thread.agent.cta)
        return thread.agent.leads_role

    def _credit(self, thread: Thread, event: Event) -> bool:
        if not thread.agent.leads_role:
            return True
        own = self._rank(thread)
        for rank in range(self.world) if event.other is None else [event.other]:
            if rank == own:
                continue
            self._know_begun(thread, rank, "begin before")
            if event.op.in_turn:  # type: ignore[attr-defined]
                continue
            if rank not in self.entered:
                return False
            thread.clock = np.maximum(thread.clock, self.entered[rank])
        return self._polled(thread)

    def _know_begun(self, thread: Thread, rank: int, *begins: str) -> None:
        for begin in begins:
            thread.clock[self.units[begin, rank]] = 1

    def _leave(self, thread: Thread, event: Event) -> bool:
        if self._acts(thread, event):
            self._check_block(thread, event)
            left = self.left[self._rank(thread)]
            if len(left) == self.blocks:
                raise Fault("a block leaves the launch twice", event.op, hint="comm.leave once, at the end")
            self._release_all(thread)
            left.append(thread.clock.copy())
        return True

    def _check_block(self, thread: Thread, event: Event) -> None:
        """All that the block's other threads do, reading the launch's number included, comes before its end."""
        for other in self.threads:
            if other.agent.cta != thread.agent.cta or other is thread:
                continue
            behind = [e.kind for e in other.events].index("leave") if other.events else 0
            if thread.clock[other.agent.number] < behind:
                raise Fault(
                    f"{thread.agent.name} ends the block's part in the launch while {other.agent.name} may be at work",
                    event.op,
                    hint="async.barrier of the block before comm.leave",
                    events=self._past([(thread.agent, thread.clock)]),
                    kind="early end",
                )

    def _finish(self, thread: Thread) -> None:
        """Each thread's own ends are those of its block, which `check-schedule` looks after."""

    def _check_ends(self) -> None:
        """What may still be on its way when a rank's launch ends."""
        last = self.threads[0].events[-1].op if self.threads[0].events else self.model.ops[-1]
        if len(self.entered) < self.world:
            raise Fault("a rank does not tell that it has begun the launch", last, hint="comm.enter", kind="no begin")
        ended = [clock for left in self.left for clock in left]
        if ended and any(len(left) < self.blocks for left in self.left):
            raise Fault("a block ends without leaving the launch, which would never end", last, hint="comm.leave")
        for rank in range(self.world):
            known = [thread.clock for thread in self.threads if self._rank(thread) == rank]
            self.far.check_end(rank, np.maximum.reduce([*known, *ended]))

    # --- deadlock -----------------------------------------------------------------------------------

    def _what(self, thread: Thread, event: Event) -> str:
        if event.kind == "wait_flags":
            missing = next(flag for flag in flags_of(event.place) if flag not in self.flags)
            root, rank, index = missing
            return f"flag {list(index)} of %{root.hint} of rank {rank}, {self._who_signals(missing)}"
        if event.kind == "credit":
            return f"rank {event.other} to begin the launch" if event.other is not None else "all to begin the launch"
        return super()._what(thread, event)

    def _who_signals(self, flag: Flag) -> str:
        for thread in self.threads:
            for event in thread.events[thread.at :]:
                place = event.place
                if event.kind == "signal" and (place.root, place.rank, place.elements()[0]) == flag:
                    return f"which {thread.agent.name} signals later than what it waits for"
        return "which nobody signals"


def _spread(event: Event) -> object:
    """How the elements of a tile are spread over threads."""
    op: Any = event.op
    tile = op.value if hasattr(op, "value") else op.results[0] if op.results else None
    return None if tile is None else getattr(tile.type, "layout", None)


def flags_of(place: Place) -> list[Flag]:
    """The flags that a wait names."""
    return [(place.root, place.rank, index) for index in place.elements()]


ProtocolMachine.rules = {
    **Machine.rules,
    "bulk_copy": ProtocolMachine._bulk_copy,
    "store": ProtocolMachine._store,
    "start_copy": ProtocolMachine._start_copy,
    "bulk_store": ProtocolMachine._bulk_store,
    "bulk_wait": ProtocolMachine._bulk_wait,
    "far_read": ProtocolMachine._far_read,
    "far_write": ProtocolMachine._far_write,
    "far_update": ProtocolMachine._far_update,
    "async_global_fence": ProtocolMachine._acquire_fence,
    "acquire_fence": ProtocolMachine._acquire_fence,
    "release_fence": ProtocolMachine._release_fence,
    "signal": ProtocolMachine._signal,
    "wait_flags": ProtocolMachine._wait_flags,
    "enter": ProtocolMachine._enter,
    "credit": ProtocolMachine._credit,
    "leave": ProtocolMachine._leave,
}

__all__ = ["Flag", "ProtocolMachine", "flags_of"]
