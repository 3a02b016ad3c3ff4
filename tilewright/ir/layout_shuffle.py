"""Conversions between layouts inside a warp, by the fewest shuffles.

A result's word in register i of lane l lies in the source at word E i ^ F l of lane A i ^ B l: linear maps over F2
that the two layouts determine. A shuffle takes one word of every lane, so in round i a lane receives its result
register i ^ H l, with H such that A H ^ B (round i's map of lanes to lanes) is invertible where registers differ:
then what a lane sends depends on that lane alone, through a linear map K, and as many rounds as result words do.
Choosing registers by lane, before by K and behind by H, takes one select per word and rank ("Linear Layouts",
arXiv 2505.23819, section 5.4; a transposition inside a warp has rank log2(registers) on both sides).

Elements below 32 bits travel packed where both layouts hold the same elements together in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tilewright.ir.layout_bits import F2Span
from tilewright.ir.layout_linear import LinearLayout
from tilewright.ir.layout_spaces import FlatLayout, combine, contains, independent, intersection, span_of


@dataclass(frozen=True)
class Turn:
    """Where the parity of (lane & lanes) and (warp & warps) is odd, word j becomes the former word j ^ step."""

    lanes: int
    warps: int
    step: int


@dataclass(frozen=True)
class Round:
    """One word of the result: which word is sent, and what is XORed into the lane that it is taken from."""

    word: int
    lane: int


@dataclass(frozen=True)
class ShufflePlan:
    """Per copy of the core: pack registers into words, turn, shuffle, turn, unpack.

    ``sent[copy][word]`` lists the source's registers of a word; ``received[register]`` of the result is
    (copy, word, position in the word). The lane asked in a round is lane_map(lane) ^ warp_map(warp) ^ round.lane.
    """

    sent: tuple[tuple[tuple[int, ...], ...], ...]
    before: tuple[Turn, ...]
    rounds: tuple[Round, ...]
    lane_map: tuple[int, ...]
    warp_map: tuple[int, ...]
    after: tuple[Turn, ...]
    received: tuple[tuple[int, int, int], ...]

    @property
    def is_xor(self) -> bool:
        """Whether a lane's partner is at a fixed XOR distance."""
        return not any(self.warp_map) and self.lane_map == tuple(1 << b for b in range(len(self.lane_map)))

    def stays(self, step: Round) -> bool:
        """Whether a round moves nothing between lanes."""
        return self.is_xor and step.lane == 0

    @property
    def shuffles(self) -> int:
        return len(self.sent) * sum(not self.stays(step) for step in self.rounds)

    @property
    def selects(self) -> int:
        words, rounds = len(self.sent[0]), len(self.rounds)
        return len(self.sent) * (len(self.before) * words + len(self.after) * rounds)


def same_copies(source: LinearLayout, result: LinearLayout) -> bool:
    """Whether both layouts repeat the same core."""
    return source.shape == result.shape and source.repeat == result.repeat


def plan_shuffles(source: LinearLayout, result: LinearLayout, element_bits: int) -> ShufflePlan | None:
    """The plan; None where data crosses warps or no map of lanes to lanes exists."""
    if not same_copies(source, result) or (source.num_lanes, source.num_warps) != (result.num_lanes, result.num_warps):
        return None
    src, dst = FlatLayout.of(source), FlatLayout.of(result)
    common = intersection(src.register, dst.register)
    widest = max(0, (32 // element_bits).bit_length() - 1)
    for count in range(min(widest, len(common)), -1, -1):
        maps = _maps(src, dst, common[:count])
        if maps is not None:
            return _assemble(source, result, maps)
    return None


@dataclass
class _Maps:
    """Columns of the linear maps, as masks: of source words (e, f, g) and of lanes (a, b, c)."""

    packed: list[int]
    source_words: list[int]
    result_words: list[int]
    a: list[int]
    b: list[int]
    c: list[int]
    e: list[int]
    f: list[int]
    g: list[int]


def _maps(src: FlatLayout, dst: FlatLayout, packed: list[int]) -> _Maps | None:
    words = independent(src.register, packed)
    span = span_of(packed, words, src.lane)
    parts = (1 << len(packed)) - 1, (1 << len(words)) - 1

    def place(vector: int) -> tuple[int, int, int] | None:
        """(position in the word, word, lane) of an element in the source."""
        rest, mask = span.reduce(vector)
        if rest:
            return None
        return mask & parts[0], mask >> len(packed) & parts[1], mask >> len(packed) + len(words)

    result_words = []
    for vector in independent(dst.register, packed):
        found = place(vector)
        if found is None:
            return None
        result_words.append(vector ^ combine(packed, found[0]))
    columns = [[place(v) for v in vs] for vs in (result_words, dst.lane)]
    columns.append([place(x ^ y) for x, y in zip(dst.warp, src.warp, strict=True)])
    tables: list[list[int]] = []
    for column in columns:
        for found in column:
            if found is None or found[0]:
                return None  # another warp has it, or it would change its position in the word
        tables += [[f[2] for f in column if f], [f[1] for f in column if f]]
    a, e, b, f, c, g = tables
    maps = _Maps(packed, words, result_words, a, b, c, e, f, g)
    _spread_replicas(maps, _null_space(src.lane))
    return maps


def _spread_replicas(maps: _Maps, replicas: list[int]) -> None:
    """Where lanes would ask one lane for different words all the time, let some ask a replica of it."""
    for kernel in _null_space(maps.b):
        needs = combine(maps.f, kernel)
        reached = span_of(maps.b)
        if not needs or any(not contains(reached, a) for a in maps.a):
            continue
        spare = next((r for r in replicas if not contains(reached, r)), None)
        if spare is None:
            continue
        maps.b[kernel.bit_length() - 1] ^= spare


def _null_space(columns: Sequence[int]) -> list[int]:
    """Masks of columns whose XOR is zero."""
    span, found = F2Span(), []
    for index, column in enumerate(columns):
        if not span.insert(column, index):
            found.append(span.reduce(column)[1] | 1 << index)
    return found


def _choose_h(maps: _Maps) -> list[int] | None:
    """H's columns per lane bit: rank as low as possible such that A H ^ B determines the word that is asked for."""
    h, lanes = [0] * len(maps.b), maps.b
    reached = span_of(lanes)
    for kernel in _null_space(lanes):
        if not combine(maps.f, kernel):
            continue  # both lanes want the same word of the same lane
        last = kernel.bit_length() - 1
        register = next((j for j, a in enumerate(maps.a) if not contains(reached, a)), None)
        if register is not None:
            reached.insert(maps.a[register], 0)
            h[last] = 1 << register
            continue
        redundant = span_of(maps.e)
        rest, mask = redundant.reduce(combine(maps.f, kernel))
        if rest or combine(maps.a, mask):
            return None
        h[last] = mask
    return h


def _assemble(source: LinearLayout, result: LinearLayout, maps: _Maps) -> ShufflePlan | None:
    h = _choose_h(maps)
    if h is None:
        return None
    lane_map = [b ^ combine(maps.a, column) for b, column in zip(maps.b, h, strict=True)]
    asked = [f ^ combine(maps.e, column) for f, column in zip(maps.f, h, strict=True)]
    k = _solve(lane_map, asked, len(maps.b))
    if k is None:
        return None
    by_warp = [g ^ combine(k, c) for g, c in zip(maps.g, maps.c, strict=True)]
    rounds = []
    for number in range(1 << len(maps.result_words)):
        lane, word = combine(maps.a, number), combine(maps.e, number)
        rounds.append(Round(word ^ combine(k, lane), lane))
    return ShufflePlan(
        sent=_sent(source, maps),
        before=_turns(k, by_warp),
        rounds=tuple(rounds),
        lane_map=tuple(lane_map),
        warp_map=tuple(maps.c),
        after=_turns(h, []),
        received=_received(result, maps),
    )


def _solve(lane_map: list[int], asked: list[int], lanes: int) -> list[int] | None:
    """K's columns per source lane bit with K lane_map = asked; None where two lanes ask one lane for two words."""
    span, chosen = F2Span(), list(range(len(lane_map)))
    for index in chosen:
        if not span.insert(lane_map[index], index):
            rest, mask = span.reduce(lane_map[index])
            assert rest == 0
            if combine(asked, mask) != asked[index]:
                return None
    k = []
    extended = list(asked)
    for bit in range(lanes):
        if span.insert(1 << bit, len(extended)):
            extended.append(0)  # a lane that nobody asks
        _, mask = span.reduce(1 << bit)
        k.append(combine(extended, mask))
    return k


def _turns(by_lane: Sequence[int], by_warp: Sequence[int]) -> tuple[Turn, ...]:
    """The map (lane, warp) -> step as a sum of as few (parity, step) pairs as its rank."""
    span = F2Span()
    steps: list[int] = []
    for column in [*by_lane, *by_warp]:
        if span.insert(column, len(steps)):
            steps.append(column)
    masks = [[0, 0] for _ in steps]
    for side, columns in enumerate((by_lane, by_warp)):
        for bit, column in enumerate(columns):
            _, mask = span.reduce(column)
            for index in range(len(steps)):
                masks[index][side] |= (mask >> index & 1) << bit
    return tuple(Turn(lanes, warps, step) for (lanes, warps), step in zip(masks, steps, strict=True))


# --- registers ------------------------------------------------------------------------------------


def copies(layout: LinearLayout) -> list[tuple[int, ...]]:
    """The first coordinates of the core's copies, row-major."""
    ranges = (range(0, s * r, s) for s, r in zip(layout.shape, layout.repeat, strict=True))
    return list(product(*ranges))


def flat_registers(layout: LinearLayout) -> list[dict[int, int]]:
    """Per copy: flat coordinate of thread 0's element inside the copy -> its lowest register."""
    numbers = {start: number for number, start in enumerate(copies(layout))}
    found: list[dict[int, int]] = [{} for _ in numbers]
    for register, coordinate in enumerate(layout.table("register").tolist()):
        start = tuple(c // s * s for c, s in zip(coordinate, layout.shape, strict=True))
        flat = 0
        for c, s in zip(coordinate, layout.shape, strict=True):
            flat = flat * s + c % s
        found[numbers[start]].setdefault(flat, register)
    return found


def _sent(source: LinearLayout, maps: _Maps) -> tuple[tuple[tuple[int, ...], ...], ...]:
    positions, words = range(1 << len(maps.packed)), range(1 << len(maps.source_words))
    return tuple(
        tuple(
            tuple(held[combine(maps.source_words, word) ^ combine(maps.packed, p)] for p in positions) for word in words
        )
        for held in flat_registers(source)
    )


def _received(result: LinearLayout, maps: _Maps) -> tuple[tuple[int, int, int], ...]:
    span = span_of(maps.packed, maps.result_words)
    numbers = {start: number for number, start in enumerate(copies(result))}
    found = []
    for coordinate in result.table("register").tolist():
        start = tuple(c // s * s for c, s in zip(coordinate, result.shape, strict=True))
        flat = 0
        for c, s in zip(coordinate, result.shape, strict=True):
            flat = flat * s + c % s
        rest, mask = span.reduce(flat)
        assert rest == 0
        found.append((numbers[start], mask >> len(maps.packed), mask & ((1 << len(maps.packed)) - 1)))
    return tuple(found)


__all__ = ["Round", "ShufflePlan", "Turn", "copies", "flat_registers", "plan_shuffles", "same_copies"]
