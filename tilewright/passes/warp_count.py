"""How many warps compute, where nobody says so."""

from __future__ import annotations

from collections.abc import Iterator

from tilewright.ir.core import Function, Region, Value
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Reduce
from tilewright.ir.types import TileType

#: elements of the largest tile that one thread of a kernel without dots should hold, and the most warps to that end;
#: more where the tile is reduced: it waits in registers for the result, and others with it
ELEMENTS_PER_THREAD, MOST_WARPS, MOST_REDUCING_WARPS = 32, 8, 16


def default_warps(function: Function, target: Target) -> int:
    """A power of two such that threads hold about `ELEMENTS_PER_THREAD` elements of the largest tile."""
    largest = max((v.type.size for v in values_of(function.body) if isinstance(v.type, TileType)), default=1)
    reduced = max((_size(op.source) for op in function.walk() if isinstance(op, Reduce)), default=0)
    warps = 1
    for size, most in ((largest, MOST_WARPS), (reduced, MOST_REDUCING_WARPS)):
        while warps < most and size > warps * target.warp_size * ELEMENTS_PER_THREAD:
            warps *= 2
    return max(warps, 4) if largest >= 4 * target.warp_size else warps


def values_of(region: Region) -> Iterator[Value]:
    yield from region.block.args
    for op in region.block.ops:
        yield from op.results
        for nested in op.regions:
            yield from values_of(nested)


def _size(value: Value) -> int:
    assert isinstance(value.type, TileType)
    return value.type.size
