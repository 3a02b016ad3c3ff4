"""Register layouts of tiles that threads copy from global to shared memory.

A copy wants two things: adjacent threads read adjacent global memory, and each thread writes wide vectors
along the direction in which shared memory is read. Where the two directions agree one blocked layout serves
both. Where they differ each thread holds a small block of the tile, vectors long both ways, so that turning
one direction into the other renames registers and moves nothing between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.ir.layout import LinearLayout, SharedLayout, blocked, shared_candidates
from tilewright.ir.layout_linear import log2_exact, power_of_two_part, unit

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
