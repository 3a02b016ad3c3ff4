"""Loads from shared memory that may wait for the dot that uses them, so that operands need few registers."""

from __future__ import annotations

from tilewright.ir.async_ops import Alloc, LocalLoad, buffer_of
from tilewright.ir.core import Effect, Operation, Value
from tilewright.ir.scratch import scratch_bytes
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import BufferType


def is_deferrable(op: LocalLoad) -> bool:
    """One dot of the same block is the only user, and nothing between the two can overwrite the slot."""
    block = op.parent
    assert block is not None
    position = block.ops.index(op)
    for number, other in enumerate(block.ops[position + 1 :], position + 1):
        users = [inner for inner in other.walk() if op.result in inner.operands]
        if users:
            later = (inner for o in block.ops[number + 1 :] for inner in o.walk())
            alone = not any(op.result in inner.operands for inner in later)
            return users == [other] and isinstance(other, Dot) and other.acc is not op.result and alone
        if any(_may_overwrite(inner, op.slot) for inner in other.walk()):
            return False
    return False


def _may_overwrite(op: Operation, slot: Value) -> bool:
    """Writes, synchronisation, and scratch in the slot's place: buffers whose last read is over lend theirs."""
    if op.effect & (Effect.WRITE | Effect.SYNC):
        return True
    scratch = op.attributes.get("scratch")
    if scratch is None:
        return False
    buffer = buffer_of(slot)
    if not isinstance(buffer.op, Alloc) or buffer.op.offset is None or not isinstance(buffer.type, BufferType):
        return True
    first, size = buffer.op.offset, buffer.type.bytes
    return bool(scratch < first + size and first < scratch + scratch_bytes(op))
