"""``x[...]`` on tiles, tensors, tuples and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.frontend.emitter import Emitter
from tilewright.frontend.errors import CompileError
from tilewright.frontend.values import ViewShape, describe, dtype_of, is_tile, is_view, known_int, tile_shape, view_type
from tilewright.ir.core import Value
from tilewright.ir.types import ScalarType, i8, i16, i32


@dataclass(frozen=True)
class Slice:
    """``a:b:c`` with evaluated bounds."""

    start: Any
    stop: Any
    step: Any

    @property
    def everything(self) -> bool:
        return self.start is None and self.stop is None and self.step in (None, 1)


def subscript(emit: Emitter, value: Any, key: Any) -> Any:
    """``value[key]``; ``key`` is an index, a `Slice`, None, Ellipsis or a tuple of these."""
    keys = key if isinstance(key, tuple) else (key,)
    if is_tile(value):
        return _tile(emit, value, keys)
    if is_view(value):
        return _view(emit, value, keys)
    if isinstance(value, ViewShape):
        return _shape_item(emit, value, key)
    if isinstance(value, tuple | str):
        return _tuple(value, key)
    hint = "tw.sum and its kin over every axis give a scalar" if isinstance(value, Value) else ""
    raise CompileError(f"{describe(value)} cannot be indexed", hint=hint)


def _shape_item(emit: Emitter, shape: ViewShape, key: Any) -> Any:
    if isinstance(key, Slice):
        return _tuple(emit.plain(shape), key)
    rank = len(shape.sizes)
    axis = known_int(key, "the axis of a shape")
    if not -rank <= axis < rank:
        raise CompileError(f"axis {axis} is out of range for a tensor of rank {rank}")
    return emit.view_size(shape, axis % rank)


def _tuple(value: Any, key: Any) -> Any:
    if isinstance(key, Slice):
        return value[slice(key.start, key.stop, key.step)]
    position = known_int(key, "the index of a tuple")
    if not -len(value) <= position < len(value):
        raise CompileError(f"index {position} is out of range for a tuple of {len(value)}")
    return value[position]


# --- tiles ------------------------------------------------------------------------------------------


def _tile(emit: Emitter, tile: Value, keys: tuple[Any, ...]) -> Value:
    """Slices and integers cut (`tile.extract`), None adds an axis."""
    shape = tile_shape(tile)
    keys = _without_ellipsis(keys, len(shape))
    used = sum(k is not None for k in keys)
    if used > len(shape):
        raise CompileError(f"{used} indices for a tile of rank {len(shape)}", hint="None adds an axis: x[:, None]")
    keys += (Slice(None, None, None),) * (len(shape) - used)
    offsets, sizes = _cut([k for k in keys if k is not None], shape)
    if tuple(sizes) != shape:
        tile = emit.builder.extract(tile, offsets, sizes)
    return _reform(emit, tile, keys)


def _without_ellipsis(keys: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    if Ellipsis not in keys:
        return keys
    position = keys.index(Ellipsis)
    missing = rank - sum(k is not None and k is not Ellipsis for k in keys)
    return keys[:position] + (Slice(None, None, None),) * missing + keys[position + 1 :]


def _cut(keys: list[Any], shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Offset and size along each axis."""
    offsets, sizes = [], []
    for key, size in zip(keys, shape, strict=True):
        if isinstance(key, Slice):
            offset, length = _slice_bounds(key, size)
        else:
            position, length = known_int(key, "the index of a tile"), 1
            if not -size <= position < size:
                raise CompileError(f"index {position} is out of range for an axis of size {size}")
            offset = position % size
        offsets.append(offset)
        sizes.append(length)
    return offsets, sizes


def _slice_bounds(key: Slice, size: int) -> tuple[int, int]:
    start = 0 if key.start is None else known_int(key.start, "a slice bound of a tile")
    stop = size if key.stop is None else known_int(key.stop, "a slice bound of a tile")
    if key.step not in (None, 1):
        raise CompileError("tiles are sliced with step 1 only", hint="reshape, then slice: x.reshape(n // 2, 2)[:, 0]")
    start, stop = (b + size if b < 0 else b for b in (start, stop))
    if not 0 <= start < stop <= size:
        raise CompileError(f"slice {start}:{stop} is empty or leaves an axis of size {size}")
    return start, stop - start


def _reform(emit: Emitter, tile: Value, keys: tuple[Any, ...]) -> Value:
    """Drop the axes that integers index, add those that None asks for."""
    axes = [k for k in keys if k is not None]
    if any(not isinstance(k, Slice) for k in axes):
        shape = tuple(n for n, k in zip(tile_shape(tile), axes, strict=True) if isinstance(k, Slice))
        if not shape:
            return only_element(emit, tile)
        tile = emit.builder.reshape(tile, shape)
    left = [k for k in keys if k is None or isinstance(k, Slice)]
    for axis, key in enumerate(left):
        if key is None:
            tile = emit.builder.expand_dims(tile, axis)
    return tile


def only_element(emit: Emitter, tile: Value) -> Value:
    """The element of a tile of one, as a scalar."""
    while is_tile(tile):
        tile = emit.builder.reduce("max", tile, len(tile_shape(tile)) - 1)
    return tile


# --- tensors ----------------------------------------------------------------------------------------


def _view(emit: Emitter, view: Value, keys: tuple[Any, ...]) -> Value:
    """``t[b, h]`` fixes the leading dimensions."""
    type_ = view_type(view)
    keys = _without_ellipsis(keys, type_.rank)
    while keys and isinstance(keys[-1], Slice) and keys[-1].everything:
        keys = keys[:-1]
    if any(isinstance(k, Slice) or k is None for k in keys):
        raise CompileError(
            "a tensor is indexed by its leading dimensions only",
            hint="t[b, h] drops leading dimensions, t.offset(row, col) moves the origin, tw.load reads a tile",
        )
    is_flag = type_.symmetric and type_.dtype == i32 and len(keys) == type_.rank
    if len(keys) >= type_.rank and not is_flag:
        raise CompileError(
            f"{len(keys)} indices leave nothing of a tensor of rank {type_.rank}",
            hint="tw.load(t, index) reads an element, tw.load(t, index, shape) a tile",
        )
    for key, size in zip(keys, type_.shape, strict=False):
        if isinstance(key, int) and (key < 0 or (size is not None and key >= size)):
            raise CompileError(f"index {key} is out of range for a dimension of size {'?' if size is None else size}")
    return emit.builder.subview(view, [scalar_index(emit, k, "an index") for k in keys]) if keys else view


def scalar_index(emit: Emitter, value: Any, what: str, argument: str | None = None) -> Value:
    """An index as an i32 scalar."""
    if isinstance(value, int) and not isinstance(value, bool):
        return emit.constant(value, i32)
    if isinstance(value, Value) and isinstance(value.type, ScalarType):
        dtype = dtype_of(value)
        if dtype in (i8, i16, i32):
            return emit.cast(value, i32)
        hint = "convert it: x.to(tw.int32)"
        raise CompileError(f"{what} must be an int32 scalar, got {describe(value)}", hint=hint, argument=argument)
    hint = "use '//' for whole numbers" if isinstance(value, float) else ""
    raise CompileError(f"{what} must be an integer scalar, got {describe(value)}", hint=hint, argument=argument)


__all__ = ["Slice", "only_element", "scalar_index", "subscript"]
