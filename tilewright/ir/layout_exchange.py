"""Conversions between layouts through shared memory: where each element lies, and in which slices the tile goes.

Offsets are a linear map over F2 made for the two layouts. Its low bits are a vector that both sides (or, where they
share none, one side) hold in registers; registers are renamed first, so the vector may consist of any of them. Its
bits above the 128-byte line of banks span a complement of what one phase of the writers and one phase of the readers
touch, so that no two lanes of a phase meet in a bank ("Linear Layouts", arXiv 2505.23819, section 5.4). Both
complements exist together because two subspaces of equal dimension always have a common one.

A tile larger than the scratch limit goes in slices along coordinate bits that registers (or else warps) hold on both
sides; along bits that lanes hold, which then idle in turn, only where twice the limit would be exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np
import numpy.typing as npt

from tilewright.ir.layout_bits import Vector
from tilewright.ir.layout_linear import IntArray, LinearLayout
from tilewright.ir.layout_shared import access_phases, shared_cycles
from tilewright.ir.layout_shuffle import flat_registers, same_copies
from tilewright.ir.layout_spaces import FlatLayout, complement, contains, independent, intersection, span_of

#: scratch that one conversion may take before the tile is cut into slices
SCRATCH_LIMIT = 16384
MAX_VECTOR_BYTES = 16


@dataclass(frozen=True)
class ExchangeLayout:
    """Where the elements of a tile of rank one lie in scratch memory: offset bit -> coordinate, linear over F2.

    Offers what lowering and bank counting ask of a `SharedLayout`.
    """

    bases: tuple[int, ...]
    element_bits: int

    @property
    def shape(self) -> Vector:
        return (1 << len(self.bases),)

    @property
    def core_shape(self) -> Vector:
        return self.shape

    @property
    def bytes(self) -> int:
        return max(1, (self.element_bits << len(self.bases)) // 8)

    @property
    def alignment(self) -> int:
        return 128

    @cached_property
    def _inverse(self) -> tuple[int, ...]:
        span = span_of(self.bases)
        return tuple(span.reduce(1 << bit)[1] for bit in range(len(self.bases)))

    def offset_of(self, *coords: npt.ArrayLike) -> IntArray:
        """Element offsets of flat coordinates."""
        (flat,) = (np.asarray(c, np.int64) for c in coords)
        offset = np.zeros_like(flat)
        for bit, image in enumerate(self._inverse):
            offset ^= (flat >> bit & 1) * image
        return offset

    def offset_bases(self) -> tuple[Vector, ...]:
        """Per coordinate bit: what it XORs into the byte offset."""
        return (tuple(image * self.element_bits // 8 for image in self._inverse),)

    def repeat_strides(self) -> Vector:
        return (0,)


@dataclass(frozen=True)
class Part:
    """One side's share of a slice: its registers in the order of the side's layout, and who takes part.

    A thread takes part where for all of ``threads`` the parity of (lane & lanes) + (warp & warps) is ``odd``.
    """

    registers: tuple[int, ...]
    threads: tuple[tuple[int, int, bool], ...]


@dataclass(frozen=True)
class ExchangePlan:
    """Slices of one layout each way; ``writes[i]`` and ``reads[i]`` belong to slice i.

    ``equal[r]`` is the register of the result that holds the element of register r and is read.
    ``cycles`` counts what one warp spends on the accesses.
    """

    memory: ExchangeLayout
    writer: LinearLayout
    reader: LinearLayout
    writes: tuple[Part, ...]
    reads: tuple[Part, ...]
    equal: tuple[int, ...]
    cycles: int

    @property
    def bytes(self) -> int:
        return self.memory.bytes


@lru_cache(maxsize=512)
def plan_exchange(
    source: LinearLayout, result: LinearLayout, element_bits: int, banks: str, limit: int = SCRATCH_LIMIT
) -> ExchangePlan | None:
    """The plan with the fewest cycles; None for layouts that repeat different cores. Bools count 8 bits."""
    if not same_copies(source, result):
        return None
    src, dst = FlatLayout.of(source), FlatLayout.of(result)
    cuts = _cuts(src, dst, element_bits, limit)
    slices = _cut(src, cuts), _cut(dst, cuts)
    plans = []
    for vector in _vectors(slices[0], slices[1], element_bits):
        memory = _memory(slices[0], slices[1], vector, element_bits, banks)
        writer, reader = (_ordered(side, memory, element_bits) for side in slices)
        cycles = shared_cycles(writer.layout(), memory, MAX_VECTOR_BYTES, banks, "write") * _turns(cuts, 0)
        cycles += shared_cycles(reader.layout(), memory, MAX_VECTOR_BYTES, banks, "read") * _turns(cuts, 1)
        plans.append((cycles, memory, writer, reader))
    cycles, memory, writer, reader = min(plans, key=lambda plan: plan[0])
    writes, reads = _parts(source, src, writer, cuts), _parts(result, dst, reader, cuts)
    cycles *= prod(source.repeat)
    return ExchangePlan(memory, writer.layout(), reader.layout(), writes, reads, _equal(result), cycles)


def _equal(layout: LinearLayout) -> tuple[int, ...]:
    first: dict[tuple[int, ...], int] = {}
    return tuple(first.setdefault(tuple(c), r) for r, c in enumerate(layout.table("register").tolist()))


def _turns(cuts: dict[int, tuple[str, str]], side: int) -> int:
    """The slices in which one warp of a side takes part, wholly or with some lanes."""
    return 1 << sum(owners[side] != "warp" for owners in cuts.values())


# --- slices ---------------------------------------------------------------------------------------


def _owner(side: FlatLayout, bit: int) -> str | None:
    """Who alone decides a coordinate bit: "register" (one of them), "warp", "lane" (lanes, perhaps warps), or None."""
    registers = [v for v in side.register if v >> bit & 1]
    lanes, warps = any(v >> bit & 1 for v in side.lane), any(v >> bit & 1 for v in side.warp)
    if registers == [1 << bit] and not lanes and not warps:
        return "register"
    if registers or not (lanes or warps):
        return None
    return "lane" if lanes else "warp"


def _cuts(src: FlatLayout, dst: FlatLayout, element_bits: int, limit: int) -> dict[int, tuple[str, str]]:
    """The coordinate bits that number the slices, and who owns them on either side."""
    common = intersection(src.register, dst.register)
    vector_bits = max(0, (MAX_VECTOR_BYTES * 8 // element_bits).bit_length() - 1)
    kept = common[:vector_bits] or [*src.register[:vector_bits], *dst.register[:vector_bits]]
    options: list[tuple[int, int, int, tuple[str, str]]] = []
    for bit in reversed(range(src.bits)):
        first, second = _owner(src, bit), _owner(dst, bit)
        if first is not None and second is not None and not any(v >> bit & 1 for v in kept):
            owners = first, second
            options.append((owners.count("lane"), owners.count("warp"), -bit, owners))
    cuts: dict[int, tuple[str, str]] = {}
    for lanes, _, bit, owners in sorted(options):
        if (element_bits << (src.bits - len(cuts))) // 8 <= (2 * limit if lanes else limit):
            break
        cuts[-bit] = owners
    return cuts


def _squeeze(vector: int, bits: Sequence[int]) -> int:
    """Remove coordinate bits."""
    for bit in sorted(bits, reverse=True):
        vector = (vector >> bit + 1 << bit) | vector & ((1 << bit) - 1)
    return vector


def _cut(side: FlatLayout, cuts: dict[int, tuple[str, str]]) -> FlatLayout:
    """A side's layout of one slice; registers that hold an element twice are left out."""
    bits = list(cuts)
    registers = independent([_squeeze(v, bits) for v in side.register])
    lane, warp = (tuple(_squeeze(v, bits) for v in vs) for vs in (side.lane, side.warp))
    return FlatLayout(tuple(registers), lane, warp, side.bits - len(bits))


def _parts(
    layout: LinearLayout, side: FlatLayout, ordered: FlatLayout, cuts: dict[int, tuple[str, str]]
) -> tuple[Part, ...]:
    """One part per copy and slice: copies outermost."""
    bits, parts = sorted(cuts), []
    table = ordered.layout().table("register")[:, 0].tolist()
    for held in flat_registers(layout):
        for number in range(1 << len(bits)):
            offset, threads = 0, []
            for position, bit in enumerate(bits):
                one = bool(number >> position & 1)
                lanes, warps = (sum(1 << i for i, v in enumerate(vs) if v >> bit & 1) for vs in (side.lane, side.warp))
                if lanes or warps:
                    threads.append((lanes, warps, one))
                elif one:
                    offset |= 1 << bit
            parts.append(Part(tuple(held[_spread(flat, bits) | offset] for flat in table), tuple(threads)))
    return tuple(parts)


def _spread(flat: int, bits: Sequence[int]) -> int:
    """Insert zero bits: the inverse of `_squeeze`."""
    for bit in sorted(bits):
        flat = (flat >> bit << bit + 1) | flat & ((1 << bit) - 1)
    return flat


# --- the map --------------------------------------------------------------------------------------


def _vectors(src: FlatLayout, dst: FlatLayout, element_bits: int) -> list[list[int]]:
    """Candidates for the low offset bits: registers of both sides, then those of one side on top."""
    bits = max(0, (MAX_VECTOR_BYTES * 8 // element_bits).bit_length() - 1)
    common = intersection(src.register, dst.register)[:bits]
    candidates = [common]
    for side in (src, dst):
        longer = [*common, *independent(side.register, common)][:bits]
        if longer not in candidates:
            candidates.append(longer)
    return candidates


def _phase(side: FlatLayout, vector_bytes: int, banks: str, op: str) -> list[int]:
    """The span of what the lanes of one phase hold: phases are cosets of a subspace of the lanes."""
    _, phases = access_phases(banks, vector_bytes, op)
    lanes = independent(phases[0])
    return [_image(side.lane, lane) for lane in lanes]


def _image(vectors: Sequence[int], mask: int) -> int:
    image = 0
    for bit, vector in enumerate(vectors):
        image ^= vector if mask >> bit & 1 else 0
    return image


def _memory(src: FlatLayout, dst: FlatLayout, vector: list[int], element_bits: int, banks: str) -> ExchangeLayout:
    """Offset bits, lowest first: the vector, the line of banks, the lines."""
    spaces, low = [], list(vector)
    word_bits = max(0, (32 // element_bits).bit_length() - 1)
    for side, op in ((src, "write"), (dst, "read")):
        own = span_of(side.register)
        width = 0
        while width < len(vector) and contains(own, vector[width]):
            width += 1
        bytes_ = max(1, (element_bits << width) // 8)
        phase = _phase(side, bytes_, banks, op)
        if len(low) < word_bits:  # lanes of this phase that share a word
            low += independent(phase, low)[: word_bits - len(low)]
        total, _ = access_phases(banks, bytes_, op)
        line_bits = min(src.bits, (total * 32 // element_bits).bit_length() - 1)
        space = independent([*low[: max(width, word_bits)], *phase])[:line_bits]
        units = independent([1 << bit for bit in range(src.bits)], space)
        spaces.append([*space, *units[: line_bits - len(space)]])
    top = complement(spaces, src.bits)
    line = independent([*spaces[0], *spaces[1], *(1 << bit for bit in range(src.bits))], [*low, *top])
    low = independent(low)
    top = independent(top, [*low])
    return ExchangeLayout((*low, *line, *reversed(top)), element_bits)


def _ordered(side: FlatLayout, memory: ExchangeLayout, element_bits: int) -> FlatLayout:
    """The side's registers with those of the vector first, in the order of memory."""
    own, width = span_of(side.register), max(0, (MAX_VECTOR_BYTES * 8 // element_bits).bit_length() - 1)
    vector: list[int] = []
    for image in memory.bases[:width]:
        if not contains(own, image):
            break
        vector.append(image)
    registers = (*vector, *independent(side.register, vector))
    return FlatLayout(registers, side.lane, side.warp, side.bits)


__all__ = ["SCRATCH_LIMIT", "ExchangeLayout", "ExchangePlan", "Part", "plan_exchange"]
