"""How well a scheduled function uses the banks of shared memory, by the layout algebra."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tilewright.ir.async_ops import LocalLoad, LocalStore
from tilewright.ir.core import Function, Operation, Value
from tilewright.ir.layout import LinearLayout, SharedLayout, bank_conflicts, shared_vector_bytes
from tilewright.ir.target import Target
from tilewright.ir.types import SlotType, TileType

MAX_VECTOR_BYTES = 16


@dataclass(frozen=True)
class SharedTraffic:
    """One operation's accesses of shared memory: ``conflicts`` are extra cycles of its worst instruction."""

    op: Operation
    kind: str  # "read" or "write"
    vector_bytes: int
    instructions: int  # of one warp
    conflicts: int


def shared_traffic(function: Function, target: Target) -> list[SharedTraffic]:
    """The `async.local_load` and `async.local_store` of a function whose tiles have layouts.

    Matrix units and copy engines that access slots themselves do not appear.
    """
    return [_traffic(*access, target) for access in _accesses(function)]


def shared_conflicts(function: Function, target: Target) -> int:
    """The sum of the extra cycles of all operations' worst instructions; 0: no bank is ever met twice."""
    return sum(traffic.conflicts for traffic in shared_traffic(function, target))


def _accesses(function: Function) -> Iterator[tuple[Operation, str, LinearLayout, SharedLayout]]:
    for op in function.walk():
        if isinstance(op, LocalLoad) and op.at is None:
            yield op, "read", _registers(op.result), _slot(op.slot)
        elif isinstance(op, LocalStore):
            yield op, "write", _registers(op.value), _slot(op.slot)


def _traffic(op: Operation, kind: str, registers: LinearLayout, slot: SharedLayout, target: Target) -> SharedTraffic:
    width = shared_vector_bytes(registers, slot, MAX_VECTOR_BYTES)
    count = max(1, registers.num_registers * slot.element_bits // (8 * width))
    return SharedTraffic(op, kind, width, count, bank_conflicts(registers, slot, width, target.banks, kind))


def _registers(value: Value) -> LinearLayout:
    assert isinstance(value.type, TileType) and value.type.layout is not None
    return value.type.layout


def _slot(value: Value) -> SharedLayout:
    assert isinstance(value.type, SlotType)
    return value.type.layout
