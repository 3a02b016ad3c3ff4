"""Clusters of blocks (PTX ISA 2.2.2 "Cluster of Cooperative Thread Arrays"): `mapa` and barrier.cluster.

A cluster is a run of blocks along x, all in one batch. Only mbarriers, multicast copies and `messages` reach other
blocks' memory; loads and stores there are out of range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.errors import EmulatorError
from tilewright.runtime.emulator.nvidia.mbarrier import publish
from tilewright.runtime.emulator.nvidia.operands import dest, source
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.spaces import cluster_address
from tilewright.runtime.emulator.nvidia.types import Array
from tilewright.runtime.emulator.races import Token

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.decode import Instruction, Kernel
    from tilewright.runtime.emulator.nvidia.state import State


@dataclass(eq=False)
class ClusterBarrier:
    """barrier.cluster: the warps that have arrived in this phase, and for those yet to wait in which they did.

    ``arriving``: what those know who released it by arriving; ``completed``: of complete phases, for who acquires it.
    """

    phase: int = 0
    arrived: set[int] = field(default_factory=set)
    phases: dict[int, int] = field(default_factory=dict)
    waiting: list[tuple[int, Array]] = field(default_factory=list)
    #: by block the last phase that a warp of it has waited for
    waited: dict[int, int] = field(default_factory=dict)
    arriving: Token = field(default_factory=Token)
    completed: Token = field(default_factory=Token)


def cluster_blocks(kernel: Kernel, grid: tuple[int, int, int]) -> int:
    """Blocks of a cluster, as the kernel's directive says; EmulatorError where the grid is no multiple of it."""
    x, *others = (*kernel.directives.get("reqnctapercluster", []), 1, 1, 1)[:3]
    if others != [1, 1]:
        raise EmulatorError(f"clusters of {[x, *others]} blocks: the emulator knows clusters along x")
    if grid[0] % x:
        raise EmulatorError(f"a grid of {grid} blocks is no multiple of the cluster's {x}")
    return x


@instruction("mapa")
def _mapa(inst: Instruction) -> Execute:
    """mapa.shared::cluster.u32 d, a, b: the address of a in the block of rank b (9.7.9.23)."""
    inst.one_of("shared::cluster")
    inst.type("u32")
    write = dest(inst, inst.operands[0], "u32")
    where, rank = (source(inst, operand, "u32") for operand in inst.operands[1:])

    def execute(state: State) -> None:
        at, ranks = where(state).astype(np.int64), rank(state).astype(np.int64)
        write(state, cluster_address(ranks, at).astype(np.uint32))

    return execute


@instruction("barrier.cluster.arrive", "barrier.cluster.wait", ends_run=True, gathers="warp")
def _barrier(inst: Instruction) -> Execute:
    """A wait lets go once all warps of the cluster that have not ended have arrived (9.7.13.4).

    Arrivals release unless they are .relaxed; every wait acquires.
    """
    order = inst.one_of("release", "acquire", "relaxed", default="")
    inst.flag("aligned")
    arrives = inst.name.endswith("arrive")

    def execute(state: State) -> None:
        ordering = state.launch.ordering
        for row, warp in enumerate(state.selected().tolist()):
            cluster = int(state.block[warp]) // state.launch.cluster
            barrier = state.launch.cluster_barriers.setdefault(cluster, ClusterBarrier())
            if arrives:
                if warp in barrier.phases:
                    state.fault("the warp arrives twice at the cluster's barrier, with no wait between", warp=warp)
                barrier.arrived.add(warp)
                barrier.phases[warp] = barrier.phase
                state.launch.effects += 1
                if ordering is not None and order != "relaxed":
                    barrier.arriving.join(ordering.team.release(warp, state.lanes[row]))
                complete(state, cluster)
                continue
            arrived = barrier.phases.pop(warp, None)
            if arrived is None:
                state.fault("the warp waits at the cluster's barrier without having arrived", warp=warp)
            if arrived == barrier.phase:
                barrier.waiting.append((warp, state.lanes[row].copy()))
                state.blocked[warp] |= state.lanes[row]
                state.launch.waits[warp] = "the cluster's barrier"
                continue
            barrier.waited[int(state.block[warp])] = barrier.phase
            if ordering is not None:
                ordering.team.acquire(warp, barrier.completed, state.lanes[row])

    return execute


def complete(state: State, cluster: int) -> None:
    """Open the cluster's barrier if no warp is missing any more: one has arrived or ended."""
    barrier, size = state.launch.cluster_barriers.get(cluster), state.launch.cluster
    if barrier is None or not barrier.arrived:
        return
    warps = range(cluster * size * state.warps_per_block, (cluster + 1) * size * state.warps_per_block)
    if any(warp not in barrier.arrived and not state.exited[warp].all() for warp in warps):
        return
    barrier.phase += 1
    barrier.arrived.clear()
    barrier.completed.join(barrier.arriving)
    for block in range(cluster * size, (cluster + 1) * size):
        publish(state, block)
    for (owner, _), mbarrier in state.launch.barriers.items():
        if owner // size == cluster:
            mbarrier.known_from = mbarrier.known_from or barrier.phase
    for waiter, lanes in barrier.waiting:
        barrier.waited[int(state.block[waiter])] = barrier.phase
        state.wake(waiter, lanes)
        state.launch.waits.pop(waiter, None)
        if state.launch.ordering is not None:
            state.launch.ordering.team.acquire(waiter, barrier.completed, lanes)
    barrier.waiting.clear()


__all__ = ["ClusterBarrier", "cluster_blocks", "complete"]
