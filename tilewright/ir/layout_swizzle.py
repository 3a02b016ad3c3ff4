"""Swizzles that keep several accesses off each other's banks at once, found by linear algebra.

The lanes that shared memory serves together are an affine subspace of the lane numbers, and an address is linear in
the lane (over F2). So an access meets no bank twice exactly where the bank bits of the addresses have the rank of the
addresses themselves on every such subspace. A swizzle by lines (`SharedLayout.phases`) adds one unknown vector for
each bit of the line; `find_phases` tries them bit by bit and drops a choice as soon as a subspace has lost rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import xor

from tilewright.ir.layout_linear import LinearLayout
from tilewright.ir.layout_shared import (
    Access,
    SharedLayout,
    access_phases,
    bank_conflicts,
    shared_candidates,
    shared_cycles,
    shared_vector_bytes,
)

#: bytes that a swizzle may keep together, and the choices that `find_phases` looks at before it gives up
VECTORS, MOST_CHOICES = (16, 8, 4), 2500


@lru_cache(maxsize=512)
def choose_swizzle(
    shape: tuple[int, ...],
    element_bits: int,
    order: tuple[int, ...],
    readers: tuple[Access, ...],
    writers: tuple[Access, ...],
    target: str,
) -> SharedLayout:
    """The layout with no read conflicts where there is one, then with the fewest cycles of all accesses.

    ``readers`` and ``writers``: register layouts and the bytes that a lane should access at once.
    """
    accesses = [(*access, "read") for access in readers] + [(*access, "write") for access in writers]

    def cost(option: SharedLayout) -> tuple[int, int]:
        worst = sum(_conflicts(option, access, target) for access in accesses if access[2] == "read")
        return worst, sum(shared_cycles(layout, option, size, target, op) for layout, size, op in accesses)

    best: tuple[tuple[int, int], SharedLayout] | None = None
    for option in _options(shape, element_bits, order, accesses, target):
        if all(_conflicts(option, access, target) == 0 for access in accesses):
            return option
        candidate = (cost(option), option)
        if best is None or candidate[0] < best[0]:
            best = candidate
    assert best is not None
    return best[1]


def _options(
    shape: tuple[int, ...],
    element_bits: int,
    order: tuple[int, ...],
    accesses: Sequence[tuple[LinearLayout, int, str]],
    target: str,
) -> Iterator[SharedLayout]:
    """Plain first, then found swizzles of long vectors, within lines if they suffice, then fixed patterns."""
    plain = SharedLayout(shape, element_bits, order)
    yield plain
    for vector_bytes, across in [(size, across) for size in VECTORS for across in (False, True)]:
        phases = find_phases(plain, accesses, target, vector_bytes, across)
        if phases is not None:
            try:
                yield SharedLayout(shape, element_bits, order, vec=vector_bytes * 8 // element_bits, phases=phases)
            except ValueError:
                continue  # the tile repeats a part that is smaller than the pattern
    yield from shared_candidates(shape, element_bits, order, target)


def _conflicts(option: SharedLayout, access: tuple[LinearLayout, int, str], target: str) -> int:
    """Extra cycles of an access, which may be narrower than it should be; that counts too."""
    layout, wanted, op = access
    width = shared_vector_bytes(layout, option, wanted)
    return bank_conflicts(layout, option, width, target, op) + (wanted // width - 1)


@dataclass(frozen=True)
class _Rank:
    """Vectors of address bits, each with the line bits whose phases are added to it, that must keep their rank."""

    vectors: tuple[tuple[int, int], ...]  # (bank bits of the plain layout, line bits)
    rank: int
    mask: int  # the address bits that name a bank

    @property
    def lines(self) -> int:
        return reduce(lambda x, y: x | y, (lines for _, lines in self.vectors), 0)


def find_phases(
    plain: SharedLayout,
    accesses: Sequence[tuple[LinearLayout, int, str]],
    target: str,
    vector_bytes: int,
    across: bool = False,
) -> tuple[int, ...] | None:
    """Phases for vectors of ``vector_bytes`` under which no access meets a bank twice; None where none were found.

    ``across``: also those that leave the line, for lines shorter than a round of the banks.
    """
    chunks = plain.block_size * plain.element_bits // 8 // vector_bytes
    if len(plain.shape) != 2 or chunks < 2 or vector_bytes * 8 < plain.element_bits:
        return None
    wanted = [rank for access in accesses for rank in _ranks(plain, access, target, vector_bytes)]
    bits = [bit for bit in range(plain.num_lines.bit_length()) if any(r.lines >> bit & 1 for r in wanted)]
    #: the requirements that are complete with the n-th bit
    due = [[r for r in wanted if r.lines.bit_length() - 1 == bit] for bit in bits]
    if not all(_holds(r, {}, vector_bytes) for r in wanted if not r.lines):
        return None
    tried, chosen = 0, dict[int, int]()
    everywhere = max((r.mask + vector_bytes & -vector_bytes for r in wanted), default=0) // vector_bytes
    if across and everywhere <= chunks:
        return None

    def search(position: int) -> bool:
        nonlocal tried
        if position == len(bits):
            return True
        choices = min(chunks << bits[position], max(chunks, everywhere)) if across else chunks
        for number in range(choices):
            tried += 1
            chosen[bits[position]] = _preferred(number, position, choices)
            if all(_holds(r, chosen, vector_bytes) for r in due[position]) and search(position + 1):
                return True
            if tried > MOST_CHOICES:
                break
        chosen.pop(bits[position], None)
        return False

    if not search(0):
        return None
    return tuple(chosen.get(bit, 0) for bit in range(max(bits, default=-1) + 1))


def _preferred(number: int, position: int, chunks: int) -> int:
    """The usual swizzle, bit for bit, first."""
    return number ^ (1 << position) % chunks


def _holds(requirement: _Rank, chosen: dict[int, int], vector_bytes: int) -> bool:
    vectors = []
    for banks, lines in requirement.vectors:
        phases = (phase * vector_bytes for bit, phase in chosen.items() if lines >> bit & 1)
        vectors.append(reduce(xor, phases, banks))
    return rank_of(vectors, requirement.mask) == requirement.rank


def rank_of(vectors: Sequence[int], mask: int = -1) -> int:
    """The rank over F2 of bit vectors, of which the bits in ``mask`` count."""
    basis: list[int] = []
    for vector in vectors:
        rest = vector & mask
        for pivot in basis:
            rest = min(rest, rest ^ pivot)
        if rest:
            basis.append(rest)
    return len(basis)


def _ranks(
    plain: SharedLayout, access: tuple[LinearLayout, int, str], target: str, vector_bytes: int
) -> Iterator[_Rank]:
    """What the phases of one access demand."""
    layout, size, op = access
    width = min(vector_bytes, shared_vector_bytes(layout, plain, size))
    banks, phases = access_phases(target, width, op)
    word = max(width, 4)
    mask = (banks * 4 - 1) & ~(word - 1)
    inner, outer = plain.order
    for directions in {_directions(lanes) for lanes in phases}:
        vectors, addresses = [], []
        for direction in directions:
            moves = [layout.basis("lane")[bit] for bit in range(direction.bit_length()) if direction >> bit & 1]
            column, line = (reduce(xor, (move[axis] for move in moves), 0) for axis in (inner, outer))
            address = (line * plain.block_size ^ column) * plain.element_bits // 8
            vectors.append((address, line))
            addresses.append(address & ~(word - 1))
        yield _Rank(tuple(vectors), rank_of(addresses), mask)


def _directions(lanes: Sequence[int]) -> tuple[int, ...]:
    """A basis of the differences of lanes that are served together."""
    basis: list[int] = []
    for lane in lanes:
        difference = lane ^ lanes[0]
        if rank_of([*basis, difference]) > len(basis):
            basis.append(difference)
    return tuple(basis)
