"""Builtins made of other operations, and those that join or run along a tile: argmax, cumsum, cat."""

from __future__ import annotations

from math import prod
from typing import Any

from tilewright.frontend import language as tw
from tilewright.frontend.builtins import IMPLEMENTATIONS, Implementation, implements, reduce_axes, reduction_dtypes
from tilewright.frontend.emitter import Emitter, require_tile
from tilewright.frontend.errors import CompileError
from tilewright.frontend.promotion import arithmetic_dtype
from tilewright.frontend.values import describe, dtype_name, dtype_of, is_tile, tile_shape
from tilewright.ir.core import Value
from tilewright.ir.types import TileType, i32


def _arg(fn: str) -> Implementation:
    """The least position whose element equals the extremum, which is exact; a NaN equals itself here."""
    name = f"arg{fn}"

    def implementation(emit: Emitter, x: Any, axis: Any, keepdims: Any) -> Value:
        tile = require_tile(x, f"the operand of tw.{name}", "x")
        tile = emit.cast(tile, arithmetic_dtype(dtype_of(tile)))
        if not isinstance(keepdims, bool):
            raise CompileError(f"keepdims must be True or False, got {describe(keepdims)}", argument="keepdims")
        shape = tile_shape(tile)
        axes = reduce_axes(name, axis, len(shape))
        if axis is None:
            if len(shape) > 1:
                tile = emit.builder.reshape(tile, (prod(shape),))
            axes = [0]
        if len(axes) != 1:
            raise CompileError(f"tw.{name} takes one axis or None", argument="axis")
        result = _first_extremum(emit, fn, tile, axes[0])
        if not keepdims:
            return result
        if not is_tile(result):
            return emit.builder.splat(result, (1,) * len(shape))
        return emit.builder.expand_dims(result, axes[0])

    return implementation


def _first_extremum(emit: Emitter, fn: str, tile: Value, axis: int) -> Value:
    b, shape = emit.builder, tile_shape(tile)
    best = b.reduce(fn, tile, axis)
    if is_tile(best):
        best = b.expand_dims(best, axis)
    chosen = b.compare("eq", tile, emit.broadcast(best, shape))
    if dtype_of(tile).is_float:
        chosen = b.binary("or", chosen, b.compare("ne", tile, tile))
    position = b.iota(shape[axis])
    for other in range(len(shape)):
        if other != axis:
            position = b.expand_dims(position, other)
    last = b.constant(shape[axis] - 1, TileType(shape, i32))
    return b.reduce("min", b.select(chosen, b.broadcast(position, shape), last), axis)


IMPLEMENTATIONS.update({tw.argmax: _arg("max"), tw.argmin: _arg("min")})


@implements(tw.cumsum)
def cumsum(emit: Emitter, x: Any, axis: Any) -> Value:
    tile = require_tile(x, "the operand of tw.cumsum", "x")
    axes = reduce_axes("cumsum", axis, len(tile_shape(tile)))
    if len(axes) != 1:
        raise CompileError("tw.cumsum takes one axis", hint="reshape the tile to one dimension first", argument="axis")
    inner, outer = reduction_dtypes("sum", dtype_of(tile))
    return emit.cast(emit.builder.scan("sum", emit.cast(tile, inner), axes[0]), outer)


@implements(tw.cat)
def cat(emit: Emitter, tiles: Any, axis: Any) -> Value:
    if not isinstance(tiles, tuple) or not tiles:
        message = f"tw.cat takes a tuple or list of tiles, got {describe(tiles)}"
        raise CompileError(message, hint="write tw.cat([a, b], axis=0)", argument="tiles")
    parts = [require_tile(part, "a part of tw.cat", "tiles") for part in tiles]
    shape, dtype = tile_shape(parts[0]), dtype_of(parts[0])
    (position,) = reduce_axes("cat", axis, len(shape)) if isinstance(axis, int) else (0,)
    if not isinstance(axis, int):
        raise CompileError(f"the axis must be a compile-time integer, got {describe(axis)}", argument="axis")
    for part in parts:
        if dtype_of(part) != dtype:
            message = f"tw.cat: tiles of different dtypes, {dtype} and {dtype_of(part)}"
            raise CompileError(message, hint=f"convert one: .to({dtype_name(dtype)})", argument="tiles")
        other = tile_shape(part)
        if len(other) != len(shape) or any(
            a != b for n, (a, b) in enumerate(zip(shape, other, strict=True)) if n != position
        ):
            message = f"tw.cat: shapes {shape} and {other} differ along an axis other than {position}"
            raise CompileError(message, hint="only the sizes along the axis may differ", argument="tiles")
    return parts[0] if len(parts) == 1 else emit.builder.cat(parts, position)


__all__ = ["cat", "cumsum"]
