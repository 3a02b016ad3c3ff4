"""What reading or writing a tile in global memory costs a warp, by its register layout.

Memory serves sectors of 32 bytes. A layout whose neighbouring lanes hold neighbouring elements fills every sector
that an instruction touches; a matrix fragment may use half of each and touch the rest with another instruction.
"""

from __future__ import annotations

from functools import lru_cache

from tilewright.ir.layout_bits import Vector, log2_exact, unit
from tilewright.ir.layout_linear import LinearLayout
from tilewright.ir.layout_spaces import FlatLayout, independent

SECTOR_BYTES, LINE_BYTES = 32, 128
MAX_VECTOR_BYTES = 16
#: bytes of neighbouring lanes that a layout near another one should make contiguous
RUN_BYTES = 64
#: a warp's share of the path to memory: cycles per sector (about 16 bytes a cycle and SM), per line of the cache
#: that an instruction touches, and per instruction
SECTOR_CYCLES, LINE_CYCLES, ISSUE_CYCLES = 2.0, 0.25, 1.0


@lru_cache(maxsize=1024)
def access_cost(
    layout: LinearLayout, contiguous: int | None, element_bits: int, vector_bytes: int = MAX_VECTOR_BYTES
) -> float:
    """Cycles for a tile in memory that runs along axis ``contiguous`` (None: no axis has stride 1).

    ``vector_bytes``: what the alignment of the tensor allows in one access. Units as in `conversion_cost`.
    """
    bytes_ = max(1, element_bits // 8)
    width = 1
    if contiguous is not None:
        width = max(1, min(layout.contiguity(contiguous), vector_bytes // bytes_))
    instructions = layout.num_registers // width
    touched = SECTOR_CYCLES * pieces(layout, contiguous, bytes_) + LINE_CYCLES * pieces(
        layout, contiguous, bytes_, LINE_BYTES
    )
    return instructions * (ISSUE_CYCLES + touched)


def pieces(layout: LinearLayout, contiguous: int | None, element_bytes: int, piece_bytes: int = SECTOR_BYTES) -> int:
    """Sectors, or other aligned pieces of memory, that one instruction of a warp touches."""
    shift = (piece_bytes // element_bytes).bit_length() - 1
    shape = list(layout.shape)
    lanes = [list(v) for v in layout.basis("lane")]
    if contiguous is not None:
        for vector in lanes:
            vector[contiguous] >>= shift
    flat = FlatLayout.of(LinearLayout.make({"lane": lanes}, shape)).lane
    return 1 << len(independent(flat))


@lru_cache(maxsize=256)
def near_coalesced(layout: LinearLayout, contiguous: int, element_bits: int) -> LinearLayout | None:
    """A layout in which every warp holds what it holds in ``layout``, in vectors and runs along ``contiguous``.

    Converting between the two never leaves the warp. None where that gains nothing.
    """
    rank, shape = layout.rank, layout.shape
    own = [*layout.basis("register"), *layout.basis("lane")]
    along: list[Vector] = []
    for bit in range(log2_exact(shape[contiguous])):
        vector = unit(rank, contiguous, 1 << bit)
        if vector not in own:
            break
        along.append(vector)
    vector_bits = max(0, (MAX_VECTOR_BYTES * 8 // element_bits).bit_length() - 1)
    run_bits = max(0, (RUN_BYTES * 8 // element_bits).bit_length() - 1)
    lane_bits = len(layout.basis("lane"))
    register = along[: min(vector_bits, len(layout.basis("register")))]
    lane = along[len(register) : run_bits]
    lane += [v for v in layout.basis("lane") if v not in register and v not in lane]
    lane += [v for v in layout.basis("register") if v not in register and v not in lane]
    lane = lane[:lane_bits]
    left = [v for v in own if v not in (*register, *lane)]
    if len(set(own)) != len(own) or len(lane) != lane_bits:
        return None  # replicas
    bases = {"register": register + left, "lane": lane, "warp": layout.basis("warp")}
    near = LinearLayout.make(bases, shape, layout.repeat, layout.repeat_order)
    return None if near == layout else near


__all__ = ["access_cost", "near_coalesced", "pieces"]
