"""Operations that find elements of a view by integer tiles: gather, scatter and atomic updates (``tile.*``).

They share one rule of addresses. ``axes`` are the dimensions of the view that ``indices`` (one integer tile for
each, all of the operation's tile shape) give coordinates for, element by element; along the other dimensions the
operation covers the tile at ``index`` (one scalar for each of them in order, counted in tiles) as `tile.load` does::

    place(c)[axes[i]] = indices[i][c]
    place(c)[d]       = index[...] * shape[d] + c[d]          for every other dimension d

So the tile has the view's rank, unless ``axes`` names every dimension: then it may have any. An element is outside
the view where any coordinate is negative or not below the size: negative indices do not count from the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.core import (
    Effect,
    Operation,
    Value,
    attribute,
    named_operands,
    operand,
    operands,
    operation,
    optional,
)
from tilewright.ir.tile_ops import tile_of, view_of
from tilewright.ir.types import DType, i32, i64

ATOMIC = ("add", "max", "min", "and", "or", "xor", "exchange", "cas")
#: element types that each kind of atomic update exists for
ATOMIC_DTYPES: dict[str, tuple[str, ...]] = {
    "add": ("i32", "i64", "f16", "bf16", "f32", "f64"),
    **dict.fromkeys(("max", "min", "exchange", "cas"), ("i32", "i64", "f32", "f64")),
    **dict.fromkeys(("and", "or", "xor"), ("i32", "i64")),
}
INDEX_DTYPES = (i32, i64)
#: what an atomic update orders beside its own place: nothing, or all accesses of the program before and after it
ORDERS = ("relaxed", "acq_rel")


@operation("tile.gather", effect=Effect.READ)
class Gather(Operation):
    """Read the elements at the coordinates ``indices`` along ``axes``; those outside the view read as ``pad``."""

    view: Value = operand()
    index: list[Value] = operands()
    indices: list[Value] = operands()
    after: list[Value] = named_operands()
    axes: tuple[int, ...] = attribute()
    pad: float = attribute(default=0)

    def verify(self) -> None:
        _verify_places(self, self.view, self.index, self.indices, self.axes, self.result)


@operation("tile.scatter", effect=Effect.WRITE)
class Scatter(Operation):
    """Write elements to the coordinates ``indices`` along ``axes``, dropping those outside the view.

    Of several elements for one place any one is written.
    """

    view: Value = operand()
    index: list[Value] = operands()
    indices: list[Value] = operands()
    value: Value = operand()
    axes: tuple[int, ...] = attribute()

    def verify(self) -> None:
        _verify_places(self, self.view, self.index, self.indices, self.axes, self.value)


@operation("tile.atomic", effect=Effect.READ | Effect.WRITE, family=ATOMIC)
class Atomic(Operation):
    """Update elements as `tile.scatter` places them, each atomically (device scope); gives the old values.

    Old values of elements outside are 0. ``exchange`` writes ``value``; ``cas`` writes it where the old bits are
    those of ``expected``. The order of updates is not defined. Float ``max`` and ``min`` let a NaN in ``value`` win.
    ``order`` "acq_rel": all of the program's writes before are visible to programs whose ordered update of the place
    comes later, and its reads behind see what such earlier ones wrote.
    ``scratch`` (bytes, set by the shared-memory plan) is where threads find old values that another thread got.
    """

    fn: str = attribute()
    view: Value = operand()
    index: list[Value] = operands()
    indices: list[Value] = operands()
    value: Value = operand()
    expected: Value | None = optional()
    axes: tuple[int, ...] = attribute(default=())
    order: str = attribute(default="relaxed")
    scratch: int | None = attribute(default=None)

    def verify(self) -> None:
        _verify_places(self, self.view, self.index, self.indices, self.axes, self.value)
        self.require(self.order in ORDERS, f"order is one of {', '.join(ORDERS)}")
        self.require(self.result.type == self.value.type, "gives the old values, a tile like the new ones")
        dtype = tile_of(self.value).dtype
        self.require(dtype.name in ATOMIC_DTYPES[self.fn], f"does not exist for {dtype}")
        self.require((self.expected is not None) == (self.fn == "cas"), "takes 'expected' for cas alone")
        if self.expected is not None:
            self.require(self.expected.type == self.value.type, "'expected' has the value's type")


def free_axes(rank: int, axes: Sequence[int]) -> list[int]:
    """The dimensions of a view that no index tile stands for."""
    return [axis for axis in range(rank) if axis not in axes]


def _verify_places(
    op: Operation, view: Value, index: Sequence[Value], indices: Sequence[Value], axes: Sequence[int], tile: Value
) -> None:
    type_, shape = view_of(view), tile_of(tile)
    op.require(len(set(axes)) == len(axes) and all(0 <= a < type_.rank for a in axes), f"axes {tuple(axes)} are wrong")
    op.require(len(indices) == len(axes), f"{len(indices)} index tiles for {len(axes)} axes")
    free = free_axes(type_.rank, axes)
    op.require(len(index) == len(free), f"{len(index)} tile indices for {len(free)} other dimensions")
    op.require(not free or shape.rank == type_.rank, "view and tile have one rank")
    op.require(shape.dtype == type_.dtype, f"a tile of {shape.dtype} for a view of {type_.dtype}")
    for value in indices:
        op.require(tile_of(value).dtype in INDEX_DTYPES, f"indices are i32 or i64, not {tile_of(value).dtype}")
        op.require(tile_of(value).shape == shape.shape, "index tiles have the tile's shape")


def supports_atomic(fn: str, dtype: DType) -> bool:
    """Whether an atomic update exists for an element type."""
    return dtype.name in ATOMIC_DTYPES[fn]
