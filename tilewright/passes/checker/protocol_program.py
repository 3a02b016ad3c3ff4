"""What a role does as other ranks see it: flags, accesses to symmetric tensors, and what orders these in a block.

What a block does in its own shared memory is left out, but for the rings, barriers and waits by which one role's
waits and accesses come before another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tilewright.ir import async_ops as a
from tilewright.ir import comm_ops as c
from tilewright.ir.async_ops import ring_of
from tilewright.ir.check_ops import Assume
from tilewright.ir.core import Block, Operation, Value
from tilewright.ir.indexed_ops import Atomic, Gather, Scatter
from tilewright.ir.packet_ops import Receive, Send
from tilewright.ir.tile_ops import Element, For, If, Load, Store, While
from tilewright.ir.types import SlotType, ViewType
from tilewright.passes.checker.block_events import BLOCK
from tilewright.passes.checker.model import Model, RoleModel, kind_of
from tilewright.passes.checker.places import FindPlace, first_place, gathered_place, tile_place, whole_place
from tilewright.passes.checker.program import Compiler, RoleProgram, Step, Vocabulary, control, emit, result
from tilewright.passes.checker.scalars import is_computed, root_axis
from tilewright.passes.checker.trace import Run

#: operations on global memory, with what they do there
READS, WRITES, UPDATES = (Load | Element | Gather), (Store | Scatter | c.Put), (c.ReducePut | Atomic)
COMMUNICATES = c.Signal | c.WaitFlags | Send | Receive | c.Enter | c.Credit | c.Leave
#: what names flags; packets are flags that carry data
SIGNALS, WAITS = c.Signal | Send, c.WaitFlags | Receive
#: what orders accesses within a block
ORDERS = (
    a.Acquire
    | a.Publish
    | a.Await
    | a.Release
    | a.Copy
    | a.Barrier
    | a.BulkStore
    | a.BulkWait
    | a.TakeTurn
    | a.PassTurn
    | a.Fence
)


def is_shared_by_ranks(view: Value) -> bool:
    """Whether other ranks can reach the tensor that a view belongs to."""
    root = c.view_root(view)
    return isinstance(root.type, ViewType) and root.type.symmetric


def touches_ranks(op: Operation) -> bool:
    """Whether an operation communicates, or accesses memory that ranks share."""
    if isinstance(op, COMMUNICATES):
        return True
    return isinstance(op, READS | WRITES | UPDATES | a.Copy | a.BulkStore) and is_shared_by_ranks(op.view)


def protocol_programs(model: Model) -> list[RoleProgram]:
    """For each role the steps that matter between ranks."""
    rings = _rings_between(model, [r for r in model.roles if any(touches_ranks(op) for op in r.operations(model))])
    vocabulary = Vocabulary(lambda op, flying: _acts(model, op, rings), _arguments, _events, _shortens(model))
    return [RoleProgram(model, role, vocabulary) for role in model.roles]


def flag_programs(model: Model) -> list[RoleProgram]:
    """Of roles that have such, their signals and waits alone."""
    acting = SIGNALS | WAITS | Assume
    vocabulary = Vocabulary(lambda op, flying: isinstance(op, acting), _arguments, _events, _shortens(model))
    roles = [r for r in model.roles if any(isinstance(op, SIGNALS | WAITS) for op in r.operations(model))]
    return [RoleProgram(model, role, vocabulary) for role in roles]


def flags_depend_on_data(programs: Sequence[RoleProgram]) -> bool:
    """Whether what tensors hold decides which flags are used, and when."""
    return any(
        _depends_on_data(program.compiler, _decides(program.compiler, op))
        for program in programs
        for op in program.compiler.busy
        if isinstance(op, SIGNALS | WAITS)
    )


def _rings_between(model: Model, roles: list[RoleModel]) -> set[Value]:
    """Rings that two of the roles share; others order nothing between ranks."""
    users: dict[Value, set[int]] = {ring: set() for ring in model.rings}
    for role in roles:
        for op in role.operations(model):
            if isinstance(op, a.Acquire | a.Publish | a.Await | a.Release):
                users[op.ring].add(role.number)
    return {ring for ring, numbers in users.items() if len(numbers) > 1}


def _acts(model: Model, op: Operation, rings: set[Value]) -> bool:
    if isinstance(op, a.Acquire | a.Publish | a.Await | a.Release):
        return op.ring in rings
    if isinstance(op, a.Copy):
        return touches_ranks(op) or op.result not in model.publishes or ring_of(op.slot) in rings
    if isinstance(op, a.AsyncDot | a.Wait):  # what a warpgroup's threads know of each other when they release a stage
        return bool(rings) or (isinstance(op, a.Wait) and op.token is not None and kind_of(op.token) != "mma")
    return isinstance(op, Assume | ORDERS) or touches_ranks(op)


def _shortens(model: Model) -> Callable[[Operation], bool]:
    """Every signal meets its wait: loops with such are followed to their ends, in all roles that a loop has gone to."""
    loops = [op for op in model.ops if isinstance(op, For)]
    whole = {loop.loc for loop in loops if any(isinstance(op, COMMUNICATES) for op in loop.walk())}
    return lambda loop: loop.loc not in whole


def _arguments(op: Operation) -> list[Value]:
    """The numbers that an event is made of: counts, indices, ranks, and those in the views' derivation."""
    if isinstance(op, c.Signal):
        return [op.peer, *_numbers_of(op.flag)]
    if isinstance(op, c.WaitFlags):
        return [*([] if op.when is None else [op.when]), *_numbers_of(op.flags)]
    if isinstance(op, c.Credit):
        return [] if op.peer is None else [op.peer]
    if isinstance(op, Send | Receive):
        return _numbers_of(op.view)
    found = BLOCK.arguments(op)
    if touches_ranks(op) and not isinstance(op, COMMUNICATES):
        found = [*found, *op.index, *_numbers_of(op.view)]  # type: ignore[attr-defined]
    return found


def _numbers_of(view: Value) -> list[Value]:
    found: list[Value] = []
    while view.op is not None and isinstance(view.type, ViewType):
        op: Any = view.op
        found += [v for v in op.operands if v is not op.view]
        view = op.view
    return found


# --- data -----------------------------------------------------------------------------------------


def _decides(compiler: Compiler, op: Operation) -> list[Value]:
    """The values that decide whether an operation runs and what it names."""
    found, block = _arguments(op), op.parent
    while block in compiler.owners:
        owner = compiler.owners[block]
        found = [*found, *control(owner)]
        block = owner.parent
    return found


def _depends_on_data(compiler: Compiler, values: list[Value]) -> bool:
    """Whether numbers follow from what tensors hold, which the checker can only guess."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if value in seen or isinstance(value.type, ViewType):
            continue
        seen.add(value)
        op = value.op
        if op is not None and not isinstance(op, For | While | If) and not is_computed(op):
            return True
        if isinstance(value.owner, Block) or op is not None:
            pending += compiler.sources(value)
    return False


# --- events ---------------------------------------------------------------------------------------


def _events(compiler: Compiler, op: Operation) -> list[Step]:
    if isinstance(op, a.Fence):
        return [] if op.proxy == "async" else [emit(f"{op.proxy}_fence", op)]
    make = _MAKERS.get(type(op))
    if make is not None:
        return [*make(compiler, op), *result(compiler, op)]
    if not touches_ranks(op):
        return BLOCK.events(compiler, op)
    find = _place(compiler, op)
    if isinstance(op, a.Copy | a.BulkStore):
        return [*BLOCK.events(compiler, op), _add_place(find)]
    kind = "far_read" if isinstance(op, READS) else "far_update" if isinstance(op, UPDATES) else "far_write"
    return [*result(compiler, op), _emit_at(kind, op, find)]


def _emit_at(kind: str, op: Operation, find: FindPlace) -> Step:
    step = emit(kind, op)

    def emit_at(run: Run) -> None:
        step(run)
        run.events[-1].place = find(run)

    return emit_at


def _add_place(find: FindPlace) -> Step:
    def step(run: Run) -> None:
        run.events[-1].place = find(run)

    return step


def _place(compiler: Compiler, op: Any) -> FindPlace:
    exact = not _depends_on_data(compiler, [*op.index, *_numbers_of(op.view)])
    if isinstance(op, Gather | Scatter | Atomic):
        values: Any = op.result if isinstance(op, Gather) else op.value
        return gathered_place(op.view, op.index, values.type.shape, op.axes, exact)
    return tile_place(op.view, op.index, _shape(op), exact)


def _shape(op: Any) -> tuple[int, ...]:
    if isinstance(op, Element):
        return (1,) * len(op.index)
    if isinstance(op, a.Copy | a.BulkStore):
        assert isinstance(op.slot.type, SlotType)
        return op.slot.type.shape
    tile: Any = op.result.type if isinstance(op, Load) else op.value.type
    return tuple(tile.shape)


def _size(view: Value) -> Callable[[Run, int], int]:
    def size(run: Run, axis: int) -> int:
        root, number = root_axis(view, axis)
        known = root.type.shape[number] if isinstance(root.type, ViewType) else None
        return known if known is not None else run.inputs.dims[root, number]

    return size


def _signal(compiler: Compiler, op: c.Signal) -> list[Step]:
    find, peer = whole_place(op.flag, _size(op.flag), True), op.peer

    def step(run: Run) -> None:
        emit_signal(run)
        run.events[-1].place = replace(find(run), rank=run.env[peer])

    emit_signal = emit("signal", op)
    return [step]


def _wait(compiler: Compiler, op: c.WaitFlags) -> list[Step]:
    find, when = whole_place(op.flags, _size(op.flags), True), op.when
    emit_wait = _emit_at("wait_flags", op, find)

    def step(run: Run) -> None:
        if when is None or run.env[when]:
            emit_wait(run)

    return [step]


def _credit(compiler: Compiler, op: c.Credit) -> list[Step]:
    peer = op.peer

    def step(run: Run) -> None:
        emit_credit(run)
        run.events[-1].other = None if peer is None else run.env[peer]

    emit_credit = emit("credit", op)
    return [step]


_MAKERS: dict[type[Operation], Callable[[Compiler, Any], list[Step]]] = {
    c.Signal: _signal,
    c.WaitFlags: _wait,
    c.Credit: _credit,
    Send: lambda compiler, op: [_emit_at("signal", op, first_place(op.view))],
    Receive: lambda compiler, op: [*result(compiler, op), _emit_at("wait_flags", op, first_place(op.view))],
    c.Enter: lambda compiler, op: [emit("enter", op)],
    c.Leave: lambda compiler, op: [emit("leave", op)],
}

__all__ = ["flag_programs", "flags_depend_on_data", "protocol_programs", "touches_ranks"]
