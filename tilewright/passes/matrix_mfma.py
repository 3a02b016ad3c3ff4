"""MFMA, the matrix unit of CDNA: operands and accumulators in registers, results interlocked by the hardware.

Accumulators are held transposed (the instruction is given B first): a lane then has four neighbouring columns of one
row. That is how a row-major result is stored, it is the left operand of a next dot as it stands, and a sum or maximum
along rows stays in the lane but for its last steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tilewright.ir.async_ops import AsyncDot
from tilewright.ir.core import IRError, Operation, Value
from tilewright.ir.layout import LinearLayout, SharedLayout, mfma_accumulator, mfma_operand
from tilewright.ir.layout_swizzle import choose_swizzle
from tilewright.ir.mfma import (
    ACCUMULATOR_RUN,
    READ_BYTES,
    MfmaProduct,
    accumulator_dtype,
    least_k,
    mfma_products,
    tile_sizes,
)
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, For, If, Load, While
from tilewright.ir.types import DType, TileType, f32
from tilewright.passes.copy_layouts import VECTOR_BYTES, copy_layouts
from tilewright.passes.matrix import MatrixUnit, operand_dtype, operand_shape, result_type
from tilewright.passes.warp_grid import deals

#: 32-bit accumulators per lane above which the dot is spread over eight waves instead of four
MOST_ACCUMULATORS = 160

_LONG_NAMES = {"f32": "float32", "f64": "float64", "i32": "int32"}


class Mfma(MatrixUnit):
    """Every dot is a grid of instruction tiles, dealt to the waves in turn (`mfma_accumulator`)."""

    reads_slots = False
    asynchronous = False

    def __init__(self, target: Target, whole_rows: bool = False):
        """``whole_rows``: a wave should hold whole rows of the accumulators (see `rows_stay_together`)."""
        super().__init__(target)
        self.whole_rows = whole_rows

    def check(self, dot: Dot) -> None:
        (m, k), n = operand_shape(dot, "a"), operand_shape(dot, "b")[1]
        dtype, acc, name = operand_dtype(dot), result_type(dot).dtype, self.target.name
        wanted = accumulator_dtype(dtype)
        if wanted is None:
            hint = "convert the operands, for example to int8, float16 or float32"
            raise IRError(f"{name} has no dot of {dtype}", dot.loc, hint)
        if acc != wanted:
            raise IRError(
                f"dot of {dtype} accumulates in {wanted}, not in {acc}",
                dot.loc,
                f"make the accumulator with tw.zeros(shape, tw.{_LONG_NAMES[wanted.name]})",
            )
        depth = least_k(self.target, dtype, min(tile_sizes(self.target, dtype)))
        if m % 16 or n % 16 or k % depth:
            raise IRError(
                f"dot of ({m}, {k}) @ ({k}, {n}) in {dtype} does not fit {name}",
                dot.loc,
                f"M and N must be multiples of 16 and K of {depth}: load a larger tile, "
                "parts outside the tensor read as 0",
            )

    def warps(self, dots: Sequence[Dot]) -> int:
        """Four waves, one for each SIMD; eight where the accumulators of four would fill the register file.

        Fewer where the tiles do not divide by so many.
        """
        sizes = [result_type(dot).size for dot in dots]
        words = max(result_type(dot).size * result_type(dot).dtype.bits // 32 for dot in dots)
        warps = 8 if words > 4 * self.target.warp_size * MOST_ACCUMULATORS else 4
        while warps > 1 and max(sizes) < warps * 16 * 16:
            warps //= 2
        while warps > 1 and not all(any(self._tilings(dot, warps)) for dot in dots):
            warps //= 2  # 3 x 3 instruction tiles divide by nothing
        return warps

    def accumulator(self, shape: tuple[int, ...], warps: int) -> LinearLayout:
        """That of a product into f32."""
        tile, grid = self._best(shape, _tilings(shape, (32, 16), warps), warps)
        return mfma_accumulator(shape, (tile, tile), grid, transposed=True)

    def result(self, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        tile, grid = self._tiling(dot, warps)
        type_ = result_type(dot)
        return mfma_accumulator(type_.shape, (tile, tile), grid, type_.dtype.bits, transposed=True)

    def operand(self, which: str, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        _, grid = self._tiling(dot, warps)
        product = self.instruction(dot, warps)
        return mfma_operand(operand_shape(dot, which), which, product.mnk, product.run, grid)

    def instruction(self, dot: Dot | AsyncDot, warps: int) -> MfmaProduct:
        """The instructions for a dot: the largest tile that leaves no wave idle, the longest K that divides.

        An operand that was computed from another dot has the runs of an accumulator, so that it need not move.
        """
        tile, _ = self._tiling(dot, warps)
        dtype, depth = operand_dtype(dot), operand_shape(dot, "a")[1]
        run = accumulator_run(result_type(dot).dtype) if _is_computed(dot) else None
        precision = dot.precision if isinstance(dot, Dot) else "default"
        for product in mfma_products(self.target, dtype, precision, tile, run):
            if depth % product.k == 0:
                return product
        raise IRError(f"no matrix instruction of {self.target.name} has a K that divides {depth}", dot.loc)

    def shared(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> SharedLayout | None:
        """K runs fastest, so that an operand is one ds_read; swizzled so that no access meets a bank twice."""
        shape, bits = operand_shape(dot, which), operand_dtype(dot).bits
        depth = 1 if which == "a" else 0
        read_bytes = min(READ_BYTES, self.instruction(dot, warps).run * bits // 8)
        staging = copy_layouts(shape, bits, contiguous, depth, warps, self.target.warp_size)
        readers = ((self.operand(which, dot, warps), read_bytes),)
        writers = ((staging.store, VECTOR_BYTES),)
        return choose_swizzle(shape, bits, (depth, 1 - depth), readers, writers, self.target.banks)

    def _tiling(self, dot: Dot | AsyncDot, warps: int) -> tuple[int, tuple[int, int]]:
        return self._best(result_type(dot).shape, self._tilings(dot, warps), warps)

    def _tilings(self, dot: Dot | AsyncDot, warps: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Those whose instructions' K divides the dot's."""
        dtype, depth = operand_dtype(dot), operand_shape(dot, "a")[1]
        tiles = [tile for tile in tile_sizes(self.target, dtype) if depth % least_k(self.target, dtype, tile) == 0]
        return _tilings(result_type(dot).shape, tiles, warps)

    def _best(
        self, shape: Sequence[int], choices: Iterator[tuple[int, tuple[int, int]]], warps: int
    ) -> tuple[int, tuple[int, int]]:
        """Instruction tile and grid of waves: no idle wave, then whole rows, then 32x32, then the least traffic."""
        m, n = shape

        def cost(choice: tuple[int, tuple[int, int]]) -> tuple[int, ...]:
            tile, (wm, wn) = choice
            used = min(wm, m // tile) * min(wn, n // tile)
            across = min(wn, n // tile) if self.whole_rows else 0
            return -used, across, -tile, m // wm + n // wn, max(wm, wn)

        found = list(choices)
        if not found:
            raise IRError(
                f"a product of ({m}, {n}) cannot be spread over {warps} waves of {self.target.name}",
                hint="make the tile's sizes powers of two, or use fewer num_warps",
            )
        return min(found, key=cost)


def accumulator_run(dtype: DType) -> int:
    """Consecutive columns that a lane holds of an accumulator."""
    return ACCUMULATOR_RUN if dtype.bits == f32.bits else 1


def _is_computed(dot: Dot | AsyncDot) -> bool:
    """Whether an operand comes from another dot, through operations on tiles alone (`tile.load` ends the search)."""
    seen: set[Value] = set()
    pending: list[Value] = [dot.a, dot.b]
    while pending:
        value = pending.pop()
        if value in seen or not isinstance(value.type, TileType) or value.op is None or isinstance(value.op, Load):
            continue
        seen.add(value)
        if isinstance(value.op, Dot | AsyncDot):
            return True
        pending += _sources(value, value.op)
    return False


def _sources(value: Value, op: Operation) -> list[Value]:
    if isinstance(op, For | While | If):
        position = op.results.index(value)
        ends = [region.block.terminator for region in op.regions[-1 if isinstance(op, For | While) else 0 :]]
        return [end.operands[position] for end in ends if end is not None]
    return op.operands


def _tilings(shape: Sequence[int], tiles: Sequence[int], warps: int) -> Iterator[tuple[int, tuple[int, int]]]:
    for tile in tiles:
        if any(size % tile for size in shape):
            continue
        for bit in range(warps.bit_length()):
            grid = (1 << bit, warps >> bit)
            if all(deals(size // tile, count) for size, count in zip(shape, grid, strict=True)):
                yield tile, grid
