"""State spaces (PTX ISA 5.1): which memory an address means, and checked access to it.

The generic address space has windows of shared and local memory; parameters and module variables
live in global memory. Shared memory is in `shared_memory`.

In the shared::cluster window a block finds its own shared memory at its shared::cta addresses, and that of the block
of rank r from ``(r + 1) << 24`` on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.memory import BASE
from tilewright.runtime.emulator.nvidia.types import LANES, Array

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.state import State

SHARED_WINDOW, LOCAL_WINDOW = 0x7E00_0000_0000, 0x7D00_0000_0000
_WINDOW_BITS = 24
_WINDOW = 1 << _WINDOW_BITS
_I64 = np.int64


def split_generic(state: State, address: Array) -> list[tuple[str, Array, Array]]:
    """(space, lanes, addresses in it) for the spaces that the active lanes' generic addresses fall into."""
    found = []
    lanes = state.lanes
    for space, base in (("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW)):
        inside = (address >= base) & (address < base + _WINDOW) & state.lanes
        if inside.any():
            found.append((space, inside, address - base))
            lanes = lanes & ~inside
    if lanes.any() or not found:
        found.append(("global", lanes, address))
    return found


def check_alignment(state: State, address: Array, size: int, what: str) -> None:
    """An access of ``size`` bytes must be aligned to them (PTX ISA 6.4.1)."""
    if size > 1:
        bad = ((address & (size - 1)) != 0) & state.lanes
        if bad.any():
            at = int(np.broadcast_to(address, bad.shape)[bad][0])
            state.fault(f"misaligned {what} of {size} bytes at {at:#x}", bad)


def global_offsets(state: State, address: Array, size: int, needed: int | Array = 0) -> Array:
    """Checked offsets into the bytes of global memory, of the active lanes (one-dimensional).

    Only the first ``needed`` bytes of each access must lie in an allocation (0: all). LLVM widens
    loads within their alignment, where memory is there but no value: see `beyond` and the pragma ``used_bytes_mask``.
    """
    state.require_defined("an address")
    check_alignment(state, address, size, "global access")
    offsets: Array = (address.reshape(-1) if state.full else address[state.lanes]) - BASE
    if offsets.size:
        memory = state.launch.memory
        bad = memory.outside(offsets, needed if isinstance(needed, np.ndarray) else needed or size)
        if bad is not None:
            guilty = np.zeros(state.lanes.shape, np.bool_)
            guilty[state.lanes] = bad
            first = int(address[guilty][0])
            state.fault(
                f"global access outside any allocation: {size} bytes at {first:#x}, {memory.describe(first)} "
                f"({int(bad.sum())} lanes in all)",
                guilty,
            )
    return offsets


def beyond(state: State, offsets: Array, size: int, count: int) -> Array | None:
    """Which of ``count`` elements of ``size`` bytes from each offset lie behind their allocation: [offsets, count]."""
    if state.launch.memory.outside(offsets, size * count) is None:
        return None
    places = offsets[:, None] + size * np.arange(count)
    bad = state.launch.memory.outside(places.reshape(-1), size)
    return None if bad is None else bad.reshape(places.shape)


def local_offsets(state: State, address: Array, size: int) -> Array:
    """Checked offsets into the bytes of local memory, of the active lanes."""
    state.require_defined("an address")
    check_alignment(state, address, size, "local access")
    limit = state.launch.kernel.local_bytes
    bad = ((address < 0) | (address + size > limit)) & state.lanes
    if bad.any():
        state.fault(f"local access out of range: {size} bytes at {int(address[bad][0])} of {limit}", bad)
    thread = state.selected()[:, None] * LANES + np.arange(LANES)
    offsets: Array = (address + thread * limit)[state.lanes]
    return offsets


# --- blocks of a cluster ---------------------------------------------------------------------------


def cluster_address(ranks: Array, address: Array) -> Array:
    """The shared::cluster addresses of places in the blocks of these ranks."""
    mapped: Array = (ranks + 1 << _WINDOW_BITS) | (address & (_WINDOW - 1))
    return mapped


def peer(state: State, warp: int, rank: int) -> int:
    """The block (within the batch) of a rank in the warp's cluster. Faults where it has none, or has ended."""
    size, block = state.launch.cluster, int(state.block[warp])
    if not 0 <= rank < size:
        state.fault(f"block {rank} of a cluster of {size}", warp=warp)
    found = block - block % size + rank
    if state.exited[found * state.warps_per_block : (found + 1) * state.warps_per_block].all():
        state.fault(f"uses the shared memory of block {rank} of the cluster, which has ended", warp=warp)
    return found


def locate(state: State, warp: int, address: int) -> tuple[int, int]:
    """(block within the batch, place in its shared memory) of a shared::cluster address."""
    if address < _WINDOW:
        return int(state.block[warp]), address
    return peer(state, warp, (address >> _WINDOW_BITS) - 1), address & (_WINDOW - 1)


__all__ = [
    "BASE",
    "LOCAL_WINDOW",
    "SHARED_WINDOW",
    "cluster_address",
    "global_offsets",
    "local_offsets",
    "locate",
    "peer",
    "split_generic",
]
