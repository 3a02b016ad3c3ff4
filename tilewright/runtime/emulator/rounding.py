"""Arithmetic that NumPy lacks: float64 fused multiply-add, and float32 and float16 in every rounding mode.

The modes are rn, rz, rm and rp (as in `exact`). What is narrower than float64 is computed in float64 *rounded to odd*
and then rounded once more in the mode asked for: a float64 that was rounded to odd still tells on which side of any
float32, float16 or bfloat16 (or midpoint of two) the exact value lies, so the second rounding gives what a single one
of the exact value would (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.runtime.emulator.exact import fused_to_nearest

Array = NDArray[Any]
_I64 = np.int64


def round_to_odd(value: Array, error: Array) -> Array:
    """``value`` + ``error`` (the nearest float64 and the exact remainder) rounded to odd."""
    bits = value.view(_I64)
    even = (bits & 1) == 0
    step = np.where((error > 0) == (value > 0), 1, -1)
    wrong = even & (error != 0) & np.isfinite(value) & (value != 0)
    result: Array = np.where(wrong, bits + step, bits).view(np.float64)
    return result


def sum_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd (Knuth's error-free sum)."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    plain = a + b
    other = plain - a
    error = (a - (plain - other)) + (b - other)
    return round_to_odd(plain, error)


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded to odd; the product of two numbers of at most 26 bits is exact."""
    return sum_to_odd(a.astype(np.float64) * b.astype(np.float64), c)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """float64 fused multiply-add, to nearest: Dekker's product, and sums rounded to odd before the last.

    Where the splitting overflows or the product's error underflows, by rationals. An infinite c stays, whatever a * b.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    product = a * b
    high_a, low_a = _split(a)
    high_b, low_b = _split(b)
    error = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    plain = product + c
    other = plain - product
    rest = (product - (plain - other)) + (c - other)
    corrected = plain + sum_to_odd(rest, error)
    quick: Array = np.where(np.isfinite(corrected), corrected, plain)
    result = fused_to_nearest(a, b, c, quick)
    return np.where(np.isinf(c) & np.isfinite(a) & np.isfinite(b), c, result)


def _split(value: Array) -> tuple[Array, Array]:
    scaled = value * 134217729.0
    high = scaled - (scaled - value)
    return high, value - high


def round_from_odd(value: Array, dtype: Any, mode: str) -> Array:
    """float64 (rounded to odd, or exact) -> float32 or float16."""
    nearest: Array = value.astype(dtype)
    if mode == "rn":
        return nearest
    back = nearest.astype(np.float64)
    beyond = {"rz": np.abs(back) > np.abs(value), "rm": back > value, "rp": back < value}[mode]
    limit = {"rz": 0, "rm": -np.inf, "rp": np.inf}[mode]
    return np.where(beyond, np.nextafter(nearest, dtype(limit)), nearest)


def signed_zero(total: Array, a: Array, b: Array, mode: str) -> Array:
    """a + b, where a sum that is exactly zero is -0 when rounding down, unless both are +0."""
    if mode != "rm":
        return total
    return np.where((total == 0) & (np.signbit(a) | np.signbit(b)), -0.0, total)
