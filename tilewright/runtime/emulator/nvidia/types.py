"""The fundamental types of PTX (PTX ISA 5.2) and how their bits lie in NumPy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: any numeric array; in registers the shape is [warps, 32]
Array = NDArray[Any]

LANES = 32


@dataclass(frozen=True)
class Type:
    """``dtype`` holds one value; ``kind`` is u, s, b (bits), f (float) or p (predicate).

    Formats that NumPy lacks are their bits: bf16 is uint16, tf32 and the packed pairs are uint32.
    """

    name: str
    bits: int
    dtype: Any
    kind: str

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.bits // 8

    @property
    def unsigned(self) -> Any:
        """The NumPy type of the register that holds it."""
        return UNSIGNED[self.bits]


UNSIGNED: dict[int, Any] = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}

#: a bool array
Mask = NDArray[np.bool_]

TYPES: dict[str, Type] = {
    t.name: t
    for t in (
        *(Type(f"u{n}", n, np.dtype(f"u{n // 8}").type, "u") for n in (8, 16, 32, 64)),
        *(Type(f"s{n}", n, np.dtype(f"i{n // 8}").type, "s") for n in (8, 16, 32, 64)),
        *(Type(f"b{n}", n, np.dtype(f"u{n // 8}").type, "b") for n in (8, 16, 32, 64)),
        Type("f16", 16, np.float16, "f"),
        Type("bf16", 16, np.uint16, "f"),
        Type("f32", 32, np.float32, "f"),
        Type("f64", 64, np.float64, "f"),
        Type("tf32", 32, np.uint32, "f"),
        Type("f16x2", 32, np.uint32, "f"),
        Type("bf16x2", 32, np.uint32, "f"),
        Type("u16x2", 32, np.uint32, "u"),
        Type("s16x2", 32, np.uint32, "s"),
        Type("e4m3x2", 16, np.uint16, "f"),
        Type("e5m2x2", 16, np.uint16, "f"),
        Type("e4m3", 8, np.uint8, "f"),
        Type("e5m2", 8, np.uint8, "f"),
        Type("pred", 1, np.bool_, "p"),
    )
}


def unsigned_of(value: Array) -> Array:
    """The bits of a value, as the register's type. Conditions stay bool."""
    if value.dtype == np.bool_:
        return value
    result: Array = value.view(UNSIGNED[value.dtype.itemsize * 8])
    return result
