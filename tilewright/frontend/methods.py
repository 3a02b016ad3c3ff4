"""Attributes and methods of tiles, scalars and tensors."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from tilewright.frontend import language as tw
from tilewright.frontend.emitter import Emitter, Shape, require_size
from tilewright.frontend.errors import CompileError, suggestion
from tilewright.frontend.markers import as_dtype
from tilewright.frontend.subscripts import scalar_index
from tilewright.frontend.values import (
    BoundMethod,
    ViewShape,
    describe,
    dtype_of,
    is_number,
    is_tile,
    is_view,
    known_int,
    tile_shape,
    view_type,
)
from tilewright.ir.core import Value
from tilewright.ir.types import DType, TileType, ViewType


def attribute(emit: Emitter, value: Value, name: str) -> Any:
    """``value.name``: a property, or a method to be called."""
    kind = "tile" if is_tile(value) else "tensor" if is_view(value) else "scalar"
    if name in PROPERTIES[kind]:
        return PROPERTIES[kind][name](emit, value)
    if name in METHODS[kind]:
        return BoundMethod(value, name, METHODS[kind][name])
    known = [*PROPERTIES[kind], *METHODS[kind]]
    hint = suggestion(name, known) or f"a {kind} has " + ", ".join(f".{n}" for n in known)
    if name in tw.BUILTINS:
        hint = f"it is a function: tw.{name}(...)"
    raise CompileError(f"a {kind} has no attribute '{name}'", hint=hint)


# --- arguments ------------------------------------------------------------------------------------


def require_dtype(value: Any, argument: str | None = None) -> DType:
    """A dtype, or its name."""
    if isinstance(value, DType):
        return value
    if isinstance(value, str):
        try:
            return as_dtype(value)
        except ValueError as error:
            raise CompileError(str(error), argument=argument) from None
    raise CompileError(
        f"expected a dtype, got {describe(value)}", hint="use tw.float32, tw.int32, ... or t.dtype", argument=argument
    )


def require_shape(emit: Emitter, value: Any, argument: str | None = "shape") -> Shape:
    """A tile shape: a positive compile-time integer, or a tuple of them."""
    items: tuple[Any, ...] = (
        tuple(value.sizes) if isinstance(value, ViewShape) else value if isinstance(value, tuple) else (value,)
    )
    for position, item in enumerate(items):
        if isinstance(item, int) and not isinstance(item, bool) and item > 0:
            continue
        if item is None or isinstance(item, Value):
            got = "a run-time value"
            hint = "make it a tw.constexpr parameter; parts of a tile outside the tensor read as the pad value"
        else:
            got, hint = describe(item), "sizes are positive integers; '//' divides integers, '/' gives a float"
        message = f"tile shapes are compile-time constants: dimension {position} is {got}"
        raise CompileError(message, hint=hint, argument=argument)
    if not items:
        raise CompileError("a tile has at least one dimension", hint="use a scalar", argument=argument)
    return require_size(items, argument)


def require_permutation(items: tuple[Any, ...], rank: int) -> tuple[int, ...]:
    axes = items[0] if len(items) == 1 and isinstance(items[0], tuple) else items
    perm = tuple(known_int(a, "an axis") for a in axes)
    normal = tuple(a + rank if a < 0 else a for a in perm)
    if sorted(normal) != list(range(rank)):
        raise CompileError(f"{perm} is not a permutation of the {rank} axes", hint=f"name each of 0..{rank - 1} once")
    return normal


# --- tiles ------------------------------------------------------------------------------------------


def _transposed(emit: Emitter, tile: Value) -> Value:
    rank = len(tile_shape(tile))
    if rank != 2:
        raise CompileError(f".T needs rank 2, the tile has rank {rank}", hint="use .permute(...)")
    return emit.builder.transpose(tile, (1, 0))


def _permute(emit: Emitter, tile: Value, *axes: Any) -> Value:
    return emit.builder.transpose(tile, require_permutation(axes, len(tile_shape(tile))))


def _reshape(emit: Emitter, tile: Value, *sizes: Any) -> Value:
    wanted = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes
    size, old = prod(tile_shape(tile)), tile_shape(tile)
    known = [n for n in wanted if n != -1 or not is_number(n)]
    if len(known) == len(wanted) - 1:
        rest = prod(require_shape(emit, tuple(known), None)) if known else 1
        wanted = tuple(size // rest if is_number(n) and n == -1 else n for n in wanted)
    shape = require_shape(emit, tuple(wanted), None)
    if prod(shape) != size:
        raise CompileError(
            f"cannot reshape {old} ({size} elements) to {shape} ({prod(shape)} elements)",
            hint="the number of elements stays; -1 stands for the size that fits",
        )
    return tile if shape == old else emit.builder.reshape(tile, shape)


def _to(emit: Emitter, value: Value, dtype: Any) -> Value:
    return emit.cast(value, require_dtype(dtype))


# --- tensors ------------------------------------------------------------------------------------------


def _view_transposed(emit: Emitter, view: Value) -> Value:
    rank = view_type(view).rank
    if rank != 2:
        raise CompileError(f".T needs rank 2, the tensor has rank {rank}", hint="use .permute(...), or t[b].T")
    return emit.builder.permute_view(view, (1, 0))


def _view_permute(emit: Emitter, view: Value, *axes: Any) -> Value:
    return emit.builder.permute_view(view, require_permutation(axes, view_type(view).rank))


def _view_offset(emit: Emitter, view: Value, *offsets: Any) -> Value:
    items = offsets[0] if len(offsets) == 1 and isinstance(offsets[0], tuple) else offsets
    rank = view_type(view).rank
    if len(items) != rank:
        raise CompileError(f".offset takes one number per dimension: {rank}, got {len(items)}", hint="use 0 to stay")
    return emit.builder.offset_view(view, [scalar_index(emit, n, "an offset") for n in items])


def _view_peer(emit: Emitter, view: Value, rank: Any) -> Value:
    if not view_type(view).symmetric:
        hint = "annotate the kernel's parameter tw.Symmetric; a view that .peer gave belongs to one rank already"
        raise CompileError(f".peer of {describe(view)}, which is not symmetric", hint=hint)
    return emit.builder.peer(view, scalar_index(emit, rank, "a rank"))


def _tensor_to(emit: Emitter, view: Value, dtype: Any) -> Value:
    raise CompileError("a tensor has no .to", hint="load a tile and convert that: tw.load(...).to(dtype)")


def _rank(emit: Emitter, value: Value) -> int:
    type_ = value.type
    return type_.rank if isinstance(type_, TileType | ViewType) else 0


def _dtype(emit: Emitter, value: Value) -> DType:
    return dtype_of(value)


PROPERTIES: dict[str, dict[str, Callable[[Emitter, Value], Any]]] = {
    "tile": {"shape": lambda e, v: tile_shape(v), "dtype": _dtype, "ndim": _rank, "T": _transposed},
    "scalar": {"shape": lambda e, v: (), "dtype": _dtype, "ndim": _rank},
    "tensor": {"shape": lambda e, v: ViewShape(v), "dtype": _dtype, "ndim": _rank, "T": _view_transposed},
}
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "tile": {"to": _to, "reshape": _reshape, "permute": _permute},
    "scalar": {"to": _to},
    "tensor": {"permute": _view_permute, "offset": _view_offset, "peer": _view_peer, "to": _tensor_to},
}

__all__ = ["attribute", "require_dtype", "require_permutation", "require_shape"]
