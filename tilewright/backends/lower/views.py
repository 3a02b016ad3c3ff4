"""Lowering of views of global memory: `tile.dim`, subviews, permutations and moved origins."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from tilewright.backends.lower.context import Lowering, ViewRef, lowers
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.ranges import constant_of
from tilewright.ir import tile_ops
from tilewright.ir.core import Value


def index_operand(lw: Lowering, value: Value) -> IntLike:
    """An integer scalar, as a Python int where it is known."""
    known = constant_of(value)
    return lw.scalar(value) if known is None else known


def _step_alignment(view: ViewRef, axis: int, steps: IntLike) -> int:
    """A divisor, in bytes, of ``steps`` elements along ``axis``; 0 for no step at all."""
    stride = view.strides[axis]
    if isinstance(steps, int) and steps == 0:
        return 0
    unit = stride * view.dtype.bytes if isinstance(stride, int) else view.stride_align
    return unit * steps if isinstance(steps, int) else unit


@lowers(tile_ops.Dim)
def lower_dim(lw: Lowering, op: tile_ops.Dim) -> None:
    lw.define(op.result, lw.index.value(lw.view(op.view).shape[op.axis]))


@lowers(tile_ops.Subview)
def lower_subview(lw: Lowering, op: tile_ops.Subview) -> None:
    view = lw.view(op.view)
    index = [index_operand(lw, value) for value in op.index]
    count = len(index)
    positions = [lw.index.add(view.origin[axis], i) for axis, i in enumerate(index)]
    steps = [lw.index.mul(lw.index.wide(p), view.strides[axis]) for axis, p in enumerate(positions)]
    align = gcd(view.align, *(_step_alignment(view, axis, i) for axis, i in enumerate(index)))
    fixed = dict(view.fixed) | {view.root_dims[axis]: p for axis, p in enumerate(positions)}
    result = replace(
        view,
        shape=view.shape[count:],
        strides=view.strides[count:],
        origin=view.origin[count:],
        root_dims=view.root_dims[count:],
        offset=lw.index.sum([view.offset, *steps]),
        align=align,
        fixed=fixed,
    )
    lw.define(op.result, result)


@lowers(tile_ops.PermuteView)
def lower_permute_view(lw: Lowering, op: tile_ops.PermuteView) -> None:
    view = lw.view(op.view)

    def permuted(values: tuple) -> tuple:
        return tuple(values[p] for p in op.perm)

    result = replace(
        view,
        shape=permuted(view.shape),
        strides=permuted(view.strides),
        origin=permuted(view.origin),
        root_dims=permuted(view.root_dims),
    )
    lw.define(op.result, result)


@lowers(tile_ops.OffsetView)
def lower_offset_view(lw: Lowering, op: tile_ops.OffsetView) -> None:
    view = lw.view(op.view)
    offsets = [index_operand(lw, value) for value in op.offsets]
    origin = tuple(lw.index.add(o, lw.index.narrow(i)) for o, i in zip(view.origin, offsets, strict=True))
    align = gcd(view.align, *(_step_alignment(view, axis, i) for axis, i in enumerate(offsets)))
    lw.define(op.result, replace(view, origin=origin, align=align))
