"""Where the registers of a thread lie in a tile: the run-time part of the thread, the constant part of the register."""

from __future__ import annotations

from copy import copy
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from tilewright.backends.lower.index import IntLike
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.layout import LinearLayout

if TYPE_CHECKING:
    from tilewright.backends.lower.context import Lowering


def basis_mask(layout: LinearLayout, axis: int) -> int:
    """The coordinate bits along ``axis`` that depend on lane or warp."""
    return reduce(or_, (v[axis] for name in ("lane", "warp") for v in layout.basis(name)), 0)


def thread_part(lw: Lowering, layout: LinearLayout, axis: int) -> IntLike:
    """The lanes' and warps' contribution to the coordinate along ``axis`` (XOR it with the register's)."""
    scope = lw.scope
    lane = lw.index.linear_map(scope.lane, [v[axis] for v in layout.basis("lane")])
    warp = lw.index.linear_map(scope.warp, [v[axis] for v in layout.basis("warp")])
    return lw.index.xor(lane, warp)


class TileCoordinates:
    """Coordinates of the elements that the current thread holds of a tile with ``layout``."""

    def __init__(self, lw: Lowering, layout: LinearLayout):
        check_threads(lw, layout)
        self.lw, self.layout = lw, layout
        self.masks = [basis_mask(layout, axis) for axis in range(layout.rank)]
        self.thread = [thread_part(lw, layout, axis) for axis in range(layout.rank)]
        #: [register][axis]
        self.register: list[list[int]] = layout.table("register").tolist()
        #: coordinates computed so far
        self.known: dict[tuple[int, int], IntLike] = {}

    def fresh(self) -> TileCoordinates:
        """The same coordinates without those already computed, which may not be defined elsewhere."""
        other = copy(self)
        other.known = {}
        return other

    def separates(self, axis: int) -> bool:
        """Whether thread and register parts share no bit along ``axis``, so that they add."""
        return not any(part[axis] & self.masks[axis] for part in self.register)

    def along(self, axis: int, part: int) -> IntLike:
        """The coordinate along ``axis`` of a register whose own part is ``part`` (i32)."""
        if (axis, part) not in self.known:
            combine = self.lw.index.xor if part & self.masks[axis] else self.lw.index.add
            self.known[axis, part] = combine(self.thread[axis], part)
        return self.known[axis, part]

    def of(self, register: int, axis: int) -> IntLike:
        """The coordinate of a register along ``axis`` (i32)."""
        return self.along(axis, self.register[register][axis])


def check_threads(lw: Lowering, layout: LinearLayout) -> None:
    """Raise unless the layout is one for the warps and lanes of the current scope."""
    if layout.num_lanes != lw.target.warp_size:
        raise lw.error(f"the layout has {layout.num_lanes} lanes, a warp of {lw.target.name} {lw.target.warp_size}")
    if layout.num_warps != lw.scope.num_warps:
        raise lw.error(f"the layout has {layout.num_warps} warps, but {lw.scope.num_warps} run this code")


def sole_holder(lw: Lowering, layout: LinearLayout) -> mlir.Value | None:
    """i1: this thread is the first of those that hold the same elements. None where nobody shares."""
    fb = lw.fb
    conditions = []
    for value, dim in ((lw.scope.lane, "lane"), (lw.scope.warp, "warp")):
        mask = sum(1 << bit for bit in layout.free_bits(dim))
        if mask:
            conditions.append(fb.icmp("eq", fb.and_(value, fb.i32(mask)), fb.i32(0)))
    return reduce(fb.and_, conditions) if conditions else None
