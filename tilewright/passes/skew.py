"""skew: let one iteration's vector work overlap another iteration's matrix products.

In a loop like attention's, ``s = q k(j)``, vector work on s, ``o = p v(j) + o`` form a chain, and the
matrix unit idles during the vector work. The last product of the chain feeds nothing but the next
iteration, so it can lag: iteration j issues ``s`` for j, then the product of j - 1, and does its
vector work while that one runs::

    if lo < hi:
        iteration lo without the lagging product
        for j in lo + step .. hi:
            issue s(j); issue o(j - 1)
            vector work on s(j)              // beside o(j - 1)
            rescale o(j - 1); convert p(j)   // behind it: its operands stay untouched while it runs
        issue o(hi - 1)

The values are computed in the same order as before, so the results have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.ir.async_ops import Await, Release, Role, Slot, TransposeSlot, ring_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Operation, Value, uses_of
from tilewright.ir.tile_ops import Cast, Dot, For, Yield
from tilewright.ir.types import RingType, SlotType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import matrix_unit


@register_pass("skew")
class Skew(FunctionPass):
    """Applies to consumer loops on a unit whose products run beside the warps."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        roles = [op for op in function.walk() if isinstance(op, Role)]
        if not roles or not matrix_unit(context.target, function).asynchronous:
            return
        loops = [op for role in roles for op in role.body.walk() if isinstance(op, For)]
        for loop in loops:
            plan = find_lag(loop, function)
            if plan is not None:
                _rewrite(loop, plan, function)


@dataclass
class Lag:
    """What of a loop's body runs one iteration late."""

    dot: Dot
    #: position of the dot's accumulator among the carried values
    position: int
    #: the dot, its slots and the ring operations of its operands, in program order
    delayed: list[Operation]
    #: values of the body that they need: carried to the next iteration
    inputs: list[Value]


def find_lag(loop: For, function: Function) -> Lag | None:
    """A dot whose result only the next iteration reads, behind another dot of the same iteration."""
    block = loop.body.block
    dots = [op for op in block.ops if isinstance(op, Dot)]
    if len(dots) < 2 or any(isinstance(op, Dot) for op in loop.body.walk() if op.parent is not block):
        return None
    uses = uses_of(function.body)
    dot, terminator = dots[-1], block.terminator
    assert isinstance(terminator, Yield)
    if uses.get(dot.result) != [terminator] or terminator.values.count(dot.result) != 1:
        return None
    position = terminator.values.index(dot.result)
    accumulator = loop.carried[position]
    early = _depends(block, accumulator)
    if any(id(d) in early for d in dots[:-1]) or id(dot) not in early:
        return None
    if isinstance(dot.a.type, SlotType) and not any(dot.a in o.results for o in block.ops):
        return None
    delayed = _delayed_operations(block, dot, uses)
    if delayed is None:
        return None
    inside = {v for op in delayed for v in op.results}
    local = {v for op in block.ops for v in op.results} | set(block.args)
    inputs: list[Value] = []
    for op in delayed:
        inputs += [v for v in op.operands if v in local and v not in inside and v not in inputs]
    return Lag(dot, position, delayed, inputs)


def _depends(block: Block, value: Value) -> set[int]:
    """Operations of a block that need ``value``, by identity."""
    tainted, found = {value}, set()
    for op in block.ops:
        if any(v in tainted for o in op.walk() for v in o.operands):
            found.add(id(op))
            tainted.update(op.results)
    return found


def _delayed_operations(block: Block, dot: Dot, uses: dict[Value, list[Operation]]) -> list[Operation] | None:
    """The dot and all that serves it alone; None where a ring is shared or too shallow to keep a stage longer."""
    chosen: set[int] = {id(dot)}
    for value in (dot.a, dot.b):
        while isinstance(value.op, Slot | TransposeSlot):
            if uses[value] != [dot] and not all(id(u) in chosen for u in uses[value]):
                return None
            chosen.add(id(value.op))
            value = value.op.buffer if isinstance(value.op, Slot) else value.op.slot
    rings = {r for v in (dot.a, dot.b) if isinstance(v.type, SlotType) and (r := ring_of(v)) is not None}
    for op in block.ops:
        if isinstance(op, Await | Release) and op.ring in rings:
            chosen.add(id(op))
        elif isinstance(op, Dot) and op is not dot and rings & _rings_read(op):
            return None
    for ring in rings:
        if not isinstance(ring.type, RingType) or ring.type.stages < 2:
            return None
    return [op for op in block.ops if id(op) in chosen]


def _rings_read(dot: Dot) -> set[Value]:
    return {r for v in (dot.a, dot.b) if isinstance(v.type, SlotType) and (r := ring_of(v)) is not None}


# --- rewriting ------------------------------------------------------------------------------------


def _rewrite(loop: For, lag: Lag, function: Function) -> None:
    outer = loop.parent
    assert outer is not None
    position = outer.ops.index(loop)
    outer.ops.remove(loop)
    b = Builder(outer, loop.loc)
    with b.at(outer, position):
        runs = b.compare("lt", loop.lo, loop.hi)
        branch = b.if_else(runs, [v.type for v in loop.results])
        with b.at(branch.then_body.block):
            b.yield_(_emit(b, loop, lag))
        with b.at(branch.else_body.block):
            b.yield_(loop.inits)
    for old, new in zip(loop.results, branch.results, strict=True):
        new.hint = old.hint
    mapping = dict(zip(loop.results, branch.results, strict=True))
    for op in function.walk():
        op.replace_operands(mapping)


def _emit(b: Builder, loop: For, lag: Lag) -> list[Value]:
    """The loop's results, computed with the lagging product one iteration behind."""
    block = loop.body.block
    assert isinstance(block.terminator, Yield)
    yielded = block.terminator.values
    others = [n for n in range(len(loop.carried)) if n != lag.position]
    parts = _Parts.of(block, lag, loop.carried[lag.position])

    first = {loop.index: loop.lo, **dict(zip(loop.carried, loop.inits, strict=True))}
    parts.emit(b, first, None)
    inits = [first.get(yielded[n], yielded[n]) for n in others] + [first.get(v, v) for v in lag.inputs]
    hints = [loop.index.hint, *(loop.carried[n].hint for n in others), *(v.hint for v in lag.inputs)]
    rest = b.for_loop(b.add(loop.lo, loop.step), loop.hi, loop.step, inits, hints)
    with b.at(rest.body.block):
        now = {loop.index: rest.index, **{loop.carried[n]: v for n, v in zip(others, rest.carried, strict=False)}}
        before = dict(zip(lag.inputs, rest.carried[len(others) :], strict=True))
        parts.emit(b, now, before)
        b.yield_([now.get(yielded[n], yielded[n]) for n in others] + [now.get(v, v) for v in lag.inputs])
    last = dict(zip(lag.inputs, rest.results[len(others) :], strict=True))
    for op in lag.delayed:
        b.insert(op.clone(last))
    results = dict(zip(others, rest.results, strict=False))
    results[lag.position] = last[lag.dot.result]
    return [results[n] for n in range(len(loop.carried))]


@dataclass
class _Parts:
    """The body's operations in their new order."""

    lag: Lag
    accumulator: Value
    products: list[Operation]  # up to the last dot that does not lag
    overlapped: list[Operation]  # vector work beside the lagging dot
    behind: list[Operation]  # needs the lagging dot's result
    conversions: Sequence[Operation]  # makes its next register operands

    @classmethod
    def of(cls, block: Block, lag: Lag, accumulator: Value) -> _Parts:
        delayed = {id(op) for op in lag.delayed}
        tainted = _depends(block, accumulator)
        ops = [op for op in block.ops if id(op) not in delayed and not op.terminator]
        conversions = [op for op in ops if isinstance(op, Cast) and op.result is lag.dot.a]
        ops = [op for op in ops if op not in conversions]
        free = [op for op in ops if id(op) not in tainted]
        cut = max(n for n, op in enumerate(free) if isinstance(op, Dot)) + 1
        products, overlapped = free[:cut], free[cut:]
        return cls(lag, accumulator, products, overlapped, [op for op in ops if id(op) in tainted], conversions)

    def emit(self, b: Builder, now: dict[Value, Value], before: dict[Value, Value] | None) -> None:
        """Clone one iteration; ``before`` holds the lagging product's inputs, None in the first iteration."""
        for op in self.products:
            b.insert(op.clone(now))
        late = []
        if before is not None:
            for op in self.lag.delayed:
                if isinstance(op, Release):
                    late.append(op)
                else:
                    b.insert(op.clone(before))
            now[self.accumulator] = before[self.lag.dot.result]
        for op in [*self.overlapped, *self.behind]:
            b.insert(op.clone(now))
        for op in late:
            b.insert(op.clone(before if before is not None else now))
        for op in self.conversions:
            b.insert(op.clone(now))
