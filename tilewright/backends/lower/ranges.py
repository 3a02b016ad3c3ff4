"""What is known of an integer scalar at compile time: the smallest and largest value it can take."""

from __future__ import annotations

from collections.abc import Callable

from tilewright.ir import tile_ops
from tilewright.ir.core import Block, Operation, Value
from tilewright.ir.types import ScalarType

Range = tuple[int, int]

INT32_MAX = 2**31 - 1
_DEPTH = 16  # expressions nested deeper are taken as unknown


def limits(value: Value) -> Range:
    """Every value of the type."""
    bits = value.type.dtype.bits if isinstance(value.type, ScalarType) else 64
    return (0, 1) if bits == 1 else (-(1 << bits - 1), (1 << bits - 1) - 1)


def value_range(value: Value, depth: int = _DEPTH) -> Range:
    """(least, greatest) of an integer scalar; its type's limits where nothing is known."""
    full = limits(value)
    if depth == 0:
        return full
    if isinstance(value.owner, Block):
        return _loop_index(value, value.owner, depth) or full
    rule = _RULES.get(type(value.op)) if value.op is not None else None
    found = rule(value.op, depth - 1) if rule is not None and value.op is not None else None
    if found is None or found[0] < full[0] or found[1] > full[1]:  # may wrap around
        return full
    return found


def constant_of(value: Value) -> int | None:
    """The value of an integer that is known exactly."""
    low, high = value_range(value)
    return low if low == high else None


def _loop_index(value: Value, block: Block, depth: int) -> Range | None:
    loop = block.parent.parent if block.parent is not None else None
    if not isinstance(loop, tile_ops.For) or value is not loop.index:
        return None
    first, last = value_range(loop.lo, depth - 1)[0], value_range(loop.hi, depth - 1)[1] - 1
    return first, max(first, last)


def _constant(op: Operation, depth: int) -> Range | None:
    assert isinstance(op, tile_ops.Constant)
    return (int(op.value), int(op.value)) if isinstance(op.value, int) else None


def _index(op: Operation, depth: int) -> Range:
    return 0, INT32_MAX


def _index_below_limit(op: Operation, depth: int) -> Range:
    return 0, INT32_MAX - 1


def _binary(op: Operation, depth: int) -> Range | None:
    assert isinstance(op, tile_ops.Binary)
    if not (isinstance(op.lhs.type, ScalarType) and op.lhs.type.dtype.is_int):
        return None
    (a, b), (c, d) = value_range(op.lhs, depth), value_range(op.rhs, depth)
    if op.fn == "add":
        return a + c, b + d
    if op.fn == "sub":
        return a - d, b - c
    if op.fn == "mul":
        corners = (a * c, a * d, b * c, b * d)
        return min(corners), max(corners)
    if op.fn == "floordiv" and c > 0:
        return min(a // c, a // d), max(b // c, b // d)
    if op.fn == "mod" and c > 0:
        return 0, min(d - 1, b) if a >= 0 else d - 1
    if op.fn in ("max", "min"):
        pick = max if op.fn == "max" else min
        return pick(a, c), pick(b, d)
    return None


def _select(op: Operation, depth: int) -> Range:
    assert isinstance(op, tile_ops.Select)
    (a, b), (c, d) = value_range(op.on_true, depth), value_range(op.on_false, depth)
    return min(a, c), max(b, d)


def _cast(op: Operation, depth: int) -> Range | None:
    assert isinstance(op, tile_ops.Cast)
    source = op.source.type
    return value_range(op.source, depth) if isinstance(source, ScalarType) and not source.dtype.is_float else None


_RULES: dict[type[Operation], Callable[[Operation, int], Range | None]] = {
    tile_ops.Constant: _constant,
    tile_ops.Dim: _index,
    tile_ops.NumPrograms: _index,
    tile_ops.NumBlocks: _index,
    tile_ops.ProgramId: _index_below_limit,
    tile_ops.BlockId: _index_below_limit,
    tile_ops.Binary: _binary,
    tile_ops.Select: _select,
    tile_ops.Cast: _cast,
}
