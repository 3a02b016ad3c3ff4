"""Who needs shared memory when: lifetimes of buffers and scratch in programs that all warps run in one order.

Operations are numbered as they appear, nested ones included. A buffer lives from its first to its last use within
its *home*, the innermost block that holds all uses; where its content may come from an earlier run of that block
(its first use there is not a write to a slot with a fixed count), the home is the block around the loop.
Scratch lives for one operation, but in all of a loop where a reduction takes turns with two places and does not meet
before it writes. Two owners may share memory when their lifetimes do not overlap and a barrier lies
between their uses, also around loops; `separate` inserts the barriers that are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tilewright.ir.async_ops import Alloc, Barrier, Copy, LocalStore, Slot, TransposeSlot, buffer_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Operation
from tilewright.ir.scratch import exchange_places, scratch_bytes
from tilewright.ir.tile_ops import Constant, For, While
from tilewright.passes.analysis import ancestor_in


@dataclass(frozen=True)
class Lifetime:
    """Numbers of the first and the last operation, inclusive."""

    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def buffers_used(op: Operation) -> list[Alloc]:
    """The buffers that an operation itself reads or writes."""
    if isinstance(op, Slot | TransposeSlot):
        return []
    found = [buffer_of(v).op for v in op.operands]
    return list(dict.fromkeys(a for a in found if isinstance(a, Alloc)))


class Lifetimes:
    """Numbers the operations of a function and gives the lifetime of each owner of shared memory."""

    def __init__(self, function: Function):
        self.span: dict[Operation, Lifetime] = {}
        self.uses: dict[Alloc, list[Operation]] = {}
        self._number(function.body.block, 0)

    def _number(self, block: Block, number: int) -> int:
        for op in block.ops:
            first = number
            number += 1
            for alloc in buffers_used(op):
                self.uses.setdefault(alloc, []).append(op)
            for region in op.regions:
                number = self._number(region.block, number)
            self.span[op] = Lifetime(first, number - 1)
        return number

    def of(self, owner: Operation) -> Lifetime | None:
        """The lifetime of a buffer or of an operation's scratch; None for a buffer without uses."""
        if not isinstance(owner, Alloc):
            around = _owner(owner.parent) if owner.parent is not None and exchange_places(owner) > 1 else None
            return self.span[around or owner]
        uses = self.uses.get(owner)
        if not uses:
            return None
        home = uses[0].parent
        while home is not None:
            inside = [ancestor_in(op, home) for op in uses]
            if all(op is not None for op in inside):
                around = _owner(home)
                if not isinstance(around, For | While) or _starts_afresh(uses[0], home):
                    spans = [self.span[op] for op in inside if op is not None]
                    return Lifetime(min(s.first for s in spans), max(s.last for s in spans))
            above = _owner(home)
            home = above.parent if above is not None else None
        raise AssertionError("the function's own block holds all uses")


def _owner(block: Block) -> Operation | None:
    owner = block.parent.parent if block.parent is not None else None
    return owner if isinstance(owner, Operation) else None


def _starts_afresh(first: Operation, home: Block) -> bool:
    """Whether a run of the block begins by writing the buffer's slots, counting from a fixed number."""
    if not isinstance(first, LocalStore | Copy) or first.parent is not home:
        return False
    slot = first.slot
    while isinstance(slot.op, TransposeSlot):
        slot = slot.op.slot
    return isinstance(slot.op, Slot) and isinstance(slot.op.count.op, Constant)


# --- places ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """Something that needs memory; ``life`` None: all the time. Scratch of one ``group`` takes turns."""

    owner: Operation
    size: int
    alignment: int
    life: Lifetime | None
    group: int | None = None

    def conflicts(self, other: Item) -> bool:
        if self.group is not None and self.group == other.group:
            return False
        return self.life is None or other.life is None or self.life.overlaps(other.life)


def lowest_places(items: Iterable[Item]) -> dict[Operation, Area]:
    """One after the other, the lowest place for each item that no item alive at the same time takes."""
    placed: list[tuple[Item, Area]] = []
    for item in items:
        taken = sorted((area.first, area.size) for other, area in placed if item.conflicts(other))
        offset = 0
        for first, size in taken:
            if offset + item.size <= first:
                break
            offset = max(offset, round_up(first + size, item.alignment))
        placed.append((item, Area(item.owner, offset, item.size)))
    return {item.owner: area for item, area in placed}


def round_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


# --- barriers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Area:
    """The bytes of one owner."""

    owner: Operation
    first: int
    size: int

    def overlaps(self, other: Area) -> bool:
        return self.first < other.first + other.size and other.first < self.first + self.size


def separate(function: Function, areas: dict[Operation, Area]) -> int:
    """Insert barriers between uses of one piece of memory by different owners; returns how many."""
    walk = _Walk(areas)
    walk.block(function.body.block, frozenset())
    for op in walk.missing:
        assert op.parent is not None
        b = Builder(op.parent, op.loc)
        with b.at(op.parent, op.parent.ops.index(op)):
            b.insert(Barrier())
    return len(walk.missing)


class _Walk:
    """Follows the owners used since the last barrier.

    Operations with scratch begin with a barrier of their own, but for those that take turns with two places.
    """

    def __init__(self, areas: dict[Operation, Area]):
        self.areas = areas
        self.missing: dict[Operation, None] = {}

    def block(self, block: Block, dirty: frozenset[Operation]) -> frozenset[Operation]:
        for op in block.ops:
            dirty = self.operation(op, dirty)
        return dirty

    def operation(self, op: Operation, dirty: frozenset[Operation]) -> frozenset[Operation]:
        if isinstance(op, Barrier) or op in self.missing:
            dirty = frozenset()
        if op.regions:
            return self.regions(op, dirty)
        if op in self.areas and not isinstance(op, Alloc):
            if exchange_places(op) > 1 and self._collides(op, dirty):
                self.missing[op] = None
            return frozenset({op})
        used = [alloc for alloc in buffers_used(op) if alloc in self.areas]
        if any(self._collides(alloc, dirty) for alloc in used):
            self.missing[op] = None
            dirty = frozenset()
        return dirty | frozenset(used)

    def regions(self, op: Operation, dirty: frozenset[Operation]) -> frozenset[Operation]:
        if not isinstance(op, For | While):
            return frozenset().union(*(self.block(r.block, dirty) for r in op.regions), dirty)
        while True:
            after = dirty
            for region in op.regions:
                after = self.block(region.block, after)
            if after <= dirty:
                return dirty
            dirty |= after

    def _collides(self, owner: Operation, dirty: frozenset[Operation]) -> bool:
        area = self.areas[owner]
        return any(other is not owner and area.overlaps(self.areas[other]) for other in dirty)


def scratch_users(function: Function) -> Iterator[Operation]:
    """The operations that borrow shared memory."""
    return (op for op in function.walk() if scratch_bytes(op))
