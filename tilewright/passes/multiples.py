"""Powers of two that an integer scalar is a multiple of, whatever a launch's arguments are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd

from tilewright.ir.check_ops import Assume, promised_multiple
from tilewright.ir.core import Block, Operation, Region, Value
from tilewright.ir.tile_ops import Binary, Cast, Constant, For, Select
from tilewright.ir.types import ScalarType

#: larger ones are not told apart
MOST = 16
_DEPTH = 16  # expressions nested deeper are taken as unknown


def power_of_two(value: Value, at: Operation) -> int:
    """The largest power of two up to `MOST` that ``value`` is known to be a multiple of where ``at`` runs.

    From how it is computed, and from what `tw.assume` promises in the blocks around ``at``. Powers of two because they
    divide a result that wraps around as well.
    """
    promises: dict[Value, int] = {}
    for block in _blocks_around(at):
        for op in block.ops:
            promise = promised_multiple(op.condition) if isinstance(op, Assume) else None
            if promise is not None:
                promises[promise[0]] = max(_power(promise[1]), promises.get(promise[0], 1))
    return _known(value, promises, _DEPTH)


def _blocks_around(op: Operation) -> Iterator[Block]:
    block = op.parent
    while block is not None:
        yield block
        owner = block.parent.parent if isinstance(block.parent, Region) else None
        block = owner.parent if isinstance(owner, Operation) else None


def _power(number: int) -> int:
    return gcd(number, MOST)  # of 0, which is a multiple of everything, MOST


def _known(value: Value, promises: dict[Value, int], depth: int) -> int:
    return max(promises.get(value, 1), _computed(value, promises, depth - 1) if depth > 0 else 1)


def _computed(value: Value, promises: dict[Value, int], depth: int) -> int:
    def known(operand: Value) -> int:
        return _known(operand, promises, depth)

    op = value.op
    if op is None:
        return _loop_index(value, known)
    if isinstance(op, Constant):
        return _power(op.value) if isinstance(op.value, int) else 1
    if isinstance(op, Cast):
        source = op.source.type
        return known(op.source) if isinstance(source, ScalarType) and source.dtype.is_int else 1
    if isinstance(op, Select):
        return min(known(op.on_true), known(op.on_false))
    if isinstance(op, Binary) and op.fn == "mul":
        return _power(known(op.lhs) * known(op.rhs))
    if isinstance(op, Binary) and op.fn in ("add", "sub", "mod", "min", "max"):
        return min(known(op.lhs), known(op.rhs))
    return 1


def _loop_index(value: Value, known: Callable[[Value], int]) -> int:
    region = value.owner.parent if isinstance(value.owner, Block) else None
    loop = region.parent if region is not None else None
    if isinstance(loop, For) and value is loop.index:
        return min(known(loop.lo), known(loop.step))
    return 1


__all__ = ["MOST", "power_of_two"]
