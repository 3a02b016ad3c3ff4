"""shared-plan: where every buffer, barrier and scratch area lies, and how deep the rings are.

Elastic rings start with the stages that their schedule needs and share what is left, one stage at a
time in turn, up to ``max_stages``.
Operations that exchange data between warps (reductions, layout conversions) run one after the other
and reuse one scratch area. Running out of memory is an error that lists each buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.async_ops import Alloc, MakeRing
from tilewright.ir.core import Function, IRError, Operation, Value
from tilewright.ir.scratch import scratch_bytes
from tilewright.ir.types import BufferType, RingType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

BARRIER_BYTES = 8


@register_pass("shared-plan")
class SharedPlan(FunctionPass):
    """Sets offsets, ring depths and the function's ``shared_bytes``."""

    max_stages: int = 8

    def run_on_function(self, function: Function, context: PassContext) -> None:
        allocs = [op for op in function.walk() if isinstance(op, Alloc)]
        rings = [op for op in function.walk() if isinstance(op, MakeRing)]
        users = [op for op in function.walk() if scratch_bytes(op)]
        scratch = max((scratch_bytes(op) for op in users), default=0)
        limit = context.target.shared_bytes
        elastic = [r for r in rings if r.elastic]
        growing = list(elastic)
        while growing:
            ring = growing.pop(0)
            _set_stages(ring, allocs, _stages(ring) + 1)
            if _total(allocs, rings, scratch) > limit:
                _set_stages(ring, allocs, _stages(ring) - 1)
            elif _stages(ring) < self.max_stages:
                growing.append(ring)
        total = _total(allocs, rings, scratch)
        if total > limit:
            raise IRError(
                f"'{function.name}' needs {total} bytes of shared memory, {context.target.name} has {limit}:\n"
                + _listing(allocs, rings, scratch),
                function.loc,
                "use smaller tiles or fewer stages (num_stages=)",
            )
        function.attributes["shared_bytes"] = _place(allocs, rings, users, scratch)


def _set_stages(ring: MakeRing, allocs: list[Alloc], stages: int) -> None:
    ring.result.type = RingType(stages)
    for alloc in allocs:
        if alloc.ring is ring.result:
            alloc.result.type = BufferType(stages, _buffer(alloc).slot)


def _stages(ring: MakeRing) -> int:
    assert isinstance(ring.result.type, RingType)
    return ring.result.type.stages


def _buffer(alloc: Alloc) -> BufferType:
    assert isinstance(alloc.result.type, BufferType)
    return alloc.result.type


def _round_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _total(allocs: list[Alloc], rings: list[MakeRing], scratch: int) -> int:
    return _place(allocs, rings, [], scratch)


def _place(allocs: list[Alloc], rings: list[MakeRing], users: Sequence[Operation], scratch: int) -> int:
    """Assign offsets, most aligned first; returns the end."""
    offset = 0
    for alloc in sorted(allocs, key=lambda a: -_buffer(a).slot.layout.alignment):
        offset = _round_up(offset, _buffer(alloc).slot.layout.alignment)
        alloc.offset = offset
        offset += _buffer(alloc).bytes
    offset = _round_up(offset, 128)
    for op in users:
        op.attributes["scratch"] = offset
    offset = _round_up(offset + scratch, BARRIER_BYTES)
    for ring in rings:
        ring.offset = offset
        offset += 2 * _stages(ring) * BARRIER_BYTES
    return offset


def _listing(allocs: list[Alloc], rings: list[MakeRing], scratch: int) -> str:
    lines = []
    for alloc in allocs:
        buffer, name = _buffer(alloc), _name(alloc.result)
        shape = "x".join(map(str, buffer.slot.shape))
        lines.append(f"  {name}: {buffer.bytes} bytes ({buffer.stages} x {shape} {buffer.slot.dtype})")
    if scratch:
        lines.append(f"  exchange between warps: {scratch} bytes")
    if rings:
        lines.append(f"  barriers: {sum(2 * _stages(r) * BARRIER_BYTES for r in rings)} bytes")
    return "\n".join(lines)


def _name(value: Value) -> str:
    return value.hint or "buffer"
