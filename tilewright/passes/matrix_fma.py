"""Outer products on the vector unit: float32 dots with float32's own accuracy, which no matrix unit gives.

Every thread has a block of the accumulator and adds the products of a column of A and a row of B, one fused
multiply-add each, in the order of K.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.async_ops import AsyncDot
from tilewright.ir.core import IRError
from tilewright.ir.layout import (
    LinearLayout,
    SharedLayout,
    choose_shared_layout,
    fma_accumulator,
    fma_operand_a,
    fma_operand_b,
)
from tilewright.ir.layout_fragments import fma_tile
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import f32
from tilewright.passes.copy_layouts import VECTOR_BYTES, copy_layouts
from tilewright.passes.matrix import MatrixUnit, operand_dtype, operand_shape, result_type
from tilewright.passes.warp_grid import warp_grid

#: accumulators per thread that leave room for operands and copies in flight
MOST_ACCUMULATORS = 64
MOST_WARPS = 8


class Fma(MatrixUnit):
    """float32 by fused multiply-adds; M a multiple of 16, N of 8, any K."""

    reads_slots = False
    asynchronous = False

    def __init__(self, target: Target, whole_rows: bool = False):
        super().__init__(target)
        self.whole_rows = whole_rows

    def check(self, dot: Dot) -> None:
        (m, k), n = operand_shape(dot, "a"), operand_shape(dot, "b")[1]
        if operand_dtype(dot) != f32 or result_type(dot).dtype != f32:
            message = f"dot of {operand_dtype(dot)} into {result_type(dot).dtype}"
            raise IRError(message, dot.loc, "make the accumulator with tw.zeros(shape, tw.float32)")
        if m % 16 or n % 8:
            raise IRError(
                f"float32 dot of ({m}, {k}) @ ({k}, {n}) does not fit {self.target.name}",
                dot.loc,
                "M must be a multiple of 16 and N of 8: load a larger tile, parts outside the tensor read as 0",
            )

    def warps(self, dots: Sequence[Dot]) -> int:
        largest = max(result_type(dot).size for dot in dots)
        warps = 4
        while warps < MOST_WARPS and largest > warps * self.target.warp_size * MOST_ACCUMULATORS:
            warps *= 2
        return warps

    def grid(self, shape: tuple[int, ...], warps: int) -> tuple[int, int]:
        """Warps along M and N."""
        return warp_grid(shape, fma_tile(shape[1]), warps, self.whole_rows)

    def accumulator(self, shape: tuple[int, ...], warps: int) -> LinearLayout:
        return fma_accumulator(shape, self.grid(shape, warps))

    def operand(self, which: str, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        shape = result_type(dot).shape
        grid = self.grid(shape, warps)
        if which == "a":
            return fma_operand_a(operand_shape(dot, "a"), shape[1], grid)
        return fma_operand_b(operand_shape(dot, "b"), grid)

    def shared(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> SharedLayout | None:
        """M or N runs fastest: threads read runs of rows and columns, many of them the same."""
        shape, bits = operand_shape(dot, which), operand_dtype(dot).bits
        along = 0 if which == "a" else 1
        staging = copy_layouts(shape, bits, contiguous, along, warps, self.target.warp_size)
        readers, writers = [(self.operand(which, dot, warps), VECTOR_BYTES)], [(staging.store, VECTOR_BYTES)]
        return choose_shared_layout(shape, bits, (along, 1 - along), readers, writers, self.target.banks)
