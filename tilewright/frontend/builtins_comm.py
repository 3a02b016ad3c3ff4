"""Builtins of communication between ranks."""

from __future__ import annotations

from math import prod
from typing import Any

from tilewright.frontend import language as tw
from tilewright.frontend.builtins import IMPLEMENTATIONS, Implementation, implements, require_tokens, stored_tile
from tilewright.frontend.emitter import Emitter, require_tile
from tilewright.frontend.errors import CompileError
from tilewright.frontend.methods import require_dtype, require_shape
from tilewright.frontend.subscripts import scalar_index
from tilewright.frontend.values import describe, dtype_name, dtype_of, is_view, tile_shape, view_type
from tilewright.ir.collectives import GATHERING, TILE_COLLECTIVES, VIEW_COLLECTIVES, TileCollective, ViewCollective
from tilewright.ir.comm_ops import FLAG, view_root
from tilewright.ir.core import Value
from tilewright.ir.indexed_ops import ATOMIC_DTYPES, supports_atomic
from tilewright.ir.packet_ops import PAYLOAD
from tilewright.ir.types import DTYPES, DType, TileType, i1, i32, i64


@implements(tw.rank)
def rank(emit: Emitter) -> Value:
    return emit.builder.rank()


@implements(tw.world_size)
def world_size(emit: Emitter) -> Value:
    return emit.builder.world_size()


@implements(tw.turn)
def turn(emit: Emitter) -> Value:
    return emit.builder.turn()


# --- puts ---------------------------------------------------------------------------------------


@implements(tw.put)
def put(emit: Emitter, view: Any, index: Any, value: Any, after: Any) -> Value:
    indices, tile = stored_tile(emit, "put", _symmetric(view, "put"), index, value)
    return emit.builder.put(view, indices, tile, require_tokens(after, "flag"))


@implements(tw.reduce_put)
def reduce_put(emit: Emitter, view: Any, index: Any, value: Any, after: Any) -> Value:
    indices, tile = stored_tile(emit, "reduce_put", _symmetric(view, "reduce_put"), index, value)
    if not supports_atomic("add", dtype_of(tile)):
        hint = f"there are additions of {', '.join(dtype_name(DTYPES[name]) for name in ATOMIC_DTYPES['add'])}"
        raise CompileError(f"tw.reduce_put of {dtype_name(dtype_of(tile))}", hint=hint, argument="value")
    return emit.builder.reduce_put(view, indices, tile, require_tokens(after, "flag"))


def _symmetric(view: Any, name: str) -> Value:
    if is_view(view) and view_type(view_root(view)).symmetric:
        return view
    hint = "annotate the kernel's parameter tw.Symmetric; tw.store writes to other tensors"
    message = f"tw.{name} writes to a symmetric tensor, got {describe(view)}"
    raise CompileError(message, hint=hint, argument="view")


# --- packets ------------------------------------------------------------------------------------


@implements(tw.send)
def send(emit: Emitter, packets: Any, value: Any) -> None:
    tile = require_tile(value, "the value of tw.send", "value")
    emit.builder.send(_packets(packets, "send", tile_shape(tile), dtype_of(tile)), tile)


@implements(tw.receive)
def receive(emit: Emitter, packets: Any, shape: Any, dtype: Any) -> Value:
    sizes, kind = require_shape(emit, shape), require_dtype(dtype, "dtype")
    return emit.builder.receive(_packets(packets, "receive", sizes, kind), TileType(sizes, kind))


def _packets(view: Any, name: str, shape: tuple[int, ...], dtype: DType) -> Value:
    """The view of packets for a tile."""
    view = _symmetric(view, name)
    type_, argument = view_type(view), "shape" if name == "receive" else "value"
    if type_.dtype != i64 or type_.rank != 1 or type_.strides != (1,):
        hint = "index every dimension but the last of an int64 tensor: packets[rank, tile]"
        raise CompileError(f"tw.{name} takes a row of packets, got {describe(view)}", hint=hint, argument="packets")
    if dtype.bytes > PAYLOAD:
        message = f"tw.{name}: an element of {dtype_name(dtype)} does not fit a packet of {PAYLOAD} bytes"
        raise CompileError(message, hint="convert it, or use tw.put", argument=argument)
    if prod(shape) * dtype.bytes % PAYLOAD:
        message = f"tw.{name} of {prod(shape)} elements of {dtype_name(dtype)}: packets hold {PAYLOAD} bytes"
        raise CompileError(message, hint="use a larger tile", argument=argument)
    return view


# --- flags --------------------------------------------------------------------------------------


@implements(tw.signal)
def signal(emit: Emitter, flag: Any, peer: Any, after: Any) -> None:
    flag = _flags(flag, "flag")
    if view_type(flag).rank:
        hint = "index every dimension: flags[i, j]"
        raise CompileError(f"tw.signal sets one flag, got {describe(flag)}", hint=hint, argument="flag")
    emit.builder.signal(flag, scalar_index(emit, peer, "a rank", "peer"), require_tokens(after, "put", "flag"))


@implements(tw.wait)
def wait(emit: Emitter, flags: Any, when: Any, earlier: Any) -> Value:
    if earlier is not None:
        if when is not True:
            hint = "put it into an if"
            raise CompileError("tw.wait takes no condition for flags of an earlier launch", hint=hint, argument="when")
        if isinstance(earlier, int) and earlier < 1:
            raise CompileError(f"tw.wait(earlier={earlier}): it is at least 1", argument="earlier")
        launches = scalar_index(emit, earlier, "a number of launches", "earlier")
        return emit.builder.wait_earlier(_flags(flags, "flags"), launches)
    condition = emit.truth(when, "the condition of a wait")
    if condition is False:
        condition = emit.constant(False, i1)
    return emit.builder.wait_flags(_flags(flags, "flags"), condition if isinstance(condition, Value) else None)


@implements(tw.barrier)
def barrier(emit: Emitter, flags: Any, after: Any) -> Value:
    flags, b = _flags(flags, "flags"), emit.builder
    if view_type(flags).rank != 1:
        hint = "pass a row of world_size() flags: flags[i]"
        raise CompileError(f"tw.barrier takes a view of rank one, got {describe(flags)}", hint=hint, argument="flags")
    tokens, own = require_tokens(after, "put", "flag"), b.subview(flags, [b.rank()])
    loop = b.for_loop(b.index(0), b.world_size(), b.index(1), [], ["peer"])
    with b.at(loop.body.block):
        b.signal(own, loop.index, tokens)
        b.yield_()
    return b.wait_flags(flags)


# --- collectives --------------------------------------------------------------------------------


def _of_tile(name: str) -> Implementation:
    def implementation(emit: Emitter, value: Any, buffer: Any, flags: Any) -> Value:
        tile = require_tile(value, f"the value of tw.{name}", "value")
        shape, places = tile_shape(tile), _places(emit, name, tile_shape(tile), dtype_of(tile), buffer, flags)
        result = FLAG if name in GATHERING else TileType(shape, dtype_of(tile))
        return emit.builder.insert(TileCollective(tile, *places, types=[result], fn=name)).result

    return implementation


def _of_view(name: str) -> Implementation:
    def implementation(emit: Emitter, view: Any, index: Any, shape: Any, buffer: Any, flags: Any) -> Value:
        if not is_view(view) or view_type(view).rank < 2:
            hint = "pass a view (world, ...) whose part r is for rank r"
            raise CompileError(f"tw.{name} takes a tensor, got {describe(view)}", hint=hint, argument="view")
        sizes, part = require_shape(emit, shape), view_type(view).rank - 1
        items = index if isinstance(index, tuple) else (index,)
        if len(items) != part or len(sizes) != part:
            message = f"tw.{name}: {len(items)} indices and {len(sizes)} sizes for the {part} dimensions of view[r]"
            raise CompileError(message, hint="give one for each dimension but the first", argument="index")
        indices = [scalar_index(emit, item, "a tile index", "index") for item in items]
        places = _places(emit, name, sizes, dtype_of(view), buffer, flags)
        result = FLAG if name in GATHERING else TileType(sizes, dtype_of(view))
        op = ViewCollective(view, indices, *places, types=[result], fn=name, shape=sizes)
        return emit.builder.insert(op).result

    return implementation


def _places(
    emit: Emitter, name: str, shape: tuple[int, ...], dtype: DType, buffer: Any, flags: Any
) -> tuple[Value, Value]:
    """The buffer and the flags of a collective of tiles of ``shape``."""
    flags = _flags(flags, "flags")
    if view_type(flags).rank != 1:
        message = f"tw.{name} takes a view of flags of rank one, got {describe(flags)}"
        raise CompileError(message, hint="pass a row of world_size() flags: flags[i]", argument="flags")
    fits = is_view(buffer) and view_type(buffer).symmetric and view_type(buffer).rank == len(shape) + 1
    if not fits or dtype_of(buffer) != dtype:
        hint = f"pass a tw.Symmetric view (world, {', '.join(map(str, shape))}) of {dtype_name(dtype)}"
        message = f"the buffer of tw.{name} holds a tile of each rank, got {describe(buffer)}"
        raise CompileError(message, hint=hint, argument="buffer")
    return buffer, flags


IMPLEMENTATIONS.update({tw.BUILTINS[name]: _of_tile(name) for name in TILE_COLLECTIVES})
IMPLEMENTATIONS.update({tw.BUILTINS[name]: _of_view(name) for name in VIEW_COLLECTIVES})


def _flags(flags: Any, argument: str) -> Value:
    """A view of flags of the own rank."""
    hint = "flags are int32 elements of a tw.Symmetric parameter: flags[i, j]"
    if not is_view(flags):
        raise CompileError(f"expected flags, got {describe(flags)}", hint=hint, argument=argument)
    type_ = view_type(flags)
    if not type_.symmetric:
        if view_type(view_root(flags)).symmetric:
            hint = (
                "name the flag without .peer: tw.signal(flags[i], r) sets it on rank r, tw.wait waits for the own one"
            )
        raise CompileError(f"{describe(flags)} is no view of the own rank's flags", hint=hint, argument=argument)
    if type_.dtype != i32:
        raise CompileError(f"flags are int32, got {describe(flags)}", hint=hint, argument=argument)
    return flags
