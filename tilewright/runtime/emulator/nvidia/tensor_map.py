"""Tensor maps: the emulator's own 128-byte form of what cuTensorMapEncodeTiled encodes opaquely.

Limits as in the CUDA driver API's description of that function. A map is plain bytes, so that code
which copies parameters works; a wrong pointer does not decode (magic number).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.runtime.emulator.errors import EmulatorError

TENSOR_MAP_BYTES = 128
_MAGIC = 0x4D545754
_LAYOUT = struct.Struct("<IBBHQ5I5Q5H5H")
#: element types by the name of the CU_TENSOR_MAP_DATA_TYPE, in the driver's order
ELEMENTS: dict[str, Any] = {
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "INT32": np.int32,
    "UINT64": np.uint64,
    "INT64": np.int64,
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "FLOAT64": np.float64,
    "BFLOAT16": np.uint16,
    "FLOAT32_FTZ": np.float32,
}
_NAMES = tuple(ELEMENTS)
_SWIZZLES = (0, 32, 64, 128)


@dataclass(frozen=True)
class TensorMap:
    """``dims``, ``box`` and ``steps`` (traversal strides) count elements, ``strides`` bytes; innermost first."""

    element: str
    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: int

    @property
    def dtype(self) -> Any:
        """The NumPy type of an element."""
        return np.dtype(ELEMENTS[self.element])

    @property
    def box_shape(self) -> tuple[int, ...]:
        """Elements that one copy moves in each dimension."""
        return tuple(-(-extent // step) for extent, step in zip(self.box, self.steps, strict=True))

    @property
    def box_bytes(self) -> int:
        """Bytes that one copy moves."""
        return int(np.prod(self.box_shape)) * int(self.dtype.itemsize)


def encode_tensor_map(
    element: str,
    address: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int = 0,
    steps: Sequence[int] | None = None,
) -> bytes:
    """The 128 bytes of a map. ``strides`` (bytes) leave out the innermost dimension, as cuTensorMapEncodeTiled does.

    ``element`` is the end of a CU_TENSOR_MAP_DATA_TYPE name ("BFLOAT16"). Elements outside the tensor
    read as zero. EmulatorError for what the driver would refuse.
    """
    rank = len(dims)
    steps = [1] * rank if steps is None else steps
    _check(element, address, dims, strides, box, swizzle, steps)
    packed = _LAYOUT.pack(
        _MAGIC,
        rank,
        _SWIZZLES.index(swizzle),
        _NAMES.index(element),
        address,
        *_padded([d - 1 for d in dims]),
        *_padded([np.dtype(ELEMENTS[element]).itemsize, *strides]),
        *_padded(box),
        *_padded(steps),
    )
    return packed.ljust(TENSOR_MAP_BYTES, b"\0")


def _padded(values: Sequence[int]) -> list[int]:
    return [*values, *[0] * (5 - len(values))]


def _check(
    element: str,
    address: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int,
    steps: Sequence[int],
) -> None:
    rank = len(dims)
    if element not in ELEMENTS or swizzle not in _SWIZZLES:
        raise EmulatorError(f"tensor map: unknown element type {element!r} or swizzle {swizzle}")
    row = -(-box[0] // steps[0]) * np.dtype(ELEMENTS[element]).itemsize
    problems = {
        "the rank must be 1 to 5": not 1 <= rank <= 5,
        "box, steps and strides must fit the rank": (len(box), len(steps), len(strides)) != (rank, rank, rank - 1),
        "the address must be a multiple of 16": address % 16 != 0,
        "dimensions must be 1 to 2**32": any(not 1 <= d <= 1 << 32 for d in dims),
        "strides must be multiples of 16 below 2**40": any(s % 16 or not 0 <= s < 1 << 40 for s in strides),
        "box dimensions must be 1 to 256": any(not 1 <= b <= 256 for b in box),
        "element strides must be 1 to 8": any(not 1 <= s <= 8 for s in steps),
        "the innermost row of the box must be a multiple of 16 bytes": row % 16 != 0,
        "the innermost row of the box must fit the swizzle": swizzle != 0 and row > swizzle,
    }
    for problem, found in problems.items():
        if found:
            raise EmulatorError(f"tensor map: {problem} (dims {dims}, strides {strides}, box {box}, {element})")


def decode_tensor_map(data: bytes) -> TensorMap | None:
    """The map in 128 bytes; None if they hold none."""
    magic, rank, swizzle, element, address, *rest = _LAYOUT.unpack_from(data)
    if magic != _MAGIC:
        return None
    dims, strides, box, steps = (tuple(rest[at : at + rank]) for at in (0, 5, 10, 15))
    return TensorMap(_NAMES[element], address, tuple(d + 1 for d in dims), strides, box, steps, _SWIZZLES[swizzle])
