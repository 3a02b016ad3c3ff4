"""Lowering of `tile.cat`: every thread already holds the parts of its elements, so registers are renamed."""

from __future__ import annotations

from tilewright.backends.lower.context import Lowering, lowers
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import tile_ops


@lowers(tile_ops.Cat)
def lower_cat(lw: Lowering, op: tile_ops.Cat) -> None:
    result = lw.layout(op.result)
    held: dict[tuple[int, ...], mlir.Value] = {}
    start = 0
    for source in op.sources:
        layout = lw.layout(source)
        size, threads = layout.tile_shape[op.axis], 0
        for dim in ("lane", "warp"):
            if layout.basis(dim) != result.basis(dim):
                raise lw.error("threads do not hold the parts of their elements: the layout pass must convert")
            threads |= max((v[op.axis] for v in layout.basis(dim)), default=0)
        if threads and start % (1 << threads.bit_length()):
            raise lw.error("a part begins inside the run of the threads: the layout pass must convert")
        for coordinate, value in zip(layout.table("register").tolist(), lw.registers(source), strict=True):
            coordinate[op.axis] += start
            held.setdefault(tuple(coordinate), value)
        start += size
    lw.define(op.result, [held[tuple(coordinate)] for coordinate in result.table("register").tolist()])
