"""Memories: the global address space, LDS, scratch; and the one place all accesses go through.

`MemorySystem` is where late landing of loads, race detection or other devices would hook in: every
vector or scalar access of a kernel is a call of one of its four methods (``load``, ``store``,
``atomic``, ``load_scalar``) with a space, addresses, a lane mask and a size.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.amd.errors import EmulatorError
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.amd.state import WaveState

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

    def outside(self, offsets: Array, size: int) -> Array | None:
        """Which of the offsets (from BASE, int64, one-dimensional) start an access outside any allocation."""
        low, high = int(offsets.min()), int(offsets.max())
        index = bisect.bisect_right(self._starts, low) - 1
        if index >= 0 and high + size <= self._ends[index]:
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


#: (old, operand words) -> new; words are uint32 arrays
AtomicFunction = Callable[[list[Array], list[Array]], list[Array]]


class MemorySystem:
    """Every memory access of a kernel. Spaces are "global", "lds" and "scratch".

    Addresses are uint64 or int64 arrays [selected waves, 64]: virtual for global memory, byte
    offsets in the workgroup's LDS or the lane's scratch otherwise.
    """

    def __init__(self, memory: GlobalMemory, groups: int, lds_bytes: int, scratch_bytes: int, lanes: int, arch: str):
        self.memory = memory
        self.lds_bytes = lds_bytes
        self._lds_pitch = -(-lds_bytes // 16) * 16 + 16
        self.lds = np.zeros(groups * self._lds_pitch, np.uint8)
        self.scratch_bytes = scratch_bytes
        self._scratch_pitch = -(-scratch_bytes // 16) * 16 + 16
        self.scratch = np.zeros(lanes * self._scratch_pitch if scratch_bytes else 16, np.uint8)
        #: fp8 formats of gfx942 are FNUZ, of gfx950 OCP
        self.fnuz = arch == "gfx942"
        self.clock = 0

    # ---- the four accesses ---------------------------------------------------------------------

    def load(self, state: WaveState, space: str, address: Array, mask: Array, size: int) -> list[Array]:
        """Words [selected waves, 64] read in the lanes of ``mask``; zero elsewhere."""
        data, offsets, full = self._locate(state, space, address, mask, size)
        if full:
            return [word.reshape(mask.shape) for word in load_words(data, offsets, size)]
        words = [np.zeros(mask.shape, _U32) for _ in range(max(1, size // 4))]
        if offsets.size:
            for word, value in zip(words, load_words(data, offsets, size), strict=True):
                word[mask] = value
        return words

    def store(self, state: WaveState, space: str, address: Array, mask: Array, words: list[Array], size: int) -> None:
        """Write the words in the lanes of ``mask``."""
        data, offsets, _ = self._locate(state, space, address, mask, size)
        if offsets.size:
            store_words(data, offsets, [np.broadcast_to(word, mask.shape)[mask] for word in words], size)

    def atomic(
        self,
        state: WaveState,
        space: str,
        address: Array,
        mask: Array,
        words: list[Array],
        size: int,
        function: AtomicFunction,
    ) -> list[Array]:
        """Apply ``function`` lane after lane, in wave and lane order; the old words. Misalignment faults."""
        data, offsets, _ = self._locate(state, space, address, mask, size)
        if (offsets & (size - 1)).any():
            state.fault(f"misaligned {size}-byte atomic")
        operands = [np.broadcast_to(word, mask.shape)[mask] for word in words]
        old = [np.zeros(mask.shape, _U32) for _ in range(size // 4)]
        rank = _ranks(offsets)
        before = [np.zeros(offsets.shape, _U32) for _ in range(size // 4)]
        for turn in range(int(rank.max()) + 1 if offsets.size else 0):
            now = rank == turn
            current = load_words(data, offsets[now], size)
            for word, value in zip(before, current, strict=True):
                word[now] = value
            store_words(data, offsets[now], function(current, [word[now] for word in operands]), size)
        for word, value in zip(old, before, strict=True):
            word[mask] = value
        return old

    def load_scalar(self, state: WaveState, address: Array, words: int) -> list[Array]:
        """Words [selected waves] from global memory (ISA chapter 8: dword-aligned)."""
        if (address & _U64(3)).any():
            state.fault("misaligned scalar load", (address & _U64(3)) != 0)
        offsets = (address - _U64(BASE)).astype(_I64)
        bad = self.memory.outside(offsets, 4 * words)
        if bad is not None:
            wrong = int(address[bad.argmax()])
            state.fault(f"scalar load outside any allocation: address {wrong:#x}", bad)
        return load_words(self.memory.data, offsets, 4 * words)

    # ---- addresses -----------------------------------------------------------------------------

    def _locate(
        self, state: WaveState, space: str, address: Array, mask: Array, size: int
    ) -> tuple[Array, Array, bool]:
        """The backing bytes, the checked byte offsets of the lanes in ``mask``, and whether that is all lanes."""
        state.require_defined("an address or stored data")
        full = bool(mask.all())
        address = np.broadcast_to(address, mask.shape)
        chosen = address.reshape(-1) if full else address[mask]
        if space == "global":
            offsets = (chosen.astype(_U64) - _U64(BASE)).view(_I64)
            bad = self.memory.outside(offsets, size) if offsets.size else None
            data = self.memory.data
        else:
            offsets = chosen.astype(_I64)
            limit = self.lds_bytes if space == "lds" else self.scratch_bytes
            bad = (offsets < 0) | (offsets + size > limit)
            bad = bad if bad.any() else None
        if bad is not None:
            self._report(state, space, chosen, mask, bad, size)
        if space == "lds":
            group = np.broadcast_to(state.group[state.w][:, None], mask.shape)
            offsets = offsets + (group.reshape(-1) if full else group[mask]) * self._lds_pitch
            data = self.lds
        elif space == "scratch":
            wave = np.arange(state.waves)[state.w]
            lane = wave[:, None] * 64 + np.arange(64)
            offsets = offsets + (lane.reshape(-1) if full else lane[mask]) * self._scratch_pitch
            data = self.scratch
        return data, offsets, full

    def _report(self, state: WaveState, space: str, chosen: Array, mask: Array, bad: Array, size: int) -> None:
        which = int(bad.argmax())
        wave, lane = (int(index[which]) for index in np.nonzero(mask))
        guilty = np.zeros(state.count, np.bool_)
        guilty[wave] = True
        address = int(chosen[which])
        if space == "global":
            detail = f"global access outside any allocation: {self.memory.describe(address)}"
        else:
            limit = self.lds_bytes if space == "lds" else self.scratch_bytes
            detail = f"{space} access out of range: offset {address} of {limit} bytes"
        state.fault(f"{detail} ({size} bytes at {address:#x}, lane {lane}, {int(bad.sum())} lanes in all)", guilty)


def _ranks(offsets: Array) -> Array:
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
