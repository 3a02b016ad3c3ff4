"""lead: make ready in one iteration what the next one multiplies.

In a loop with products behind vector work on another product (backward attention: ``s = k q(j)``, weights ``p`` of s,
then four products with p and what follows from it) the matrix unit idles while p is worked out, and the vector units
idle while the rest is multiplied. The front of an iteration, a product of tiles in shared memory and the vector work on
it alone, can run one iteration ahead, beside the products of the one before::

    if lo < hi:
        issue s(lo); p = vector work on s(lo)
        for j in lo .. hi - 1:
            first product of j
            issue s(j + 1)
            the rest of j up to its last product      // beside these two
            issue other products of j + 1 that need shared memory alone
            p' = vector work on s(j + 1)              // beside the last products of j
            what is left of j
        iteration hi - 1 without another one's front

The values are computed in the same order as before, so the results have the same bits. What crosses from one iteration
to the next takes registers: loops without enough of them stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tilewright.ir.async_ops import Alloc, Await, LocalLoad, Role, Slot, buffer_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Function, Operation, Value, uses_of
from tilewright.ir.tile_ops import Constant, Dot, For, Yield
from tilewright.ir.types import RingType, ScalarType, SlotType, TileType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import matrix_unit
from tilewright.passes.roles import MANY_RESULTS

LEAST_STAGES = 2


@register_pass("lead")
class Lead(FunctionPass):
    """Applies to consumer loops on a unit whose products run beside the warps, behind `skew`."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        roles = [op for op in function.walk() if isinstance(op, Role)]
        if not roles or not matrix_unit(context.target, function).asynchronous:
            return
        threads = int(function.attributes["num_warps"]) * context.target.warp_size
        for loop in [op for role in roles for op in role.body.walk() if isinstance(op, For)]:
            front = find_front(loop, function)
            if front is not None and front.words() <= MANY_RESULTS * threads:
                _Rewrite(loop, front).run(function)


@dataclass
class Front:
    """What of a loop's body runs one iteration ahead."""

    loop: For
    #: products of shared memory alone; the vector work follows from the first
    dots: list[Dot]
    vector: list[Operation]
    #: waits for the stages that the dots read
    awaits: list[Await]
    #: results of dots and vector work that the rest of the iteration reads
    crossing: list[Value]

    def words(self) -> int:
        """32-bit words of all products of an iteration and of what crosses."""
        products = [op.result for op in self.loop.body.block.ops if isinstance(op, Dot)]
        tiles = [v.type for v in dict.fromkeys([*products, *self.crossing]) if isinstance(v.type, TileType)]
        return sum(tile.size * tile.dtype.bits // 32 for tile in tiles)

    def awaited(self, dots: Sequence[Dot]) -> list[Await]:
        rings = set().union(*(_rings(dot) for dot in dots))
        return [op for op in self.awaits if op.ring in rings]


def find_front(loop: For, function: Function) -> Front | None:
    """The front of a loop's iterations, None where there is none."""
    block = loop.body.block
    dots = [op for op in block.ops if isinstance(op, Dot)]
    nested = any(isinstance(op, Dot) for op in loop.body.walk() if op.parent is not block)
    if nested or not isinstance(loop.step.op, Constant) or loop.step.op.value != 1:
        return None
    leading = [dot for dot in dots if _from_memory(dot)]
    if not leading or leading[0] is not dots[0] or len(leading) == len(dots):
        return None
    tiles = [v for v in loop.carried if isinstance(v.type, TileType)]
    vector = _only_from(block.ops, dots[0].result, [*tiles, *(dot.result for dot in dots[1:])])
    made = {v for op in vector for v in op.results}
    if not any(v in made for dot in dots for v in (dot.a, dot.b)):
        return None
    rings = set().union(*(_rings(dot) for dot in leading))
    awaits = [op for op in block.ops if isinstance(op, Await) and op.ring in rings]
    if any(not isinstance(op.ring.type, RingType) or op.ring.type.stages < LEAST_STAGES for op in awaits):
        return None
    uses = uses_of(function.body)
    inside = {id(op) for op in vector}
    candidates = [*(dot.result for dot in leading), *(v for op in vector for v in op.results)]
    crossing = [v for v in candidates if any(id(op) not in inside for op in uses.get(v, []))]
    front = Front(loop, leading, vector, awaits, crossing)
    return front if _can_run_ahead(front) else None


def _from_memory(dot: Dot) -> bool:
    """Both operands lie in shared memory, and the sum is new."""
    slots = isinstance(dot.a.type, SlotType) and isinstance(dot.b.type, SlotType)
    return slots and isinstance(dot.acc.op, Constant)


def _rings(dot: Dot) -> set[Value]:
    """The rings that hand over the slots which a dot reads."""
    rings = {_ring(value) for value in (dot.a, dot.b) if isinstance(value.type, SlotType)}
    return {ring for ring in rings if ring is not None}


def _ring(slot: Value) -> Value | None:
    alloc = buffer_of(slot).op
    return alloc.ring if isinstance(alloc, Alloc) else None


def _only_from(ops: Sequence[Operation], source: Value, others: Iterable[Value]) -> list[Operation]:
    """Operations without effects that need ``source`` and none of ``others``."""
    wanted, spoiled, found = {source}, set(others), []
    for op in ops:
        operands = [v for o in op.walk() for v in o.operands]
        pure = not any(o.effect and not isinstance(o, LocalLoad) for o in op.walk())
        if any(v in spoiled for v in operands) or not pure or isinstance(op, Dot):
            spoiled.update(v for v in op.results if v is not source)
        elif any(v in wanted for v in operands):
            wanted.update(op.results)
            found.append(op)
    return found


def _can_run_ahead(front: Front) -> bool:
    """Whether all that the front needs of the next iteration follows from scalars of this one and awaited stages."""
    support = _support(front.loop, [*front.dots, *front.vector, *front.awaits])
    if support is None:
        return False
    awaited = {op.ring for op in front.awaits}
    reads = [op.slot for op in [*support, *front.vector] if isinstance(op, LocalLoad)]
    carried = _carried_inputs(front.loop, support, front)
    return all(_ring(slot) in awaited for slot in reads) and all(isinstance(v.type, ScalarType) for v in carried)


def _support(loop: For, ops: Sequence[Operation]) -> list[Operation] | None:
    """Other operations of the body that these need, in order; None where one has an effect that cannot be repeated."""
    inside, block = {id(op) for op in ops}, loop.body.block
    made = {v: op for op in block.ops for v in op.results}
    needed: set[int] = set()
    pending = [v for op in ops for o in op.walk() for v in o.operands]
    while pending:
        op = made.get(pending.pop())
        if op is None or id(op) in needed or id(op) in inside:
            continue
        if isinstance(op, Dot) or any(o.effect and not isinstance(o, LocalLoad | Slot) for o in op.walk()):
            return None
        needed.add(id(op))
        pending += [v for o in op.walk() for v in o.operands]
    return [op for op in block.ops if id(op) in needed]


def _carried_inputs(loop: For, support: Sequence[Operation], front: Front) -> list[Value]:
    used = {v for op in [*support, *front.dots, *front.vector, *front.awaits] for o in op.walk() for v in o.operands}
    return [v for v in loop.carried if v in used]


class _Rewrite:
    """Emits the iterations of a loop with their fronts one ahead."""

    def __init__(self, loop: For, front: Front):
        self.loop, self.front, self.block = loop, front, loop.body.block
        terminator = self.block.terminator
        assert isinstance(terminator, Yield)
        self.yielded = terminator.values
        ahead = {id(op) for op in [*front.dots, *front.vector, *front.awaits]}
        self.rest = [op for op in self.block.ops if id(op) not in ahead and op is not terminator]
        places = [n for n, op in enumerate(self.rest) if isinstance(op, Dot)]
        self.first, self.last = places[0] + 1, places[-1] + 1
        support = _support(loop, [*front.dots, *front.vector, *front.awaits])
        assert support is not None
        self.support = support

    def run(self, function: Function) -> None:
        loop, outer = self.loop, self.loop.parent
        assert outer is not None
        position = outer.ops.index(loop)
        outer.ops.remove(loop)
        b = Builder(outer, loop.loc)
        with b.at(outer, position):
            branch = b.if_else(b.compare("lt", loop.lo, loop.hi), [v.type for v in loop.results])
            with b.at(branch.then_body.block):
                b.yield_(self._iterations(b))
            with b.at(branch.else_body.block):
                b.yield_(loop.inits)
        mapping = dict(zip(loop.results, branch.results, strict=True))
        for old, new in mapping.items():
            new.hint = old.hint
        for op in function.walk():
            op.replace_operands(mapping)

    def _iterations(self, b: Builder) -> list[Value]:
        loop, front = self.loop, self.front
        start: dict[Value, Value] = {loop.index: loop.lo, **dict(zip(loop.carried, loop.inits, strict=True))}
        self._support_of(b, start)
        self._dots(b, start, front.dots)
        self._vector(b, start)
        last = b.sub(loop.hi, b.index(1))
        inits = [*loop.inits, *(start[v] for v in front.crossing)]
        hints = [loop.index.hint, *(v.hint for v in loop.carried), *(v.hint for v in front.crossing)]
        ahead = b.for_loop(loop.lo, last, loop.step, inits, hints)
        with b.at(ahead.body.block):
            now = dict(zip([*loop.carried, *front.crossing], ahead.carried, strict=True))
            now[loop.index] = ahead.index
            later = self._iteration(b, now, True)
            b.yield_([now.get(v, v) for v in self.yielded] + [later[v] for v in front.crossing])
        final = dict(zip([*loop.carried, *front.crossing], ahead.results, strict=True))
        final[loop.index] = last
        self._iteration(b, final, False)
        return [final.get(v, v) for v in self.yielded]

    def _iteration(self, b: Builder, now: dict[Value, Value], more: bool) -> dict[Value, Value]:
        """The rest of an iteration and, if there are ``more``, the front of the next; gives that one's values."""
        front, later = self.front, {}
        self._clone(b, now, self.rest[: self.first])
        if more:
            later = self._next(b, now)
            self._dots(b, later, front.dots[:1])
        self._clone(b, now, self.rest[self.first : self.last])
        if more:
            self._dots(b, later, front.dots[1:])
            self._vector(b, later)
        self._clone(b, now, self.rest[self.last :])
        return later

    def _next(self, b: Builder, now: dict[Value, Value]) -> dict[Value, Value]:
        """The inputs of the next iteration's front."""
        loop = self.loop
        later = {loop.index: b.add(now[loop.index], loop.step)}
        for value in _carried_inputs(loop, self.support, self.front):
            yielded = self.yielded[loop.carried.index(value)]
            scalars = _slice_of(self.block.ops, yielded)
            self._clone(b, copy := dict(now), scalars)
            later[value] = copy.get(yielded, yielded)
        self._support_of(b, later)
        return later

    def _support_of(self, b: Builder, values: dict[Value, Value]) -> None:
        """Scalars and slots; what reads shared memory comes behind the waits for it (`_vector`)."""
        self._clone(b, values, [op for op in self.support if not self._reads(op)])

    def _reads(self, op: Operation) -> bool:
        """Whether a supporting operation reads shared memory, or follows from one that does."""
        if isinstance(op, LocalLoad):
            return True
        made = {v: o for o in self.support for v in o.results}
        return any(v in made and self._reads(made[v]) for v in op.operands)

    def _dots(self, b: Builder, values: dict[Value, Value], dots: Sequence[Dot]) -> None:
        """Products, each behind the waits for the stages that none before it reads."""
        for dot in dots:
            earlier = self.front.awaited(self.front.dots[: self.front.dots.index(dot)])
            self._clone(b, values, [op for op in self.front.awaited([dot]) if op not in earlier])
            b.insert(dot.clone(values))

    def _vector(self, b: Builder, values: dict[Value, Value]) -> None:
        self._clone(b, values, [op for op in self.support if self._reads(op)])
        self._clone(b, values, self.front.vector)

    def _clone(self, b: Builder, values: dict[Value, Value], ops: Iterable[Operation]) -> None:
        for op in ops:
            b.insert(op.clone(values))


def _slice_of(ops: Sequence[Operation], value: Value) -> list[Operation]:
    """The operations of a block that make a scalar, in order."""
    made = {v: op for op in ops for v in op.results}
    needed: set[int] = set()
    pending = [value]
    while pending:
        op = made.get(pending.pop())
        if op is not None and id(op) not in needed:
            needed.add(id(op))
            pending += op.operands
    return [op for op in ops if id(op) in needed]
