"""Vectors over F2 and the powers of two that they address: what layouts are made of."""

from __future__ import annotations

from collections.abc import Sequence

Vector = tuple[int, ...]


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def log2_exact(value: int) -> int:
    """log2 of a power of two; ValueError otherwise."""
    if not is_power_of_two(value):
        raise ValueError(f"{value} is not a power of two")
    return value.bit_length() - 1


def power_of_two_part(value: int) -> int:
    """The largest power of two that divides value (96 -> 32)."""
    return value & -value


def unit(rank: int, axis: int, value: int) -> Vector:
    """The basis vector of the given rank that is `value` along `axis` and 0 elsewhere."""
    return tuple(value if i == axis else 0 for i in range(rank))


def pack(vector: Sequence[int], shape: Sequence[int]) -> int:
    """Row-major flat index of a coordinate inside a power-of-two shape (XOR-linear, as all sizes are powers of two)."""
    flat = 0
    for coordinate, size in zip(vector, shape, strict=True):
        flat = flat * size + coordinate
    return flat


def unpack(flat: int, shape: Sequence[int]) -> Vector:
    """Inverse of `pack`."""
    reversed_coordinates = []
    for size in reversed(shape):
        reversed_coordinates.append(flat % size)
        flat //= size
    return tuple(reversed(reversed_coordinates))


class F2Span:
    """Incremental Gaussian elimination over F2 that remembers which inserted vectors make each reduced one."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, int]] = {}  # leading bit -> (vector, mask of inserted vectors)

    def __len__(self) -> int:
        return len(self._rows)

    def reduce(self, vector: int) -> tuple[int, int]:
        """(remainder, mask): vector = remainder ^ XOR of the inserted vectors whose bit is set in mask."""
        mask = 0
        for bit in sorted(self._rows, reverse=True):
            if vector >> bit & 1:
                row, row_mask = self._rows[bit]
                vector, mask = vector ^ row, mask ^ row_mask
        return vector, mask

    def insert(self, vector: int, index: int) -> bool:
        """Add inserted-vector number `index`; False when it already lies in the span (then nothing changes)."""
        remainder, mask = self.reduce(vector)
        if remainder == 0:
            return False
        self._rows[remainder.bit_length() - 1] = (remainder, mask ^ (1 << index))
        return True
