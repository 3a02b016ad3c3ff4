"""issue-ahead: the next iteration's products run while this iteration's results are worked on.

In a loop whose products start from values that are known beforehand, and whose vector work goes into carried values
(sums that are scaled, or rounded at every step), the matrix unit idles while the warps work. Here each iteration
issues the next one's products first::

    if lo < hi:
        issue p(lo)
        for j in lo .. hi by pairs:
            issue q(j + 1); wait for p(j); vector work on p(j)
            issue p(j + 2); wait for q(j + 1); vector work on q(j + 1)
        the one or two iterations that are left

Iterations go in pairs since registers of products in flight cannot be renamed. Needs twice the accumulators, and rings
of two stages, which they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.ir.async_ops import Await, Release, Role, Slot, TransposeSlot, ring_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Operation, Value, uses_of
from tilewright.ir.tile_ops import Dot, For, Yield
from tilewright.ir.types import RingType, ScalarType, SlotType, TileType, Type
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import matrix_unit, result_type

#: registers of a thread that carried tiles and two iterations' products may take, of those that a consumer has; the
#: rest is for addresses, counts and what the vector work needs
MOST_WORDS = 200

Mapping = dict[Value, Value]


@register_pass("issue-ahead")
class IssueAhead(FunctionPass):
    """Applies to consumer loops on a unit whose products run beside the warps."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        roles = [op for op in function.walk() if isinstance(op, Role)]
        if not roles or not matrix_unit(context.target, function).asynchronous:
            return
        for role in roles:
            for loop in [op for op in role.body.walk() if isinstance(op, For)]:
                plan = find_front(loop, function)
                if plan is not None and _words(loop, plan) <= MOST_WORDS * role.warps * context.target.warp_size:
                    _rewrite(loop, plan, function)


@dataclass
class Front:
    """What of a loop's body runs one iteration ahead."""

    dots: list[Dot]
    #: the dots, their slots and the waits for the slots' rings, with the scalars they need, in program order
    ops: list[Operation]
    #: carried scalars that they need
    counts: list[Value]
    #: scalar code that makes the next values of these
    counting: list[Operation]
    rings: set[Value]
    #: for each carried value, whether it is a tile that is made of the products
    tainted: list[bool]


def find_front(loop: For, function: Function) -> Front | None:
    """The products of a loop, if they need nothing but scalars and slots, and vector work needs them."""
    block, terminator = loop.body.block, loop.body.block.terminator
    assert isinstance(terminator, Yield)
    dots = [op for op in block.ops if isinstance(op, Dot)]
    nested = any(isinstance(op, Dot) for op in loop.body.walk() if op.parent is not block)
    if not dots or nested or not all(_from_slots(dot) for dot in dots):
        return None
    local = {v for op in block.ops for v in op.results} | set(block.args)
    if any(dot.acc in local for dot in dots) or not _worked_on(dots, function):
        return None
    read = {ring_of(v) for dot in dots for v in (dot.a, dot.b)}
    awaits = [op for op in block.ops if isinstance(op, Await) and op.ring in read]
    rings = {op.ring for op in awaits}
    if any(not isinstance(ring.type, RingType) or ring.type.stages < 2 for ring in rings):
        return None
    first = [*dots, *awaits]
    front = _slice(block, [v for op in first for v in op.operands])
    if front is None:
        return None
    counts = [v for v in loop.carried if any(v in op.operands for op in [*first, *front])]
    counting = _slice(block, [terminator.values[loop.carried.index(v)] for v in counts])
    if counting is None or any(isinstance(v.type, TileType) for v in counts):
        return None
    chosen = {id(op) for op in [*first, *front]}
    ops = [op for op in block.ops if id(op) in chosen]
    return Front(dots, ops, counts, counting, rings, _tainted(block, dots))


def _tainted(block: Block, dots: Sequence[Dot]) -> list[bool]:
    """For each value that a body yields, whether it is a tile that depends on its products."""
    found = {dot.result for dot in dots}
    for op in block.ops:
        if any(v in found for o in op.walk() for v in o.operands):
            found.update(op.results)
    assert isinstance(block.terminator, Yield)
    return [v in found and isinstance(v.type, TileType) for v in block.terminator.values]


def _from_slots(dot: Dot) -> bool:
    return isinstance(dot.a.type, SlotType) and isinstance(dot.b.type, SlotType)


def _worked_on(dots: Sequence[Dot], function: Function) -> bool:
    """Whether every product is read within the iteration, by vector work."""
    uses = uses_of(function.body)
    readers = [uses.get(dot.result, []) for dot in dots]
    return all(found and not any(isinstance(op, Dot | Yield) for op in found) for found in readers)


def _slice(block: Block, values: Sequence[Value]) -> list[Operation] | None:
    """The scalar code and slots of a block behind ``values``, in program order; None where more is behind them."""
    chosen: set[int] = set()
    pending = list(values)
    while pending:
        op = pending.pop().op
        if op is None or op.parent is not block or id(op) in chosen:
            continue
        scalar = all(isinstance(v.type, ScalarType) for v in op.results) and not op.effect and not op.regions
        if not scalar and not isinstance(op, Slot | TransposeSlot):
            return None
        chosen.add(id(op))
        pending += op.operands
    return [op for op in block.ops if id(op) in chosen]


def _words(loop: For, front: Front) -> float:
    """32-bit words of all threads that carried tiles and two iterations' products take."""
    types: list[Type] = [v.type for v in loop.carried]
    types += 2 * [result_type(dot) for dot in front.dots]
    return sum(type_.size * type_.dtype.bits / 32 for type_ in types if isinstance(type_, TileType))


# --- rewriting ------------------------------------------------------------------------------------


def _rewrite(loop: For, front: Front, function: Function) -> None:
    outer = loop.parent
    assert outer is not None
    position = outer.ops.index(loop)
    outer.ops.remove(loop)
    b = Builder(outer, loop.loc)
    with b.at(outer, position):
        branch = b.if_else(b.compare("lt", loop.lo, loop.hi), [v.type for v in loop.results])
        with b.at(branch.then_body.block):
            b.yield_(_Emitter(b, loop, front).run())
        with b.at(branch.else_body.block):
            b.yield_(loop.inits)
    for old, new in zip(loop.results, branch.results, strict=True):
        new.hint = old.hint
    results = dict(zip(loop.results, branch.results, strict=True))
    for op in function.walk():
        op.replace_operands(results)


@dataclass
class _Emitter:
    """Emits the loop's iterations, each with the next one's products ahead; for at least one iteration."""

    b: Builder
    loop: For
    front: Front

    def run(self) -> list[Value]:
        """The loop's results."""
        b, loop = self.b, self.loop
        one, two = b.index(1), b.index(2)
        trips = b.binary("floordiv", b.sub(b.add(b.sub(loop.hi, loop.lo), loop.step), one), loop.step)
        pairs = b.binary("floordiv", b.sub(trips, one), two)
        both = b.mul(loop.step, two)
        left = b.add(loop.lo, b.mul(pairs, both))
        first = self._issue(self._iteration(loop.lo, loop.inits))
        hints = [loop.index.hint, *(v.hint for v in loop.carried)]
        rest = b.for_loop(loop.lo, left, both, [*loop.inits, *first], hints)
        number = len(loop.carried)
        with b.at(rest.body.block):
            b.yield_(self._pair(rest.index, rest.carried[:number], rest.carried[number:], last=False))
        values, flying = rest.results[:number], rest.results[number:]
        branch = b.if_else(b.compare("lt", b.add(left, loop.step), loop.hi), [v.type for v in values])
        with b.at(branch.then_body.block):
            b.yield_(self._pair(left, values, flying, last=True))
        with b.at(branch.else_body.block):
            b.yield_(self._finish(self._iteration(left, values), flying, pending=0))
        return list(branch.results)

    def _pair(self, index: Value, values: Sequence[Value], flying: Sequence[Value], last: bool) -> list[Value]:
        """Two iterations, the first one's products in flight; unless they are the last, those of a third are issued."""
        pending = len(self.front.dots)
        now = self._iteration(index, values)
        following = self._issue(self._next(now))
        values = self._finish(now, flying, pending)
        now = self._iteration(self.b.add(index, self.loop.step), values if last else self._pinned(values))
        if last:
            return self._finish(now, following, pending=0)
        third = self._issue(self._next(now))
        return [*self._finish(now, following, pending), *third]

    def _iteration(self, index: Value, values: Sequence[Value]) -> Mapping:
        return {self.loop.index: index, **dict(zip(self.loop.carried, values, strict=True))}

    def _pinned(self, values: Sequence[Value]) -> list[Value]:
        """The carried values, with those made of products made here: their registers are free for those issued next."""
        made = [v for v, tainted in zip(values, self.front.tainted, strict=True) if tainted]
        pinned = dict(zip(made, self.b.wait(made, pending=len(self.front.dots)), strict=True))
        return [pinned.get(v, v) for v in values]

    def _next(self, now: Mapping) -> Mapping:
        """The index and the counts of the next iteration."""
        loop, terminator, mapping = self.loop, self.loop.body.block.terminator, dict(now)
        assert isinstance(terminator, Yield)
        for op in self.front.counting:
            self.b.insert(op.clone(mapping))
        values = [terminator.values[loop.carried.index(count)] for count in self.front.counts]
        following = {count: mapping.get(v, v) for count, v in zip(self.front.counts, values, strict=True)}
        return {loop.index: self.b.add(now[loop.index], loop.step), **following}

    def _issue(self, now: Mapping) -> list[Value]:
        """An iteration's products, in flight."""
        b, mapping, flying = self.b, dict(now), []
        for op in self.front.ops:
            if isinstance(op, Dot):
                b.loc = op.loc
                result, _ = b.async_dot(*(mapping.get(v, v) for v in (op.a, op.b, op.acc)))
                result.hint = op.result.hint
                flying.append(result)
            else:
                b.insert(op.clone(mapping))
        return flying

    def _finish(self, now: Mapping, flying: Sequence[Value], pending: int) -> list[Value]:
        """An iteration but for issuing its products, which are waited for where they are needed; what it hands on."""
        b, mapping, waited = self.b, dict(now), False
        results = [dot.result for dot in self.front.dots]
        ahead = {id(op) for op in self.front.ops if isinstance(op, Dot | Await)}
        terminator = self.loop.body.block.terminator
        assert isinstance(terminator, Yield)
        for op in self.loop.body.block.ops[:-1]:
            if id(op) in ahead:
                continue
            if not waited and self._needs(op, results):
                mapping.update(zip(results, b.wait(flying, pending=pending), strict=True))
                waited = True
            b.insert(op.clone(mapping))
        return [mapping.get(v, v) for v in terminator.values]

    def _needs(self, op: Operation, results: Sequence[Value]) -> bool:
        """Whether an operation reads products, or gives back what they read."""
        inside = list(op.walk())
        reads = any(v in o.operands for o in inside for v in results)
        return reads or any(isinstance(o, Release) and o.ring in self.front.rings for o in inside)
