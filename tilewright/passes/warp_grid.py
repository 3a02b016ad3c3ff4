"""How the instruction tiles of an accumulator are dealt to the warps of a block."""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.async_ops import AsyncDot
from tilewright.ir.core import Function, IRError
from tilewright.ir.tile_ops import Dot, Reduce
from tilewright.ir.types import TileType
from tilewright.passes.analysis import backward_slice, enclosing_operations


def deals(tiles: int, warps: int) -> bool:
    """Whether ``tiles`` can be dealt to ``warps``, which repeat each other's where there are fewer tiles."""
    used = min(tiles, warps)
    return tiles % used == 0 and warps % used == 0 and used & (used - 1) == 0


def grids(shape: Sequence[int], tile: tuple[int, int], warps: int) -> list[tuple[int, int]]:
    """The grids (warps along M, along N) over which a tile of ``shape`` can be dealt."""
    found = [(1 << bit, warps >> bit) for bit in range(warps.bit_length())]
    return [grid for grid in found if all(deals(n // t, w) for n, t, w in zip(shape, tile, grid, strict=True))]


def warp_grid(shape: Sequence[int], tile: tuple[int, int], warps: int, whole_rows: bool) -> tuple[int, int]:
    """The grid without idle warps, with whole rows in a warp if asked for, and the least traffic; else an error."""
    rows, columns = shape[0] // tile[0], shape[1] // tile[1]

    def cost(grid: tuple[int, int]) -> tuple[int, ...]:
        down, across = min(grid[0], rows), min(grid[1], columns)
        return -down * across, across if whole_rows else 0, shape[0] // down + shape[1] // across, max(grid)

    choices = grids(shape, tile, warps)
    if not choices:
        m, n = shape
        raise IRError(f"a tile of ({m}, {n}) cannot be spread over {warps} warps", hint="use fewer: num_warps=")
    return min(choices, key=cost)


def rows_stay_together(function: Function) -> bool:
    """Whether results of dots are reduced along their rows or are the left operand of other dots.

    Both stay inside a warp that holds whole rows, and cross warps through shared memory otherwise.
    """
    sources = []
    for op in function.walk():
        if isinstance(op, Reduce) and isinstance(op.source.type, TileType) and op.axis == op.source.type.rank - 1:
            sources.append(op.source)
        elif isinstance(op, Dot | AsyncDot) and isinstance(op.a.type, TileType):
            sources.append(op.a)
    return any(isinstance(v.op, Dot | AsyncDot) for v in backward_slice(sources, enclosing_operations(function)))
