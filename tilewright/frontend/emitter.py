"""Emits operations with the language's semantics: promotion, broadcasting, folding of compile-time values.

Errors raised here have no location; the visitor adds that of the expression at work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from tilewright.frontend.errors import CompileError
from tilewright.frontend.promotion import (
    FLOAT8,
    arithmetic_dtype,
    literal_as,
    literal_dtype,
    promote,
)
from tilewright.frontend.values import (
    ViewShape,
    contains_value,
    describe,
    dtype_name,
    dtype_of,
    is_number,
    is_operand,
    is_scalar,
    is_tile,
    tile_shape,
)
from tilewright.ir.builder import Builder
from tilewright.ir.core import Value
from tilewright.ir.types import DType, ScalarType, TileType, Type, f32, i1

Shape = tuple[int, ...]

#: of one tile: far more than any device holds in registers, little enough for the interpreter
MOST_ELEMENTS = 1 << 24

#: IR function -> (symbol, meaning at compile time)
ARITHMETIC: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "add": ("+", operator.add),
    "sub": ("-", operator.sub),
    "mul": ("*", operator.mul),
    "div": ("/", operator.truediv),
    "floordiv": ("//", operator.floordiv),
    "mod": ("%", operator.mod),
    "pow": ("**", operator.pow),
    "max": ("maximum", max),
    "min": ("minimum", min),
    "and": ("&", operator.and_),
    "or": ("|", operator.or_),
    "xor": ("^", operator.xor),
    "shl": ("<<", operator.lshift),
    "shr": (">>", operator.rshift),
}
BITWISE = ("and", "or", "xor")
SHIFTS = ("shl", "shr")
COMPARISONS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "eq": ("==", operator.eq),
    "ne": ("!=", operator.ne),
    "lt": ("<", operator.lt),
    "le": ("<=", operator.le),
    "gt": (">", operator.gt),
    "ge": (">=", operator.ge),
}


class Emitter:
    """Operators of the language over a `Builder`."""

    def __init__(self, builder: Builder):
        self.builder = builder

    # --- conversions ----------------------------------------------------------------------------

    def constant(self, value: int | float, type_: Type | DType) -> Value:
        """A scalar or tile constant of a Python number; an error where the dtype cannot hold it."""
        full = ScalarType(type_) if isinstance(type_, DType) else type_
        assert isinstance(full, ScalarType | TileType)
        return self.builder.constant(literal_as(value, full.dtype), full)

    def materialise(self, value: Any) -> Value:
        """A run-time value; Python numbers become scalars of their default dtype."""
        if isinstance(value, Value):
            return value
        if is_number(value):
            return self.constant(value, literal_dtype(value))
        raise CompileError(f"expected a run-time value, got {describe(value)}")

    def cast(self, value: Any, dtype: DType) -> Value:
        """``value.to(dtype)``. Numbers become typed scalars."""
        if not isinstance(value, Value):
            return self.constant(_converted(value, dtype), dtype)
        if dtype_of(value) == dtype:
            return value
        if dtype == i1:
            return self.builder.compare("ne", value, self.constant(0, value.type))
        return self.builder.cast(value, dtype)

    def broadcast(self, value: Value, shape: Shape) -> Value:
        """Splat, expand and broadcast to ``shape``, which the value is known to fit."""
        if isinstance(value.type, ScalarType):
            return self.builder.splat(value, shape) if shape else value
        while len(tile_shape(value)) < len(shape):
            value = self.builder.expand_dims(value, 0)
        return self.builder.broadcast(value, shape)

    def conform(self, value: Any, dtype: DType, shape: Shape) -> Value:
        """A value or number as ``dtype`` with ``shape`` (() for a scalar)."""
        if not isinstance(value, Value):
            return self.constant(value, TileType(shape, dtype) if shape else ScalarType(dtype))
        return self.broadcast(self.cast(value, dtype), shape)

    # --- operators --------------------------------------------------------------------------------

    def binary(self, fn: str, a: Any, b: Any) -> Any:
        """An arithmetic or bitwise operator on numbers, scalars and tiles."""
        a, b = self.plain(a), self.plain(b)
        symbol, meaning = ARITHMETIC[fn]
        if a is None or b is None:
            require_operands(symbol, a, b)
        if not contains_value(a) and not contains_value(b):
            return fold(symbol, meaning, a, b)
        if isinstance(a, tuple) and isinstance(b, tuple) and fn == "add":
            return a + b
        require_operands(symbol, a, b)
        if fn == "pow":
            return self.power(a, b)
        dtype = self._operator_dtype(fn, symbol, promote(a, b))
        shape = broadcast_shapes(symbol, tile_shape(a), tile_shape(b))
        return self.builder.binary(fn, self.conform(a, dtype, shape), self.conform(b, dtype, shape))

    def _operator_dtype(self, fn: str, symbol: str, dtype: DType) -> DType:
        if fn in BITWISE and dtype == i1:
            return i1
        dtype = arithmetic_dtype(dtype)
        if fn in BITWISE + SHIFTS and dtype.is_float:
            raise CompileError(
                f"'{symbol}' needs integers, got {dtype_name(dtype)}",
                hint="use 'and'/'or' on scalars, tw.where on tiles, or tw.bitcast to work on bits",
            )
        return f32 if fn == "div" and not dtype.is_float else dtype

    def power(self, base: Any, exponent: Any) -> Any:
        """``x ** n`` for a compile-time exponent: an integer from -16 to 16, 0.5 or -0.5."""
        if exponent in (0.5, -0.5) and is_number(exponent):
            return self.unary("sqrt" if exponent > 0 else "rsqrt", base)
        if not isinstance(exponent, int) or abs(exponent) > 16:
            raise CompileError(
                f"'**' needs a compile-time exponent between -16 and 16, or 0.5, got {describe(exponent)}",
                hint="write tw.exp2(y * tw.log2(x)) for the general power",
            )
        if exponent < 0:
            return self.binary("div", 1.0, self.power(base, -exponent))
        if exponent == 0:
            return self.conform(1, dtype_of(base), tile_shape(base))
        half = self.power(base, exponent // 2) if exponent > 1 else None
        if half is None:
            return base
        square = self.binary("mul", half, half)
        return self.binary("mul", square, base) if exponent % 2 else square

    def compare(self, fn: str, a: Any, b: Any) -> Any:
        """A comparison, giving bool."""
        a, b = self.plain(a), self.plain(b)
        symbol, meaning = COMPARISONS[fn]
        if not contains_value(a) and not contains_value(b):
            return fold(symbol, meaning, a, b)
        require_operands(symbol, a, b)
        dtype = promote(a, b)
        if dtype in FLOAT8:
            arithmetic_dtype(dtype)
        shape = broadcast_shapes(symbol, tile_shape(a), tile_shape(b))
        return self.builder.compare(fn, self.conform(a, dtype, shape), self.conform(b, dtype, shape))

    def unary(self, fn: str, value: Value) -> Value:
        """A function of one operand; those that need floats convert integers to float32."""
        dtype = arithmetic_dtype(dtype_of(value))
        if fn not in ("neg", "abs") and not dtype.is_float:
            dtype = f32
        return self.builder.unary(fn, self.cast(value, dtype))

    def negate(self, value: Any) -> Any:
        if not isinstance(value, Value):
            return fold("-", lambda x, _: -x, value, 0)
        require_operands("-", value)
        return self.unary("neg", value)

    def invert(self, value: Any) -> Any:
        """``~x``: every bit of an integer, the truth of a bool tile."""
        if isinstance(value, bool):
            raise CompileError("'~' on a compile-time bool gives an int", hint="write 'not x'")
        if not isinstance(value, Value):
            return fold("~", lambda x, _: ~x, value, 0)
        require_operands("~", value)
        if dtype_of(value).is_float:
            raise CompileError(f"'~' needs integers or bools, got {dtype_name(dtype_of(value))}")
        return self.builder.unary("not", value)

    # --- truth --------------------------------------------------------------------------------------

    def truth(self, value: Any, what: str) -> bool | Value:
        """A condition: a Python bool where it is known at compile time, else a scalar i1."""
        value = self.plain(value)
        if isinstance(value, Value):
            if not is_scalar(value):
                hint = "use tw.where for a choice per element, or reduce to a scalar: tw.max(x.to(tw.int32)) > 0"
                raise CompileError(f"{what} must be a scalar, got {describe(value)}", hint=hint)
            return self.cast(value, i1)
        if isinstance(value, bool | int | float | str | tuple) or value is None:
            return bool(value)
        raise CompileError(f"{what} must be a scalar, got {describe(value)}")

    def logical_not(self, value: Any) -> bool | Value:
        condition = self.truth(value, "the operand of 'not'")
        return not condition if isinstance(condition, bool) else self.builder.unary("not", condition)

    def logical(self, fn: str, a: bool | Value, b: bool | Value) -> bool | Value:
        """``and``/``or`` of two conditions; both sides are evaluated when neither is known."""
        if isinstance(a, bool):
            a, b = b, a
        if isinstance(b, bool):
            absorbing = fn == "or"
            return b if b == absorbing else a
        assert isinstance(a, Value)
        return self.builder.binary(fn, a, b)

    # --- shapes ---------------------------------------------------------------------------------------

    def plain(self, value: Any) -> Any:
        """``t.shape`` as a tuple; everything else as it is."""
        if isinstance(value, ViewShape):
            return tuple(self.view_size(value, axis) for axis in range(len(value.sizes)))
        return value

    def view_size(self, shape: ViewShape, axis: int) -> int | Value:
        """One dimension of a tensor: an int where it is static, else an operation."""
        size = shape.sizes[axis]
        return self.builder.dim(shape.view, axis) if size is None else size


def fold(symbol: str, meaning: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """An operator on compile-time values, as Python does it."""
    try:
        return meaning(a, b)
    except ZeroDivisionError:
        raise CompileError(f"'{symbol}' divides by zero at compile time") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise CompileError(f"'{symbol}' on {describe(a)} and {describe(b)}: {error}") from None


def require_operands(symbol: str, *values: Any) -> None:
    for value in values:
        if not is_operand(value):
            hint = "load a tile first: tw.load(view, index, shape)" if isinstance(value, Value) else ""
            hint = "a helper gives None where it ends without 'return'" if value is None else hint
            raise CompileError(f"'{symbol}' does not apply to {describe(value)}", hint=hint)


def require_size(shape: Shape, argument: str | None = None) -> Shape:
    """The shape, or an error where a tile of it has too many elements for anybody."""
    if prod(shape) > MOST_ELEMENTS:
        message = f"a tile of shape {shape} has {prod(shape)} elements, more than {MOST_ELEMENTS}"
        raise CompileError(message, hint="load smaller tiles, in a loop or in more programs", argument=argument)
    return shape


def broadcast_shapes(what: str, *shapes: Sequence[int]) -> Shape:
    """The common shape by NumPy's rules."""
    rank = max(len(s) for s in shapes)
    result = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, rank - len(shape)):
            if size != 1 and result[axis] not in (1, size):
                texts = " and ".join(str(tuple(s)) for s in shapes if s)
                raise CompileError(
                    f"'{what}' on tiles of shapes {texts}, which do not broadcast",
                    hint="sizes must be equal or 1, aligned at the last axis; x[:, None] adds an axis",
                )
            result[axis] = max(result[axis], size) if size != 1 else result[axis]
    return require_size(tuple(result))


def require_tile(value: Any, what: str, argument: str | None = None) -> Value:
    """A tile, or an error that says what needs one."""
    if is_tile(value):
        return value
    hint = "load it first: tw.load(view, index, shape)" if isinstance(value, Value) and not is_scalar(value) else ""
    raise CompileError(f"{what} must be a tile, got {describe(value)}", hint=hint, argument=argument)


def _converted(value: Any, dtype: DType) -> Any:
    if not is_number(value):
        raise CompileError(f"cannot convert {describe(value)} to {dtype_name(dtype)}")
    return int(value) if dtype.is_int else bool(value) if dtype == i1 else value


__all__ = ["ARITHMETIC", "COMPARISONS", "Emitter", "Shape", "broadcast_shapes", "fold", "require_size", "require_tile"]
