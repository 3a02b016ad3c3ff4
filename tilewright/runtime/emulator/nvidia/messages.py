"""st.async (PTX ISA 9.7.9.12): a store into a block of the cluster that counts its bytes at an mbarrier there.

It lands like a copy: when no warp can run without it, or with a seed at any time before. Its thread goes on at once;
that the barrier counts the bytes releases the store, and what the thread did before, to who acquires the phase.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.launch import Work
from tilewright.runtime.emulator.nvidia.mbarrier import change, find_barrier, landed
from tilewright.runtime.emulator.nvidia.operands import address, parts, source
from tilewright.runtime.emulator.nvidia.registry import Execute
from tilewright.runtime.emulator.nvidia.spaces import locate
from tilewright.runtime.emulator.nvidia.types import unsigned_of

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.state import State


def store_async(inst: Instruction) -> Execute:
    """st.async{.weak}.shared::cluster.mbarrier::complete_tx::bytes{.v2, .v4}.type [a], b, [mbar]; (.async is taken)."""
    inst.one_of("weak", default="")
    inst.one_of("shared::cluster")
    inst.one_of("mbarrier::complete_tx::bytes")
    vector = inst.one_of("v2", "v4", default="")
    type_ = inst.type()
    inst.need(3)
    reads = [source(inst, operand, type_) for operand in parts(inst.operands[1])]
    if len(reads) != (int(vector[1:]) if vector else 1) or type_.bytes not in (4, 8):
        raise Problem("stores one, two or four words of 4 or 8 bytes")
    where, barrier_at, size = address(inst, inst.operands[0]), address(inst, inst.operands[2]), type_.bytes * len(reads)

    def execute(state: State) -> None:
        shape = state.lanes.shape
        places, barriers = (np.broadcast_to(read(state), shape) for read in (where, barrier_at))
        values = np.stack([np.broadcast_to(unsigned_of(read(state)), shape) for read in reads], axis=-1)
        state.require_defined("an operand of st.async")
        octets = np.ascontiguousarray(values).view(np.uint8)
        warps = state.selected().tolist()
        for row, lane in np.argwhere(state.lanes).tolist():
            place, barrier = int(places[row, lane]), int(barriers[row, lane])
            _send(state, warps[row], lane, place, barrier, octets[row, lane].copy(), size)

    return execute


def _send(state: State, warp: int, lane: int, place: int, barrier_place: int, octets: Any, size: int) -> None:
    """Queue one lane's store."""
    launch = state.launch
    block, start = locate(state, warp, place)
    barrier_block, at = locate(state, warp, barrier_place)
    if block != barrier_block:
        state.fault("st.async to one block counts at a barrier of another", warp=warp)
    if start % size or at % 8:
        state.fault(f"misaligned st.async: {size} bytes at {start}, the barrier at {at}", warp=warp)
    find_barrier(state, warp, at, block)
    launch.shared.expect(state, block, start, size)
    records, token = [], None
    if launch.ordering is not None:
        target = np.array([block * launch.shared.pitch + start])
        records = [launch.ordering.message(state, warp, lane, target, size)]
        token = launch.ordering.team.release(warp, lane)

    def complete(state: State) -> None:
        shared = launch.shared
        shared.data[block, start : start + size] = octets
        shared.arrived(block, start, size)
        barrier = find_barrier(state, warp, at, block)
        landed(state, block, barrier, records)
        barrier.arriving.join(token)
        change(state, block, barrier, 0, -size, warp)

    assert state.instruction is not None
    launch.copies.append(Work(block, warp, state.instruction, complete))
    launch.effects += 1


__all__ = ["store_async"]
