"""What Hopper's matrix units compute, bit for bit: D = A B + C of one instruction.

The PTX ISA leaves the precision of sums open ("at least single precision", 9.7.14 and 9.7.15). What follows was found
by comparing candidates with an H100 on random operands and equals it in every bit (``tests/gpu/emulator_agreement.py``
and its committed results); other architectures add up in other widths. For floats of at most 16 bits and tf32:

- a product's exponent is the sum of its factors' exponents (the product itself, in [1, 4), is not normalised);
- all products and C are cut off, toward zero, at 25 binary digits below the largest exponent among them, and added
  exactly; the sum is cut to float32 toward zero, or rounded to the nearest float16;
- warpgroup instructions on 8-bit floats keep 13 digits below the largest exponent, and 13 of the sum;
- mma.sync on 8-bit floats is two products of 16-bit floats, of elements 4 i, 4 i + 1 and 4 i + 2, 4 i + 3 of k, one
  after the other onto zero; C is added to that in float32, rounded to nearest.

Products of float64 are fused multiply-adds in the order of k.
"""

from __future__ import annotations

import numpy as np

from tilewright.runtime.emulator.nvidia.types import Array
from tilewright.runtime.emulator.rounding import fma64

#: binary digits kept below the largest exponent
DIGITS, DIGITS_OF_BYTES = 25, 13
#: the exponent of zero: below all others, and no sum of two overflows
_NOTHING = -(1 << 14)


def multiply(a: Array, b: Array, c: Array, kind: str, result: str, asynchronous: bool) -> Array:
    """D = A B + C in float64 (exactly the numbers of ``result``).

    a [g, m, k], b [g, k, n], c [g, m, n], float64. ``kind``: the type of A, ``result`` that of C and D (PTX names).
    ``asynchronous``: wgmma.
    """
    if kind == "f64":
        return _fused(a, b, c)
    if result == "s32":
        product: Array = a @ b + c
        return product
    unusual = not all(np.isfinite(x).all() for x in (a, b, c))
    plain = a @ b + c if unusual else c
    exact = _floats(a, b, c, kind, result, asynchronous)
    return np.where(np.isfinite(plain), exact, plain) if unusual else exact


def _floats(a: Array, b: Array, c: Array, kind: str, result: str, asynchronous: bool) -> Array:
    eight = kind in ("e4m3", "e5m2")
    if not eight or asynchronous:
        digits = DIGITS_OF_BYTES if eight else DIGITS
        return _rounded(*_sum(a, b, c, digits), result, DIGITS_OF_BYTES if eight else None)
    first = np.arange(a.shape[2]) % 4 < 2
    total = np.zeros_like(c)
    for half in (first, ~first):
        total = _rounded(*_sum(a[:, :, half], b[:, half], total, DIGITS), "f32", None)
    return (total + c).astype(np.float32 if result == "f32" else np.float16).astype(np.float64)


def _fused(a: Array, b: Array, c: Array) -> Array:
    for i in range(a.shape[2]):
        c = fma64(a[:, :, i, None], b[:, None, i, :], c)
    return c


def _sum(a: Array, b: Array, c: Array, digits: int) -> tuple[Array, Array]:
    """The sum of the products and C, cut off ``digits`` below the largest exponent: in units of 2^[1]. All finite."""
    a_digits, a_exponents = _split(a)
    b_digits, b_exponents = _split(b)
    largest = _exponents(c)
    k = a.shape[2]
    for i in range(k):
        np.maximum(largest, a_exponents[:, :, i, None] + b_exponents[:, None, i, :], out=largest)
    # a product's digits lie in [2^(digits - shift), 2^(digits + 2 - shift)): exact in float32 while they are cut off
    total = np.trunc(_scaled(c, digits - largest))
    b_scaled = np.ldexp(b_digits, digits).astype(np.float32)
    for i in range(k):
        shift = a_exponents[:, :, i, None] + b_exponents[:, None, i, :]
        shift -= largest
        part = _power_of_two(shift)
        part *= a_digits[:, :, i, None]
        part *= b_scaled[:, None, i, :]
        total += np.trunc(part, out=part)
    return total, largest - digits


def _split(value: Array) -> tuple[Array, Array]:
    """Signed significands in [1, 2) as float32, and exponents; zeros are 0 and `_NOTHING`."""
    significand, exponent = np.frexp(value)
    zero = (significand == 0) | ~np.isfinite(significand)
    return (significand * 2).astype(np.float32), np.where(zero, _NOTHING, exponent - 1).astype(np.int32)


def _exponents(value: Array) -> Array:
    exponent = np.frexp(value)[1]
    return np.where((value == 0) | ~np.isfinite(value), _NOTHING, exponent - 1).astype(np.int32)


def _scaled(value: Array, power: Array) -> Array:
    return np.ldexp(value, np.clip(power, -1000, 1000))


def _power_of_two(exponent: Array) -> Array:
    """2^exponent as float32 for exponents up to 0; 0 below -126, where nothing is left of a product."""
    exponent += 127
    np.maximum(exponent, 0, out=exponent)
    exponent <<= 23
    power: Array = exponent.view(np.float32)
    return power


def _rounded(total: Array, unit: Array, result: str, digits: int | None) -> Array:
    """``total`` * 2^unit as float64: cut to float32 or to so many ``digits``, or rounded to float16.

    From 2^128 on it is infinite.
    """
    value = np.ldexp(total, unit)
    if digits is not None:
        value = _cut(value, digits)
    if result == "f16":
        return value.astype(np.float16).astype(np.float64)
    nearest = value.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(value)
    over &= np.abs(value) < 2.0**128
    return np.where(over, np.nextafter(nearest, np.float32(0)), nearest).astype(np.float64)


def _cut(value: Array, digits: int) -> Array:
    """float64 with only so many binary digits after the first, cut off."""
    keep = np.uint64((1 << 64) - (1 << (52 - digits)))
    bits: Array = value.view(np.uint64) & keep
    return bits.view(np.float64)
