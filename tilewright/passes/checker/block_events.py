"""What happens in a block, as events that `machine` plays: the vocabulary of the schedule checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tilewright.ir import async_ops as a
from tilewright.ir.check_ops import Assume
from tilewright.ir.core import Operation, Value
from tilewright.ir.tile_ops import Dot, Reduce
from tilewright.ir.types import ScalarType, SlotType, TileType
from tilewright.passes.checker.model import by_engine, engine_alone, kind_of, split_axis
from tilewright.passes.checker.program import Compiler, Step, Vocabulary, emit, result
from tilewright.passes.checker.trace import BulkCopy, Event, Infeasible, Run

_ACTS = (
    a.Acquire, a.Copy, a.Publish, a.Await, a.Release, a.AsyncDot, a.Wait, a.LocalLoad, a.LocalStore, a.Fence,
    a.Barrier, a.BulkStore, a.BulkWait, a.TakeTurn, a.PassTurn, Assume,
)  # fmt: skip


def _acts(op: Operation, flying: set[Value]) -> bool:
    if isinstance(op, _ACTS) or op.attributes.get("scratch") is not None:
        return True
    if not op.terminator and not op.regions and any(v in flying for v in op.operands):
        return True
    return isinstance(op, Dot) and any(isinstance(v.type, SlotType) for v in op.operands)


def _arguments(op: Operation) -> list[Value]:
    """What an operation's event is made of."""
    if isinstance(op, a.Acquire | a.Publish | a.Await | a.Release):
        return [op.count]
    if isinstance(op, Assume):
        return [op.condition]
    if isinstance(op, Reduce):
        return [op.turn] if op.turn is not None else []
    return [v for v in op.operands if isinstance(v.type, SlotType)]


# --- events ----------------------------------------------------------------------------------------


def _events(compiler: Compiler, op: Operation) -> list[Step]:
    """The steps of an operation that the machine sees."""
    make = _MAKERS.get(type(op))
    if make is not None:
        return make(compiler, op)
    if op.attributes.get("scratch") is not None and op in compiler.model.scratch:
        return _exchange(compiler, op) + result(compiler, op)
    if isinstance(op, Dot):
        slots = [v for v in op.operands if isinstance(v.type, SlotType)]
        return [emit("load", op, _whole(slot)) for slot in slots]
    return result(compiler, op)


def _whole(slot: Value) -> Callable[[Run], Any]:
    return lambda run: (run.env[slot], None, None)


def _ring_event(kind: str) -> Callable[[Compiler, Any], list[Step]]:
    def make(compiler: Compiler, op: Any) -> list[Step]:
        ring, count = compiler.model.rings[op.ring], op.count

        def step(run: Run) -> None:
            run.make_room()
            number = run.env[count]
            if number < 0:
                raise compiler.fault(run, f"the use count of {ring.label} is {number}", op)
            run.events.append(Event(kind, op, ring, number))

        return [step]

    return make


def _publish(compiler: Compiler, op: a.Publish) -> list[Step]:
    return _ring_event("announced" if engine_alone(op) else "publish")(compiler, op)


def _release(compiler: Compiler, op: a.Release) -> list[Step]:
    steps = _ring_event("release")(compiler, op)
    if compiler.model.rings[op.ring].read_by_threads and not compiler.role.single_thread:
        return [emit("barrier", op, other="warpgroup"), *steps]  # part of the release (backends/nvidia/rings.py)
    return steps


def _copy(compiler: Compiler, op: a.Copy) -> list[Step]:
    publish = compiler.model.publishes.get(op.result)
    slot, spread = op.slot, _spread_copy(op)
    if publish is None:
        return [emit("start_copy", op, lambda run: (run.env[slot], None, spread), kind_of(op.result))]
    if not by_engine(op.result):
        return [emit("store", op, lambda run: (run.env[slot], None, spread))]
    engines = [token for token in publish.tokens if by_engine(token)]
    announced = sum(_bytes(token) for token in engines) if engines[0] is op.result else 0
    parts = compiler.model.ctas if op.multicast is not None else 1
    other = BulkCopy(announced, bool(announced) and engine_alone(publish), _bytes(op.result) // parts, parts > 1)
    ring, count = compiler.model.rings[publish.ring], publish.count

    def step(run: Run) -> None:
        run.make_room()
        run.events.append(Event("bulk_copy", op, ring, run.env[count], (run.env[slot], None, None), other))

    return [step]


def _spread_copy(op: a.Copy) -> tuple[str, object]:
    owners = op.layout.owners if op.layout is not None and isinstance(op.slot.op, a.Slot) else None
    return ("copy", id(op)) if owners is None else ("tile", owners)


def _bytes(token: Value) -> int:
    assert isinstance(token.op, a.Copy) and isinstance(token.op.slot.type, SlotType)
    return token.op.slot.type.bytes


def _dot(compiler: Compiler, op: a.AsyncDot) -> list[Step]:
    result, token = op.results
    rows = isinstance(op.acc.type, TileType) and op.acc.type.shape[0] > 64
    slots = [
        (v, 0 if rows and v is op.a and isinstance(v.op, a.Slot) else None)
        for v in (op.a, op.b)
        if isinstance(v.type, SlotType)
    ]

    def step(run: Run) -> None:
        run.make_room()
        run.issued += 1
        run.env[result] = run.env[token] = run.issued
        run.events.append(Event("dot", op, access=[(run.env[v], own, None) for v, own in slots]))

    return [step]


def _wait(compiler: Compiler, op: a.Wait) -> list[Step]:
    token, pending = op.token, op.pending
    if token is not None and kind_of(token) != "mma":
        return [emit("wait_copies", op, other=(kind_of(token), pending))]

    def step(run: Run) -> None:
        run.make_room()
        run.retired = max(run.retired, run.issued - pending)
        run.events.append(Event("wait", op, None, run.issued - pending))
        for value in [*op.values, *([token] if token is not None else [])]:
            group = run.env.get(value, 0)
            if group > run.retired:
                dot = [event.op for event in run.events if event.kind == "dot"][group - 1]
                text = f"'{op.name}' waits for a dot that is among the {pending} that may stay in flight"
                raise compiler.fault(run, text, op, dot, f"pending = {run.issued - group} at most")

    return [step]


def _local(kind: str) -> Callable[[Compiler, Any], list[Step]]:
    def make(compiler: Compiler, op: Any) -> list[Step]:
        slot, tile = op.slot, op.result.type if kind == "load" else op.value.type
        if isinstance(tile, ScalarType):
            return [emit(kind, op, lambda run: (run.env[slot], None, ("copies", None)))]
        own = split_axis(tile, compiler.role.groups) if isinstance(slot.op, a.Slot) else None
        owners = None if tile.layout is None else tile.layout.owners
        spread = ("tile", owners or tile.layout) if isinstance(slot.op, a.Slot) else ("turned", id(op))
        if kind == "load" and owners is None:
            spread = ("copies", tile.layout)
        return [emit(kind, op, lambda run: (run.env[slot], own, spread))]

    return make


def _bulk_store(compiler: Compiler, op: a.BulkStore) -> list[Step]:
    slot, own = op.slot, op.axis if op.scope == "warpgroup" and compiler.role.groups > 1 else None
    return [emit("bulk_store", op, lambda run: (run.env[slot], own, None), own)]


def _exchange(compiler: Compiler, op: Operation) -> list[Step]:
    """Threads of a role pass elements through scratch memory, between two barriers of the role.

    A reduction whose turns count takes one of two places, without the first barrier.
    """
    places, turn = compiler.model.scratch[op], op.turn if isinstance(op, Reduce) else None

    def place(run: Run) -> int:
        return places[0 if turn is None else run.env[turn] % len(places)].number

    return [
        *([emit("barrier", op, other="role")] if turn is None else []),
        emit("store", op, lambda run: (place(run), None, ("exchange", id(op)))),
        emit("barrier", op, other="role"),
        emit("load", op, lambda run: (place(run), None, None)),
    ]


def _assume(compiler: Compiler, op: Assume) -> list[Step]:
    condition = op.condition

    def step(run: Run) -> None:
        if not run.env[condition]:
            raise Infeasible("an assumption does not hold")

    return [step]


_MAKERS: dict[type[Operation], Callable[[Compiler, Any], list[Step]]] = {
    a.Acquire: _ring_event("acquire"),
    a.Await: _ring_event("await"),
    a.Publish: _publish,
    a.Release: _release,
    a.Copy: _copy,
    a.AsyncDot: _dot,
    a.Wait: _wait,
    a.LocalLoad: _local("load"),
    a.LocalStore: _local("store"),
    a.Fence: lambda compiler, op: [emit("fence", op)],
    a.Barrier: lambda compiler, op: [emit("barrier", op, other=op.scope)],
    a.TakeTurn: lambda compiler, op: [emit("take_turn", op)],
    a.PassTurn: lambda compiler, op: [emit("pass_turn", op)],
    a.BulkStore: _bulk_store,
    a.BulkWait: lambda compiler, op: [emit("bulk_wait", op, other=op.pending)],
    Assume: _assume,
}

BLOCK = Vocabulary(_acts, _arguments, _events)

__all__ = ["BLOCK"]
