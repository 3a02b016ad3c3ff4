"""Lowering of control flow: carried tiles become one block argument per register."""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.backends.lower.context import Lowering, lowers
from tilewright.backends.lower.ranges import constant_of
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import tile_ops
from tilewright.ir.core import Block


def _types(values: Sequence[mlir.Value]) -> list[mlir.Type]:
    return [v.type for v in values]


@lowers(tile_ops.For)
def lower_for(lw: Lowering, op: tile_ops.For) -> None:
    loop(lw, op, lw.flatten(op.inits))


def loop(lw: Lowering, op: tile_ops.For, initial: Sequence[mlir.Value]) -> None:
    """A loop that begins with the registers ``initial`` of what it carries."""
    lo, hi, step = (lw.scalar(v) for v in (op.lo, op.hi, op.step))
    with lw.fb.for_loop(lo, hi, step, initial, unroll=op.attributes.get("unroll")) as emitted:
        lw.define(op.index, emitted.index)
        lw.define_flat(op.carried, emitted.values)
        lw.lower_block(op.body.block)
        emitted.yields(lw.flatten(lw.yielded(op.body.block)))
    lw.define_flat(op.results, emitted.results)


@lowers(tile_ops.If)
def lower_if(lw: Lowering, op: tile_ops.If) -> None:
    known = constant_of(op.condition)
    if known is not None:
        block = (op.then_body if known else op.else_body).block
        lw.define_flat(op.results, _branch(lw, block))
        return
    condition = lw.scalar(op.condition)
    types = [t for v in op.results for t in lw.register_types(v)]
    results = lw.fb.if_else(
        condition, types, lambda: _branch(lw, op.then_body.block), lambda: _branch(lw, op.else_body.block)
    )
    lw.define_flat(op.results, results)


def _branch(lw: Lowering, block: Block) -> list[mlir.Value]:
    lw.lower_block(block)
    return lw.flatten(lw.yielded(block))


@lowers(tile_ops.While)
def lower_while(lw: Lowering, op: tile_ops.While) -> None:
    fb, initial = lw.fb, lw.flatten(op.inits)
    head, body, after = fb.block(*_types(initial)), fb.block(), fb.block()
    fb.br(head, initial)
    fb.position_at_end(head)
    carried = list(head.arguments)
    lw.define_flat(op.condition.block.args, carried)
    lw.lower_block(op.condition.block)
    (condition,) = lw.yielded(op.condition.block)
    fb.cond_br(lw.scalar(condition), body, after)
    fb.position_at_end(body)
    lw.define_flat(op.body.block.args, carried)
    lw.lower_block(op.body.block)
    fb.br(head, lw.flatten(lw.yielded(op.body.block)))
    fb.position_at_end(after)
    lw.define_flat(op.results, carried)
