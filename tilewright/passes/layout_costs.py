"""What the choice of register layouts costs in accesses to global memory and in conversions.

A tile can be read or written in the layout that its class has; or in a layout made for memory, with a conversion
to or from the class's; or in one made for memory whose conversion stays inside the warp. `best_access` takes the
cheapest. Costs are those of `access_cost` and `conversion_cost`, a warp's cycles.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from tilewright.ir.comm_ops import Put, ReducePut
from tilewright.ir.core import Operation, Value
from tilewright.ir.layout import LinearLayout, access_cost, blocked, conversion_cost, near_coalesced, plan_conversion
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Load, Store
from tilewright.ir.types import TileType, ViewType
from tilewright.passes.copy_layouts import copy_layouts

MAX_VECTOR_BYTES = 16
#: a shuffle and what combines its result; two barriers around a round trip through shared memory
SHUFFLE_CYCLES, MEETING_CYCLES = 3, 100


@dataclass(frozen=True)
class Access:
    """A load or store of threads: the tile's value and how its tensor lies in memory."""

    op: Load | Store | Put | ReducePut
    value: Value
    #: axis of stride 1
    contiguous: int | None
    #: widest access that the tensor's alignment allows
    vector_bytes: int
    warps: int
    target: Target

    @staticmethod
    def of(op: Operation, warps: int, target: Target) -> Access | None:
        if not isinstance(op, Load | Store | Put | ReducePut):
            return None
        view = op.view.type
        assert isinstance(view, ViewType)
        value = op.result if isinstance(op, Load) else op.value
        bytes_ = view.dtype.bytes
        steps = [s * bytes_ for s in view.strides if s is not None and s != 1]
        return Access(op, value, view.contiguous_axis, gcd(MAX_VECTOR_BYTES, view.align, *steps), warps, target)

    @property
    def tile(self) -> TileType:
        assert isinstance(self.value.type, TileType)
        return self.value.type

    @property
    def bits(self) -> int:
        return max(8, self.tile.dtype.bits)

    def coalesced(self, warps_apart: bool = False) -> LinearLayout:
        """The layout made for this access alone; ``warps_apart``: where each warp has rows of its own, if possible."""
        rank, fastest = self.tile.rank, self.contiguous
        fastest = rank - 1 if fastest is None else fastest
        order = (fastest, *(a for a in reversed(range(rank)) if a != fastest))
        bits, size = self.tile.dtype.bits, self.target.warp_size
        return blocked(self.tile.shape, bits, self.warps, size, order, warps_apart=warps_apart)

    def turning(self) -> list[LinearLayout]:
        """Layouts in which each thread holds a block with vectors along both axes of a matrix."""
        if self.tile.rank != 2 or self.contiguous is None:
            return []
        across = 1 - self.contiguous
        layouts = copy_layouts(self.tile.shape, self.bits, self.contiguous, across, self.warps, self.target.warp_size)
        return [layouts.load, layouts.store]

    def cost(self, layout: LinearLayout) -> float:
        """Of the access in a layout, without conversions. Renaming registers is free: the best order counts."""
        ordered = layout if self.contiguous is None else vectors_first(layout, self.contiguous)
        return access_cost(ordered, self.contiguous, self.bits, self.vector_bytes)

    def ideal(self) -> float:
        return self.cost(self.coalesced())


def reduction_cost(layout: LinearLayout, axis: int) -> float:
    """Cycles of a warp to combine what threads hold along an axis: shuffles, and a meeting where warps do, too."""
    lanes, warps = (sum(1 for vector in layout.basis(dim) if vector[axis]) for dim in ("lane", "warp"))
    results = layout.slice_dim(axis).num_registers
    return results * lanes * SHUFFLE_CYCLES + (MEETING_CYCLES + results * 2**warps if warps else 0)


def vectors_first(layout: LinearLayout, axis: int) -> LinearLayout:
    """The same elements in the same threads, registers along ``axis`` first."""
    registers = layout.basis("register")
    along = [
        v for bit in range(layout.shape[axis].bit_length() - 1) if (v := _unit(layout.rank, axis, bit)) in registers
    ]
    if list(registers[: len(along)]) == along or len(set(registers)) != len(registers):
        return layout
    bases = {"register": [*along, *(v for v in registers if v not in along)]}
    bases |= {dim: list(layout.basis(dim)) for dim in ("lane", "warp")}
    return LinearLayout.make(bases, layout.shape, layout.repeat, layout.repeat_order)


def _unit(rank: int, axis: int, bit: int) -> tuple[int, ...]:
    return tuple(1 << bit if a == axis else 0 for a in range(rank))


def best_access(access: Access, held: LinearLayout, borrow: int) -> tuple[float, LinearLayout]:
    """(cycles, layout of the access) for a tile whose class has layout ``held``.

    ``borrow``: bytes of scratch memory that a conversion may take; with 0 only those inside warps count.
    """
    best = access_cost(held, access.contiguous, access.bits, access.vector_bytes), held
    if best[0] <= access.ideal():
        return best
    options = [access.coalesced()]
    if access.contiguous is not None:
        options.insert(0, vectors_first(held, access.contiguous))
        near = near_coalesced(held, access.contiguous, access.bits)
        options += [near] if near is not None else []
    for option in options:
        pair = (option, held) if isinstance(access.op, Load) else (held, option)
        if plan_conversion(*pair, access.bits, access.target.banks).scratch_bytes > borrow:
            continue
        cost = access.cost(option) + conversion_cost(*pair, access.bits, access.target.banks)
        if cost < best[0]:
            best = cost, option
    return best
