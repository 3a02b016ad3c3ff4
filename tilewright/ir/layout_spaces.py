"""Subspaces of F2^n for planning conversions: vectors are ints, one bit per bit of the flat (row-major) coordinate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import xor

from tilewright.ir.layout_bits import F2Span, log2_exact, pack
from tilewright.ir.layout_linear import LinearLayout


def span_of(*groups: Iterable[int]) -> F2Span:
    """The span of all vectors of the groups; the mask of `F2Span.reduce` numbers the vectors in order."""
    span = F2Span()
    for index, vector in enumerate(v for group in groups for v in group):
        span.insert(vector, index)
    return span


def independent(vectors: Iterable[int], modulo: Iterable[int] = ()) -> list[int]:
    """The vectors that are not in the span of ``modulo`` and of those before them."""
    span, kept = span_of(modulo), []
    for vector in vectors:
        if span.insert(vector, 0):
            kept.append(vector)
    return kept


def contains(span: F2Span, vector: int) -> bool:
    return span.reduce(vector)[0] == 0


def combine(vectors: Sequence[int], mask: int) -> int:
    """The XOR of the vectors whose bit is set in ``mask``."""
    return reduce(xor, (v for i, v in enumerate(vectors) if mask >> i & 1), 0)


def intersection(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """A basis of span(a) & span(b); vectors of ``b`` itself come first, in b's order."""
    a, b = independent(a), independent(b)
    span = span_of(a, b)
    of_a = span_of(a)
    found = [v for v in b if contains(of_a, v)]
    joint = F2Span()
    for index, vector in enumerate([*a, *b]):
        if not joint.insert(vector, index):  # vector of b = some of a ^ some of b before it
            _, mask = joint.reduce(vector)
            found.append(combine(a, mask & ((1 << len(a)) - 1)))
    assert len(span) == len(joint)
    return independent(found)


def complement(spaces: Sequence[Sequence[int]], dimensions: int) -> list[int]:
    """Vectors t1, t2, ... that extend every space to the whole F2^n: the first n - dim(space) of them complement it.

    At most two spaces may have the same dimension. A common complement exists, since no vector space is the union of
    two proper subspaces: where x misses only one of them and y only the other, x ^ y misses both.
    """
    spans = [span_of(space) for space in spaces]
    found: list[int] = []
    while open_spans := [span for span in spans if len(span) < dimensions]:
        vector = _outside(open_spans, dimensions)
        found.append(vector)
        for span in spans:
            span.insert(vector, 0)
    return found


def _outside(spans: Sequence[F2Span], dimensions: int) -> int:
    units = [1 << bit for bit in reversed(range(dimensions))]
    outside = [[u for u in units if not contains(span, u)] for span in spans]
    for vector in outside[0]:
        if all(not contains(span, vector) for span in spans):
            return vector
    return next(x ^ y for x in outside[0] for y in outside[-1] if not any(contains(s, x ^ y) for s in spans))


@dataclass(frozen=True)
class FlatLayout:
    """The basis vectors of one copy of a layout's core as flat coordinates."""

    register: tuple[int, ...]
    lane: tuple[int, ...]
    warp: tuple[int, ...]
    #: log2 of the elements
    bits: int

    @staticmethod
    def of(layout: LinearLayout) -> FlatLayout:
        vectors = {d: tuple(pack(v, layout.shape) for v in layout.basis(d)) for d in ("register", "lane", "warp")}
        return FlatLayout(**vectors, bits=log2_exact(pack([s - 1 for s in layout.shape], layout.shape) + 1))

    def layout(self) -> LinearLayout:
        bases = {"register": self.register, "lane": self.lane, "warp": self.warp}
        return LinearLayout.make({n: [(v,) for v in vectors] for n, vectors in bases.items()}, (1 << self.bits,))


__all__ = ["FlatLayout", "combine", "complement", "contains", "independent", "intersection", "span_of"]
