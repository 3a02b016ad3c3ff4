"""What each role does: its schedule, compiled once, then run on small inputs into a trace of events.

Only scalars that decide control flow, slots and counts are computed; tiles are dropped, but for the number of the
matrix unit's group that an accumulator in flight belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.ir import async_ops as a
from tilewright.ir.core import Block, Effect, Operation, Region, Value
from tilewright.ir.tile_ops import For, If, Reduce, While, yielded
from tilewright.ir.types import ScalarType
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.model import Model, RoleModel
from tilewright.passes.checker.scalars import evaluator, parameter_key
from tilewright.passes.checker.scenarios import Inputs
from tilewright.passes.checker.trace import Event, Full, Infeasible, Run

#: iterations of a `while` whose condition depends on data
MOST_UNKNOWN = 24

Step = Callable[["Run"], None]


@dataclass(frozen=True)
class Vocabulary:
    """Which operations a program follows, and how they become events."""

    #: whether an operation acts; the second argument: values that may be accumulators in flight
    acts: Callable[[Operation, set[Value]], bool]
    #: the values that its event is made of
    arguments: Callable[[Operation], list[Value]]
    events: Callable[[Compiler, Operation], list[Step]]
    #: whether a long loop may be shortened
    shortens: Callable[[Operation], bool] = lambda op: True


class RoleProgram:
    """The steps of one role."""

    def __init__(self, model: Model, role: RoleModel, vocabulary: Vocabulary):
        self.model, self.role = model, role
        self.compiler = Compiler(model, role, vocabulary)
        ops: list[Operation] = []
        for op in model.function.body.block.ops:
            if not isinstance(op, a.Role):
                ops.append(op)
            elif op is role.op:
                ops += op.body.block.ops
        self.steps = self.compiler.block(ops)
        #: what a set of executions should cover of this role; see `Run.covered`
        self.goals = {
            (op, n)
            for op in self.compiler.busy
            if isinstance(op, For | If)
            for n in ((0, 1) if isinstance(op, If) else (1, 2))
        }

    def trace(self, inputs: Inputs, most_events: int) -> Run:
        """Run on inputs. Raises Fault for what one thread does wrong on its own, Infeasible."""
        run = Run(inputs, {**self.compiler.constants, **inputs.scalars}, most_events)
        try:
            for step in self.steps:
                step(run)
        except Full:
            run.cut = True
        if run.issued > run.retired and not run.cut:
            dots = [event.op for event in run.events if event.kind == "dot"]
            raise Fault(
                f"{self.role.name} ends with {run.issued - run.retired} dots in flight",
                dots[-1],
                hint="async.wait for them at its end",
                events=[(self.role.name, event) for event in run.events],
            )
        return run


class Compiler:
    """Turns operations into steps; see `RoleProgram`."""

    def __init__(self, model: Model, role: RoleModel, vocabulary: Vocabulary):
        self.model, self.role, self.vocabulary = model, role, vocabulary
        body = model.function.body if role.op is None else role.op.body
        self.constants: dict[Value, Any] = {param: parameter_key(param) for param in model.function.params}
        self.owners = {r.block: op for op in model.ops for r in op.regions}
        self.flying = _flying(body)
        self.busy = _busy(body, self.flying, vocabulary)
        self.busy |= {op for op in model.function.body.block.ops if not op.regions and vocabulary.acts(op, self.flying)}
        self.needed = self._needed(body)
        self.counting = self._counting(body)

    # --- what matters -------------------------------------------------------------------------------

    def _needed(self, body: Region) -> set[Value]:
        """Values that the schedule's course depends on."""
        pending: list[Value] = []
        for op in body.walk():
            if op in self.busy:
                pending += control(op) if op.regions else self.vocabulary.arguments(op)
        seen: set[Value] = set()
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            pending += self.sources(value)
        return seen

    def sources(self, value: Value) -> Iterable[Value]:
        op = value.op
        if op is None:
            assert isinstance(value.owner, Block)
            owner = self.owners.get(value.owner)
            position = value.owner.args.index(value)
            if isinstance(owner, For):
                return [owner.lo, owner.hi, owner.step] if position == 0 else _carried(owner, position - 1)
            return _carried(owner, position) if isinstance(owner, While) else []
        position = op.results.index(value)
        if isinstance(op, For | While):
            return [*_carried(op, position), *control(op)]
        if isinstance(op, If):
            return [op.condition, *(yielded(r)[position] for r in op.regions)]
        return op.operands

    def _counting(self, body: Region) -> set[Operation]:
        """Loops whose index numbers the uses of rings, slots or places of exchange."""
        counted = a.Acquire | a.Await | a.Publish | a.Release | a.Slot
        pending = [op.count for op in body.walk() if isinstance(op, counted)]
        pending += [op.turn for op in body.walk() if isinstance(op, Reduce) and op.turn is not None]
        seen: set[Value] = set()
        found: set[Operation] = set()
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            owner = value.op if value.op is not None else self.owners.get(value.owner)  # type: ignore[arg-type]
            if isinstance(owner, For) and value is owner.index:
                found.add(owner)
            elif isinstance(owner, For | While | If):
                deciding = control(owner)
                pending += [v for v in self.sources(value) if not any(v is c for c in deciding)]
            elif value.op is not None:
                pending += value.op.operands
        return found

    # --- steps --------------------------------------------------------------------------------------

    def block(self, ops: Iterable[Operation]) -> list[Step]:
        steps: list[Step] = []
        for op in ops:
            if isinstance(op, For | While | If):
                if op in self.busy or any(v in self.needed for v in op.results):
                    steps.append(_STRUCTURED[type(op)](self, op))
                continue
            if op in self.busy:
                steps += self._checks(op)
                steps += self.vocabulary.events(self, op)
            elif op.results and any(v in self.needed for v in op.results) and not isinstance(op, a.Alloc | a.MakeRing):
                self.scalar(op, steps)
        return steps

    def scalar(self, op: Operation, steps: list[Step]) -> None:
        evaluate = _slot(self, op) if isinstance(op, a.Slot) else evaluator(op)
        if isinstance(op, a.TransposeSlot):
            evaluate = _same(op.slot)
        if op.base_name == "tile.constant" and isinstance(op.results[0].type, ScalarType):
            self.constants[op.results[0]] = evaluate(None)
            return
        if len(op.results) != 1:
            steps += [_assign(value, evaluate) for value in op.results]
            return
        steps.append(_assign(op.results[0], evaluate))

    def _checks(self, op: Operation) -> list[Step]:
        """Accumulators in flight go to the next dot or to a wait, and nowhere else."""
        allowed = op.groups[2] if isinstance(op, a.AsyncDot) else op.operands if isinstance(op, a.Wait) else []
        reads = [v for v in op.operands if v in self.flying and not any(v is w for w in allowed)]
        return [_not_in_flight(self, op, value) for value in reads]

    def carried(self, values: Iterable[Value]) -> list[int]:
        """The positions of values that are worth carrying."""
        return [n for n, v in enumerate(values) if v in self.needed or v in self.flying]

    def fault(self, run: Run, message: str, op: Operation, other: Operation | None = None, hint: str = "") -> Fault:
        return Fault(message, op, other, hint, [(self.role.name, event) for event in run.events])


# --- analysis -------------------------------------------------------------------------------------


def _carried(op: Any, position: int) -> list[Value]:
    return [op.inits[position], yielded(op.regions[-1])[position]]


def control(op: Operation) -> list[Value]:
    if isinstance(op, For):
        return [op.lo, op.hi, op.step]
    return [op.condition] if isinstance(op, If) else yielded(op.regions[0])[:1] if isinstance(op, While) else []


def _flying(body: Region) -> set[Value]:
    """Values that may be accumulators in flight."""
    found = {op.results[0] for op in body.walk() if isinstance(op, a.AsyncDot)}
    size = -1 if found else 0
    while size != len(found):
        size = len(found)
        for op in body.walk():
            if isinstance(op, For | While):
                arguments = [op.carried] if isinstance(op, For) else [r.block.args for r in op.regions]
                for n, (init, value) in enumerate(
                    zip(op.inits, yielded(op.regions[-1])[-len(op.inits) :], strict=False)
                ):
                    if init in found or value in found:
                        found.update([op.results[n], *(args[n] for args in arguments)])
            elif isinstance(op, If):
                for n, result in enumerate(op.results):
                    if any(yielded(r)[n] in found for r in op.regions):
                        found.add(result)
    return found


def _busy(body: Region, flying: set[Value], vocabulary: Vocabulary) -> set[Operation]:
    """Operations that the machine sees, and those that hold such."""
    found: set[Operation] = set()

    def visit(op: Operation) -> bool:
        inside = [visit(nested) for r in op.regions for nested in r.block.ops]
        if vocabulary.acts(op, flying) or any(inside):
            found.add(op)
            return True
        return False

    for op in body.block.ops:
        visit(op)
    return found


# --- steps ----------------------------------------------------------------------------------------


def _assign(value: Value, evaluate: Callable[[Any], Any]) -> Step:
    def step(run: Run) -> None:
        run.env[value] = evaluate(run)

    return step


def _not_in_flight(compiler: Compiler, op: Operation, value: Value) -> Step:
    def step(run: Run) -> None:
        group = run.env.get(value, 0)
        if group:
            dot = [event.op for event in run.events if event.kind == "dot"][group - 1]
            raise compiler.fault(
                run,
                f"'{op.name}' reads an accumulator whose dot is in flight, or was and came past its wait",
                op,
                dot,
                "only the results of async.wait may be read",
            )

    return step


def _for(compiler: Compiler, op: For) -> Step:
    lo, hi, step_, index = op.lo, op.hi, op.step, op.index
    kept = compiler.carried(op.carried)
    kept = sorted({*kept, *compiler.carried(op.results)})
    arguments, results = [op.carried[n] for n in kept], [op.results[n] for n in kept]
    inits, following = [op.inits[n] for n in kept], [yielded(op.body)[n] for n in kept]
    body = compiler.block(op.body.block.ops)
    counts, shortens = op in compiler.counting, compiler.vocabulary.shortens(op)

    def step(run: Run) -> None:
        env = run.env
        values = [env.get(v, 0) for v in inits]
        chosen: Sequence[int] = range(env[lo], env[hi], max(1, env[step_]))
        if shortens:
            chosen = indices(run, chosen, counts)
        run.covered.add((op, min(len(chosen), 2)))
        if len(chosen) > 1:
            run.covered.add((op, 1))
        for i in chosen:
            env[index] = i
            env.update(zip(arguments, values, strict=True))
            for inner in body:
                inner(run)
            values = [env.get(v, 0) for v in following]
        env.update(zip(results, values, strict=True))

    return step


def indices(run: Run, every: Sequence[int], counts: bool) -> Sequence[int]:
    """Of long loops the first and the last indices, with a multiple of all stage counts left out between them.

    Where the index itself numbers uses (``counts``), only the first: a ring's uses have no gaps.
    """
    most, period = run.inputs.most_trips, run.inputs.period
    if most is None or len(every) <= most + period:
        return every
    run.shortened = True
    left_out = (len(every) - most) // period * period
    first = len(every) - left_out if counts else (len(every) - left_out) // 2
    return [*every[:first], *(() if counts else every[first + left_out :])]


def _while(compiler: Compiler, op: While) -> Step:
    before, body = op.regions
    kept = sorted({n for r in op.regions for n in compiler.carried(r.block.args)} | set(compiler.carried(op.results)))
    inits, results = [op.inits[n] for n in kept], [op.results[n] for n in kept]
    tests, arguments = [before.block.args[n] for n in kept], [body.block.args[n] for n in kept]
    (condition, *_), following = yielded(before), [yielded(body)[n] for n in kept]
    checks, steps = compiler.block(before.block.ops), compiler.block(body.block.ops)

    def step(run: Run) -> None:
        env = run.env
        values = [env.get(v, 0) for v in inits]
        for _ in range(MOST_UNKNOWN):
            env.update(zip(tests, values, strict=True))
            for inner in checks:
                inner(run)
            if not env[condition]:
                env.update(zip(results, values, strict=True))
                return
            env.update(zip(arguments, values, strict=True))
            for inner in steps:
                inner(run)
            values = [env.get(v, 0) for v in following]
        raise Infeasible("a loop that data ends went on for long")

    return step


def _if(compiler: Compiler, op: If) -> Step:
    kept = compiler.carried(op.results)
    results, condition = [op.results[n] for n in kept], op.condition
    branches = []
    for region in (op.else_body, op.then_body):
        values = yielded(region)
        branches.append((compiler.block(region.block.ops), [values[n] for n in kept]))

    def step(run: Run) -> None:
        env = run.env
        taken = bool(env[condition])
        run.covered.add((op, int(taken)))
        steps, values = branches[taken]
        for inner in steps:
            inner(run)
        for result, value in zip(results, values, strict=True):
            env[result] = env.get(value, 0)

    return step


_STRUCTURED: dict[type[Operation], Callable[[Compiler, Any], Step]] = {For: _for, While: _while, If: _if}


# --- values and events -----------------------------------------------------------------------------


def _slot(compiler: Compiler, op: a.Slot) -> Callable[[Any], int]:
    numbers = [region.number for region in compiler.model.buffers[op.buffer]]
    count = op.count
    return lambda run: numbers[run.env[count] % len(numbers)]


def _same(value: Value) -> Callable[[Run], Any]:
    return lambda run: run.env[value]


def result(compiler: Compiler, op: Operation) -> list[Step]:
    """The value of an operation that is both seen and computed with."""
    steps: list[Step] = []
    if any(v in compiler.needed for v in op.results) and op.effect in (Effect.PURE, Effect.READ):
        compiler.scalar(op, steps)
    return steps


def emit(kind: str, op: Operation, access: Callable[[Run], Any] | None = None, other: Any = None) -> Step:
    def step(run: Run) -> None:
        run.make_room()
        run.events.append(Event(kind, op, None, 0, None if access is None else access(run), other))

    return step


__all__ = ["Compiler", "RoleProgram", "Step", "Vocabulary", "control", "emit", "result"]
