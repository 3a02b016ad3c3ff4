"""Canonicalisation: constant folding, algebraic identities and simple control flow, to a fixed point.

Every rewrite keeps the bits of the result. On floats that leaves few identities: ``x * 1.0``,
``x / 1.0``, ``x - 0.0`` and ``x + -0.0`` are ``x``; but ``x + 0.0`` is not (``-0.0 + 0.0`` is ``0.0``),
``x * 0.0`` is not zero (infinities, NaN, ``-0.0``), and ``x - x`` is not (infinities, NaN). Integers
wrap around, so their sums and products may be regrouped.

The pass is a table of small functions keyed by operation class. A rewrite looks at one operation,
whose operands are already simplified, and gives the value that replaces its result. One sweep goes
through the program in order; each sweep ends with dead code elimination.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tilewright.ir.core import Block, Function, Operation, Region, Value
from tilewright.ir.tile_ops import (
    Binary,
    Bitcast,
    Broadcast,
    Cast,
    Compare,
    Constant,
    Convert,
    Dim,
    ExpandDims,
    Extract,
    For,
    If,
    PermuteView,
    Reduce,
    Reshape,
    Select,
    Splat,
    Subview,
    Transpose,
    Unary,
    While,
)
from tilewright.ir.types import DType, ScalarType, TileType, Type, ViewType, element_type
from tilewright.passes import constant_folding as folding
from tilewright.passes.constant_folding import Number
from tilewright.passes.cse import reads_nothing
from tilewright.passes.dce import eliminate_dead_code, terminator
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("canonicalize")
class Canonicalize(FunctionPass):
    """Simplify until nothing changes, in at most ``max_sweeps`` sweeps."""

    max_sweeps: int = 16

    def run_on_function(self, function: Function, context: PassContext) -> None:
        for _ in range(self.max_sweeps):
            changed = Rewriter().region(function.body)
            changed |= eliminate_dead_code(function)
            if not changed:
                return


class Rewriter:
    """One sweep in program order. Definitions come before uses, so a use sees the final value."""

    def __init__(self) -> None:
        self.mapping: dict[Value, Value] = {}
        self.out: list[Operation] = []
        self.changed = False

    def region(self, region: Region) -> bool:
        """Rewrite the operations of a region and those nested in it; whether anything changed."""
        saved, self.out = self.out, []
        for op in region.block.ops:
            self.visit(op)
        region.block.set_ops(self.out)
        self.out = saved
        return self.changed

    def visit(self, op: Operation) -> None:
        """Rewrite one operation and append what is left of it."""
        if self.mapping:
            op.replace_operands(self.mapping)
        if isinstance(op, For | If | While):
            replacement = _CONTROL[type(op)](op, self)
            if replacement is not None:
                self.replace(op.results, replacement)
                return
        else:
            for rewrite in REWRITES.get(type(op), ()):
                value = rewrite(op, self)
                if value is not None and value is not op.results[0]:
                    self.replace(op.results, [value])
                    return
        for nested in op.regions:
            self.region(nested)
        self.out.append(op)

    def replace(self, old: Sequence[Value], new: Sequence[Value]) -> None:
        """Uses of ``old`` below become ``new``, which takes over the hint if it has none."""
        self.changed = True
        for before, after in zip(old, new, strict=True):
            assert before.type == after.type, f"a rewrite changed the type {before.type} to {after.type}"
            after.hint = after.hint or before.hint
            self.mapping[before] = after

    def make(self, op: Operation, like: Operation) -> Value:
        """Insert a new operation in place of ``like``, simplified; its result."""
        op.loc = like.loc
        (result,) = op.results
        if len(like.results) == 1:
            result.hint = like.results[0].hint
        self.visit(op)
        return self.mapping.get(result, result)

    def constant(self, value: Number, like: Operation, type_: Type | None = None) -> Value:
        """A constant of ``like``'s result type."""
        return self.make(Constant(types=[type_ or like.result.type], value=value), like)

    def inline(self, block: Block, args: Sequence[Value]) -> list[Value]:
        """Move the operations of a block here, with ``args`` for its arguments; what it yields."""
        self.mapping.update(zip(block.args, args, strict=True))
        assert block.parent is not None
        end = terminator(block.parent)
        for op in block.ops[:-1]:
            self.visit(op)
        return [self.mapping.get(v, v) for v in end.values]


Rewrite = Callable[[Any, Rewriter], Value | None]
F = TypeVar("F", bound=Callable[..., Value | None])

#: operation class -> rewrites, tried in order
REWRITES: dict[type[Operation], list[Rewrite]] = {}


def rewrites(*classes: type[Operation]) -> Callable[[F], F]:
    """Add a function to the table."""

    def register(function: F) -> F:
        for cls in classes:
            REWRITES.setdefault(cls, []).append(function)
        return function

    return register


def constant_of(value: Value) -> Number | None:
    """The value of a constant scalar, or of every element of a constant tile; None if not constant."""
    op = value.op
    return folding.normalize(op.value, element_type(value.type)) if isinstance(op, Constant) else None


def _is(value: Value, number: Number) -> bool:
    """Whether the value is the constant ``number``; tells -0.0 from 0.0."""
    constant = constant_of(value)
    return constant is not None and constant == number and str(float(constant)) == str(float(number))


def _defining(value: Value, cls: type[Operation]) -> Any:
    return value.op if isinstance(value.op, cls) else None


def _dtype(value: Value) -> DType:
    return element_type(value.type)


# --- constants and elementwise operations -----------------------------------------------------


@rewrites(Constant)
def constant_has_the_dtypes_kind(op: Constant, rewriter: Rewriter) -> Value | None:
    dtype = _dtype(op.result)
    kind: type = float if dtype.is_float else int if dtype.is_int else bool
    return None if type(op.value) is kind else rewriter.constant(kind(op.value), op)


@rewrites(Binary)
def binary_of_constants(op: Binary, rewriter: Rewriter) -> Value | None:
    a, b = constant_of(op.lhs), constant_of(op.rhs)
    value = None if a is None or b is None else folding.fold_binary(op.fn, a, b, _dtype(op.lhs))
    return None if value is None else rewriter.constant(value, op)


@rewrites(Unary)
def unary_of_constant(op: Unary, rewriter: Rewriter) -> Value | None:
    a = constant_of(op.source)
    value = None if a is None else folding.fold_unary(op.fn, a, _dtype(op.source))
    return None if value is None else rewriter.constant(value, op)


@rewrites(Compare)
def compare_of_constants(op: Compare, rewriter: Rewriter) -> Value | None:
    a, b = constant_of(op.lhs), constant_of(op.rhs)
    if a is None or b is None:
        return None
    return rewriter.constant(folding.fold_compare(op.fn, a, b, _dtype(op.lhs)), op)


@rewrites(Cast)
def cast_of_constant(op: Cast, rewriter: Rewriter) -> Value | None:
    a = constant_of(op.source)
    value = None if a is None else folding.fold_cast(a, _dtype(op.source), _dtype(op.result))
    return None if value is None else rewriter.constant(value, op)


@rewrites(Bitcast)
def bitcast_of_constant(op: Bitcast, rewriter: Rewriter) -> Value | None:
    if op.source.type == op.result.type:
        return op.source
    a = constant_of(op.source)
    value = None if a is None else folding.fold_bitcast(a, _dtype(op.source), _dtype(op.result))
    return None if value is None else rewriter.constant(value, op)


_COMMUTATIVE = ("add", "mul", "max", "min", "and", "or", "xor")


@rewrites(Binary)
def constant_goes_right(op: Binary, rewriter: Rewriter) -> Value | None:
    a = constant_of(op.lhs)
    if op.fn not in _COMMUTATIVE or a is None or a != a or constant_of(op.rhs) is not None:
        return None
    if op.fn in ("max", "min") and _dtype(op.lhs).is_float and a == 0:
        return None  # max(0.0, -0.0) may depend on the order
    return rewriter.make(Binary(op.rhs, op.lhs, types=[op.result.type], fn=op.fn), op)


#: (fn, right operand): the result is the left operand. Integers and bool.
_INT_NEUTRAL = {
    ("add", 0), ("sub", 0), ("mul", 1), ("floordiv", 1), ("and", -1), ("or", 0), ("xor", 0), ("shl", 0), ("shr", 0),
}  # fmt: skip
#: (fn, right operand): the result is the constant
_INT_ABSORBING = {("mul", 0): 0, ("mod", 1): 0, ("and", 0): 0, ("or", -1): -1}
#: floats: the identities that keep every bit, with the sign of zero
_FLOAT_NEUTRAL = {("add", "-0.0"), ("sub", "0.0"), ("mul", "1.0"), ("div", "1.0")}


@rewrites(Binary)
def identity(op: Binary, rewriter: Rewriter) -> Value | None:
    constant, dtype = constant_of(op.rhs), _dtype(op.lhs)
    if constant is None:
        return None
    if dtype.is_float:
        return op.lhs if (op.fn, str(constant)) in _FLOAT_NEUTRAL else None
    number = int(constant) if dtype.is_int else -int(constant)  # true is all ones
    if not dtype.is_int and op.fn not in ("and", "or", "xor"):
        return None
    if (op.fn, number) in _INT_NEUTRAL:
        return op.lhs
    absorbed = _INT_ABSORBING.get((op.fn, number))
    return None if absorbed is None else rewriter.constant(absorbed if dtype.is_int else bool(absorbed), op)


@rewrites(Binary)
def same_operands(op: Binary, rewriter: Rewriter) -> Value | None:
    if op.lhs is not op.rhs:
        return None
    if op.fn in ("max", "min", "and", "or"):
        return op.lhs
    dtype = _dtype(op.lhs)
    if op.fn == "xor" or (op.fn == "sub" and dtype.is_int):
        return rewriter.constant(0 if dtype.is_int else False, op)
    return None


@rewrites(Binary)
def regroup_constants(op: Binary, rewriter: Rewriter) -> Value | None:
    """(x + 1) + 2 -> x + 3, for integers."""
    inner = _defining(op.lhs, Binary)
    if op.fn not in ("add", "mul") or inner is None or inner.fn != op.fn or not _dtype(op.lhs).is_int:
        return None
    a, b = constant_of(inner.rhs), constant_of(op.rhs)
    if a is None or b is None:
        return None
    value = folding.fold_binary(op.fn, a, b, _dtype(op.lhs))
    assert value is not None
    return rewriter.make(Binary(inner.lhs, rewriter.constant(value, op), types=[op.result.type], fn=op.fn), op)


@rewrites(Unary)
def unary_of_unary(op: Unary, rewriter: Rewriter) -> Value | None:
    inner = _defining(op.source, Unary)
    if inner is None or inner.fn != op.fn:
        return None
    if op.fn in ("neg", "not"):
        return inner.source
    return op.source if op.fn in ("abs", "floor", "ceil") else None


_NEGATED = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
_MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


@rewrites(Unary)
def not_of_compare(op: Unary, rewriter: Rewriter) -> Value | None:
    """not (a < b) -> a >= b; on floats only eq and ne, for NaN is neither less nor greater or equal."""
    inner = _defining(op.source, Compare)
    if op.fn != "not" or inner is None or (_dtype(inner.lhs).is_float and inner.fn not in ("eq", "ne")):
        return None
    return rewriter.make(Compare(inner.lhs, inner.rhs, types=[op.result.type], fn=_NEGATED[inner.fn]), op)


@rewrites(Compare)
def compare_with_itself(op: Compare, rewriter: Rewriter) -> Value | None:
    if op.lhs is not op.rhs or _dtype(op.lhs).is_float:
        return None
    return rewriter.constant(op.fn in ("eq", "le", "ge"), op)


@rewrites(Compare)
def compare_constant_goes_right(op: Compare, rewriter: Rewriter) -> Value | None:
    if constant_of(op.lhs) is None or constant_of(op.rhs) is not None:
        return None
    return rewriter.make(Compare(op.rhs, op.lhs, types=[op.result.type], fn=_MIRRORED[op.fn]), op)


@rewrites(Select)
def simplify_select(op: Select, rewriter: Rewriter) -> Value | None:
    condition = constant_of(op.condition)
    if condition is not None:
        return op.on_true if condition else op.on_false
    if op.on_true is op.on_false:
        return op.on_true
    if op.condition.type == op.result.type and _is(op.on_true, 1) and _is(op.on_false, 0):
        return op.condition
    inner = _defining(op.condition, Unary)
    if inner is not None and inner.fn == "not":
        return rewriter.make(Select(inner.source, op.on_false, op.on_true, types=[op.result.type]), op)
    return None


@rewrites(Cast)
def cast_chain(op: Cast, rewriter: Rewriter) -> Value | None:
    if op.source.type == op.result.type:
        return op.source
    inner = _defining(op.source, Cast)
    if inner is None:
        return None
    first, middle, last = _dtype(inner.source), _dtype(op.source), _dtype(op.result)
    exact = folding.converts_exactly(first, middle)
    both_exact = exact and folding.converts_exactly(first, last)
    whole = first.is_int and middle.is_int and last.is_int
    if not both_exact and not (whole and (exact or last.bits <= middle.bits)):
        return None
    return rewriter.make(Cast(inner.source, types=[op.result.type]), op)


@rewrites(Bitcast)
def bitcast_chain(op: Bitcast, rewriter: Rewriter) -> Value | None:
    inner = _defining(op.source, Bitcast)
    return None if inner is None else rewriter.make(Bitcast(inner.source, types=[op.result.type]), op)


# --- shapes -----------------------------------------------------------------------------------


@rewrites(Splat, ExpandDims, Broadcast, Reshape, Transpose, Extract, Convert)
def move_of_constant(op: Operation, rewriter: Rewriter) -> Value | None:
    """Every element is the same, wherever it goes."""
    constant = constant_of(op.operands[0])
    return None if constant is None else rewriter.constant(constant, op)


@rewrites(ExpandDims, Broadcast, Reshape, Transpose, Extract, Convert)
def move_of_splat(op: Operation, rewriter: Rewriter) -> Value | None:
    inner = _defining(op.operands[0], Splat)
    return None if inner is None else rewriter.make(Splat(inner.source, types=[op.result.type]), op)


@rewrites(Broadcast, Reshape, Extract, Convert)
def move_to_the_same_type(op: Operation, rewriter: Rewriter) -> Value | None:
    source = op.operands[0]
    return source if source.type == op.result.type else None


@rewrites(Broadcast, Reshape, Convert)
def move_of_the_same_move(op: Operation, rewriter: Rewriter) -> Value | None:
    """The second of two broadcasts, reshapes or layout conversions says it all."""
    inner = _defining(op.operands[0], type(op))
    return None if inner is None else rewriter.make(type(op)(inner.operands[0], types=[op.result.type]), op)


@rewrites(Transpose)
def transpose_chain(op: Transpose, rewriter: Rewriter) -> Value | None:
    if op.perm == tuple(range(len(op.perm))) and op.source.type == op.result.type:
        return op.source
    inner = _defining(op.source, Transpose)
    if inner is None:
        return None
    perm = tuple(inner.perm[p] for p in op.perm)
    return rewriter.make(Transpose(inner.source, types=[op.result.type], perm=perm), op)


@rewrites(Extract)
def extract_of_extract(op: Extract, rewriter: Rewriter) -> Value | None:
    inner = _defining(op.source, Extract)
    if inner is None:
        return None
    offsets = tuple(a + b for a, b in zip(inner.offsets, op.offsets, strict=True))
    return rewriter.make(Extract(inner.source, types=[op.result.type], offsets=offsets), op)


@rewrites(Reduce)
def reduce_of_constant(op: Reduce, rewriter: Rewriter) -> Value | None:
    """The maximum and minimum of equal elements, and integer sums."""
    constant, dtype = constant_of(op.source), _dtype(op.source)
    if constant is None or constant != constant:
        return None
    if op.fn in ("max", "min"):
        return rewriter.constant(constant, op)
    if op.fn == "sum" and dtype.is_int:
        assert isinstance(op.source.type, TileType)
        count = op.source.type.shape[op.axis]
        return rewriter.constant(folding.normalize(int(constant) * count, dtype), op)
    return None


# --- views ------------------------------------------------------------------------------------


@rewrites(Dim)
def dim_of_view(op: Dim, rewriter: Rewriter) -> Value | None:
    view = op.view.type
    assert isinstance(view, ViewType)
    size = view.shape[op.axis]
    if size is not None:
        return rewriter.constant(size, op)
    inner = op.view.op
    if isinstance(inner, PermuteView):
        return rewriter.make(Dim(inner.view, types=[op.result.type], axis=inner.perm[op.axis]), op)
    if isinstance(inner, Subview):
        return rewriter.make(Dim(inner.view, types=[op.result.type], axis=op.axis + len(inner.index)), op)
    return None


@rewrites(PermuteView)
def permute_chain(op: PermuteView, rewriter: Rewriter) -> Value | None:
    if op.perm == tuple(range(len(op.perm))) and op.view.type == op.result.type:
        return op.view
    inner = _defining(op.view, PermuteView)
    if inner is None:
        return None
    perm = tuple(inner.perm[p] for p in op.perm)
    return rewriter.make(PermuteView(inner.view, types=[op.result.type], perm=perm), op)


@rewrites(Subview)
def subview_chain(op: Subview, rewriter: Rewriter) -> Value | None:
    if not op.index and op.view.type == op.result.type:
        return op.view
    inner = _defining(op.view, Subview)
    if inner is None:
        return None
    return rewriter.make(Subview(inner.view, [*inner.index, *op.index], types=[op.result.type]), op)


# --- control flow -----------------------------------------------------------------------------


def simplify_if(op: If, rewriter: Rewriter) -> Sequence[Value] | None:
    """A constant condition picks a branch; equal yields and lone choices of scalars need none."""
    condition = constant_of(op.condition)
    if condition is not None:
        return rewriter.inline((op.then_body if condition else op.else_body).block, [])
    if not op.results:
        return None
    branches = (terminator(op.then_body), terminator(op.else_body))
    empty = all(len(r.block.ops) == 1 for r in op.regions)
    values: list[Value | None] = []
    for result, *pair in zip(op.results, *(b.values for b in branches), strict=True):
        a, b = (rewriter.mapping.get(v, v) for v in pair)
        if a is b:
            values.append(a)
        elif empty and isinstance(result.type, ScalarType):
            values.append(rewriter.make(Select(op.condition, a, b, types=[result.type], loc=op.loc), op))
        else:
            values.append(None)
    if all(v is not None for v in values) and empty:
        return [v for v in values if v is not None]
    for result, value in zip(op.results, values, strict=True):
        if value is not None:
            rewriter.replace([result], [value])
    return None


def simplify_for(op: For, rewriter: Rewriter) -> Sequence[Value] | None:
    """No iteration: the initial values; one: the body; else values that never change leave the loop."""
    lo, hi, step = (constant_of(v) for v in (op.lo, op.hi, op.step))
    if op.lo is op.hi:
        return op.inits
    if lo is not None and hi is not None and step is not None and step > 0:
        trips = max(0, -(-(int(hi) - int(lo)) // int(step)))
        if trips == 0:
            return op.inits
        if trips == 1:
            return rewriter.inline(op.body.block, [op.lo, *op.inits])
    yielded = terminator(op.body).values
    for arg, init, value, result in zip(op.carried, op.inits, yielded, op.results, strict=True):
        if rewriter.mapping.get(value, value) in (arg, init) and result not in rewriter.mapping:
            _carry_nothing(rewriter, [arg, result], init)
    return None


def simplify_while(op: While, rewriter: Rewriter) -> Sequence[Value] | None:
    """A condition that is false: the initial values; else values that never change leave the loop."""
    (condition,) = terminator(op.condition).values
    condition = rewriter.mapping.get(condition, condition)
    if _is(condition, 0) and all(reads_nothing(o) and not o.regions for o in op.condition.block.ops):
        return op.inits
    groups = (op.condition.block.args, op.body.block.args, op.inits, terminator(op.body).values, op.results)
    for tested, arg, init, value, result in zip(*groups, strict=True):
        if rewriter.mapping.get(value, value) in (arg, init) and result not in rewriter.mapping:
            _carry_nothing(rewriter, [tested, arg, result], init)
    return None


def _carry_nothing(rewriter: Rewriter, values: list[Value], init: Value) -> None:
    """The values are all ``init``. Dead code elimination then drops them from the loop."""
    hint = init.hint
    rewriter.replace(values, [init] * len(values))
    init.hint = hint or values[0].hint


_CONTROL: dict[type[Operation], Callable[[Any, Rewriter], Sequence[Value] | None]] = {
    For: simplify_for,
    If: simplify_if,
    While: simplify_while,
}

__all__ = ["REWRITES", "Canonicalize", "Rewriter", "constant_of", "rewrites"]
