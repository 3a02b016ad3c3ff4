"""How many registers a block's tiles need at its barriers, from which follows how many blocks an SM should hold."""

from __future__ import annotations

from tilewright.ir.core import Block, Function, Operation, Value
from tilewright.ir.tile_ops import Reduce
from tilewright.ir.types import TileType


def waiting_words(function: Function) -> int:
    """The most 32-bit words that a thread holds in tiles while a reduction between threads is under way.

    Elsewhere values come and go element by element, and ptxas orders them to need few registers.
    """
    return _waiting(function.body.block, set())


def _waiting(block: Block, after: set[Value]) -> int:
    """``after``: values of outer blocks that are needed when the block has run."""
    most, live = 0, set(after)
    for op in reversed(block.ops):
        live.difference_update(op.results)
        if isinstance(op, Reduce):
            most = max(most, sum(map(_words, live)))
        outside = _from_outside(op)
        for region in op.regions:
            most = max(most, _waiting(region.block, live | outside))
        live |= outside | set(op.operands)
    return most


def _from_outside(op: Operation) -> set[Value]:
    """What the regions of an operation use of the values around it."""
    inner = [o for region in op.regions for o in region.walk()]
    made: set[Value] = {v for o in inner for v in o.results}
    made.update(v for o in (op, *inner) for region in o.regions for v in region.block.args)
    return {v for o in inner for v in o.operands} - made


def _words(value: Value) -> int:
    type_ = value.type
    if not isinstance(type_, TileType) or type_.layout is None:
        return 0
    return -(-type_.layout.num_registers * type_.dtype.bits // 32)
