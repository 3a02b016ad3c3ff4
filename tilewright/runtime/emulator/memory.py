"""The global address space that emulated kernels share, and access to bytes as words."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.runtime.emulator.errors import EmulatorError

#: any numeric array
Array = NDArray[Any]

_U32, _U64, _I64 = np.uint32, np.uint64, np.int64
#: where the simulated address space starts: 48-bit, as buffer descriptors need
BASE = 0x7F10_0000_0000
_ALIGNMENT, _GUARD = 256, 4096


class GlobalMemory:
    """An address space of copies of NumPy arrays, with guard gaps between them.

    ``allocate`` copies the array in and returns its address (256-byte aligned); ``read_back``
    copies the present contents out with the array's shape and dtype.
    """

    def __init__(self) -> None:
        self.data = np.zeros(1 << 16, np.uint8)
        #: grows with each write of a kernel: who waits for memory to change need not look before
        self.version = 0
        self._top = _GUARD
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._arrays: dict[int, tuple[tuple[int, ...], Any]] = {}
        self._names: dict[int, str] = {}

    def allocate(self, array: np.ndarray[Any, Any], name: str = "") -> int:
        """Copy ``array`` into the address space; the address of its first byte. C order."""
        octets = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        start = self._top
        end = start + octets.size
        self._top = -(-(end + _GUARD) // _ALIGNMENT) * _ALIGNMENT
        if self._top > self.data.size:
            grown = np.zeros(max(self._top, 2 * self.data.size) + 7 & ~7, np.uint8)
            grown[: self.data.size] = self.data
            self.data = grown
        self.data[start:end] = octets
        self._starts.append(start)
        self._ends.append(end)
        self._arrays[BASE + start] = (array.shape, array.dtype)
        self._names[BASE + start] = name
        return BASE + start

    def read_back(self, address: int) -> np.ndarray[Any, Any]:
        """The contents of the allocation at ``address`` as an array of its own."""
        if address not in self._arrays:
            raise EmulatorError(f"no allocation starts at {address:#x}")
        shape, dtype = self._arrays[address]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.data[address - BASE : address - BASE + size].tobytes(), dtype).reshape(shape).copy()

    def free(self, address: int) -> None:
        """End an allocation: later accesses to it fault."""
        index = bisect.bisect_left(self._starts, address - BASE)
        if self._arrays.pop(address, None) is None:
            raise EmulatorError(f"no allocation starts at {address:#x}")
        del self._starts[index], self._ends[index], self._names[address]

    def write(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Copy ``array`` over the start of the allocation at ``address``."""
        octets = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        index = bisect.bisect_right(self._starts, address - BASE) - 1
        if index < 0 or address - BASE + octets.size > self._ends[index]:
            raise EmulatorError(f"{octets.size} bytes at {address:#x} do not fit an allocation")
        self.data[address - BASE : address - BASE + octets.size] = octets

    def outside(self, offsets: Array, size: int | Array) -> Array | None:
        """Which of the offsets (from BASE, int64, one-dimensional) start an access outside any allocation."""
        low = int(offsets.min())
        high = int(offsets.max()) + size if isinstance(size, int) else int((offsets + size).max())
        index = bisect.bisect_right(self._starts, low) - 1
        if index >= 0 and high <= self._ends[index]:
            return None
        if not self._starts:
            return np.ones(offsets.shape, np.bool_)
        index_of = np.searchsorted(np.array(self._starts), offsets, side="right") - 1
        bad: Array = (index_of < 0) | (offsets + size > np.array(self._ends)[index_of])
        return bad if bad.any() else None

    def describe(self, address: int) -> str:
        """Where an address lies relative to the nearest allocation below it, for messages."""
        index = bisect.bisect_right(self._starts, address - BASE) - 1
        if index < 0:
            return "below every allocation"
        start, end = self._starts[index], self._ends[index]
        name = self._names[BASE + start] or f"{start + BASE:#x}"
        return f"{address - BASE - start} bytes into allocation {name} of {end - start} bytes"


def load_words(data: Array, offsets: Array, size: int) -> list[Array]:
    """Read ``size`` bytes (1, 2 or a multiple of 4) at each byte offset: uint32 words, zero-extended."""
    if size < 4:
        word = data[offsets].astype(_U32)
        if size == 2:
            word |= data[offsets + 1].astype(_U32) << _U32(8)
        return [word]
    if not (offsets & 3).any():
        words, index = data.view(_U32), offsets >> 2
        return [words[index + part] for part in range(size // 4)]
    octets = data[offsets[..., None] + np.arange(size)]
    return [octets[..., 4 * part : 4 * part + 4].copy().view(_U32)[..., 0] for part in range(size // 4)]


def store_words(data: Array, offsets: Array, words: list[Array], size: int) -> None:
    """Write ``size`` bytes at each byte offset; of equal offsets the last wins."""
    if size < 4:
        data[offsets] = words[0].astype(np.uint8)
        if size == 2:
            data[offsets + 1] = (words[0] >> _U32(8)).astype(np.uint8)
        return
    if not (offsets & 3).any():
        view, index = data.view(_U32), offsets >> 2
        for part, word in enumerate(words):
            view[index + part] = word
        return
    octets = np.ascontiguousarray(np.stack(words, axis=-1)).view(np.uint8)
    data[offsets[..., None] + np.arange(size)] = octets


def ranks(offsets: Array) -> Array:
    """For each element, how many equal ones precede it."""
    order = np.argsort(offsets, kind="stable")
    ordered = offsets[order]
    fresh = np.ones(len(ordered), np.bool_)
    fresh[1:] = ordered[1:] != ordered[:-1]
    positions = np.arange(len(ordered))
    starts = np.maximum.accumulate(np.where(fresh, positions, 0))
    rank = np.empty(len(ordered), _I64)
    rank[order] = positions - starts
    return rank
