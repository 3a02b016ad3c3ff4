"""The implementations of the language's builtins, one small function each, keyed by marker."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tilewright.frontend import language as tw
from tilewright.frontend.emitter import Emitter, broadcast_shapes, fold, require_operands, require_size, require_tile
from tilewright.frontend.errors import CompileError
from tilewright.frontend.markers import Builtin
from tilewright.frontend.methods import require_dtype, require_shape
from tilewright.frontend.promotion import arithmetic_dtype, literal_as, literal_dtype, promote
from tilewright.frontend.subscripts import scalar_index
from tilewright.frontend.values import (
    RangeValue,
    describe,
    dtype_name,
    dtype_of,
    is_number,
    is_operand,
    is_scalar,
    is_tile,
    is_view,
    known_int,
    tile_shape,
    view_type,
)
from tilewright.ir.comm_ops import peer_of
from tilewright.ir.core import Value
from tilewright.ir.tile_ops import EVICTION
from tilewright.ir.types import DType, TileType, TokenType, bf16, f16, f32, f64, i1, i8, i16, i32, multipliable

Implementation = Callable[..., Any]
IMPLEMENTATIONS: dict[Builtin, Implementation] = {}


def implements(marker: Any) -> Callable[[Implementation], Implementation]:
    """Register the implementation of a marker; it takes the emitter and the marker's own parameters."""

    def register(implementation: Implementation) -> Implementation:
        IMPLEMENTATIONS[marker] = implementation
        return implementation

    return register


# --- grid, loops, assertions --------------------------------------------------------------------------


def _axis(axis: Any) -> int:
    number = known_int(axis, "the grid axis", "axis")
    if number not in (0, 1, 2):
        raise CompileError(f"grid axis {number} is out of range", hint="the axes are 0, 1 and 2", argument="axis")
    return number


@implements(tw.program_id)
def program_id(emit: Emitter, axis: Any) -> Value:
    return emit.builder.program_id(_axis(axis))


@implements(tw.num_programs)
def num_programs(emit: Emitter, axis: Any) -> Value:
    return emit.builder.num_programs(_axis(axis))


@implements(tw.range)
def range_(emit: Emitter, start: Any, stop: Any, step: Any) -> RangeValue:
    return RangeValue(0, start, step) if stop is None else RangeValue(start, stop, step)


@implements(tw.static_range)
def static_range(emit: Emitter, start: Any, stop: Any, step: Any) -> RangeValue:
    bounds = (0, start, step) if stop is None else (start, stop, step)
    low, high, stride = (known_int(b, "a bound of tw.static_range") for b in bounds)
    if stride == 0:
        raise CompileError("the step of tw.static_range is zero", argument="step")
    if len(range(low, high, stride)) > 4096:
        raise CompileError("tw.static_range unrolls more than 4096 iterations", hint="use tw.range")
    return RangeValue(low, high, stride, unrolled=True)


@implements(tw.static_assert)
def static_assert(emit: Emitter, condition: Any, message: Any) -> None:
    holds = emit.truth(condition, "the condition of tw.static_assert")
    if isinstance(holds, Value):
        raise CompileError(
            "the condition of tw.static_assert is a run-time value",
            hint="it must depend on constants and tw.constexpr parameters only",
            argument="condition",
        )
    if not holds:
        raise CompileError(f"static assertion failed: {message}" if message else "static assertion failed")


# --- memory -------------------------------------------------------------------------------------------


def _view(value: Any, name: str) -> Value:
    if is_view(value):
        return value
    hint = "tiles live in registers: use their values directly" if is_tile(value) else ""
    raise CompileError(f"tw.{name} needs a tensor, got {describe(value)}", hint=hint, argument="view")


def _index(emit: Emitter, view: Value, index: Any, name: str) -> list[Value]:
    index = emit.plain(index)
    items, rank = index if isinstance(index, tuple) else (index,), view_type(view).rank
    if len(items) != rank:
        raise CompileError(
            f"tw.{name}: {len(items)} indices for a tensor of rank {rank}",
            hint="give one tile index per dimension; t[b, h] drops leading dimensions first",
            argument="index",
        )
    return [scalar_index(emit, item, "a tile index", "index") for item in items]


@implements(tw.load)
def load(emit: Emitter, view: Any, index: Any, shape: Any, pad: Any, after: Any, eviction_policy: Any = None) -> Value:
    view = _view(view, "load")
    indices, padding = _index(emit, view, index, "load"), require_pad(pad, dtype_of(view))
    tokens, evict = require_tokens(after, "flag"), _require_policy(eviction_policy)
    if shape is None:
        if evict is not None:
            raise CompileError("tw.load: single elements have no eviction policy", argument="eviction_policy")
        return emit.builder.element(view, indices, padding, tokens)
    sizes = require_shape(emit, shape)
    if len(sizes) != len(indices):
        raise CompileError(
            f"tw.load: a tile of rank {len(sizes)} from a tensor of rank {len(indices)}",
            hint="give one size per dimension and reshape the tile afterwards",
            argument="shape",
        )
    return emit.builder.load(view, indices, sizes, padding, tokens, evict)


def _require_policy(policy: Any) -> str | None:
    if policy is None or policy in EVICTION:
        return policy
    known = ", ".join(map(repr, EVICTION))
    raise CompileError(f"eviction_policy is None or one of {known}, got {policy!r}", argument="eviction_policy")


IMPLEMENTATIONS[tw.get] = load


def require_tokens(after: Any, *kinds: str) -> list[Value]:
    """The tokens of an ``after``: None, one, or tuples of them."""
    if after is None:
        return []
    if isinstance(after, tuple):
        return [token for item in after for token in require_tokens(item, *kinds)]
    if isinstance(after, Value) and after.type in [TokenType(kind) for kind in kinds]:
        return [after]
    givers = {"flag": "tw.wait and tw.barrier", "put": "tw.put and tw.reduce_put"}
    hint = "tokens are what " + " and ".join(givers[kind] for kind in kinds) + " give"
    raise CompileError(f"'after' takes tokens, got {describe(after)}", hint=hint, argument="after")


def require_pad(pad: Any, dtype: DType) -> int | float:
    """What elements outside a tensor read as: a compile-time number that the dtype holds."""
    if not is_number(pad):
        raise CompileError(f"pad must be a compile-time number, got {describe(pad)}", argument="pad")
    try:
        value = literal_as(pad, dtype)
    except CompileError as error:
        raise CompileError(
            f"pad: {error.message}", hint="pad with a number of the tensor's dtype", argument="pad"
        ) from None
    return value if value != 0 and dtype != i1 else int(value != 0)


@implements(tw.store)
def store(emit: Emitter, view: Any, index: Any, value: Any, eviction_policy: Any) -> None:
    indices, tile = stored_tile(emit, "store", _view(view, "store"), index, value)
    require_own_rank(view, "store")
    emit.builder.store(view, indices, tile, _require_policy(eviction_policy))


def require_own_rank(view: Value, name: str) -> None:
    """An error for views of other ranks' tensors, which are written by puts alone."""
    if peer_of(view) is not None:
        hint = "use tw.put, and pass its token to the tw.signal that tells the rank"
        raise CompileError(f"tw.{name} to the tensor of another rank", hint=hint, argument="view")


def stored_tile(emit: Emitter, name: str, view: Value, index: Any, value: Any) -> tuple[list[Value], Value]:
    """The tile index and the tile of a store."""
    indices, dtype = _index(emit, view, index, name), dtype_of(view)
    if is_scalar(value):
        if isinstance(value, Value):
            _same_dtype(dtype_of(value), dtype, "scalar")
        tile = emit.conform(value, dtype, (1,) * len(indices))
    else:
        tile = require_tile(value, f"the value of tw.{name}", "value")
    _same_dtype(dtype_of(tile), dtype, "tile")
    if len(tile_shape(tile)) != len(indices):
        raise CompileError(
            f"tw.{name}: a tile of shape {tile_shape(tile)} to a tensor of rank {len(indices)}",
            hint="reshape the tile, or drop leading dimensions of the tensor: t[b]",
            argument="value",
        )
    return indices, tile


def _same_dtype(value: DType, tensor: DType, kind: str) -> None:
    if value != tensor:
        raise CompileError(
            f"cannot store a {value} {kind} to a tensor of {tensor}",
            hint=f"convert it to the tensor's dtype: value.to(c.dtype), here .to({dtype_name(tensor)})",
            argument="value",
        )


# --- making tiles ---------------------------------------------------------------------------------------


@implements(tw.full)
def full(emit: Emitter, shape: Any, value: Any, dtype: Any) -> Value:
    if not is_scalar(value):
        raise CompileError(f"tw.full needs a scalar, got {describe(value)}", argument="value")
    sizes = require_shape(emit, shape)
    if dtype is None:
        wanted = dtype_of(value) if isinstance(value, Value) else literal_dtype(value)
    else:
        wanted = require_dtype(dtype, "dtype")
    return emit.conform(value, wanted, sizes)


@implements(tw.zeros)
def zeros(emit: Emitter, shape: Any, dtype: Any) -> Value:
    return full(emit, shape, 0, require_dtype(dtype, "dtype"))


@implements(tw.arange)
def arange(emit: Emitter, start: Any, end: Any, dtype: Any) -> Value:
    low, high = (0, start) if end is None else (start, end)
    first, last = known_int(low, "the start of tw.arange", "start"), known_int(high, "the end of tw.arange", "end")
    if last <= first:
        raise CompileError(f"tw.arange({first}, {last}) is empty", hint="the end must be larger than the start")
    require_size((last - first,))
    wanted = require_dtype(dtype, "dtype")
    if wanted.is_float or wanted == i1:
        return emit.cast(emit.builder.iota(last - first, first), wanted)
    return emit.builder.iota(last - first, int(literal_as(first, wanted)), wanted)


@implements(tw.broadcast_to)
def broadcast_to(emit: Emitter, x: Any, shape: Any) -> Value:
    require_operands("tw.broadcast_to", x)
    sizes = require_shape(emit, shape)
    if broadcast_shapes("tw.broadcast_to", tile_shape(x), sizes) != sizes:
        raise CompileError(f"a tile of shape {tile_shape(x)} does not broadcast to {sizes}", argument="shape")
    return emit.broadcast(emit.materialise(x), sizes)


@implements(tw.cast)
def cast(emit: Emitter, x: Any, dtype: Any) -> Value:
    require_operands("tw.cast", x)
    return emit.cast(x, require_dtype(dtype, "dtype"))


@implements(tw.bitcast)
def bitcast(emit: Emitter, x: Any, dtype: Any) -> Value:
    require_operands("tw.bitcast", x)
    value, wanted = emit.materialise(x), require_dtype(dtype, "dtype")
    if dtype_of(value).bits != wanted.bits:
        message = f"tw.bitcast: {dtype_of(value)} has {dtype_of(value).bits} bits, {wanted} has {wanted.bits}"
        raise CompileError(message, hint="choose a dtype of the same width", argument="dtype")
    return value if dtype_of(value) == wanted else emit.builder.bitcast(value, wanted)


# --- elementwise ------------------------------------------------------------------------------------------


@implements(tw.where)
def where(emit: Emitter, condition: Any, x: Any, y: Any) -> Any:
    require_operands("tw.where", condition, x, y)
    if isinstance(condition, Value) and dtype_of(condition) != i1:
        raise CompileError(
            f"the condition of tw.where must be bool, got {describe(condition)}",
            hint="compare it: x != 0",
            argument="condition",
        )
    dtype = promote(x, y)
    shape = broadcast_shapes("tw.where", *(tile_shape(v) for v in (condition, x, y)))
    if not isinstance(condition, Value):
        chosen = x if condition else y
        return chosen if is_number(x) and is_number(y) else emit.conform(chosen, dtype, shape)
    choices = emit.conform(x, dtype, shape), emit.conform(y, dtype, shape)
    return emit.builder.select(emit.broadcast(condition, shape), *choices)


@implements(tw.maximum)
def maximum(emit: Emitter, x: Any, y: Any) -> Any:
    return emit.binary("max", x, y)


@implements(tw.minimum)
def minimum(emit: Emitter, x: Any, y: Any) -> Any:
    return emit.binary("min", x, y)


@implements(tw.cdiv)
def cdiv(emit: Emitter, x: Any, y: Any) -> Any:
    for value, name in ((x, "x"), (y, "y")):
        if isinstance(value, float) or (isinstance(value, Value) and (not is_operand(value) or _is_float(value))):
            raise CompileError(f"tw.cdiv needs integers, got {describe(value)}", argument=name)
    if is_number(x) and is_number(y):
        return fold("cdiv", lambda a, b: -(-a // b), x, y)
    return emit.binary("floordiv", emit.binary("add", x, emit.binary("sub", y, 1)), y)


def _is_float(value: Value) -> bool:
    return dtype_of(value).is_float


#: math function -> its value on a Python number
MATH: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "exp2": lambda x: 2.0**x,
    "log": math.log,
    "log2": math.log2,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)),
    "erf": math.erf,
}


def _math(name: str, meaning: Callable[[float], float]) -> Implementation:
    def implementation(emit: Emitter, x: Any) -> Any:
        require_operands(f"tw.{name}", x)
        if is_number(x):
            return fold(f"tw.{name}", lambda a, _: meaning(a), x, 0)
        return emit.unary(name, x)

    return implementation


def _rounding(name: str, meaning: Callable[[float], int]) -> Implementation:
    def implementation(emit: Emitter, x: Any) -> Any:
        require_operands(f"tw.{name}", x)
        if is_number(x):
            return float(meaning(x)) if isinstance(x, float) else x
        return emit.unary(name, x) if _is_float(x) else x

    return implementation


IMPLEMENTATIONS.update({tw.BUILTINS[name]: _math(name, meaning) for name, meaning in MATH.items()})
IMPLEMENTATIONS[tw.floor] = _rounding("floor", math.floor)
IMPLEMENTATIONS[tw.ceil] = _rounding("ceil", math.ceil)


@implements(tw.abs)
def absolute(emit: Emitter, x: Any) -> Any:
    require_operands("tw.abs", x)
    return abs(x) if is_number(x) else emit.unary("abs", x)


# --- reductions and matrix products -------------------------------------------------------------------------


def _reduction(fn: str) -> Implementation:
    def implementation(emit: Emitter, x: Any, axis: Any, keepdims: Any) -> Value:
        tile = require_tile(x, f"the operand of tw.{fn}", "x")
        axes = reduce_axes(fn, axis, len(tile_shape(tile)))
        if not isinstance(keepdims, bool):
            raise CompileError(f"keepdims must be True or False, got {describe(keepdims)}", argument="keepdims")
        return _reduce(emit, fn, tile, axes, keepdims)

    return implementation


def reduce_axes(fn: str, axis: Any, rank: int) -> list[int]:
    if axis is None:
        return list(range(rank))
    if is_tile(axis) or isinstance(axis, float):
        hint = f"tw.{fn} reduces one tile" + (f"; for two values use tw.{fn}imum" if fn in ("max", "min") else "")
        raise CompileError(f"the axis must be a compile-time integer, got {describe(axis)}", hint=hint, argument="axis")
    axes = [known_int(a, "the axis", "axis") for a in (axis if isinstance(axis, tuple) else (axis,))]
    for a in axes:
        if not -rank <= a < rank:
            hint = f"axes are {-rank}..{rank - 1}"
            raise CompileError(f"axis {a} is out of range for a tile of rank {rank}", hint=hint, argument="axis")
    normal = {a % rank for a in axes}
    if len(normal) != len(axes):
        raise CompileError(f"axis {axis} names an axis twice", argument="axis")
    return sorted(normal)


def _reduce(emit: Emitter, fn: str, tile: Value, axes: list[int], keepdims: bool) -> Value:
    dtype, shape = dtype_of(tile), tile_shape(tile)
    inner, outer = reduction_dtypes(fn, dtype)
    result = emit.cast(tile, inner)
    for axis in reversed(axes):
        result = emit.builder.reduce(fn, result, axis)
    result = emit.cast(result, outer)
    if not keepdims:
        return result
    if len(axes) == len(shape):
        return emit.builder.splat(result, (1,) * len(shape))
    for axis in axes:
        result = emit.builder.expand_dims(result, axis)
    return result


def reduction_dtypes(fn: str, dtype: DType) -> tuple[DType, DType]:
    """The dtype in which a reduction accumulates, and that of its result."""
    arithmetic_dtype(dtype)  # refuses float8
    if fn in ("max", "min"):
        if dtype == i1:
            raise CompileError(f"tw.{fn} of bools", hint="convert first: tw.max(x.to(tw.int32)) > 0 is 'any'")
        return dtype, dtype
    if dtype in (f16, bf16):
        return f32, dtype
    return (i32, i32) if dtype in (i1, i8, i16) else (dtype, dtype)


IMPLEMENTATIONS.update({tw.BUILTINS[fn]: _reduction(fn) for fn in ("sum", "prod", "max", "min")})
PRECISIONS = ("default", "ieee", "tf32", "3xtf32")


@implements(tw.dot)
def dot(emit: Emitter, a: Any, b: Any, acc: Any, precision: Any) -> Value:
    a, b = require_tile(a, "the operand 'a' of tw.dot", "a"), require_tile(b, "the operand 'b' of tw.dot", "b")
    shape = _dot_shape(tile_shape(a), tile_shape(b))
    if not multipliable(dtype_of(a), dtype_of(b)):
        raise CompileError(
            f"tw.dot: operands of different dtypes, {dtype_of(a)} and {dtype_of(b)}",
            hint=f"convert one: b.to({dtype_name(dtype_of(a))})",
            argument="b",
        )
    if dtype_of(a) == i1:
        raise CompileError("tw.dot of bools", hint="convert to tw.int8 or tw.float16", argument="a")
    if precision not in PRECISIONS:
        known = ", ".join(repr(p) for p in PRECISIONS)
        raise CompileError(f"unknown precision {precision!r}", hint=f"one of {known}", argument="precision")
    return emit.builder.dot(a, b, _accumulator(emit, acc, dtype_of(a), shape), precision)


def _dot_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int]:
    if len(a) != 2 or len(b) != 2:
        raise CompileError(f"tw.dot needs matrices, got shapes {a} and {b}", hint="reshape the operands to rank 2")
    if a[1] != b[0]:
        hint = "a is (M, K) and b is (K, N)"
        if a[1] == b[1]:
            hint += "; b looks transposed: use b.T"
        raise CompileError(f"tw.dot: shapes {a} and {b} do not agree: K is {a[1]} and {b[0]}", hint=hint)
    return a[0], b[1]


def _accumulator(emit: Emitter, acc: Any, dtype: DType, shape: tuple[int, int]) -> Value:
    default = f64 if dtype == f64 else f32 if dtype.is_float else i32
    if acc is None or (is_number(acc) and acc == 0):
        return emit.constant(0, TileType(shape, default))
    tile = require_tile(acc, "the accumulator of tw.dot", "acc")
    if tile_shape(tile) != shape:
        message = f"tw.dot: the accumulator has shape {tile_shape(tile)}, the product {shape}"
        raise CompileError(message, hint=f"acc = tw.zeros({shape}, {dtype_name(default)})", argument="acc")
    if dtype_of(tile).is_float != dtype.is_float or dtype_of(tile).bits < min(32, default.bits):
        message = f"tw.dot: a {dtype_of(tile)} accumulator for {dtype} operands"
        raise CompileError(message, hint=f"accumulate in {dtype_name(default)} and convert the result", argument="acc")
    return tile


__all__ = ["IMPLEMENTATIONS", "absolute", "cast", "cdiv", "maximum", "minimum", "range_"]
