"""Single elements: their constants, their form in memory, and small floats' way to f32 and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from tilewright.backends.mlir_builder import Type
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.types import DType, i1

if TYPE_CHECKING:
    from tilewright.backends.lower.context import Lowering

_FP8: dict[str, type] = {"f8e4m3": ml_dtypes.float8_e4m3fn, "f8e5m2": ml_dtypes.float8_e5m2}
_FP8_MAX = {"f8e4m3": 448.0, "f8e5m2": 57344.0}


def is_fp8(dtype: DType) -> bool:
    return dtype.name in _FP8


def is_small_float(dtype: DType) -> bool:
    """Whether arithmetic on the type is done in f32 and rounded after every operation."""
    return dtype.is_float and dtype.bits < 32


def element(lw: Lowering, dtype: DType) -> Type:
    """The MLIR type of one element in a register."""
    return lw.fb.types.dtype(dtype.name)


def constant(lw: Lowering, value: float, dtype: DType) -> mlir.Value:
    """One element; integers wrap, floats round to nearest even, fp8 saturates (then lies in an i8)."""
    if is_fp8(dtype):
        limit = _FP8_MAX[dtype.name]
        small: np.ndarray = np.asarray(np.clip(value, -limit, limit), _FP8[dtype.name])
        return lw.fb.const(int(small.view(np.uint8)), lw.fb.types.i8)
    if not dtype.is_float:
        return lw.fb.const(int(value), element(lw, dtype))
    return lw.fb.const(_rounded(value, dtype), element(lw, dtype))


def _rounded(value: float, dtype: DType) -> float:
    """The nearest value of the type, as a Python float."""
    if dtype.name == "bf16":
        return float(ml_dtypes.bfloat16(value))
    if dtype.name == "f16":
        with np.errstate(over="ignore"):
            return float(np.float16(value))
    if dtype.name == "f32" and abs(value) < 3e38:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    with np.errstate(over="ignore"):
        return float(np.float32(value)) if dtype.name == "f32" else float(value)


# --- memory -------------------------------------------------------------------------------------


def memory_type(lw: Lowering, dtype: DType, width: int = 1) -> Type:
    """The type of an access of ``width`` elements; a bool is a byte in memory."""
    one = lw.fb.types.i8 if dtype == i1 else element(lw, dtype)
    return one if width == 1 else lw.fb.types.vec(width, one)


def from_memory(lw: Lowering, value: mlir.Value, dtype: DType) -> mlir.Value:
    return lw.fb.icmp("ne", value, 0) if dtype == i1 else value


def to_memory(lw: Lowering, value: mlir.Value, dtype: DType) -> mlir.Value:
    return lw.fb.zext(value, lw.fb.types.i8) if dtype == i1 else value


def split_vector(lw: Lowering, value: mlir.Value, width: int) -> list[mlir.Value]:
    return [value] if width == 1 else lw.fb.unpack_vector(value)


def join_vector(lw: Lowering, values: Sequence[mlir.Value]) -> mlir.Value:
    return values[0] if len(values) == 1 else lw.fb.pack_vector(values)


# --- words, for shuffles ------------------------------------------------------------------------


def to_words(lw: Lowering, value: mlir.Value, dtype: DType) -> list[mlir.Value]:
    """An element as one or two i32."""
    fb, types = lw.fb, lw.fb.types
    if dtype.bits == 64:
        wide = fb.bitcast(value, types.i64)
        return [fb.trunc(wide, types.i32), fb.trunc(fb.lshr(wide, 32), types.i32)]
    if dtype.bits < 32:
        whole = value if dtype.bits in (1, 8) else fb.bitcast(value, types.i16)
        return [fb.zext(whole, types.i32)]
    return [fb.bitcast(value, types.i32)]


def from_words(lw: Lowering, words: Sequence[mlir.Value], dtype: DType) -> mlir.Value:
    """The inverse of `to_words`."""
    fb, types = lw.fb, lw.fb.types
    if dtype.bits == 64:
        low, high = (fb.zext(word, types.i64) for word in words)
        return fb.bitcast(fb.or_(low, fb.shl(high, 32)), element(lw, dtype))
    (word,) = words
    if dtype.bits < 32:
        small = {1: types.i1, 8: types.i8, 16: types.i16}[dtype.bits]
        return fb.bitcast(fb.trunc(word, small), element(lw, dtype))
    return fb.bitcast(word, element(lw, dtype))


# --- small floats -------------------------------------------------------------------------------


def widen(lw: Lowering, value: mlir.Value, dtype: DType) -> mlir.Value:
    """Floats of 16 and 8 bits as f32; everything else as it is."""
    if is_fp8(dtype):
        return lw.ops.widen_fp8(lw, value, dtype)
    return lw.ops.widen_half(lw, value) if is_small_float(dtype) else value


def round_to(lw: Lowering, values: Sequence[mlir.Value], dtype: DType) -> list[mlir.Value]:
    """f32 values rounded to floats of 16 or 8 bits (nearest even); f32 and other values as they are."""
    if is_fp8(dtype):
        return lw.ops.round_fp8(lw, values, dtype)
    if not is_small_float(dtype):
        return list(values)
    pairs = lw.ops.round_pairs(lw, values, dtype) if len(values) > 1 else None
    return pairs if pairs is not None else [lw.fb.fptrunc(v, element(lw, dtype)) for v in values]
