"""Shared memory of a batch of blocks, and what is known about each byte.

Besides the bytes there are, for every block,
- ``written``: bytes that hold a defined value;
- ``incoming``, ``outgoing`` (per 4-byte word): how many asynchronous operations will still write it,
  may still read it. Touching such a word is a race, whatever the values come out as;
- ``dirty`` (per 16 bytes): 1 + the warp whose generic-proxy write no ``fence.proxy.async`` has
  followed yet, or `ANYONE` once a barrier has made it known to all warps (PTX ISA 8.? "Proxies",
  9.7.12.4 membar/fence: a proxy fence is needed between a generic and an async access). The
  granularity makes the check miss some races, never invent one;
- ``barrier``: bytes of mbarrier objects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.nvidia.spaces import check_alignment
from tilewright.runtime.emulator.nvidia.types import LANES, Array

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.state import State

ANYONE = 255
GRAIN = 16


class SharedMemory:
    """``blocks`` x ``size`` bytes; addresses below ``first`` are reserved."""

    def __init__(self, blocks: int, size: int, first: int) -> None:
        self.first, self.size = first, size
        self.pitch = -(-max(size, GRAIN) // 1024) * 1024
        self.data = np.zeros((blocks, self.pitch), np.uint8)
        self.written = np.zeros((blocks, self.pitch), np.bool_)
        self.incoming = np.zeros((blocks, self.pitch // 4), np.uint8)
        self.outgoing = np.zeros((blocks, self.pitch // 4), np.uint8)
        self.dirty = np.zeros((blocks, self.pitch // GRAIN), np.uint8)
        self.barrier = np.zeros((blocks, self.pitch // 4), np.bool_)
        self.in_flight = 0
        self.barriers_exist = False
        # the same bytes by 16, and flat
        self.grains = self.data.reshape(-1, GRAIN)
        self.written_grains = self.written.view(np.uint64).reshape(-1, 2)
        self.incoming_grains = self.incoming.reshape(-1).view(np.uint32)
        self.outgoing_grains = self.outgoing.reshape(-1).view(np.uint32)
        self.grains_per_block = self.pitch // GRAIN

    # ---- generic proxy ---------------------------------------------------------------------------

    def offsets(self, state: State, address: Array, size: int, what: str) -> Array:
        """Checked offsets into the flat bytes, of the active lanes (one-dimensional)."""
        state.require_defined("a shared-memory address")
        check_alignment(state, address, size, f"shared {what}")
        bad = ((address < self.first) | (address + size > self.size)) & state.lanes
        if bad.any():
            at = int(address[bad][0])
            state.fault(
                f"shared {what} out of range: {size} bytes at {at} (the block has {self.first} to {self.size})", bad
            )
        flat = address + (state.selected_blocks() * self.pitch)[:, None]
        offsets: Array = flat.reshape(-1) if state.full else flat[state.lanes]
        return offsets

    def check_read(self, state: State, offsets: Array, size: int, strength: int = 0) -> Array | None:
        """Faults on racing with an asynchronous write; the accesses [lanes] that read undefined bytes, if any."""
        if self.in_flight:
            self._check_words(state, self.incoming, offsets, size, "reads shared memory that a copy in flight writes")
        if self.barriers_exist:
            self._check_words(state, self.barrier, offsets, size, "reads an mbarrier object as data")
        if state.launch.ordering is not None:
            state.launch.ordering.touch(state, "shared", offsets, size, writes=False, strength=strength)
        flat = self.written.reshape(-1)
        defined = flat[offsets]
        for byte in range(1, size):
            defined = defined & flat[offsets + byte]
        return None if defined.all() else ~defined

    def check_write(self, state: State, offsets: Array, size: int, defined: Array | bool = True) -> None:
        """Faults on racing with an asynchronous access; marks the bytes as written by these warps."""
        self.check_target(state, offsets, size)
        self.mark_written(state, offsets, size, defined)

    def check_target(self, state: State, offsets: Array, size: int) -> None:
        """Faults where these bytes are in asynchronous use, or an mbarrier."""
        if self.in_flight:
            self._check_words(state, self.incoming, offsets, size, "writes shared memory that a copy in flight writes")
            self._check_words(
                state, self.outgoing, offsets, size, "writes shared memory that an asynchronous operation still reads"
            )
        if self.barriers_exist:
            self._check_words(state, self.barrier, offsets, size, "writes over an mbarrier object")

    def mark_written(self, state: State, offsets: Array, size: int, defined: Array | bool = True) -> None:
        """The bytes hold values that the selected warps wrote through the generic proxy."""
        flat = self.written.reshape(-1)
        for byte in range(size):
            flat[offsets + byte] = defined
        owner = np.broadcast_to((state.rank[state.w] + 1).astype(np.uint8)[:, None], state.lanes.shape)
        self.dirty.reshape(-1)[offsets // GRAIN] = owner.reshape(-1) if state.full else owner[state.lanes]

    def _check_words(self, state: State, words: Array, offsets: Array, size: int, message: str) -> None:
        flat = words.reshape(-1)
        index = offsets >> 2
        busy = flat[index] != 0
        for word in range(1, max(1, size // 4)):
            busy |= flat[index + word] != 0
        if busy.any():
            guilty = np.zeros(state.lanes.shape, np.bool_)
            guilty[state.lanes] = busy
            state.fault(f"{message}, at {int(offsets[busy.argmax()] % self.pitch)}", guilty)

    # ---- async proxy -----------------------------------------------------------------------------

    def fence(self, state: State) -> None:
        """fence.proxy.async by the selected warps (those with an active lane)."""
        for warp in state.selected()[state.lanes.any(axis=1)]:
            row = self.dirty[state.block[warp]]
            row[(row == state.rank[warp] + 1) | (row == ANYONE)] = 0

    def publish(self, block: int) -> None:
        """The block's warps have synchronised: any of them may fence the writes of all."""
        row = self.dirty[block]
        row[row != 0] = ANYONE

    def check_async_read(self, state: State, grains: Array, message: str) -> None:
        """Fault where the async proxy would read bytes (flat 16-byte grains) not fenced, or still to be written."""
        flat = grains.reshape(-1)
        dirty = self.dirty.reshape(-1)[flat]
        if dirty.any():
            at = int(flat[dirty.argmax()])
            owner = int(dirty.max())
            by = "" if owner == ANYONE else f" by warp {owner - 1}"
            state.fault(
                f"{message} shared memory at {at % self.grains_per_block * GRAIN} written{by} with no "
                "fence.proxy.async between",
                warp=None,
            )
        incoming = self.incoming_grains[flat]
        if incoming.any():
            at = int(flat[incoming.argmax()])
            state.fault(
                f"{message} shared memory that a copy in flight writes, at {at % self.grains_per_block * GRAIN}"
            )

    def hold(self, grains: Array) -> None:
        """An asynchronous operation may read these grains until `release`."""
        flat = np.unique(grains)
        self.outgoing.reshape(-1, 4)[flat] += np.uint8(1)
        self.in_flight += 1

    def release(self, grains: Array) -> None:
        """The end of `hold`."""
        flat = np.unique(grains)
        self.outgoing.reshape(-1, 4)[flat] -= np.uint8(1)
        self.in_flight -= 1

    def expect(self, state: State, block: int, start: int, size: int) -> None:
        """An asynchronous copy will write ``size`` bytes at ``start`` of a block. Faults if something uses them."""
        words = slice(start // 4, -(-(start + size) // 4))
        if start < self.first or start + size > self.size:
            state.fault(f"a copy to shared memory out of range: {size} bytes at {start} of {self.size}")
        for busy, why in (
            (self.outgoing, "an asynchronous operation still reads"),
            (self.incoming, "a copy in flight writes"),
            (self.barrier, "holds an mbarrier"),
        ):
            if busy[block, words].any():
                at = (int(busy[block, words].argmax()) + words.start) * 4
                state.fault(f"a copy to shared memory at {at} that {why}")
        self.incoming[block, words] = 1
        self.in_flight += 1

    def arrived(self, block: int, start: int, size: int) -> None:
        """The end of `expect`: the bytes hold values, of the async proxy."""
        words = slice(start // 4, -(-(start + size) // 4))
        self.incoming[block, words] = 0
        self.written[block, start : start + size] = True
        self.dirty[block, start // GRAIN : -(-(start + size) // GRAIN)] = 0
        self.in_flight -= 1


__all__ = ["ANYONE", "GRAIN", "LANES", "SharedMemory"]
