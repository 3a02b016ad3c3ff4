"""What one elementwise function does to single elements, in the IR's semantics (`ir.interpreter_numerics`).

Small floats arrive here as f32; `lower.scalars` widens and rounds. Integers wrap, division by zero gives 0,
floordiv and mod round towards minus infinity, shifts by the width or more move every bit out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from tilewright.backends.lower.elements import element
from tilewright.backends.lower.fp8 import truncate_to_odd
from tilewright.backends.lower.ranges import Range
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.types import DType, f32, f64, i1

if TYPE_CHECKING:
    from tilewright.backends.lower.context import Lowering

Apply = Callable[["Lowering", mlir.Value, mlir.Value], mlir.Value]

_FLOAT_COMPARE = {"eq": "oeq", "ne": "une", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge"}
_EXACT_F64 = ("sqrt", "rsqrt", "floor", "ceil")


# --- unary --------------------------------------------------------------------------------------


def unary(lw: Lowering, fn: str, x: mlir.Value, dtype: DType) -> mlir.Value:
    if fn == "neg":
        return lw.fb.fneg(x) if dtype.is_float else lw.fb.neg(x)
    if fn == "abs":
        return lw.fb.fabs(x) if dtype.is_float else x if dtype == i1 else lw.fb.iabs(x)
    if fn == "not":
        return lw.fb.not_(x)
    if dtype == f64:
        if fn not in _EXACT_F64:
            raise lw.error(f"{fn} of f64 is not supported on {lw.target.name} yet", "cast to f32")
        if fn == "rsqrt":
            return lw.fb.fdiv(1.0, lw.fb.sqrt(x))
        return lw.fb.float_unary(fn, x)
    return lw.ops.math(lw, fn, x)


# --- binary -------------------------------------------------------------------------------------


def binary(
    lw: Lowering, fn: str, x: mlir.Value, y: mlir.Value, dtype: DType, ranges: tuple[Range, Range]
) -> mlir.Value:
    """``ranges`` bound the operands where something is known of them (scalars and constants)."""
    table = _FLOAT if dtype.is_float else _BOOL if dtype == i1 else _INT
    if fn in table:
        return table[fn](lw, x, y)
    if dtype.is_float:
        raise lw.error(f"{fn} of {dtype} has no meaning")
    if fn in ("floordiv", "mod"):
        return _integer_division(lw, fn, x, y, ranges)
    if fn in ("shl", "shr"):
        return _shift(lw, fn, x, y, dtype, ranges[1])
    raise lw.error(f"{fn} of {dtype} is not supported on {lw.target.name} yet")


def _float_divide(lw: Lowering, x: mlir.Value, y: mlir.Value) -> mlir.Value:
    return lw.ops.divide(lw, x, y) if x.type == lw.fb.types.f32 else lw.fb.fdiv(x, y)


def _float_divmod(lw: Lowering, x: mlir.Value, y: mlir.Value) -> tuple[mlir.Value, mlir.Value]:
    """(floor(x / y), x - floor(x / y) * y), one step back where the quotient was rounded up to an integer.

    Infinities as in NumPy: an infinite x gives NaN, an infinite y leaves x or goes one step.
    """
    fb = lw.fb
    quotient = fb.floor(fb.fdiv(x, y))  # correctly rounded: an approximation may also fall short of an integer
    rest = fb.select(fb.fcmp("oeq", quotient, 0.0), x, fb.fma(fb.fneg(quotient), y, x))
    beyond = fb.and_(fb.fcmp("one", rest, 0.0), fb.xor(fb.fcmp("olt", rest, 0.0), fb.fcmp("olt", y, 0.0)))
    quotient = fb.select(beyond, fb.fsub(quotient, 1.0), quotient)
    unbounded = fb.fcmp("oeq", fb.fabs(x), math.inf)
    return fb.select(unbounded, math.nan, quotient), fb.select(beyond, fb.fadd(rest, y), rest)


_FLOAT: dict[str, Apply] = {
    # a product may fuse with the addition that uses it: one rounding less, as CUDA and HIP compile by default
    "add": lambda lw, x, y: lw.fb.fadd(x, y, "contract"),
    "sub": lambda lw, x, y: lw.fb.fsub(x, y, "contract"),
    "mul": lambda lw, x, y: lw.fb.fmul(x, y, "contract"),
    "div": _float_divide,
    "floordiv": lambda lw, x, y: _float_divmod(lw, x, y)[0],
    "mod": lambda lw, x, y: _float_divmod(lw, x, y)[1],
    "max": lambda lw, x, y: lw.fb.maximum(x, y, "nsz"),
    "min": lambda lw, x, y: lw.fb.minimum(x, y, "nsz"),
}
_INT: dict[str, Apply] = {
    "add": lambda lw, x, y: lw.fb.add(x, y),
    "sub": lambda lw, x, y: lw.fb.sub(x, y),
    "mul": lambda lw, x, y: lw.fb.mul(x, y),
    "max": lambda lw, x, y: lw.fb.smax(x, y),
    "min": lambda lw, x, y: lw.fb.smin(x, y),
    "and": lambda lw, x, y: lw.fb.and_(x, y),
    "or": lambda lw, x, y: lw.fb.or_(x, y),
    "xor": lambda lw, x, y: lw.fb.xor(x, y),
}
_BOOL: dict[str, Apply] = {
    **dict.fromkeys(("add", "sub", "xor"), _INT["xor"]),
    **dict.fromkeys(("mul", "min", "and"), _INT["and"]),
    **dict.fromkeys(("max", "or"), _INT["or"]),
}


def _integer_division(lw: Lowering, fn: str, x: mlir.Value, y: mlir.Value, ranges: tuple[Range, Range]) -> mlir.Value:
    """Floor division and its remainder."""
    (low, _), (divisor, last) = ranges
    if divisor == last and divisor > 0 and divisor & (divisor - 1) == 0:
        return lw.fb.ashr(x, divisor.bit_length() - 1) if fn == "floordiv" else lw.fb.and_(x, divisor - 1)
    if low >= 0 and divisor > 0:
        return lw.fb.udiv(x, y) if fn == "floordiv" else lw.fb.urem(x, y)
    return _floor_division(lw, fn, x, y, divisor > 0 or last < 0)


def _floor_division(lw: Lowering, fn: str, x: mlir.Value, y: mlir.Value, nonzero: bool) -> mlir.Value:
    fb = lw.fb
    by_zero = None if nonzero else fb.icmp("eq", y, 0)
    if by_zero is not None:  # LLVM calls division by zero undefined
        y = fb.select(by_zero, 1, y)
    by_minus_one = fb.icmp("eq", y, -1)  # and the least integer divided by -1 too
    safe = fb.select(by_minus_one, 1, y)
    quotient, rest = fb.sdiv(x, safe), fb.srem(x, safe)
    below = fb.and_(fb.icmp("ne", rest, 0), fb.icmp("slt", fb.xor(rest, safe), 0))
    if fn == "floordiv":
        result = fb.select(below, fb.sub(quotient, 1), quotient)
        result = fb.select(by_minus_one, fb.neg(x), result)
    else:
        result = fb.select(below, fb.add(rest, safe), rest)
        result = fb.select(by_minus_one, 0, result)
    return result if by_zero is None else fb.select(by_zero, 0, result)


def _shift(lw: Lowering, fn: str, x: mlir.Value, y: mlir.Value, dtype: DType, amount: Range) -> mlir.Value:
    fb = lw.fb
    shift = fb.shl if fn == "shl" else fb.ashr
    if amount[0] >= 0 and amount[1] < dtype.bits:
        return shift(x, y)
    inside = fb.icmp("ult", y, dtype.bits)
    if fn == "shr":
        return fb.ashr(x, fb.select(inside, y, dtype.bits - 1))
    return fb.select(inside, fb.shl(x, fb.select(inside, y, 0)), 0)


# --- comparisons and casts ------------------------------------------------------------------------


def compare(lw: Lowering, fn: str, x: mlir.Value, y: mlir.Value, dtype: DType) -> mlir.Value:
    if dtype.is_float:
        return lw.fb.fcmp(_FLOAT_COMPARE[fn], x, y)
    prefix = "" if fn in ("eq", "ne") else "u" if dtype == i1 else "s"
    return lw.fb.icmp(prefix + fn, x, y)


def cast(lw: Lowering, x: mlir.Value, source: DType, result: DType) -> mlir.Value:
    """Convert an element (small floats as f32) to ``result``, or to f32 where that is a small float."""
    if source.is_float:
        return _cast_float(lw, x, source, result)
    if result.is_float:
        wide = lw.fb.types.f64 if result == f64 else lw.fb.types.f32
        return lw.fb.uitofp(x, wide) if source == i1 else lw.fb.sitofp(x, wide)
    if result == i1:
        return x if source == i1 else lw.fb.icmp("ne", x, 0)
    type_ = element(lw, result)
    if source.bits >= result.bits:
        return lw.fb.trunc(x, type_)
    return lw.fb.zext(x, type_) if source == i1 else lw.fb.sext(x, type_)


def _cast_float(lw: Lowering, x: mlir.Value, source: DType, result: DType) -> mlir.Value:
    fb = lw.fb
    if result.is_float:
        if source == f64:
            if result == f64:
                return x
            return fb.fptrunc(x, fb.types.f32) if result == f32 else truncate_to_odd(lw, x)
        return fb.fpext(x, fb.types.f64) if result == f64 else x
    if result == i1:
        return fb.fcmp("une", x, 0.0)
    bits = max(result.bits, 32)  # saturate to 32 bits, then clamp: narrower conversions are not native
    whole = fb.fptosi_sat(x, fb.types.i64) if bits == 64 else lw.ops.to_int(lw, x)
    if result.bits == bits:
        return whole
    limit = 1 << result.bits - 1
    return fb.trunc(fb.smax(fb.smin(whole, limit - 1), -limit), element(lw, result))
