"""shared-plan: where every buffer, barrier and scratch area lies, and how deep the rings are.

Elastic rings start with the stages that their schedule needs and share what is left, one stage at a
time in turn, up to ``max_stages``.

Operations that exchange data between warps (reductions, layout conversions) begin with a barrier, unless the threads
have met since the last use or they take turns with two places (`exchange_turns`), so those of one role, or of a program
without roles, take one scratch area in turns. Where all warps run one program, buffers and scratch whose lifetimes do
not overlap share memory (`shared_lifetimes`), with a barrier between their uses (`copy_ahead` waits for its copies
behind the loop); the buffers of roles may be in flight at any time and keep theirs.
Running out of memory is an error that lists each buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.async_ops import Alloc, BulkStore, MakeRing, Role
from tilewright.ir.cluster_ops import MakeMailbox
from tilewright.ir.comm_ops import Enter
from tilewright.ir.core import Function, IRError, Operation, Value
from tilewright.ir.scratch import MAILBOX_ALIGNMENT, SCRATCH_ALIGNMENT, mailbox_bytes, scratch_bytes
from tilewright.ir.target import Target
from tilewright.ir.types import BufferType, RingType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.shared_lifetimes import Area, Item, Lifetimes, lowest_places, round_up, scratch_users, separate

BARRIER_BYTES = NUMBER_BYTES = 8
#: of each block, for the system (CUDA C++ Programming Guide, "Shared Memory", compute capability 9.0)
RESERVED_BYTES = 1024


@register_pass("shared-plan")
class SharedPlan(FunctionPass):
    """Sets offsets, ring depths and the function's ``shared_bytes``."""

    max_stages: int = 8

    def run_on_function(self, function: Function, context: PassContext) -> None:
        plan = _Plan(function)
        limit = _limit(function, plan, context.target)
        growing = [r for r in plan.rings if r.elastic]
        while growing:
            ring = growing.pop(0)
            _set_stages(ring, plan.allocs, _stages(ring) + 1)
            if plan.place(limit)[1] > limit:
                _set_stages(ring, plan.allocs, _stages(ring) - 1)
            elif _stages(ring) < min(self.max_stages, ring.most or self.max_stages):
                growing.append(ring)
        areas, total = plan.place(limit)
        if total > limit:
            raise IRError(
                f"'{function.name}' needs {total} bytes of shared memory, {context.target.name} has {limit}:\n"
                + plan.listing(),
                function.loc,
                "use smaller tiles or fewer stages (num_stages=)",
            )
        plan.commit(areas)
        function.attributes["shared_bytes"] = total
        if plan.in_one_order:
            separate(function, areas)


def _limit(function: Function, plan: _Plan, target: Target) -> int:
    """What a block may use: a part of a multiprocessor's memory, where as many blocks as asked for can do with it."""
    blocks = int(function.attributes.get("blocks_per_unit", 1))
    limit = (target.shared_bytes + RESERVED_BYTES) // blocks - RESERVED_BYTES
    if plan.place(limit)[1] <= limit:
        return limit
    function.attributes.pop("blocks_per_unit", None)
    return target.shared_bytes


class _Plan:
    """The owners of shared memory in one function."""

    def __init__(self, function: Function):
        ops = list(function.walk())
        self.allocs = [op for op in ops if isinstance(op, Alloc)]
        self.rings = [op for op in ops if isinstance(op, MakeRing)]
        self.enters = [op for op in ops if isinstance(op, Enter)]
        self.mailboxes = [op for op in ops if isinstance(op, MakeMailbox)]
        self.users = list(scratch_users(function))
        self.scratch = {op: scratch_bytes(op) for op in self.users}
        self.in_one_order = not any(isinstance(op, Role | MakeRing | BulkStore) for op in ops)
        self.groups = _roles_of(self.users)
        lifetimes = Lifetimes(function) if self.in_one_order else None
        self.lives = {op: lifetimes.of(op) for op in [*self.allocs, *self.users, *self.enters]} if lifetimes else {}

    def items(self, enters: bool) -> list[Item]:
        """Buffers, most aligned and then largest first, then scratch; with ``enters`` the numbers of launches too."""
        buffers = [Item(a, _buffer(a).bytes, _buffer(a).slot.layout.alignment, self.lives.get(a)) for a in self.allocs]
        scratch = [
            Item(op, size, SCRATCH_ALIGNMENT, self.lives.get(op), self.groups[op]) for op, size in self.scratch.items()
        ]
        keep_order = not self.in_one_order
        buffers.sort(key=lambda item: (-item.alignment, 0 if keep_order else -item.size))
        numbers = [Item(op, NUMBER_BYTES, NUMBER_BYTES, self.lives[op]) for op in self.enters if enters]
        return buffers + sorted(scratch, key=lambda item: -item.size) + numbers

    def place(self, limit: int) -> tuple[dict[Operation, Area], int]:
        """Buffers and scratch as low as they go, then the rings' barriers, mailboxes and the number of a launch.

        The number has a place of its own, so that nobody has to wait until all have read it, unless that passes the
        ``limit`` and memory can be shared.
        """
        areas, end = self._place(False)
        return self._place(True) if end > limit and self.enters and self.in_one_order else (areas, end)

    def _place(self, shares: bool) -> tuple[dict[Operation, Area], int]:
        areas = lowest_places(self.items(shares))
        end = round_up(max((a.first + a.size for a in areas.values()), default=0), BARRIER_BYTES)
        for ring in self.rings:
            size = 2 * _stages(ring) * BARRIER_BYTES
            areas[ring] = Area(ring, end, size)
            end += size
        for box in self.mailboxes:  # other blocks write there at any time: memory of its own
            end = round_up(end, MAILBOX_ALIGNMENT)
            areas[box] = Area(box, end, mailbox_bytes(box))
            end += areas[box].size
        for enter in self.enters if not shares else ():
            areas[enter] = Area(enter, end, NUMBER_BYTES)
            end += NUMBER_BYTES
        return areas, end

    def commit(self, areas: dict[Operation, Area]) -> None:
        for alloc in self.allocs:
            alloc.offset = areas[alloc].first
        for ring in self.rings:
            ring.offset = areas[ring].first
        for box in self.mailboxes:
            box.offset = areas[box].first
        for enter in self.enters:
            enter.place = areas[enter].first
            others = [area for owner, area in areas.items() if owner is not enter]
            enter.lent = any(areas[enter].overlaps(area) for area in others)
        for user in self.users:
            user.attributes["scratch"] = areas[user].first

    def listing(self) -> str:
        lines = []
        for alloc in self.allocs:
            buffer = _buffer(alloc)
            shape = "x".join(map(str, buffer.slot.shape))
            text = f"{buffer.bytes} bytes ({buffer.stages} x {shape} {buffer.slot.dtype})"
            lines.append(f"  {_name(alloc.result)}: {text}")
        for group in sorted(set(self.groups.values())):
            largest = max(self.scratch[op] for op in self.users if self.groups[op] == group)
            lines.append(f"  exchange between warps: {largest} bytes")
        if self.rings:
            lines.append(f"  barriers: {sum(2 * _stages(r) * BARRIER_BYTES for r in self.rings)} bytes")
        if self.mailboxes:
            lines.append(f"  messages between blocks: {sum(map(mailbox_bytes, self.mailboxes))} bytes")
        return "\n".join(lines)


def _roles_of(users: Sequence[Operation]) -> dict[Operation, int]:
    """Operation -> number of the role that it belongs to; 0 outside of roles."""
    roles: dict[Operation, int] = {}
    found: dict[Operation, int] = {}
    for user in users:
        op: Operation | Function | None = user
        while isinstance(op, Operation) and not isinstance(op, Role):
            op = op.parent.parent.parent if op.parent is not None and op.parent.parent is not None else None
        found[user] = roles.setdefault(op, len(roles) + 1) if isinstance(op, Role) else 0
    return found


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


def _name(value: Value) -> str:
    return value.hint or "buffer"
