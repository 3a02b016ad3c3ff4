"""float64 arithmetic in every rounding mode, exact by rationals: rn (nearest), rz (towards zero), rm (down), rp (up).

NumPy rounds float64 to nearest only. Here the exact result is compared with the nearest one, element by element, and
moved by one place where the mode asks for it. Slow, and rarely used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: the sign of (exact result - nearest), from the nearest result and finite operands
Comparison = Callable[..., Fraction]

_TINY, _HUGE = 2.0**-400, 2.0**400


def directed(nearest: Array, difference: Comparison, mode: str, *operands: Array) -> Array:
    """``nearest`` moved to the neighbour that ``mode`` asks for. ``difference`` gives exact - nearest as a Fraction."""
    if mode == "rn":
        return nearest
    arrays = [np.broadcast_to(operand, nearest.shape).ravel() for operand in operands]
    result = nearest.ravel().copy()
    for i, value in enumerate(result):
        values = [float(array[i]) for array in arrays]
        if math.isnan(value) or not all(math.isfinite(v) for v in values):
            continue
        if math.isinf(value):  # a finite result beyond the range, or a division by zero
            if difference is quotient and values[1] == 0:
                continue
            sign = -1 if value > 0 else 1
        else:
            sign = _sign(difference(float(value), *values))
        zero = value == 0 and sign == 0 and difference in (total, fused)
        result[i] = _exact_zero(values, mode) if zero else _move(float(value), sign, mode)
    return result.reshape(nearest.shape)


def _sign(value: Fraction) -> int:
    return (value > 0) - (value < 0)


def _move(value: float, sign: int, mode: str) -> float:
    """``value`` where the exact one is lower (-1), equal (0) or higher (1)."""
    down = sign < 0 and (mode == "rm" or (mode == "rz" and value > 0))
    up = sign > 0 and (mode == "rp" or (mode == "rz" and value < 0))
    return math.nextafter(value, -math.inf) if down else math.nextafter(value, math.inf) if up else value


def _exact_zero(values: list[float], mode: str) -> float:
    """A sum that is exactly zero is -0 when rounding down, unless both addends are +0."""
    first = math.copysign(1.0, values[0]) * (math.copysign(1.0, values[1]) if len(values) == 3 else 1.0)
    signs = {first, math.copysign(1.0, values[-1])}
    if len(signs) == 1:
        return math.copysign(0.0, first)
    return -0.0 if mode == "rm" else 0.0


def total(nearest: float, a: float, b: float) -> Fraction:
    return Fraction(a) + Fraction(b) - Fraction(nearest)


def product(nearest: float, a: float, b: float) -> Fraction:
    return Fraction(a) * Fraction(b) - Fraction(nearest)


def fused(nearest: float, a: float, b: float, c: float) -> Fraction:
    return Fraction(a) * Fraction(b) + Fraction(c) - Fraction(nearest)


def quotient(nearest: float, a: float, b: float) -> Fraction:
    return Fraction(a) / Fraction(b) - Fraction(nearest)


def root(nearest: float, a: float) -> Fraction:
    return Fraction(a) - Fraction(nearest) ** 2


def fused_to_nearest(a: Array, b: Array, c: Array, quick: Array) -> Array:
    """``quick``, an error-free transformation's a * b + c, where it is safe; the rational result elsewhere.

    Safe: no part of the product overflows or underflows.
    """
    sizes = [np.abs(x) for x in (a, b, a * b)]
    unsafe = np.zeros(quick.shape, bool)
    for size in sizes:
        unsafe |= (size > _HUGE) | ((size < _TINY) & (size != 0))
    unsafe |= (a * b == 0) & (a != 0) & (b != 0)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    places = np.flatnonzero(unsafe & finite)
    if not places.size:
        return quick
    result = quick.ravel().copy()
    flat = [np.broadcast_to(x, quick.shape).ravel() for x in (a, b, c)]
    for i in places:
        x, y, z = (float(array[i]) for array in flat)
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if exact:
            try:
                result[i] = float(exact)
            except OverflowError:
                result[i] = math.inf if exact > 0 else -math.inf
            if not result[i]:
                result[i] = math.copysign(0.0, exact)
        else:
            result[i] = x * y + z
    return result.reshape(quick.shape)
