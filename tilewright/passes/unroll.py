"""Loops whose body does two iterations at once, for passes that overlap one with the next."""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.core import Function, Value
from tilewright.ir.tile_ops import For, Yield

#: what the operations of a loop's body have become: old value -> new value
Copy = dict[Value, Value]


def in_pairs(function: Function, loop: For) -> tuple[Copy, Copy, Copy]:
    """Replace a loop by one over pairs of its iterations and one over the iteration that may be left.

    Returns the copies of the body: first and second of a pair, and of the rest.
    """
    outer = loop.parent
    assert outer is not None
    position = outer.ops.index(loop)
    outer.ops.remove(loop)
    b = Builder(outer, loop.loc)
    hints = [loop.index.hint, *(v.hint for v in loop.carried)]
    with b.at(outer, position):
        one, two = b.index(1), b.index(2)
        left = b.sub(b.add(loop.hi, loop.step), loop.lo)
        trips = b.binary("floordiv", b.sub(left, one), loop.step)
        both = b.mul(loop.step, two)
        middle = b.add(loop.lo, b.mul(b.binary("floordiv", trips, two), both))
        pairs = b.for_loop(loop.lo, middle, both, loop.inits, hints)
        rest = b.for_loop(middle, loop.hi, loop.step, pairs.results, hints)
    with b.at(pairs.body.block):
        first, values = _copy(b, loop, pairs.index, pairs.carried)
        second, values = _copy(b, loop, b.add(pairs.index, loop.step), values)
        b.yield_(values)
    with b.at(rest.body.block):
        last, values = _copy(b, loop, rest.index, rest.carried)
        b.yield_(values)
    results = dict(zip(loop.results, rest.results, strict=True))
    for op in function.walk():
        op.replace_operands(results)
    return first, second, last


def _copy(b: Builder, loop: For, index: Value, carried: list[Value]) -> tuple[Copy, list[Value]]:
    """One iteration for an index and carried values; what it hands on."""
    block = loop.body.block
    copy: Copy = {loop.index: index, **dict(zip(loop.carried, carried, strict=True))}
    for op in block.ops[:-1]:
        b.insert(op.clone(copy))
    assert isinstance(block.terminator, Yield)
    return copy, [copy.get(v, v) for v in block.terminator.values]
