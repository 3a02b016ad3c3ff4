"""Memories: the global address space, LDS, scratch; and the one place all accesses go through.

Every vector or scalar access of a kernel is a call of one method of `MemorySystem` (``load``,
``store``, ``atomic``, ``load_scalar``, ``send_to_lds``) with addresses, a lane mask and a size.

Loads to LDS are asynchronous: what they read is on its way until the wave waits for it (VM_CNT), and
until then LDS keeps what it held. LDS that nobody wrote is undefined, like a register nobody wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tilewright.runtime.emulator.amd.counters import Counter
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.amd.ordering import WaveOrder, new_shadow
from tilewright.runtime.emulator.amd.state import WaveState
from tilewright.runtime.emulator.memory import BASE, GlobalMemory, load_words, ranks, store_words
from tilewright.runtime.emulator.races import BLOCK, WEAK, Shadow

_U32, _U64, _I64 = np.uint32, np.uint64, np.int64

#: (old, operand words) -> new; words are uint32 arrays
AtomicFunction = Callable[[list[Array], list[Array]], list[Array]]


@dataclass
class _Parcel:
    """Data on its way to LDS. Per wave: its index, the number of the load, byte offsets and words of its lanes."""

    waves: Array
    number: Array
    offsets: Array
    mask: Array
    words: list[Array]
    size: int

    def split(self, now: Array) -> tuple[_Parcel, _Parcel]:
        """The part of the waves in ``now`` (bool), and the rest."""
        first, rest = (
            _Parcel(
                self.waves[part],
                self.number[part],
                self.offsets[part],
                self.mask[part],
                [word[part] for word in self.words],
                self.size,
            )
            for part in (now, ~now)
        )
        return first, rest


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
        #: 255 for each byte of LDS that was written
        self._written = np.zeros_like(self.lds)
        self._parcels: list[_Parcel] = []
        self.scratch_bytes = scratch_bytes
        self._scratch_pitch = -(-scratch_bytes // 16) * 16 + 16
        self.scratch = np.zeros(lanes * self._scratch_pitch if scratch_bytes else 16, np.uint8)
        #: fp8 formats of gfx942 are FNUZ, of gfx950 OCP
        self.fnuz = arch == "gfx942"
        self.clock = 0
        #: counts changes of LDS contents, as ``memory.version`` does those of global memory
        self.version = 0
        self.order: WaveOrder | None = None

    def detect_races(self, order: WaveOrder, shadow: Shadow) -> None:
        """Check all accesses to LDS, and to global memory, whose shadow is ``shadow``, against ``order``."""
        self.order = order
        self._shadows = {
            "global": shadow,
            "lds": new_shadow(
                self.lds.size, order.waves_per_group, lambda offset: f"byte {offset % self._lds_pitch} of LDS"
            ),
        }

    # ---- the accesses ---------------------------------------------------------------------------

    def load(
        self, state: WaveState, space: str, address: Array, mask: Array, size: int, scope: int = WEAK
    ) -> list[Array]:
        """Words [selected waves, 64] read in the lanes of ``mask``; zero elsewhere. ``scope``: of an atomic load."""
        data, offsets, full = self._locate(state, space, address, mask, size)
        self._check(state, space, offsets, mask, size, writes=False, strength=scope)
        if full:
            return [word.reshape(mask.shape) for word in load_words(data, offsets, size)]
        words = [np.zeros(mask.shape, _U32) for _ in range(max(1, size // 4))]
        if offsets.size:
            for word, value in zip(words, load_words(data, offsets, size), strict=True):
                word[mask] = value
        return words

    def store(
        self,
        state: WaveState,
        space: str,
        address: Array,
        mask: Array,
        words: list[Array],
        size: int,
        scope: int = WEAK,
    ) -> None:
        """Write the words in the lanes of ``mask``. ``scope``: of an atomic store."""
        data, offsets, _ = self._locate(state, space, address, mask, size)
        if offsets.size:
            values = [np.broadcast_to(word, mask.shape)[mask] for word in words]
            before = _holds(data, offsets, values, size) if self.order is not None else None
            store_words(data, offsets, values, size)
            if before is not None:
                same = before, _holds(data, offsets, values, size)
                self._check(state, space, offsets, mask, size, writes=True, strength=scope, same=same)
            self._changed(space)
            if space == "lds":
                self._mark_written(offsets, size)

    def atomic(
        self,
        state: WaveState,
        space: str,
        address: Array,
        mask: Array,
        words: list[Array],
        size: int,
        function: AtomicFunction,
        scope: int = BLOCK,
    ) -> list[Array]:
        """Apply ``function`` lane after lane, in wave and lane order; the old words. Misalignment faults."""
        data, offsets, _ = self._locate(state, space, address, mask, size)
        if (offsets & (size - 1)).any():
            state.fault(f"misaligned {size}-byte atomic")
        if space == "lds" and offsets.size:
            self._note_unwritten(state, offsets, mask, size)
            state.require_defined("an atomic in LDS")
        self._check(state, space, offsets, mask, size, writes=True, strength=scope, atomic=True)
        operands = [np.broadcast_to(word, mask.shape)[mask] for word in words]
        old = [np.zeros(mask.shape, _U32) for _ in range(size // 4)]
        rank = ranks(offsets)
        before = [np.zeros(offsets.shape, _U32) for _ in range(size // 4)]
        for turn in range(int(rank.max()) + 1 if offsets.size else 0):
            now = rank == turn
            current = load_words(data, offsets[now], size)
            for word, value in zip(before, current, strict=True):
                word[now] = value
            result = function(current, [word[now] for word in operands])
            store_words(data, offsets[now], result, size)
            if any((new != was).any() for new, was in zip(result, current, strict=True)):
                self._changed(space)
        for word, value in zip(old, before, strict=True):
            word[mask] = value
        return old

    def load_scalar(self, state: WaveState, address: Array, words: int, waves: Array) -> list[Array]:
        """Words [waves] from global memory (ISA chapter 8: dword-aligned)."""
        if (address & _U64(3)).any():
            state.fault("misaligned scalar load", (address & _U64(3)) != 0)
        offsets = (address - _U64(BASE)).astype(_I64)
        bad = self.memory.outside(offsets, 4 * words)
        if bad is not None:
            wrong = int(address[bad.argmax()])
            state.fault(f"scalar load outside any allocation: address {wrong:#x}", bad)
        if self.order is not None and state.instruction is not None:
            where = np.broadcast_to(offsets, waves.shape)
            lanes = np.zeros(waves.shape, _I64)
            conflict = self.order.touch(
                self._shadows["global"], Counter.SCALAR, waves, lanes, where, 4 * words, state.instruction, writes=False
            )
            if conflict is not None:
                state.fault(conflict.message, state.selected == waves[conflict.index])
        return load_words(self.memory.data, offsets, 4 * words)

    def send_to_lds(self, state: WaveState, address: Array, mask: Array, words: list[Array], size: int) -> None:
        """Words on their way to LDS, by the vector memory operation that the selected waves are about to issue."""
        _, offsets, _ = self._locate(state, "lds", address, mask, size)
        self._check(state, "lds", offsets, mask, size, writes=True, counter=Counter.VECTOR)
        placed = np.zeros(mask.shape, _I64)
        placed[mask] = offsets
        waves = state.selected
        number = state.counters.issued[Counter.VECTOR, state.w] + 1
        spread = [np.broadcast_to(word, mask.shape).copy() for word in words]
        self._parcels.append(_Parcel(waves, number, placed, mask.copy(), spread, size))

    def land(self, finished: Array) -> None:
        """Put into LDS what the vector memory operations up to number ``finished`` [waves] have loaded."""
        remaining = []
        for parcel in self._parcels:
            now = parcel.number <= finished[parcel.waves]
            if now.any():
                landing, parcel = parcel.split(now)
                mask = landing.mask
                offsets = landing.offsets[mask]
                store_words(self.lds, offsets, [word[mask] for word in landing.words], landing.size)
                self._mark_written(offsets, landing.size)
                self._changed("lds")
            if parcel.waves.size:
                remaining.append(parcel)
        self._parcels = remaining

    @property
    def underway(self) -> bool:
        """Whether anything is on its way to LDS."""
        return bool(self._parcels)

    # ---- what accesses leave behind --------------------------------------------------------------

    def _changed(self, space: str) -> None:
        if space == "global":
            self.memory.version += 1
        else:
            self.version += 1

    def _check(
        self,
        state: WaveState,
        space: str,
        offsets: Array,
        mask: Array,
        size: int,
        *,
        writes: bool,
        strength: int = WEAK,
        atomic: bool = False,
        counter: Counter | None = None,
        same: tuple[Array, Array] | None = None,
    ) -> None:
        """Note reads of LDS that nobody wrote, and look for races.

        ``counter``: of the operation, by default that of the space. ``same``: see `Team.write`.
        """
        if space == "lds" and not writes and offsets.size:
            self._note_unwritten(state, offsets, mask, size)
        if self.order is None or space == "scratch" or not offsets.size:
            return
        assert state.instruction is not None
        row, lanes = np.nonzero(mask)
        waves = state.selected[row]
        if space == "lds" and atomic:
            strength = BLOCK
        kind = counter if counter is not None else Counter.LDS if space == "lds" else Counter.VECTOR
        conflict = self.order.touch(
            self._shadows[space],
            kind,
            waves,
            lanes,
            offsets,
            size,
            state.instruction,
            writes=writes,
            strength=strength,
            same=same,
        )
        if conflict is not None:
            guilty = np.zeros(state.count, np.bool_)
            guilty[row[conflict.index]] = True
            state.fault(conflict.message, guilty)
        if space == "global" and writes:
            self.order.stored(waves, offsets, strength, atomic=atomic)
        if space == "global" and strength and (atomic or not writes):
            self.order.loaded(waves, offsets, strength)

    def _mark_written(self, offsets: Array, size: int) -> None:
        ones = np.full(offsets.shape, 0xFFFFFFFF, _U32)
        store_words(self._written, offsets, [ones] * max(1, size // 4), size)

    def _note_unwritten(self, state: WaveState, offsets: Array, mask: Array, size: int) -> None:
        """Note that waves read LDS that nobody wrote; their results are undefined."""
        everything = _U32(0xFFFFFFFF >> max(0, 32 - 8 * size))
        missing = np.zeros(offsets.shape, np.bool_)
        for word in load_words(self._written, offsets, size):
            missing |= word != everything
        if missing.any():
            guilty = np.zeros(mask.shape, np.bool_)
            guilty[mask] = missing
            state.read_undefined(np.asarray(guilty.any(axis=1)))

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
            wave = state.selected
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


def _holds(data: Array, offsets: Array, words: list[Array], size: int) -> Array:
    """At which of the offsets ``size`` bytes are those of the words."""
    mask = _U32(0xFFFFFFFF >> max(0, 32 - 8 * size))
    equal: Array = np.ones(offsets.shape, np.bool_)
    for found, word in zip(load_words(data, offsets, size), words, strict=True):
        equal = equal & (found == word & mask)
    return equal
