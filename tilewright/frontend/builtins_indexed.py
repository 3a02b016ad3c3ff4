"""Builtins that take integer tiles as indices: gather, scatter and the atomic updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.frontend import language as tw
from tilewright.frontend.builtins import (
    IMPLEMENTATIONS,
    Implementation,
    implements,
    require_own_rank,
    require_pad,
    require_tokens,
)
from tilewright.frontend.emitter import Emitter, Shape, broadcast_shapes, require_tile
from tilewright.frontend.errors import CompileError
from tilewright.frontend.methods import require_shape
from tilewright.frontend.subscripts import only_element, scalar_index
from tilewright.frontend.values import (
    describe,
    dtype_name,
    dtype_of,
    is_number,
    is_scalar,
    is_tile,
    is_view,
    known_int,
    tile_shape,
    view_type,
)
from tilewright.ir.core import Value
from tilewright.ir.indexed_ops import ATOMIC_DTYPES, ORDERS, free_axes, supports_atomic
from tilewright.ir.types import DTYPES, DType, i32, i64


@dataclass
class Places:
    """Where elements lie: coordinates along ``axes`` (not yet broadcast), tile indices of the other axes."""

    name: str
    view: Value
    axes: tuple[int, ...]
    items: list[Any]
    tile: list[Value]
    #: an index of rank one stands for whole rows
    takes: bool

    @property
    def rank(self) -> int:
        return view_type(self.view).rank

    @property
    def free(self) -> list[int]:
        return free_axes(self.rank, self.axes)

    @property
    def shape(self) -> Shape:
        """The common shape of the index tiles."""
        return broadcast_shapes(f"tw.{self.name}", *(tile_shape(item) for item in self.items))

    def indices(self, emit: Emitter, shape: Shape) -> list[Value]:
        """The index tiles, broadcast."""
        return [emit.broadcast(emit.materialise(item), shape) for item in self.items]


def _places(emit: Emitter, name: str, view: Any, index: Any, axis: Any, tile: Any) -> Places:
    if not is_view(view):
        hint = "tiles live in registers: use tw.where, slices or a tw.dot" if is_tile(view) else ""
        raise CompileError(f"tw.{name} needs a tensor, got {describe(view)}", hint=hint, argument="view")
    rank, index = view_type(view).rank, emit.plain(index)
    items = list(index) if isinstance(index, tuple) else [index]
    axes = _axes(axis, len(items), rank)
    places = Places(name, view, axes, [_coordinates(emit, item) for item in items], [], False)
    places.tile = _tile_index(emit, places, tile)
    if not any(is_tile(item) for item in places.items):
        hint = "tw.load and tw.store take a tile index; gather and scatter an integer tile such as tw.arange(n)"
        raise CompileError(f"tw.{name} needs an integer tile, got {describe(index)}", hint=hint, argument="index")
    _place_rows(emit, places)
    return places


def _axes(axis: Any, count: int, rank: int) -> tuple[int, ...]:
    given = tuple(range(count)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(known_int(a, "the axis", "axis") for a in given)
    for a in axes:
        if not -rank <= a < rank:
            message = f"axis {a} is out of range for a tensor of rank {rank}"
            raise CompileError(
                message, hint=f"axes are {-rank}..{rank - 1}", argument="axis" if axis is not None else "index"
            )
    normal = tuple(a % rank for a in axes)
    if len(normal) != count or len(set(normal)) != count:
        message = f"{count} index tiles for the axes {axes}"
        raise CompileError(message, hint="give one integer tile for each axis, and each axis once", argument="axis")
    return normal


def _coordinates(emit: Emitter, item: Any) -> Any:
    """An index tile or scalar as i32 or i64; a number as it is."""
    if isinstance(item, int) and not isinstance(item, bool):
        return item
    if isinstance(item, Value) and not is_view(item) and dtype_of(item).is_int:
        return item if dtype_of(item) in (i32, i64) else emit.cast(item, i32)
    hint = "convert it: index.to(tw.int32)" if is_tile(item) else ""
    raise CompileError(f"an index must be a tile of integers, got {describe(item)}", hint=hint, argument="index")


def _tile_index(emit: Emitter, places: Places, tile: Any) -> list[Value]:
    """The tile indices of the axes without an index tile."""
    tile = emit.plain(tile)
    if tile is None:
        return [emit.constant(0, i32) for _ in places.free]
    items = tile if isinstance(tile, tuple) else (tile,)
    if len(items) != places.rank or any(items[a] != 0 or not is_number(items[a]) for a in places.axes):
        raise CompileError(
            f"tw.{places.name}: the tile index has {len(items)} entries for a tensor of rank {places.rank}"
            if len(items) != places.rank
            else f"tw.{places.name}: the tile index along axis {places.axes[0]} must be 0",
            hint="one entry for each axis; along the axis of the index tile it is 0: add to the index instead",
            argument="tile",
        )
    return [scalar_index(emit, items[a], "a tile index", "tile") for a in places.free]


def _place_rows(emit: Emitter, places: Places) -> None:
    """Give the index tiles the view's rank where other axes remain."""
    if not places.free:
        return
    tiles = [item for item in places.items if is_tile(item)]
    if len(places.axes) == 1 and len(tile_shape(tiles[0])) == 1:
        (axis,) = places.axes
        value = tiles[0]
        for position in range(places.rank):
            if position != axis:
                value = emit.builder.expand_dims(value, position)
        places.items, places.takes = [value], True
        return
    for item in tiles:
        if len(tile_shape(item)) != places.rank:
            raise CompileError(
                f"tw.{places.name}: an index of shape {tile_shape(item)} for a tensor of rank {places.rank}",
                hint="an index has rank one or the tensor's rank; x[:, None] adds an axis",
                argument="index",
            )


def _check_broadcast(places: Places, shape: Shape, argument: str) -> None:
    fits = len(places.shape) <= len(shape) and all(
        n in (1, size) for n, size in zip(reversed(places.shape), reversed(shape), strict=False)
    )
    if not fits:
        message = f"tw.{places.name}: an index of shape {places.shape} does not broadcast to {shape}"
        raise CompileError(message, hint="sizes are equal, or 1 in the index", argument=argument)


@implements(tw.gather)
def gather(emit: Emitter, view: Any, index: Any, axis: Any, tile: Any, shape: Any, pad: Any, after: Any) -> Value:
    places = _places(emit, "gather", view, index, axis, tile)
    result = _gathered_shape(places) if shape is None else require_shape(emit, shape)
    if places.free and len(result) != places.rank:
        message = f"tw.gather: a result of rank {len(result)} from a tensor of rank {places.rank}"
        raise CompileError(message, hint="give one size per dimension", argument="shape")
    _check_broadcast(places, result, "shape")
    value = require_pad(pad, dtype_of(view))
    tokens = require_tokens(after, "flag")
    return emit.builder.gather(view, places.tile, places.indices(emit, result), places.axes, value, tokens)


def _gathered_shape(places: Places) -> Shape:
    if not places.takes:
        return places.shape
    sizes = [
        places.shape[axis] if axis in places.axes else size for axis, size in enumerate(view_type(places.view).shape)
    ]
    if None in sizes:
        raise CompileError(
            f"tw.gather: the size of axis {sizes.index(None)} is known at run time only",
            hint="give the result's shape: shape=(n, 64), and tile=(0, j) for the tile along the other axes",
            argument="index",
        )
    return tuple(size for size in sizes if size is not None)


def _update(emit: Emitter, places: Places, value: Any, what: str, argument: str) -> tuple[Value, Shape]:
    """The new values, of the tensor's dtype, and the shape that they and the index broadcast to."""
    dtype = dtype_of(places.view)
    if not is_scalar(value):
        value = require_tile(value, f"the {argument} of tw.{places.name}", argument)
    if isinstance(value, Value) and dtype_of(value) != dtype:
        raise CompileError(
            f"cannot {what} a {dtype_of(value)} tile to a tensor of {dtype}",
            hint=f"convert it to the tensor's dtype: .to({dtype_name(dtype)})",
            argument=argument,
        )
    shape = broadcast_shapes(f"tw.{places.name}", places.shape, tile_shape(value))
    if places.free and len(shape) != places.rank:
        message = f"tw.{places.name}: a tile of shape {tile_shape(value)} for a tensor of rank {places.rank}"
        raise CompileError(message, hint="the value has the tensor's rank", argument=argument)
    if places.takes and not tile_shape(value):
        hint = "give it as a tile: tw.full(shape, value)"
        raise CompileError(f"tw.{places.name}: how far a scalar spreads is not known", hint=hint, argument=argument)
    return value, shape


@implements(tw.scatter)
def scatter(emit: Emitter, view: Any, index: Any, value: Any, axis: Any, tile: Any) -> None:
    places = _places(emit, "scatter", view, index, axis, tile)
    require_own_rank(view, "scatter")
    value, shape = _update(emit, places, value, "store", "value")
    tile_value = emit.conform(value, dtype_of(view), shape)
    emit.builder.scatter(view, places.tile, places.indices(emit, shape), tile_value, places.axes)


# --- atomic updates -------------------------------------------------------------------------------


def _has_tile(index: Any) -> bool:
    return any(is_tile(item) for item in index) if isinstance(index, tuple) else is_tile(index)


def _atomic(
    emit: Emitter, fn: str, view: Any, index: Any, value: Any, axis: Any, tile: Any, order: Any, expected: Any = None
) -> Value:
    name, index = f"atomic_{fn}", emit.plain(index)
    if order not in ORDERS:
        known = ", ".join(repr(o) for o in ORDERS)
        raise CompileError(f"unknown order {order!r}", hint=f"one of {known}", argument="order")
    if is_view(view):
        require_own_rank(view, name)
    if is_view(view) and not supports_atomic(fn, dtype_of(view)):
        known = ", ".join(dtype_name(DTYPES[d]) for d in ATOMIC_DTYPES[fn])
        message = f"tw.{name} does not exist for {dtype_name(dtype_of(view))}"
        raise CompileError(message, hint=f"it exists for {known}", argument="view")
    if not _has_tile(index):
        return _atomic_tile(emit, fn, view, index, value, axis, tile, order, expected)
    places = _places(emit, name, view, index, axis, tile)
    value, shape = _update(emit, places, value, name.replace("_", " "), "value")
    tiles = [emit.conform(value, dtype_of(view), shape)]
    if fn == "cas":
        other, wider = _update(emit, places, expected, "compare", "expected")
        shape = broadcast_shapes(f"tw.{name}", shape, wider)
        tiles = [emit.conform(v, dtype_of(view), shape) for v in (value, other)]
    indices = places.indices(emit, shape)
    return emit.builder.atomic(fn, view, places.tile, indices, tiles[0], places.axes, (*tiles, None)[1], order)


def _atomic_tile(
    emit: Emitter, fn: str, view: Any, index: Any, value: Any, axis: Any, tile: Any, order: str, expected: Any
) -> Value:
    """At a tile index, as a store."""
    if not is_view(view):
        raise CompileError(f"tw.atomic_{fn} needs a tensor, got {describe(view)}", argument="view")
    for given, argument in ((axis, "axis"), (tile, "tile")):
        if given is not None:
            raise CompileError(f"{argument}= goes with integer tiles, not with a tile index", argument=argument)
    items, rank = index if isinstance(index, tuple) else (index,), view_type(view).rank
    if len(items) != rank:
        hint = "give one tile index per dimension, or an integer tile"
        message = f"tw.atomic_{fn}: {len(items)} indices for a tensor of rank {rank}"
        raise CompileError(message, hint=hint, argument="index")
    indices = [scalar_index(emit, item, "a tile index", "index") for item in items]
    values = [value] if fn != "cas" else [value, expected]
    if all(is_scalar(v) for v in values):
        tiles = [_operand(emit, v, dtype_of(view), (1,) * rank) for v in values]
        return only_element(emit, emit.builder.atomic(fn, view, indices, [], tiles[0], (), (*tiles, None)[1], order))
    shape = broadcast_shapes(f"tw.atomic_{fn}", *(tile_shape(v) for v in values))
    if len(shape) != rank:
        message = f"tw.atomic_{fn}: a tile of shape {shape} to a tensor of rank {rank}"
        raise CompileError(message, hint="reshape the tile, or drop leading dimensions: t[b]", argument="value")
    tiles = [_operand(emit, v, dtype_of(view), shape) for v in values]
    return emit.builder.atomic(fn, view, indices, [], tiles[0], (), (*tiles, None)[1], order)


def _operand(emit: Emitter, value: Any, dtype: DType, shape: Shape) -> Value:
    if isinstance(value, Value) and (is_view(value) or dtype_of(value) != dtype):
        hint = f"convert it to the tensor's dtype: .to({dtype_name(dtype)})"
        raise CompileError(
            f"an atomic update of a tensor of {dtype} takes {dtype}, got {describe(value)}", hint=hint, argument="value"
        )
    return emit.conform(value, dtype, shape)


def _plain_atomic(fn: str) -> Implementation:
    def implementation(emit: Emitter, view: Any, index: Any, value: Any, axis: Any, tile: Any, order: Any) -> Value:
        return _atomic(emit, fn, view, index, value, axis, tile, order)

    return implementation


IMPLEMENTATIONS.update(
    {tw.BUILTINS[f"atomic_{fn}"]: _plain_atomic(fn) for fn in ("add", "max", "min", "and", "or", "xor", "exchange")}
)


@implements(tw.atomic_cas)
def atomic_cas(
    emit: Emitter, view: Any, index: Any, expected: Any, value: Any, axis: Any, tile: Any, order: Any
) -> Value:
    return _atomic(emit, "cas", view, index, value, axis, tile, order, expected)


__all__ = ["gather", "scatter"]
