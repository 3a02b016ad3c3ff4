"""MFMA, the matrix unit of CDNA: operands and accumulators in registers, results interlocked by the hardware.

AMD CDNA3 and CDNA4 ISA guides, "Matrix Arithmetic Instructions": v_mfma_f32_{32x32x8,16x16x16}_{f16,bf16} on
gfx942, v_mfma_f32_{32x32x16,16x16x32}_{f16,bf16} on gfx950 (which also keeps the shorter ones).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tilewright.ir.async_ops import AsyncDot
from tilewright.ir.core import Function, IRError
from tilewright.ir.layout import (
    LinearLayout,
    SharedLayout,
    bank_conflicts,
    choose_shared_layout,
    mfma_accumulator,
    mfma_operand,
)
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, Reduce
from tilewright.ir.types import TileType, bf16, f16, f32
from tilewright.passes.analysis import backward_slice, enclosing_operations
from tilewright.passes.copy_layouts import VECTOR_BYTES, copy_layouts
from tilewright.passes.matrix import MatrixUnit, operand_dtype, operand_shape

#: accumulator registers per lane above which the dot is spread over eight waves instead of four
MOST_ACCUMULATORS = 160
#: K of the instructions for 16-bit elements that every CDNA since gfx90a has
SHORTEST_K = {(32, 32): 8, (16, 16): 16}


@dataclass(frozen=True)
class Instruction:
    """v_mfma_f32_MxNxK; a lane holds ``k_per_lane`` consecutive k of one row of A or column of B."""

    m: int
    n: int
    k: int

    @property
    def k_per_lane(self) -> int:
        return self.k * self.m // 64

    @property
    def mnk(self) -> tuple[int, int, int]:
        return self.m, self.n, self.k


class Mfma(MatrixUnit):
    """Every dot is a grid of instruction tiles, dealt to the waves in turn (`mfma_accumulator`)."""

    reads_slots = False
    asynchronous = False

    def __init__(self, target: Target, whole_rows: bool = False):
        """``whole_rows``: a wave should hold whole rows of the accumulators (see `needs_whole_rows`)."""
        super().__init__(target)
        self.whole_rows = whole_rows

    def check(self, dot: Dot) -> None:
        (m, k), n = operand_shape(dot, "a"), operand_shape(dot, "b")[1]
        dtype = operand_dtype(dot)
        if dtype not in (bf16, f16):
            raise IRError(f"dot of {dtype} is not supported on {self.target.name} yet", dot.loc, "cast to bf16 or f16")
        acc = dot.acc.type
        if not isinstance(acc, TileType) or acc.dtype != f32:
            raise IRError(
                "dot accumulates in float32", dot.loc, "make the accumulator with tw.zeros(shape, tw.float32)"
            )
        if m % 16 or n % 16 or k % 16:
            raise IRError(
                f"dot of ({m}, {k}) @ ({k}, {n}) does not fit {self.target.name}",
                dot.loc,
                "M, N and K must be multiples of 16",
            )

    def warps(self, dots: Sequence[Dot]) -> int:
        """Four waves, one for each SIMD; eight where the accumulators of four would fill the register file.

        Fewer where the tiles do not divide by so many.
        """
        sizes = [operand_shape(d, "a")[0] * operand_shape(d, "b")[1] for d in dots]
        warps = 8 if max(sizes) > 4 * self.target.warp_size * MOST_ACCUMULATORS else 4
        while warps > 1 and max(sizes) < warps * 16 * 16:
            warps //= 2
        while warps > 1 and not all(any(_tilings(shape[0], shape[1], warps)) for shape in map(_result_shape, dots)):
            warps //= 2  # 3 x 3 instruction tiles divide by nothing
        return warps

    def accumulator(self, shape: tuple[int, ...], warps: int) -> LinearLayout:
        (m, n), grid = self._tiling(shape, warps)
        return mfma_accumulator(shape, (m, n), grid)

    def operand(self, which: str, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        _, grid = self._tiling(_result_shape(dot), warps)
        instruction = self.instruction(dot, warps)
        return mfma_operand(operand_shape(dot, which), which, instruction.mnk, instruction.k_per_lane, grid)

    def instruction(self, dot: Dot | AsyncDot, warps: int) -> Instruction:
        """The instruction for a dot: the largest tile that leaves no wave idle, the longest K that divides."""
        tile, _ = self._tiling(_result_shape(dot), warps)
        k = dict(self.target.mfma_k)[tile]
        depth = operand_shape(dot, "a")[1]
        return Instruction(*tile, k if depth % k == 0 else SHORTEST_K[tile])

    def shared(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> SharedLayout | None:
        """K runs fastest, so that an operand is one ds_read; swizzled so that these reads meet no bank twice."""
        shape, bits = operand_shape(dot, which), operand_dtype(dot).bits
        depth = 1 if which == "a" else 0
        operand = self.operand(which, dot, warps)
        read_bytes = self.instruction(dot, warps).k_per_lane * bits // 8
        staging = copy_layouts(shape, bits, contiguous, depth, warps, self.target.warp_size)
        options = []
        for option in _swizzles(shape, bits, (depth, 1 - depth)):
            try:
                if bank_conflicts(operand, option, read_bytes, self.target.banks) == 0:
                    options.append(option)
            except ValueError:
                continue  # the swizzle cuts the operand's vectors
        options = options or [SharedLayout(shape, bits, (depth, 1 - depth))]
        writers = [(staging.store, VECTOR_BYTES)]
        readers = [(operand, read_bytes)]
        return choose_shared_layout(shape, bits, (depth, 1 - depth), readers, writers, self.target.banks, options)

    def _tiling(self, shape: tuple[int, ...], warps: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Instruction tile and grid of waves: no idle wave, then whole rows, then 32x32, then the least traffic."""
        m, n = shape

        def cost(choice: tuple[tuple[int, int], tuple[int, int]]) -> tuple[int, ...]:
            (rows, columns), (wm, wn) = choice
            used = min(wm, m // rows) * min(wn, n // columns)
            across = min(wn, n // columns) if self.whole_rows else 0
            return -used, across, -rows, m // wm + n // wn, max(wm, wn)

        choices = list(_tilings(m, n, warps))
        if not choices:
            raise IRError(
                f"a product of ({m}, {n}) cannot be spread over {warps} waves of {self.target.name}",
                hint="make the tile's sizes powers of two, or use fewer num_warps",
            )
        return min(choices, key=cost)


def needs_whole_rows(function: Function) -> bool:
    """Whether results of dots are reduced along their rows or are the left operand of other dots.

    Both stay inside a wave when it holds whole rows, and cross waves through shared memory when it does not.
    """
    loops = enclosing_operations(function)
    sources = []
    for op in function.walk():
        if isinstance(op, Reduce) and isinstance(op.source.type, TileType) and op.axis == op.source.type.rank - 1:
            sources.append(op.source)
        elif isinstance(op, Dot | AsyncDot) and isinstance(op.a.type, TileType):
            sources.append(op.a)
    return any(isinstance(value.op, Dot | AsyncDot) for value in backward_slice(sources, loops))


def _tilings(m: int, n: int, warps: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for tile in (32, 16):
        if m % tile or n % tile:
            continue
        for bit in range(warps.bit_length()):
            wm, wn = 1 << bit, warps >> bit
            if all(_deals(size // tile, count) for size, count in ((m, wm), (n, wn))):
                yield (tile, tile), (wm, wn)


def _deals(tiles: int, waves: int) -> bool:
    """Whether ``tiles`` can be dealt to ``waves``, replicated where there are fewer (see `mfma_accumulator`)."""
    used = min(tiles, waves)
    return tiles % used == 0 and waves % used == 0 and used & (used - 1) == 0


def _swizzles(shape: tuple[int, ...], bits: int, order: tuple[int, int]) -> Iterator[SharedLayout]:
    """Plain first, then XOR swizzles of 16- and 8-byte vectors."""
    yield SharedLayout(shape, bits, order)
    for vector_bytes in (16, 8):
        for per_phase in (1, 2, 4, 8):
            for max_phase in (2, 4, 8, 16):
                try:
                    yield SharedLayout(shape, bits, order, 0, vector_bytes * 8 // bits, per_phase, max_phase)
                except ValueError:
                    continue


def _result_shape(dot: Dot | AsyncDot) -> tuple[int, ...]:
    assert isinstance(dot.acc.type, TileType)
    return dot.acc.type.shape
