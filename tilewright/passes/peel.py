"""peel: split a loop where its masks become necessary, and drop them before; or where they cease to be, and behind.

A mask like ``columns < n`` with ``columns = j * BN + arange(BN)`` is all true up to some iteration, one like
``columns >= n`` from some iteration on. Where selections of a loop's body depend on such comparisons, linear in the
loop index, the iterations before (from) that point run in a loop of their own without the masks. Only loops with
matrix products are split.

Masks that remain beside matrix products (in the other iterations, in one that `skew` took out of its loop)
are computed and applied in a branch, which is taken where some element fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tilewright.ir.async_ops import Role
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Value, replace_uses
from tilewright.ir.tile_ops import Binary, Broadcast, Compare, Constant, Dot, ExpandDims, For, Iota, Select, Splat
from tilewright.ir.types import ScalarType, TileType, i32
from tilewright.passes.dce import eliminate_dead_code
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("peel")
class Peel(FunctionPass):
    """Applies to consumer loops: the producer's copies do not depend on masks."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        roles = [op for op in function.walk() if isinstance(op, Role)]
        for loop in [op for role in roles for op in role.body.walk() if isinstance(op, For)]:
            if any(isinstance(op, Dot) for op in loop.body.block.ops):
                if masks := find_masks(loop, 1):
                    _split(loop, masks)
                elif masks := find_masks(loop, -1):
                    _split_falling(loop, masks)
        blocks = {id(op.parent): op.parent for role in roles for op in role.body.walk() if isinstance(op, Dot)}
        for block in blocks.values():
            assert block is not None
            for select in [op for op in block.ops if isinstance(op, Select)]:
                _guard(block, select)
        eliminate_dead_code(function)


#: what masks are made of
_MASK_OPERATIONS = Binary | Broadcast | Compare | Constant | ExpandDims | Iota | Splat


@dataclass
class Linear:
    """``sum(coefficient * scalar) + constant``, the constant anywhere in ``[low, high]`` over a tile's elements."""

    terms: dict[Value, int] = field(default_factory=dict)
    low: int = 0
    high: int = 0

    def plus(self, other: Linear, sign: int = 1) -> Linear:
        terms = dict(self.terms)
        for value, factor in other.terms.items():
            terms[value] = terms.get(value, 0) + sign * factor
        low, high = (other.low, other.high) if sign > 0 else (-other.high, -other.low)
        return Linear({v: c for v, c in terms.items() if c}, self.low + low, self.high + high)

    def times(self, factor: int) -> Linear:
        ends = sorted((self.low * factor, self.high * factor))
        return Linear({v: c * factor for v, c in self.terms.items() if factor}, *ends)


def linear(value: Value) -> Linear | None:
    """The linear form of an i32 scalar or tile; None where it has none."""
    op = value.op
    if isinstance(op, Constant):
        return Linear({}, int(op.value), int(op.value)) if isinstance(op.value, int) else None
    if isinstance(op, Iota) and isinstance(value.type, TileType):
        return Linear({}, op.start, op.start + value.type.size - 1)
    if isinstance(op, Splat | ExpandDims | Broadcast):
        return linear(op.source)
    if isinstance(op, Binary) and op.fn in ("add", "sub", "mul"):
        left, right = linear(op.lhs), linear(op.rhs)
        if left is not None and right is not None:
            if op.fn != "mul":
                return left.plus(right, 1 if op.fn == "add" else -1)
            for one, other in ((left, right), (right, left)):
                if not one.terms and one.low == one.high:
                    return other.times(one.low)
    return Linear({value: 1}) if value.type == ScalarType(i32) else None


@dataclass
class Mask:
    """A selection that is superfluous while ``form < 0`` in every element."""

    select: Select
    forms: list[Linear]


def find_masks(loop: For, slope: int) -> list[Mask]:
    """The selections whose conditions hold in all iterations before some point (``slope`` 1), or from one on (-1)."""
    if not isinstance(loop.step.op, Constant) or loop.step.op.value != 1:
        return []
    local = {v for op in loop.body.walk() for v in op.results} | set(loop.carried)
    masks = []
    for op in loop.body.block.ops:
        if isinstance(op, Select) and isinstance(op.condition.type, TileType):
            forms = _conjuncts(op.condition)
            if forms and all(f.terms.get(loop.index, 0) * slope > 0 and not local & set(f.terms) for f in forms):
                masks.append(Mask(op, forms))
    return masks


def _conjuncts(condition: Value) -> list[Linear]:
    """Forms that are all negative exactly where the condition holds; empty where there are none."""
    op = condition.op
    if isinstance(op, Broadcast | ExpandDims):
        return _conjuncts(op.source)
    if isinstance(op, Binary) and op.fn == "and":
        left, right = _conjuncts(op.lhs), _conjuncts(op.rhs)
        return left + right if left and right else []
    if not isinstance(op, Compare) or op.fn not in ("lt", "le", "gt", "ge"):
        return []
    small, large = (op.lhs, op.rhs) if op.fn in ("lt", "le") else (op.rhs, op.lhs)
    left_form, right_form = linear(small), linear(large)
    if left_form is None or right_form is None:
        return []
    form = left_form.plus(right_form, -1)
    return [form if op.fn in ("lt", "gt") else form.plus(Linear({}, 1, 1), -1)]


def _split(loop: For, masks: list[Mask]) -> None:
    """``for lo..hi`` becomes ``for lo..middle`` without the masks, then ``for middle..hi`` with them."""
    block = loop.parent
    assert block is not None
    position = block.ops.index(loop)
    b = Builder(block, loop.loc)
    with b.at(block, position):
        end = loop.hi
        for mask in masks:
            for form in mask.forms:
                end = b.binary("min", end, _first_failure(b, form, loop.index))
        middle = b.binary("max", loop.lo, end)
        mapping: dict[Value, Value] = {loop.lo: loop.lo, loop.hi: middle}
        free = loop.clone(mapping)
        assert isinstance(free, For)
        free.hi = middle
        b.insert(free)
    _drop_masks(free, {mapping[m.select.result]: mapping[m.select.on_true] for m in masks})
    loop.lo, loop.inits = middle, list(free.results)


def _split_falling(loop: For, masks: list[Mask]) -> None:
    """``for lo..hi`` becomes ``for lo..middle`` with the masks, then ``for middle..hi`` without them."""
    block = loop.parent
    assert block is not None
    b = Builder(block, loop.loc)
    with b.at(block, block.ops.index(loop)):
        start = loop.lo
        for form in (form for mask in masks for form in mask.forms):
            start = b.binary("max", start, _first_success(b, form, loop.index))
        middle = b.binary("min", b.binary("max", loop.lo, loop.hi), start)
        masked = loop.clone({loop.lo: loop.lo, loop.hi: middle})
        assert isinstance(masked, For)
        masked.hi = middle
        b.insert(masked)
    _drop_masks(loop, {m.select.result: m.select.on_true for m in masks})
    loop.lo, loop.inits = middle, list(masked.results)


def _drop_masks(loop: For, masked: dict[Value, Value]) -> None:
    """Replace the results of selections by what they select where the masks hold."""
    replace_uses(loop.body, masked)
    drop = {id(value.op) for value in masked}
    loop.body.block.set_ops([op for op in loop.body.block.ops if id(op) not in drop])


def _first_failure(b: Builder, form: Linear, index: Value) -> Value:
    """The first iteration j in which ``a j + rest + high < 0`` fails: ``ceil((-rest - high) / a)``."""
    factor = form.terms[index]
    total = b.sub(b.index(-form.high), _rest(b, form, index))
    return b.binary("floordiv", b.add(total, b.index(factor - 1)), b.index(factor))


def _first_success(b: Builder, form: Linear, index: Value) -> Value:
    """The first iteration j from which on ``-a j + rest + high < 0`` holds: ``floor((rest + high) / a) + 1``."""
    total = b.add(b.index(form.high), _rest(b, form, index))
    return b.add(b.binary("floordiv", total, b.index(-form.terms[index])), b.index(1))


def _rest(b: Builder, form: Linear, index: Value) -> Value:
    """The scalars of a form but the loop's index."""
    total = b.index(0)
    for value, coefficient in form.terms.items():
        if value is not index:
            total = b.add(total, b.mul(value, b.index(coefficient)))
    return total


def _guard(block: Block, select: Select) -> None:
    """``select`` becomes a branch that is taken where some element's condition fails; its mask is computed there."""
    forms = _conjuncts(select.condition) if isinstance(select.condition.type, TileType) else []
    if not forms:
        return
    position = block.ops.index(select)
    block.ops.remove(select)
    b = Builder(block, select.loc)
    with b.at(block, position):
        fails = [b.compare("ge", _largest(b, form), b.index(0)) for form in forms]
        some = fails[0]
        for other in fails[1:]:
            some = b.binary("or", some, other)
        branch = b.if_else(some, [select.result.type])
        with b.at(branch.then_body.block):
            condition = _rebuild(b, select.condition, {})
            b.yield_([b.select(condition, select.on_true, select.on_false)])
        with b.at(branch.else_body.block):
            b.yield_([select.on_true])
    branch.results[0].hint = select.result.hint
    assert block.parent is not None
    replace_uses(block.parent, {select.result: branch.results[0]})


def _largest(b: Builder, form: Linear) -> Value:
    """The largest value of a form over a tile's elements."""
    total = b.index(form.high)
    for value, coefficient in form.terms.items():
        total = b.add(total, b.mul(value, b.index(coefficient)))
    return total


def _rebuild(b: Builder, value: Value, done: dict[Value, Value]) -> Value:
    """A copy of the tile operations that a mask is made of; scalars stay where they are."""
    op = value.op
    if value in done or op is None or not isinstance(value.type, TileType) or not isinstance(op, _MASK_OPERATIONS):
        return done.get(value, value)
    for operand in op.operands:
        done[operand] = _rebuild(b, operand, done)
    return b.insert(op.clone(done)).results[0]
