"""Common subexpression elimination: equal pure operations become one, scoped by region.

An operation may be replaced by an equal one above it in its own block or in a block around it.
Reads are not merged: a write may lie between them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Hashable
from typing import Any

from tilewright.ir.core import Effect, Function, Operation, Region, Value
from tilewright.ir.tile_ops import Binary, Compare, Constant
from tilewright.ir.types import SlotType, element_type
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: exact for integers; of floats only the payload of a NaN and the sign of max(0, -0) could tell
COMMUTATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "xor", "eq", "ne"})


@register_pass("cse")
class CommonSubexpressionElimination(FunctionPass):
    """Merge equal pure operations."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        eliminate_common_subexpressions(function.body)


def eliminate_common_subexpressions(region: Region) -> bool:
    """Merge equal pure operations of ``region`` and the regions in it; whether anything changed."""
    return _scope(region, ChainMap(), {})


def reads_nothing(op: Operation) -> bool:
    """Whether the results depend on the operands alone.

    An operation on slots (`tile.dot` after placement) reads shared memory, although its class is pure.
    """
    if op.effect is not Effect.PURE:
        return False
    makes_slot = any(isinstance(v.type, SlotType) for v in op.results)
    return makes_slot or not any(isinstance(v.type, SlotType) for v in op.operands)


def commutes(op: Operation) -> bool:
    """Whether swapping the two operands gives the same bits."""
    return isinstance(op, Binary | Compare) and op.fn in COMMUTATIVE and not element_type(op.lhs.type).is_float


def _scope(region: Region, known: ChainMap[Hashable, Operation], mapping: dict[Value, Value]) -> bool:
    kept: list[Operation] = []
    changed = False
    for op in region.block.ops:
        if mapping:
            op.replace_operands(mapping)
        key = _key(op)
        earlier = known.get(key) if key is not None else None
        if earlier is not None:
            for old, new in zip(op.results, earlier.results, strict=True):
                mapping[old] = new
                new.hint = new.hint or old.hint
            continue
        if key is not None:
            known[key] = op
        kept.append(op)
        for nested in op.regions:
            changed |= _scope(nested, known.new_child(), mapping)
    if len(kept) != len(region.block.ops):
        region.block.set_ops(kept)
        changed = True
    return changed


def _key(op: Operation) -> Hashable | None:
    """What makes two operations equal; None for operations that are never merged."""
    if op.regions or op.terminator or not op.results or not reads_nothing(op):
        return None
    groups: Any = tuple(tuple(group) for group in op.groups)
    if commutes(op):
        groups = frozenset(op.operands)
    names = sorted({*op.attributes, *(f.name for f in op.attribute_fields)})
    attributes = tuple((name, _exact(_attribute(op, name))) for name in names)
    return type(op), attributes, groups, tuple(v.type for v in op.results)


def _attribute(op: Operation, name: str) -> Any:
    value = op.attributes[name] if name in op.attributes else getattr(op, name)
    if isinstance(op, Constant) and element_type(op.result.type).is_float:
        return float(value)
    return value


def _exact(value: Any) -> Hashable:
    """Tells 1 from 1.0 and True, 0.0 from -0.0, and finds one NaN equal to another."""
    if isinstance(value, tuple | list):
        return tuple(_exact(v) for v in value)
    return type(value), repr(value) if isinstance(value, float) else value
