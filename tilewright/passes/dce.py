"""Dead code elimination: marks what is needed from the effects backwards, then sweeps.

Marking sees through control flow: a loop-carried value is needed when the loop's result or the
body's argument is, so cycles of values that only feed themselves disappear, as do unused results
of conditionals. Unused reads are dead, and so are loops without effects (they are taken to end).
"""

from __future__ import annotations

from collections.abc import Iterator

from tilewright.ir.core import Effect, Function, Operation, Region, Value
from tilewright.ir.tile_ops import For, If, While, Yield
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("dce")
class DeadCodeElimination(FunctionPass):
    """Remove operations and carried values whose results nobody needs."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        eliminate_dead_code(function)


def eliminate_dead_code(function: Function) -> bool:
    """Remove dead operations, carried values and results; whether anything changed."""
    liveness = _Liveness(function.body)
    return _sweep(function.body, liveness)


def has_effect(op: Operation) -> bool:
    """Whether the operation itself (not its regions) writes or orders: it stays even if unused."""
    return bool(op.effect & ~Effect.READ)


def slots_of(op: For | While) -> list[list[Value]]:
    """For each carried value: [result, region arguments..., initial value, yielded value]."""
    blocks = [op.body.block] if isinstance(op, For) else [op.condition.block, op.body.block]
    args = [b.args[1:] if isinstance(op, For) else b.args for b in blocks]
    yielded = terminator(op.body).values
    return [list(slot) for slot in zip(op.results, *args, op.inits, yielded, strict=True)]


def terminator(region: Region) -> Yield:
    """The yield at the end of a region of structured control flow."""
    op = region.block.terminator
    assert isinstance(op, Yield), "a region of tile.for, tile.if or tile.while ends in tile.yield"
    return op


class _Liveness:
    """The live operations and values of a region. Every edge is followed once."""

    def __init__(self, root: Region):
        self.ops: set[Operation] = set()
        self.values: set[Value] = set()
        self.owner: dict[Value, Operation] = {}  # results and region arguments -> operation
        self.parent: dict[Operation, Operation] = {}
        self.groups: dict[Value, list[Value]] = {}  # values of control flow that live together
        self.pending: list[Value] = []
        roots = [op for op in self._index(root, None) if has_effect(op)]
        if root.block.terminator is not None:
            roots.append(root.block.terminator)
        for op in roots:
            self._mark_op(op)
        while self.pending:
            self._follow(self.pending.pop())

    def _index(self, region: Region, parent: Operation | None) -> Iterator[Operation]:
        for op in region.block.ops:
            if parent is not None:
                self.parent[op] = parent
            self.owner.update((v, op) for v in op.results)
            for nested in op.regions:
                self.owner.update((v, op) for v in nested.block.args)
            yield op
            for nested in op.regions:
                yield from self._index(nested, op)
            self._group(op)

    def _group(self, op: Operation) -> None:
        if isinstance(op, For | While):
            for slot in slots_of(op):
                self.groups.update((v, slot) for v in slot[:-2])
        elif isinstance(op, If):
            branches = (terminator(op.then_body).values, terminator(op.else_body).values)
            for result, on_true, on_false in zip(op.results, *branches, strict=True):
                self.groups[result] = [on_true, on_false]

    def _mark_op(self, op: Operation) -> None:
        """The operation runs: so do those around it, and it needs its operands."""
        if op in self.ops:
            return
        self.ops.add(op)
        if op in self.parent:
            self._mark_op(self.parent[op])
        if isinstance(op, For):
            self._mark(op.lo, op.hi, op.step)
        elif isinstance(op, While):
            self._mark_op(terminator(op.condition))
        elif isinstance(op, If):
            self._mark(op.condition)
        elif not isinstance(op, Yield) or not isinstance(self.parent.get(op), For | While | If):
            self._mark(*op.operands)
            for region in op.regions:
                if region.block.terminator is not None:
                    self._mark_op(region.block.terminator)
        elif isinstance(self.parent[op], While) and op is terminator(self.parent[op].regions[0]):
            self._mark(*op.operands)

    def _mark(self, *values: Value) -> None:
        for value in values:
            if value not in self.values:
                self.values.add(value)
                self.pending.append(value)

    def _follow(self, value: Value) -> None:
        if value in self.owner:
            self._mark_op(self.owner[value])
        self._mark(*self.groups.get(value, ()))


def _sweep(region: Region, live: _Liveness) -> bool:
    block = region.block
    kept = [op for op in block.ops if op in live.ops or op.terminator]
    changed = len(kept) != len(block.ops)
    if changed:
        block.set_ops(kept)
    for op in kept:
        if isinstance(op, For | While):
            changed |= _trim_loop(op, live)
        elif isinstance(op, If):
            changed |= _trim_if(op, live)
        for nested in op.regions:
            changed |= _sweep(nested, live)
    return changed


def _trim_loop(op: For | While, live: _Liveness) -> bool:
    keep = [i for i, result in enumerate(op.results) if result in live.values]
    if len(keep) == len(op.results):
        return False
    first = 1 if isinstance(op, For) else 0
    for region in op.regions:
        args = region.block.args
        region.block.args = args[:first] + [args[first + i] for i in keep]
    op.inits = [op.inits[i] for i in keep]
    op.results = [op.results[i] for i in keep]
    end = terminator(op.body)
    end.values = [end.values[i] for i in keep]
    return True


def _trim_if(op: If, live: _Liveness) -> bool:
    keep = [i for i, result in enumerate(op.results) if result in live.values]
    if len(keep) == len(op.results):
        return False
    op.results = [op.results[i] for i in keep]
    for region in op.regions:
        end = terminator(region)
        end.values = [end.values[i] for i in keep]
    return True
