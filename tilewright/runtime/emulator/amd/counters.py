"""Memory operations in flight: the counters of s_waitcnt, and what is known of each register.

ISA chapter 4, "Data dependency resolution": VM_CNT counts vector memory loads, stores and atomics, which
complete in order; LGKM_CNT counts LDS operations, which complete in order among themselves, and
scalar loads, which complete in any order (so that only a wait for zero covers them). EXP_CNT has
nothing to count here: CDNA stores read their data registers when they issue.

An operation counts as finished only when a wait says so. A register that a load will write holds its
old value until then on a real GPU; here, touching it is a fault.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.amd.operands import Array

if TYPE_CHECKING:
    from tilewright.runtime.emulator.amd.decode import Instruction

#: the selected waves: a slice of all, or their indices
Selection = slice | Array


class Counter(enum.IntEnum):
    """What counts an operation: VM_CNT, or one of the two kinds of LGKM_CNT."""

    VECTOR = 0
    LDS = 1
    SCALAR = 2


#: operations that a counter can tell: VM_CNT has six bits, LGKM_CNT four
MOST = {Counter.VECTOR: 63, Counter.LDS: 15}


class Counters:
    """How many operations each wave has issued, and how many are known to be finished: [counter, wave]."""

    def __init__(self, waves: int) -> None:
        self.issued = np.zeros((len(Counter), waves), np.int32)
        self.finished = np.zeros((len(Counter), waves), np.int32)

    def issue(self, counter: Counter, waves: Selection) -> None:
        """One more operation of the selected waves is in flight; it issues when its counter has room for it."""
        self.issued[counter, waves] += 1
        if counter is not Counter.SCALAR:  # these finish in any order
            self._finish(counter, waves, MOST[counter])

    def wait(self, waves: Selection, vector: int | None, lgkm: int | None) -> None:
        """Wait until at most so many operations are in flight; None does not wait.

        With scalar loads in flight, LGKM_CNT may drop because of them: what a wait proves of the LDS
        operations is that at most ``lgkm`` of them remain; of the scalar loads, nothing unless it is zero.
        """
        if vector is not None:
            self._finish(Counter.VECTOR, waves, vector)
        if lgkm is not None:
            self._finish(Counter.LDS, waves, lgkm)
            if lgkm == 0:
                self._finish(Counter.SCALAR, waves, 0)

    def _finish(self, counter: Counter, waves: Selection, remaining: int) -> None:
        known, issued = self.finished[counter, waves], self.issued[counter, waves]
        self.finished[counter, waves] = np.maximum(known, issued - remaining)


_WAIT = re.compile(r"(vmcnt|expcnt|lgkmcnt)\((\d+)\)")


@lru_cache(maxsize=1024)
def wait_counts(text: str) -> tuple[int | None, int | None]:
    """VM_CNT and LGKM_CNT of an s_waitcnt operand; None where it does not wait (the largest value)."""
    if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", text):
        bits = int(text, 0)
        vector, lgkm = bits & 15 | (bits >> 14 & 3) << 4, bits >> 8 & 15
    else:
        counts = {name: int(number) for name, number in _WAIT.findall(text)}
        vector, lgkm = counts.get("vmcnt", 63), counts.get("lgkmcnt", 15)
    return None if vector == 63 else vector, None if lgkm == 15 else lgkm


class RegisterStatus:
    """Of each register and wave: whether it was ever written, and which operation in flight will write it.

    ``clean`` says of a register that all waves have a defined value in it and nothing is in flight to
    it, which makes reading it cost nothing more.
    """

    def __init__(self, registers: int, waves: int, poison: bool, counters: Counters, kinds: Sequence[Counter]) -> None:
        self.counters = counters
        self.undefined = np.full((registers, waves), poison)
        self.clean = [not poison] * registers
        #: number of the last operation of each kind that writes the register; 0 for none
        self._arrival = {kind: np.zeros((registers, waves), np.int32) for kind in kinds}
        self._loads: list[Instruction | None] = [None] * registers

    def expect(self, register: int, waves: Selection, kinds: Sequence[Counter], load: Instruction) -> None:
        """The operation that each of the counters ``kinds`` issued last will write the register."""
        for kind in kinds:
            self._arrival[kind][register, waves] = self.counters.issued[kind, waves]
        self._loads[register] = load
        self.clean[register] = False

    def in_flight(self, register: int, waves: Selection, but: Sequence[Counter] = ()) -> Array | None:
        """The selected waves in which an operation will still write the register, if there are any.

        ``but`` leaves out operations of these counters.
        """
        if self._loads[register] is None:
            return None
        pending = None
        for kind, arrival in self._arrival.items():
            if kind not in but:
                late = arrival[register, waves] > self.counters.finished[kind, waves]
                pending = late if pending is None else pending | late
        return pending if pending is not None and pending.any() else None

    def load_of(self, register: int) -> str:
        """The instruction that loads the register, for messages."""
        load = self._loads[register]
        return f"`{load.text}` (line {load.line})" if load is not None else "a load"

    def refresh(self, register: int) -> None:
        """Find out whether the register is clean."""
        everything = slice(None)
        if not self.undefined[register].any() and self.in_flight(register, everything) is None:
            self.clean[register] = True
            self._loads[register] = None
