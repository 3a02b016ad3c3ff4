"""Register layouts of tiles that threads copy from global to shared memory.

A copy wants two things: adjacent threads read adjacent global memory, and each thread writes wide vectors
along the direction in which shared memory is read. Where the two directions agree one blocked layout serves
both. Where they differ each thread holds a small block of the tile, vectors long both ways, so that turning
one direction into the other renames registers and moves nothing between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from tilewright.ir.layout import LinearLayout, SharedLayout, blocked, choose_shared_layout, shared_candidates
from tilewright.ir.layout_bits import log2_exact, power_of_two_part, unit
from tilewright.ir.layout_shared import Access, shared_cycles, shared_vector_bytes
from tilewright.ir.layout_swizzle import choose_swizzle

#: widest access of one thread, and the run that adjacent lanes must read to be served together (a quad of lanes)
VECTOR_BYTES, RUN_BYTES = 16, 64
#: bytes that shared memory writes at once
ROUND_BYTES = 128


@dataclass(frozen=True)
class CopyLayouts:
    """``load``: how global memory is read; ``store``: the same registers in the order of shared memory."""

    load: LinearLayout
    store: LinearLayout

    @property
    def turns(self) -> bool:
        """Whether a conversion (of registers only) lies between load and store."""
        return self.load != self.store


def copy_layouts(
    shape: Sequence[int], element_bits: int, contiguous: int | None, fastest: int, warps: int, warp_size: int
) -> CopyLayouts:
    """Layouts for a matrix that is contiguous along ``contiguous`` in global, ``fastest`` in shared memory."""
    if contiguous is None or contiguous == fastest:
        order = (fastest, *(a for a in reversed(range(len(shape))) if a != fastest))
        layout = blocked(shape, element_bits, warps, warp_size, order, VECTOR_BYTES)
        return CopyLayouts(layout, layout)
    return _turning(shape, element_bits, contiguous, fastest, warps, warp_size)


def _turning(
    shape: Sequence[int], element_bits: int, contiguous: int, fastest: int, warps: int, warp_size: int
) -> CopyLayouts:
    rank = len(shape)
    core = [power_of_two_part(size) for size in shape]
    lane_bits, warp_bits = log2_exact(warp_size), log2_exact(warps)
    spare = max(0, sum(log2_exact(size) for size in core) - lane_bits - warp_bits)
    widest = log2_exact(VECTOR_BYTES * 8 // element_bits)
    along = min(widest, log2_exact(core[contiguous]), spare - spare // 2)
    across = min(widest, log2_exact(core[fastest]), spare - along)
    along = min(widest, log2_exact(core[contiguous]), spare - across)

    def bits(axis: int, first: int) -> list[tuple[int, ...]]:
        return [unit(rank, axis, 1 << bit) for bit in range(first, log2_exact(core[axis]))]

    # Lanes of one contiguous run, at most as many as a round of the banks has places for their vectors.
    run = min(log2_exact(ROUND_BYTES // VECTOR_BYTES), max(0, log2_exact(RUN_BYTES * 8 // element_bits) - along))
    rows = bits(contiguous, along)
    others = [v for axis in reversed(range(rank)) if axis not in (contiguous, fastest) for v in bits(axis, 0)]
    pending = rows[:run] + bits(fastest, across) + rows[run:] + others
    zero = unit(rank, -1, 0)
    lane, warp, rest = pending[:lane_bits], pending[lane_bits : lane_bits + warp_bits], pending[lane_bits + warp_bits :]
    lane += [zero] * (lane_bits - len(lane))
    warp += [zero] * (warp_bits - len(warp))
    vector, column = bits(contiguous, 0)[:along], bits(fastest, 0)[:across]
    repeat = [size // part for size, part in zip(shape, core, strict=True)]

    def make(registers: list[tuple[int, ...]]) -> LinearLayout:
        return LinearLayout.make({"register": registers + rest, "lane": lane, "warp": warp}, core, repeat)

    return CopyLayouts(make(vector + column), make(column + vector))


@lru_cache(maxsize=64)
def turning_layouts(source: SharedLayout, target: SharedLayout, warps: int, warp_size: int, banks: str) -> CopyLayouts:
    """Layouts that take a matrix from one slot to another of the same shape, which may run along the other dim.

    The lanes that shared memory serves together are chosen such that neither access meets a bank twice, where there
    is such a choice.
    """
    layouts = copy_layouts(source.shape, source.element_bits, source.order[0], target.order[0], warps, warp_size)
    if not layouts.turns:
        return layouts

    def cycles(option: CopyLayouts) -> int:
        read = shared_cycles(option.load, source, VECTOR_BYTES, banks, "read")
        return read + shared_cycles(option.store, target, VECTOR_BYTES, banks, "write")

    def with_lanes(layout: LinearLayout, lanes: Sequence[tuple[int, ...]]) -> LinearLayout:
        bases = {name: layout.basis(name) for name in ("register", "lane", "warp")}
        return LinearLayout.make({**bases, "lane": lanes}, layout.shape, layout.repeat, layout.repeat_order)

    orders = lane_orders(layouts.load.basis("lane"))
    options = [CopyLayouts(with_lanes(layouts.load, o), with_lanes(layouts.store, o)) for o in orders]
    return min(options, key=cycles)


def lane_orders(lanes: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Bases of the same span: two directions, then a third or the diagonal of two others, then what is left."""
    orders = [list(lanes)]
    for first, second in combinations(lanes, 2):
        rest = [lane for lane in lanes if lane not in (first, second)]
        for third, fourth in combinations(rest, 2):
            diagonal = tuple(x ^ y for x, y in zip(third, fourth, strict=True))
            others = [lane for lane in rest if lane not in (third, fourth)]
            orders += [[first, second, third, fourth, *others], [first, second, diagonal, fourth, *others]]
    return orders


def copied_layout(
    shape: tuple[int, ...], element_bits: int, order: tuple[int, int], reader: Access, copy: LinearLayout, banks: str
) -> SharedLayout:
    """A slot that threads fill with the widest vectors, and read as ``reader`` says, without meeting a bank twice.

    Vectors of the copy stay whole, as ``cp.async`` needs them, even where that costs readers conflicts.
    """
    plain = SharedLayout(shape, element_bits, order)
    chosen = choose_swizzle(shape, element_bits, order, (reader,), ((copy, VECTOR_BYTES),), banks)
    if shared_vector_bytes(copy, chosen, VECTOR_BYTES) == shared_vector_bytes(copy, plain, VECTOR_BYTES):
        return chosen
    options = vector_swizzles(shape, element_bits, order, banks)
    return choose_shared_layout(shape, element_bits, order, [reader], [(copy, VECTOR_BYTES)], banks, options)


def engine_layout(
    shape: tuple[int, ...], element_bits: int, order: tuple[int, int], reader: Access, banks: str
) -> SharedLayout | None:
    """A slot that the copy engine fills and threads read as ``reader`` says; None where no swizzle of its fits."""
    options = [option for option in shared_candidates(shape, element_bits, order, banks) if option.swizzle]
    return choose_shared_layout(shape, element_bits, order, [reader], [], banks, options) if options else None


def vector_swizzles(shape: Sequence[int], element_bits: int, order: Sequence[int], banks: str) -> list[SharedLayout]:
    """Shared layouts that keep 16-byte vectors whole: those of the copy engine, then XOR swizzles of such vectors."""
    options = shared_candidates(shape, element_bits, order, banks)
    for per_phase in (1, 2, 4, 8):
        for phases in (2, 4, 8):
            try:
                vector = VECTOR_BYTES * 8 // element_bits
                options.append(SharedLayout(tuple(shape), element_bits, tuple(order), 0, vector, per_phase, phases))
            except ValueError:
                continue
    return options
