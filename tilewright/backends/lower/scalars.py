"""Lowering of elementwise operations, constants and program indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tilewright.backends.lower import arithmetic
from tilewright.backends.lower.context import Lowering, Registers, lowers
from tilewright.backends.lower.coordinates import TileCoordinates
from tilewright.backends.lower.elements import constant, element, round_to, widen
from tilewright.backends.lower.ranges import Range, limits, value_range
from tilewright.ir import tile_ops
from tilewright.ir.core import Operation, Value
from tilewright.ir.types import ScalarType, TileType, element_type


def define_registers(lw: Lowering, value: Value, registers: Registers) -> None:
    """Define a tile by its registers, or a scalar by its only one."""
    lw.define(value, registers if isinstance(value.type, TileType) else registers[0])


# --- sources --------------------------------------------------------------------------------------


@lowers(tile_ops.Constant)
def lower_constant(lw: Lowering, op: tile_ops.Constant) -> None:
    value = constant(lw, op.value, element_type(op.result.type))
    count = lw.layout(op.result).num_registers if isinstance(op.result.type, TileType) else 1
    define_registers(lw, op.result, [value] * count)


@lowers(tile_ops.Iota)
def lower_iota(lw: Lowering, op: tile_ops.Iota) -> None:
    lane = lw.ops.from_here(lw, lw.scope.lane) if in_branch(op) else lw.scope.lane
    with lw.as_scope(replace(lw.scope, lane=lane)):
        coordinates = TileCoordinates(lw, lw.layout(op.result))
    dtype = element_type(op.result.type)
    registers = []
    for register in range(coordinates.layout.num_registers):
        index = lw.index.value(lw.index.add(coordinates.of(register, 0), op.start))
        convert = lw.fb.sext if dtype.bits > 32 else lw.fb.trunc
        registers.append(convert(index, element(lw, dtype)))
    lw.define(op.result, registers)


def in_branch(op: Operation) -> bool:
    """Whether an operation stands in a branch, which might not be taken: nothing of it should be computed before."""
    region = op.parent.parent if op.parent is not None else None
    return region is not None and isinstance(region.parent, tile_ops.If)


@lowers(tile_ops.Splat)
def lower_splat(lw: Lowering, op: tile_ops.Splat) -> None:
    lw.define(op.result, [lw.scalar(op.source)] * lw.layout(op.result).num_registers)


@lowers(tile_ops.ProgramId)
def lower_program_id(lw: Lowering, op: tile_ops.ProgramId) -> None:
    block = lw.ops.block_id(lw, op.axis)
    if op.axis == 0 and lw.function.attributes.get("spread"):  # over neighbours along x
        block = lw.fb.udiv(block, int(lw.function.attributes["num_ctas"]))
    lw.define(op.result, block)


@lowers(tile_ops.NumPrograms)
def lower_num_programs(lw: Lowering, op: tile_ops.NumPrograms) -> None:
    lw.define(op.result, lw.entry.grid[op.axis])


@lowers(tile_ops.BlockId)
def lower_block_id(lw: Lowering, op: tile_ops.BlockId) -> None:
    if lw.function.attributes.get("persistent"):  # launched one-dimensional
        lw.define(op.result, lw.ops.block_id(lw, 0))
        return
    x, y, z = (lw.ops.block_id(lw, axis) for axis in range(3))
    nx, ny = (lw.ops.num_blocks(lw, axis) for axis in range(2))
    lw.define(op.result, lw.fb.add(x, lw.fb.mul(nx, lw.fb.add(y, lw.fb.mul(ny, z)))))


@lowers(tile_ops.NumBlocks)
def lower_num_blocks(lw: Lowering, op: tile_ops.NumBlocks) -> None:
    if lw.function.attributes.get("persistent"):
        lw.define(op.result, lw.ops.num_blocks(lw, 0))
        return
    x, y, z = (lw.ops.num_blocks(lw, axis) for axis in range(3))
    lw.define(op.result, lw.fb.mul(x, lw.fb.mul(y, z)))


# --- elementwise ------------------------------------------------------------------------------------


def check_same_layout(lw: Lowering, *values: Value) -> None:
    """Elementwise operations pair registers: all tiles must have one layout."""
    layouts = {lw.layout(v) for v in values if isinstance(v.type, TileType)}
    if len(layouts) > 1:
        raise lw.error("operands and result have different layouts: the layout pass must insert tile.convert")


def _bounds(value: Value) -> Range:
    """What is known of the elements of an integer operand."""
    if isinstance(value.type, ScalarType):
        return value_range(value) if not value.type.dtype.is_float else (0, 0)
    op = value.op
    if isinstance(op, tile_ops.Constant) and isinstance(op.value, int):
        return int(op.value), int(op.value)
    if isinstance(op, tile_ops.Splat | tile_ops.Broadcast | tile_ops.ExpandDims):
        return _bounds(op.source)
    if isinstance(op, tile_ops.Iota) and isinstance(op.result.type, TileType):
        return op.start, op.start + op.result.type.size - 1
    dtype = element_type(value.type)
    return limits(Value(ScalarType(dtype))) if not dtype.is_float else (0, 0)


@lowers(tile_ops.Unary)
def lower_unary(lw: Lowering, op: tile_ops.Unary) -> None:
    check_same_layout(lw, op.source, op.result)
    dtype = element_type(op.source.type)
    source = [widen(lw, x, dtype) for x in lw.registers(op.source)]
    results = distinct_map(lambda x: arithmetic.unary(lw, op.fn, x[0], dtype), [(x,) for x in source])
    define_registers(lw, op.result, round_to(lw, results, dtype))


@lowers(tile_ops.Binary)
def lower_binary(lw: Lowering, op: tile_ops.Binary) -> None:
    check_same_layout(lw, op.lhs, op.rhs, op.result)
    dtype = element_type(op.lhs.type)
    ranges = (_bounds(op.lhs), _bounds(op.rhs))
    pairs = zip(lw.registers(op.lhs), lw.registers(op.rhs), strict=True)
    wide = [(widen(lw, x, dtype), widen(lw, y, dtype)) for x, y in pairs]
    results = distinct_map(lambda xy: arithmetic.binary(lw, op.fn, xy[0], xy[1], dtype, ranges), wide)
    define_registers(lw, op.result, round_to(lw, results, dtype))


@lowers(tile_ops.Compare)
def lower_compare(lw: Lowering, op: tile_ops.Compare) -> None:
    check_same_layout(lw, op.lhs, op.rhs, op.result)
    dtype = element_type(op.lhs.type)
    pairs = zip(lw.registers(op.lhs), lw.registers(op.rhs), strict=True)
    wide = [(widen(lw, x, dtype), widen(lw, y, dtype)) for x, y in pairs]
    define_registers(lw, op.result, distinct_map(lambda xy: arithmetic.compare(lw, op.fn, xy[0], xy[1], dtype), wide))


@lowers(tile_ops.Select)
def lower_select(lw: Lowering, op: tile_ops.Select) -> None:
    check_same_layout(lw, op.condition, op.on_true, op.on_false, op.result)
    groups = [lw.registers(v) for v in (op.condition, op.on_true, op.on_false)]
    define_registers(lw, op.result, [lw.fb.select(c, x, y) for c, x, y in zip(*groups, strict=True)])


@lowers(tile_ops.Cast)
def lower_cast(lw: Lowering, op: tile_ops.Cast) -> None:
    check_same_layout(lw, op.source, op.result)
    source, result = element_type(op.source.type), element_type(op.result.type)
    if source == result:
        define_registers(lw, op.result, lw.registers(op.source))
        return
    wide = [widen(lw, x, source) for x in lw.registers(op.source)]
    define_registers(lw, op.result, round_to(lw, [arithmetic.cast(lw, x, source, result) for x in wide], result))


@lowers(tile_ops.Bitcast)
def lower_bitcast(lw: Lowering, op: tile_ops.Bitcast) -> None:
    check_same_layout(lw, op.source, op.result)
    type_ = element(lw, element_type(op.result.type))
    define_registers(lw, op.result, [lw.fb.bitcast(x, type_) for x in lw.registers(op.source)])


def distinct_map(function: Callable[[tuple[Any, ...]], Any], groups: Sequence[tuple[Any, ...]]) -> Registers:
    """Map groups of MLIR values, once for equal groups: splats and broadcasts repeat them."""
    known: dict[tuple[Any, ...], Any] = {}
    for group in groups:
        if group not in known:
            known[group] = function(group)
    return [known[group] for group in groups]
