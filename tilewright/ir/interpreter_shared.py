"""What asynchronous code works on in the interpreter: slots, copies and dots in flight, rings, and who knows what."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from tilewright.ir import async_ops as a
from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir.core import Operation
from tilewright.ir.interpreter_machine import Thread, Trap, View, load_tile, store_tile

# --- time -----------------------------------------------------------------------------------

Clock = dict[Thread, int]


def join(clock: Clock, other: Clock) -> None:
    """Everything known in ``other`` becomes known in ``clock``."""
    for thread, event in other.items():
        clock[thread] = max(clock.get(thread, 0), event)


def signal(thread: Thread, clock: Clock) -> None:
    """An event of the thread that others may come to know of through ``clock``."""
    thread.clock[thread] = thread.clock.get(thread, 0) + 1
    join(clock, thread.clock)


def knows(thread: Thread, clock: Clock) -> bool:
    return all(thread.clock.get(other, 0) >= event for other, event in clock.items())


# --- state ----------------------------------------------------------------------------------


@dataclass(eq=False)
class SlotState:
    """One slot of shared memory and who does what with it."""

    label: str
    array: np.ndarray
    written: bool = False
    copy: CopyInFlight | None = None
    visible: set[Thread] = field(default_factory=set)  # threads that know its contents to be complete
    readers: list[DotGroup | BulkStore] = field(default_factory=list)  # asynchronous reads in flight
    phase: Phase | None = None  # the ring's use that it was last published with


@dataclass(slots=True)
class SlotRef:
    """A slot, perhaps with permuted dimensions."""

    state: SlotState
    array: np.ndarray


@dataclass(eq=False)
class Buffer:
    """The slots of an async.alloc."""

    slots: list[SlotState]


@dataclass(eq=False)
class CopyInFlight:
    """The token of an async.copy."""

    op: a.Copy
    ref: SlotRef
    view: View
    index: list[int]
    landed: bool = False

    @property
    def issued(self) -> bool:
        """Nobody has to start a part of it any more."""
        return True

    def land(self) -> None:
        if self.landed:
            return
        self.landed = True
        self.fill()
        self.ref.state.copy, self.ref.state.written = None, True

    def fill(self) -> None:
        self.ref.array[...] = load_tile(self.view, self.index, self.ref.array.shape, self.op.pad)


@dataclass(eq=False)
class SharedCopy(CopyInFlight):
    """A copy into one block's slot of which each block of a cluster makes a part along ``op.multicast``."""

    blocks: int = 1
    #: the use of the ring that the slot's contents before it were published with
    last: Phase | None = None
    #: by rank: the view and index that the block copies from
    parts: dict[int, tuple[View, list[int]]] = field(default_factory=dict)

    @property
    def issued(self) -> bool:
        return len(self.parts) == self.blocks

    def fill(self) -> None:
        array, axis = self.ref.array, self.op.multicast
        assert axis is not None
        size = array.shape[axis] // self.blocks
        for rank, (view, index) in self.parts.items():
            part = tuple(slice(rank * size, (rank + 1) * size) if n == axis else slice(None) for n in range(array.ndim))
            array[part] = load_tile(view, index, array.shape, self.op.pad)[part]


@dataclass(eq=False)
class DotGroup:
    """The token of an async.dot."""

    slots: list[SlotState]
    retired: bool = False

    def retire(self) -> None:
        self.retired = True
        for slot in self.slots:
            slot.readers.remove(self)


@dataclass(eq=False)
class BulkStore:
    """A copy from a slot to global memory that is under way."""

    ref: SlotRef
    view: View
    index: list[int]
    update: str | None = None
    data: np.ndarray | None = None

    def read(self) -> None:
        if self.data is None:
            self.data = self.ref.array.copy()
            self.ref.state.readers.remove(self)

    def land(self) -> None:
        self.read()
        assert self.data is not None
        data = self.data
        if self.update is not None:
            data = numerics.binary(self.update, load_tile(self.view, self.index, data.shape, 0), data)
        store_tile(self.view, self.index, data)


@dataclass(eq=False)
class Phase:
    """One use of one stage of a ring."""

    consumers: int
    published: Fraction = Fraction(0)
    released: Fraction = Fraction(0)
    copies: list[CopyInFlight] = field(default_factory=list)
    slots: list[SlotState] = field(default_factory=list)
    awaited: set[Thread] = field(default_factory=set)
    publish_clock: Clock = field(default_factory=dict)
    release_clock: Clock = field(default_factory=dict)

    @property
    def is_released(self) -> bool:
        return self.released >= self.consumers


@dataclass(eq=False)
class Ring:
    """Arrivals by use count, and the buffers whose slots are its stages."""

    label: str
    stages: int
    producers: int
    consumers: int
    publishers: dict[Operation | None, Fraction]
    releasers: dict[Operation | None, Fraction]
    phases: dict[int, Phase] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)

    def phase(self, count: int) -> Phase:
        if count < 0:
            raise Trap(f"use count {count} is negative")
        return self.phases.setdefault(count, Phase(self.consumers))

    def is_full(self, count: int) -> bool:
        phase = self.phase(count)
        return phase.published >= self.producers and all(copy.issued for copy in phase.copies)

    def is_free(self, count: int) -> bool:
        return count < self.stages or self.phase(count - self.stages).is_released


@dataclass(eq=False)
class BarrierState:
    """The block-wide barrier of a program."""

    arrived: int = 0
    generation: int = 0
    clock: Clock = field(default_factory=dict)
