"""Every way to take one synchronisation out of a schedule, or to weaken it by one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tilewright.ir.async_ops import (
    Acquire,
    Alloc,
    Await,
    Barrier,
    BulkWait,
    Fence,
    MakeRing,
    PassTurn,
    Publish,
    Release,
    Role,
    TakeTurn,
    Wait,
)
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import PUT, Credit, Enter, Leave, Put, ReducePut, Signal, WaitFlags
from tilewright.ir.core import Block, Function, Module, Operation, Value, replace_uses
from tilewright.ir.packet_ops import Send
from tilewright.ir.tile_ops import For, If, While
from tilewright.ir.types import BufferType, RingType, i1


@dataclass
class Mutant:
    """``position``: of the operation among all of the function; ``apply`` changes it where it stands in a clone."""

    place: str
    change: str
    position: int
    apply: Callable[[Function, Operation], None]

    def make(self, module: Module) -> Module:
        """A clone of the module with the change."""
        copy = module.clone()
        function = copy.functions[0]
        self.apply(function, list(function.walk())[self.position])
        return copy


def mutants(module: Module) -> Iterator[Mutant]:
    """One for each synchronising operation and each way to change it."""
    places: dict[str, int] = {}
    function = module.functions[0]
    weaker = _weaker_scopes(function)
    for position, (op, where) in enumerate(_walk(function.body.block, "")):
        changes = list(_changes(op, weaker))
        if not changes:
            continue
        name = f"{where}{op.name.removeprefix('async.').removeprefix('comm.')}"
        places[name] = places.get(name, 0) + 1
        place = f"{name} {places[name]}"
        for change, apply in changes:
            yield Mutant(place, change, position, apply)


def protocol_mutants(module: Module) -> Iterator[Mutant]:
    """Of a function that communicates: what orders ranks, and the threads of a block towards other ranks."""
    ops = list(module.functions[0].walk())
    chosen = {op for op in ops if isinstance(op, COMMUNICATION)}
    for op in [op for op in ops if isinstance(op, Signal | Leave | WaitFlags | Credit)]:
        assert op.parent is not None
        block, at = op.parent.ops, op.parent.ops.index(op)
        beside = block[:at][::-1] if isinstance(op, Signal | Leave) else block[at + 1 :]
        for other in beside:
            if not isinstance(other, Barrier | BulkWait | Fence):
                break
            chosen.add(other)
    return (mutant for mutant in mutants(module) if ops[mutant.position] in chosen)


def _weaker_scopes(function: Function) -> dict[str, str]:
    """What a barrier's scope can shrink to: a set of fewer threads. Waves of AMD have the block's barrier alone."""
    roles = [op for op in function.body.block.ops if isinstance(op, Role)]
    if not roles and int(function.attributes["threads"]) == 32 * int(function.attributes["num_warps"]) > 128:
        return {"block": "warpgroup"}
    if any(role.warps > 4 for role in roles):
        return {"block": "role", "role": "warpgroup"}
    return {"block": "role"} if roles else {}


def _walk(block: Block, where: str) -> Iterator[tuple[Operation, str]]:
    """Operations in the order of `Operation.walk`, and what they are inside of."""
    for op in block.ops:
        yield op, where
        inside = where
        if isinstance(op, Role):
            inside = f"{op.kind}: "
        elif isinstance(op, For | While):
            inside += "loop "
        elif isinstance(op, If):
            inside += "if "
        for region in op.regions:
            yield from _walk(region.block, inside)


#: what orders ranks
COMMUNICATION = Signal | WaitFlags | Credit | Enter | Leave | Put | ReducePut | Send

Change = tuple[str, Callable[[Function, Operation], None]]


def _changes(op: Operation, weaker: dict[str, str]) -> Iterator[Change]:
    if isinstance(op, COMMUNICATION):
        yield "delete", _never if isinstance(op, WaitFlags) else _delete
    if isinstance(op, Credit) and not op.in_turn:
        yield "of the launch before", _set("in_turn", True)
    if isinstance(op, Signal) and any(token.type == PUT for token in op.after):
        yield "without the puts it tells of", _alone_signal
    if isinstance(op, Acquire | Publish | Await | Release | Wait | BulkWait | Fence | Barrier | TakeTurn | PassTurn):
        yield "delete", _delete
    if isinstance(op, Wait | BulkWait):
        yield f"pending {op.pending} -> {op.pending + 1}", _add("pending", 1)
    if isinstance(op, BulkWait) and not op.read:
        yield "wait for the reads alone", _set("read", True)
    if isinstance(op, Barrier) and weaker.get(op.scope):
        yield f"scope {op.scope} -> {weaker[op.scope]}", _set("scope", weaker[op.scope])
    if isinstance(op, Fence) and op.proxy == "async":
        yield "behind the next operation", _later
    if isinstance(op, Release) and any(isinstance(o, Wait) for o in _before(_with_branch(op))):
        yield "before the wait", _before_wait
    if isinstance(op, MakeRing):
        for name in ("producers", "consumers"):
            count = getattr(op, name)
            yield f"{name} {count} -> {count + 1}", _add(name, 1)
            yield f"{name} {count} -> {count - 1}", _add(name, -1)
        if op.ctas > 1:
            yield f"ctas {op.ctas} -> 1", _set("ctas", 1)
            yield f"ctas {op.ctas} -> 1, and consumers so", _alone
        if _stages(op.result) > 1:
            yield f"stages {_stages(op.result)} -> {_stages(op.result) - 1}, of its buffers too", _shallower
            yield f"stages {_stages(op.result)} -> 1, of its buffers too", _one_stage
    if isinstance(op, Alloc) and _stages(op.result) > 1:
        yield f"stages {_stages(op.result)} -> {_stages(op.result) - 1}", _fewer_slots


def _stages(value: Value) -> int:
    assert isinstance(value.type, RingType | BufferType)
    return value.type.stages


def _delete(function: Function, op: Operation) -> None:
    if isinstance(op, Wait):
        replace_uses(function.body, dict(zip(op.results, op.values, strict=True)))
    for user in function.walk() if isinstance(op, Credit | Put | ReducePut) else ():
        user.groups = [[v for v in group if v not in op.results] for group in user.groups]
    assert op.parent is not None
    op.parent.ops.remove(op)


def _never(function: Function, op: Operation) -> None:
    """A wait that gives its token at once."""
    assert isinstance(op, WaitFlags) and op.parent is not None
    builder = Builder(op.parent, op.loc)
    with builder.at(op.parent, op.parent.ops.index(op)):
        op.when = builder.constant(False, i1)


def _alone_signal(function: Function, op: Operation) -> None:
    assert isinstance(op, Signal)
    op.after = [token for token in op.after if token.type != PUT]


def _add(name: str, difference: int) -> Callable[[Function, Operation], None]:
    def apply(function: Function, op: Operation) -> None:
        setattr(op, name, getattr(op, name) + difference)

    return apply


def _set(name: str, value: object) -> Callable[[Function, Operation], None]:
    def apply(function: Function, op: Operation) -> None:
        setattr(op, name, value)

    return apply


def _alone(function: Function, op: Operation) -> None:
    """Releases reach the own block only, whose producer waits for no more."""
    assert isinstance(op, MakeRing)
    op.consumers, op.ctas = op.consumers // op.ctas, 1


def _later(function: Function, op: Operation) -> None:
    assert op.parent is not None
    ops = op.parent.ops
    at = ops.index(op)
    ops[at], ops[at + 1] = ops[at + 1], ops[at]


def _with_branch(op: Operation) -> Operation:
    """The operation, or the branch that does nothing else."""
    assert op.parent is not None
    outer = op.parent.parent.parent if op.parent.parent is not None else None
    return outer if isinstance(outer, If) else op


def _before(op: Operation) -> list[Operation]:
    assert op.parent is not None
    return op.parent.ops[: op.parent.ops.index(op)]


def _before_wait(function: Function, op: Operation) -> None:
    """Move a release, with the branch around it and what it needs, before the wait that comes before it."""
    moved = _with_branch(op)
    block = moved.parent
    assert block is not None
    at = block.ops.index(moved)
    wait = max(n for n, o in enumerate(block.ops[:at]) if isinstance(o, Wait))
    needed, chain = {v for o in moved.walk() for v in o.operands}, []
    for o in reversed(block.ops[wait + 1 : at]):
        if any(r in needed for r in o.results):
            chain.insert(0, o)
            needed.update(v for inner in o.walk() for v in inner.operands)
    rest = [o for o in block.ops[wait:at] if o not in chain]
    block.ops[wait : at + 1] = [*chain, moved, *rest]


def _shallower(function: Function, op: Operation) -> None:
    _deepen(function, op.results[0], _stages(op.results[0]) - 1)


def _one_stage(function: Function, op: Operation) -> None:
    _deepen(function, op.results[0], 1)


def _deepen(function: Function, ring: Value, stages: int) -> None:
    ring.type = RingType(stages)
    for op in function.walk():
        if isinstance(op, Alloc) and op.ring is ring:
            op.result.type = BufferType(stages, op.result.type.slot)  # type: ignore[union-attr]


def _fewer_slots(function: Function, op: Operation) -> None:
    op.results[0].type = BufferType(_stages(op.results[0]) - 1, op.results[0].type.slot)  # type: ignore[union-attr]
