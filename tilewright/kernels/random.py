"""Random numbers from counters: Philox 4x32-10, the same bits on every target and for every shape of tiles.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw

#: the multipliers of the two products and what the key grows by from round to round, as signed numbers
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9 - (1 << 32), 0xBB67AE85 - (1 << 32)
LOW = 0xFFFFFFFF
ROUNDS = 10


@tw.function
def multiply(x, multiplier):
    """The high and the low 32 bits of the product of unsigned numbers, as int32 tiles."""
    product = (x.to(tw.int64) & LOW) * multiplier
    return (product >> 32).to(tw.int32), product.to(tw.int32)


@tw.function
def philox(c0, c1, c2, c3, key0, key1):
    """Four words of 32 random bits (int32 tiles) for each counter of four words, int32 tiles of one shape or scalars.

    ``key0`` and ``key1`` are int32 scalars.
    """
    for _ in tw.static_range(ROUNDS):
        high0, low0 = multiply(c0, MULTIPLIER_0)
        high1, low1 = multiply(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + WEYL_0, key1 + WEYL_1
    return c0, c1, c2, c3


@tw.function
def at_least(bits, rate):
    """Whether the upper 24 of 32 random bits, as a number in [0, 1), are at least the float32 ``rate``, exactly."""
    return ((bits >> 8) & 0xFFFFFF) >= tw.ceil(rate * (1 << 24)).to(tw.int32)


def reference_philox(
    counter: tuple[np.ndarray[Any, Any], ...], key: tuple[int, int]
) -> tuple[np.ndarray[Any, Any], ...]:
    """Four arrays of uint32 from four arrays of counters."""
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) & LOW for c in counter)
    k0, k1 = key[0] & LOW, key[1] & LOW
    for _ in range(ROUNDS):
        first, second = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0), second & np.uint64(LOW)
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1), first & np.uint64(LOW)
        k0, k1 = (k0 + WEYL_0) & LOW, (k1 + WEYL_1) & LOW
    return tuple(c.astype(np.uint32) for c in np.broadcast_arrays(c0, c1, c2, c3))
