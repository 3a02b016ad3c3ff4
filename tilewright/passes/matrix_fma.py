"""Outer products on the vector unit: float32 dots with float32's own accuracy, which no matrix unit gives.

Every thread has a block of the accumulator and adds the products of a column of A and a row of B, one fused
multiply-add each, in the order of K.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.async_ops import AsyncDot, LocalLoad
from tilewright.ir.core import IRError
from tilewright.ir.layout import (
    LinearLayout,
    SharedLayout,
    fma_accumulator,
    fma_operand_a,
    fma_operand_b,
)
from tilewright.ir.layout_fragments import fma_tile
from tilewright.ir.layout_shared import Access
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import SlotType, f32
from tilewright.passes.copy_layouts import VECTOR_BYTES, copied_layout, copy_layouts, engine_layout
from tilewright.passes.matrix import MatrixUnit, operand_dtype, operand_shape, result_type
from tilewright.passes.warp_grid import warp_grid

#: accumulators per thread that leave room for operands and copies in flight
MOST_ACCUMULATORS = 64
MOST_WARPS = 8


class Fma(MatrixUnit):
    """float32 by fused multiply-adds; M a multiple of 16, N of 8, any K."""

    reads_slots = False
    asynchronous = False

    def __init__(self, target: Target, whole_rows: bool = False, by_roles: bool = False):
        super().__init__(target)
        self.whole_rows, self.by_roles = whole_rows, by_roles

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
        warps = MOST_WARPS if self.by_roles else 4
        while warps < MOST_WARPS and largest > warps * self.target.warp_size * MOST_ACCUMULATORS:
            warps *= 2
        return warps

    def grid(self, shape: tuple[int, ...], warps: int) -> tuple[int, int]:
        """Warps along M and N."""
        return warp_grid(shape, fma_tile(shape[1]), warps, self.whole_rows)

    def accumulator(self, shape: tuple[int, ...], warps: int) -> LinearLayout:
        return fma_accumulator(shape, self.grid(shape, warps))

    def operand(self, which: str, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        """In the order of the slot that the operand is read from."""
        value = dot.a if which == "a" else dot.b
        depth = 1 if which == "a" else 0
        slot = value.op.slot.type if isinstance(value.op, LocalLoad) else None
        return self._operand(which, dot, warps, isinstance(slot, SlotType) and slot.layout.order[0] == depth)

    def _operand(self, which: str, dot: Dot | AsyncDot, warps: int, along_k: bool) -> LinearLayout:
        shape = result_type(dot).shape
        grid = self.grid(shape, warps)
        if which == "a":
            return fma_operand_a(operand_shape(dot, "a"), shape[1], grid, along_k)
        return fma_operand_b(operand_shape(dot, "b"), grid, along_k)

    def reader(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> Access:
        depth = 1 if which == "a" else 0
        return self._operand(which, dot, warps, contiguous == depth), VECTOR_BYTES

    def shared(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> SharedLayout | None:
        """The direction of global memory, so that nothing is turned; else along M or N, which threads share."""
        shape, bits = operand_shape(dot, which), operand_dtype(dot).bits
        fastest = (0 if which == "a" else 1) if contiguous is None else contiguous
        order = (fastest, 1 - fastest)
        reader = self.reader(which, dot, contiguous, warps)
        if self.by_roles:
            return engine_layout(shape, bits, order, reader, self.target.banks)
        copies = copy_layouts(shape, bits, contiguous, fastest, warps, self.target.warp_size)
        return copied_layout(shape, bits, order, reader, copies.store, self.target.banks)
