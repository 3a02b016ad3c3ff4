"""Which dtype an operation computes in.

=====================  =====================================================================
operands               result
=====================  =====================================================================
same dtype             that dtype
dtype, Python literal  the dtype (literals are weak); but a float literal with an int or bool
                       gives float32, and an int literal with a bool gives int32
bool, int              the int
int, int               the wider
int or bool, float     the float
float16, bfloat16      float32
other floats           the wider
literal, literal       computed at compile time
=====================  =====================================================================

``/`` on integers gives float32. Arithmetic on bools is done in int32 (``& | ^`` stay bool).
Comparisons give bool. float8 has no arithmetic: convert first.
"""

from __future__ import annotations

from typing import Any

from tilewright.frontend.errors import CompileError
from tilewright.frontend.values import dtype_name, dtype_of
from tilewright.ir.core import Value
from tilewright.ir.types import DType, bf16, f8e4m3, f8e5m2, f16, f32, i1, i32, i64

FLOAT8 = (f8e4m3, f8e5m2)


def promote(a: Any, b: Any) -> DType:
    """The dtype in which two operands (values or Python numbers) meet."""
    if isinstance(a, Value) and isinstance(b, Value):
        return promote_dtypes(dtype_of(a), dtype_of(b))
    if isinstance(a, Value):
        return _with_literal(dtype_of(a), b)
    if isinstance(b, Value):
        return _with_literal(dtype_of(b), a)
    if isinstance(a, float) or isinstance(b, float):
        return f32
    return max(literal_dtype(a), literal_dtype(b), key=lambda t: t.bits)


def promote_dtypes(a: DType, b: DType) -> DType:
    """The dtype in which two typed operands meet."""
    if a == b:
        return a
    if a.is_float and b.is_float:
        if a in FLOAT8 or b in FLOAT8:
            raise _float8(a if a in FLOAT8 else b)
        return f32 if {a, b} == {f16, bf16} else max(a, b, key=lambda t: t.bits)
    if a.is_float or b.is_float:
        return a if a.is_float else b
    return max(a, b, key=lambda t: t.bits)


def _with_literal(dtype: DType, literal: int | float) -> DType:
    if dtype.is_float or isinstance(literal, bool):
        return dtype
    if isinstance(literal, float):
        return f32
    return i32 if dtype == i1 else dtype


def literal_dtype(value: int | float) -> DType:
    """The dtype of a Python number that meets nothing typed: int32 (int64 if large), float32, bool."""
    if isinstance(value, bool):
        return i1
    if isinstance(value, float):
        return f32
    return i32 if fits(value, i32) else i64


def fits(value: int, dtype: DType) -> bool:
    """Whether a signed integer type holds the value."""
    return -(1 << (dtype.bits - 1)) <= value < 1 << (dtype.bits - 1)


def literal_as(value: Any, dtype: DType) -> int | float | bool:
    """A Python number as a constant of ``dtype``; an error where it would change its value."""
    if dtype.is_float:
        return float(value)
    if dtype == i1:
        if value in (0, 1):
            return bool(value)
    elif isinstance(value, float) and not value.is_integer():
        raise CompileError(f"{value!r} is not an integer: {dtype_name(dtype)} cannot hold it", hint="use a float dtype")
    elif fits(int(value), dtype):
        return int(value)
    raise CompileError(f"{value!r} does not fit {dtype_name(dtype)}", hint="use a wider dtype")


def arithmetic_dtype(dtype: DType) -> DType:
    """The dtype arithmetic happens in: bool counts as int32, float8 is refused."""
    if dtype in FLOAT8:
        raise _float8(dtype)
    return i32 if dtype == i1 else dtype


def _float8(dtype: DType) -> CompileError:
    return CompileError(f"{dtype_name(dtype)} has no arithmetic", hint="convert first: x.to(tw.float32)")


__all__ = ["FLOAT8", "arithmetic_dtype", "fits", "literal_as", "literal_dtype", "promote", "promote_dtypes"]
