"""What threads wait at: the hardware barriers of rings, and the barriers where threads meet."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tilewright.passes.checker.model import Agent
from tilewright.passes.checker.trace import Event

#: how far each thread and unit is known to be
Clock = np.ndarray


def merged(known: Clock | None, more: Clock) -> Clock:
    """What both know, in an array of its own."""
    return more.copy() if known is None else np.maximum(known, more)


@dataclass(eq=False)
class Phases:
    """One hardware barrier of a ring: who arrived for the phase that is open, and what each complete phase knows."""

    label: str
    expected: int
    done: int = 0
    arrived: int = 0
    #: bytes announced and not brought yet
    bytes: int = 0
    #: of the open phase
    clock: Clock | None = None
    proxy: Clock | None = None
    arrivals: list[list[tuple[int, int]]] = field(default_factory=lambda: [[], []])
    #: (clock, proxy clock) of complete phases; phase 0 is complete from the start and knows nothing
    complete: list[tuple[Clock, Clock]] = field(default_factory=list)
    #: who passed a wait for the last complete phase: (agent, when, event)
    waits: list[tuple[Agent, int, Event]] = field(default_factory=list)


@dataclass(eq=False)
class Meeting:
    """A barrier of some threads."""

    members: list[int]
    #: who came since it was last complete, when, and what they know together
    arrived: dict[int, int] = field(default_factory=dict)
    clock: Clock | None = None
    proxy: Clock | None = None
    complete: list[tuple[Clock, Clock]] = field(default_factory=list)
    #: the arrivals that completed it last
    last: dict[int, int] = field(default_factory=dict)

    def arrive(self, number: int, clock: Clock, proxy: Clock) -> None:
        """A thread comes, with what it knows now."""
        self.arrived[number] = int(clock[number])
        self.clock, self.proxy = merged(self.clock, clock), merged(self.proxy, proxy)
        if len(self.arrived) == len(self.members):
            self.complete.append((self.clock, self.proxy))
            self.last, self.arrived, self.clock, self.proxy = self.arrived, {}, None, None


__all__ = ["Clock", "Meeting", "Phases", "merged"]
