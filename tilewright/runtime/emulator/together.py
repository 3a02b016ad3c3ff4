"""Kernels of one or several emulated GPUs that run at the same time, in turns.

A vendor's emulator offers each launch as a `Machine`; `run_together` gives them turns until all have
ended. It finds what no machine sees alone: that nobody can run any more (deadlock), or that all
poll memory which nobody will change (livelock: the same state came back, and everybody had a turn).
"""

from __future__ import annotations

import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from tilewright.runtime.emulator.errors import EmulatorFault
from tilewright.runtime.emulator.races import Races

#: turns without any effect on memory, after which states are compared
_QUIET = 2000
#: seconds until progress is shown, and between two lines of it
_FIRST_REPORT, _NEXT_REPORT = 2.0, 0.5


@dataclass(frozen=True)
class Setting:
    """How one launch runs: the ``seed`` of its interleaving (None: in order, asynchronous work as late as allowed),
    the race detector (None: off), the GPU's number of how many, and how many blocks are resident at once (None: any
    number)."""

    seed: int | None = None
    races: Races | None = None
    rank: int = 0
    ranks: int = 1
    resident: int | None = None


@dataclass(frozen=True)
class Stuck:
    """Why a machine cannot go on: a line for each reason, and the instruction of the first warp that waits."""

    reasons: str
    instruction: str = ""
    line: int = 0
    source: str = ""


class Machine(ABC):
    """One launch on one emulated GPU, in progress.

    ``name`` is the kernel's, ``rank`` the GPU's number; ``statistics`` what has been executed, complete at
    the end. ``quiet`` counts the turns since it last did what others can see (stores, arrivals, landings).
    """

    name: str = ""
    rank: int = 0
    statistics: Any = None
    quiet: int = 0
    blocks: int = 0
    blocks_ended: int = 0

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether every thread has exited and everything in flight has landed."""

    @property
    @abstractmethod
    def instructions(self) -> int:
        """Instructions executed, counted for every warp."""

    @abstractmethod
    def turn(self) -> bool:
        """Let some warps run a while. False if none can, with nothing in flight. EmulatorFault for faults."""

    @abstractmethod
    def state(self) -> int:
        """A hash of the registers and program counters."""

    @abstractmethod
    def longest_wait(self) -> int:
        """For how many turns a warp that can run has not had one, at most."""

    @abstractmethod
    def stuck(self) -> Stuck:
        """What its warps wait for, for a report of a deadlock."""

    @abstractmethod
    def close(self) -> None:
        """Release what it holds of the address space, whatever happened."""


def run_together(machines: Sequence[Machine], seed: int | None = None, progress: bool | None = None) -> None:
    """Run the machines to their ends, in turns; with a ``seed`` in random ones.

    ``progress``: show it on stderr (None: if that is a terminal). EmulatorFault for the first fault of
    a kernel, for a deadlock among them, and for a livelock.
    """
    live, watch = list(machines), _Watch()
    report = _Report(machines, sys.stderr) if _shown(progress) else None
    order = None if seed is None or len(live) < 2 else random.Random(seed)
    try:
        while live:
            ran = False
            with np.errstate(all="ignore"):
                for machine in live if order is None else [m for m in live if order.random() < 0.5] or live:
                    ran = machine.turn() or ran
            left = [machine for machine in live if not machine.ended]
            if len(left) < len(live):
                live = left
            elif not ran and not any(machine.turn() for machine in live):
                raise _report_stuck("deadlock: no warp can run", live, len(machines))
            elif watch.repeats(live):
                raise _report_stuck("livelock: warps poll what nobody will change", live, len(machines))
            if report is not None:
                report.show()
    finally:
        if report is not None:
            report.clear()
        for machine in machines:
            machine.close()


class _Watch:
    """Notices that the machines came back to a state with no effect in between (Brent's cycle detection, 1980)."""

    def __init__(self) -> None:
        self._reference: tuple[int, ...] | None = None
        self._turns = self._limit = 0

    def repeats(self, live: Sequence[Machine]) -> bool:
        if any(machine.quiet < _QUIET for machine in live):
            self._reference = None
            return False
        now = tuple(machine.state() for machine in live)
        self._turns += 1
        if self._reference == now and all(machine.longest_wait() < self._turns for machine in live):
            return True
        if self._reference is None or self._turns >= self._limit:
            self._limit = 64 if self._reference is None else 2 * self._limit
            self._reference, self._turns = now, 0
        return False


def _report_stuck(what: str, live: Sequence[Machine], count: int) -> EmulatorFault:
    """The error for a group in which nobody gets on."""
    stuck = [machine.stuck() for machine in live]
    text = ""
    for machine, one in zip(live, stuck, strict=True):
        text += (f"\nrank {machine.rank}, kernel {machine.name}:" if count > 1 else "") + one.reasons
    first = stuck[0]
    return EmulatorFault(what + text, instruction=first.instruction, line=first.line, source=first.source)


# --- progress ----------------------------------------------------------------------------------------


def _shown(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


class _Report:
    """A line about long runs, which overwrites itself."""

    def __init__(self, machines: Sequence[Machine], out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._machines, self._out, self._clock = machines, out, clock
        self._start = clock()
        self._due = self._start + _FIRST_REPORT
        self._width = 0

    def show(self) -> None:
        now = self._clock()
        if now < self._due:
            return
        self._due = now + _NEXT_REPORT
        machines = self._machines
        text = (
            f"{machines[0].name}: {sum(m.blocks_ended for m in machines)} of {sum(m.blocks for m in machines)} blocks, "
            f"{sum(m.instructions for m in machines):,} instructions, {now - self._start:.0f} s"
        )
        self._out.write("\r" + text.ljust(self._width))
        self._out.flush()
        self._width = len(text)

    def clear(self) -> None:
        if self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._out.flush()


__all__ = ["Machine", "Setting", "Stuck", "run_together"]
