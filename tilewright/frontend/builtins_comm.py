"""Builtins of communication between ranks."""

from __future__ import annotations

from typing import Any

from tilewright.frontend import language as tw
from tilewright.frontend.builtins import implements, require_tokens, stored_tile
from tilewright.frontend.emitter import Emitter
from tilewright.frontend.errors import CompileError
from tilewright.frontend.subscripts import scalar_index
from tilewright.frontend.values import describe, dtype_name, dtype_of, is_view, view_type
from tilewright.ir.comm_ops import view_root
from tilewright.ir.core import Value
from tilewright.ir.indexed_ops import ATOMIC_DTYPES, supports_atomic
from tilewright.ir.types import DTYPES, i1, i32


@implements(tw.rank)
def rank(emit: Emitter) -> Value:
    return emit.builder.rank()


@implements(tw.world_size)
def world_size(emit: Emitter) -> Value:
    return emit.builder.world_size()


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


# --- flags --------------------------------------------------------------------------------------


@implements(tw.signal)
def signal(emit: Emitter, flag: Any, peer: Any, after: Any) -> None:
    flag = _flags(flag, "flag")
    if view_type(flag).rank:
        hint = "index every dimension: flags[i, j]"
        raise CompileError(f"tw.signal sets one flag, got {describe(flag)}", hint=hint, argument="flag")
    emit.builder.signal(flag, scalar_index(emit, peer, "a rank", "peer"), require_tokens(after, "put", "flag"))


@implements(tw.wait)
def wait(emit: Emitter, flags: Any, when: Any) -> Value:
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
