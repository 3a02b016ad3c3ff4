"""What the race detector hears of PTX (PTX ISA chapter 8, "Memory Consistency Model").

- Order: barriers, mbarriers, fences with strong accesses, bar.warp.sync. Shuffles and votes order
  nothing (9.7.9.6, 9.7.13: only bar.warp.sync speaks of memory).
- The async proxy (8.? "Proxies"): bulk and tensor copies, and wgmma's reads of shared memory. A
  generic write must be followed by ``fence.proxy.async`` on the way to them; what they complete at
  (an mbarrier, a wait) is such a fence for the other direction. cp.async is of the generic proxy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from tilewright.runtime.emulator.nvidia.types import LANES, Array
from tilewright.runtime.emulator.races import (
    BLOCK,
    CLUSTER,
    DEVICE,
    SYSTEM,
    WEAK,
    Conflict,
    Races,
    Shadow,
    Token,
)

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.decode import Instruction
    from tilewright.runtime.emulator.nvidia.launch import Launch
    from tilewright.runtime.emulator.nvidia.state import State

#: views of memory: the generic one, the async proxy's of shared memory, and its of global memory
GENERIC, ASYNC_SHARED, ASYNC_GLOBAL = range(3)
PROXIES = 3
#: beginnings of the instructions whose work the async proxy does
ASYNC_PROXY = ("cp.async.bulk", "cp.reduce.async.bulk", "wgmma.mma_async")
SCOPES = {"cta": BLOCK, "cluster": CLUSTER, "gpu": DEVICE, "gl": DEVICE, "sys": SYSTEM}
#: what `Shadow` remembers of the readers of a byte of shared memory, at most
_SLOTS = 32
_LANE = np.arange(LANES)


class Ordering:
    """The race detector for a batch of blocks. Offsets are those of the flat bytes of shared or global memory."""

    def __init__(self, races: Races, launch: Launch, first_block: int, blocks: int, warps_per_block: int) -> None:
        from tilewright.runtime.emulator.nvidia.launch import warp_name

        grid, gpu, pitch = launch.grid, launch.gpu, launch.shared.pitch

        def name(warp: int) -> str:
            block, rank = divmod(warp, warps_per_block)
            return warp_name(grid, gpu, first_block + block, rank)

        self.races, self.memory = races, launch.memory
        clusters = [block // launch.cluster for block in range(blocks)]
        self.team = races.team(blocks, warps_per_block, name, launch.gpu or 0, clusters)
        slots = min(_SLOTS, 2 * warps_per_block)
        self.shared = Shadow(blocks * pitch, slots, lambda offset: f"shared memory at {offset % pitch}")
        self._groups: dict[int, tuple[int, int]] = {}
        #: of a kernel that may begin while the launch before it runs: the lanes that have waited for that
        waits = any(inst.name == "griddepcontrol.wait" for inst in launch.kernel.instructions)
        self._awaited = np.zeros((blocks * warps_per_block, LANES), np.bool_) if waits else None

    def shadow(self, space: str) -> Shadow:
        """The shadow of "shared" or "global"."""
        return self.shared if space == "shared" else self.races.of_memory(self.memory)

    def _site(self, inst: Instruction | None) -> int:
        assert inst is not None
        return self.races.site(inst, inst.text, inst.line, inst.source)

    # ---- the launch before -----------------------------------------------------------------------

    def await_grid(self, state: State) -> None:
        """The active lanes have waited for the launch before this one (griddepcontrol.wait)."""
        assert self._awaited is not None
        self._awaited[state.w] |= state.lanes

    def _require_grid(self, state: State, space: str) -> None:
        """Fault where active lanes come to global memory that the launch before may still use."""
        if space == "global" and self._awaited is not None:
            early = state.lanes & ~self._awaited[state.w]
            if early.any():
                state.fault("comes to global memory without having waited for the launch before", early)

    def grid_awaited(self, state: State, warps: slice, warp: int) -> None:
        """A block ends: who waits for its launch must be able to rely on those before it."""
        if self._awaited is not None and not self._awaited[warps].any():
            state.fault("the block ends without having waited for the launch before", warp=warp)

    # ---- accesses of lanes -----------------------------------------------------------------------

    def _who(self, state: State) -> tuple[Array, Array]:
        """The warp and the lane of every active lane."""
        selected = state.selected()
        if state.full:
            return np.repeat(selected, LANES), np.tile(_LANE, len(selected))
        rows, lanes = np.nonzero(state.lanes)
        return selected[rows], lanes

    def touch(
        self,
        state: State,
        space: str,
        offsets: Array,
        size: int,
        *,
        writes: bool,
        strength: int = WEAK,
        same: tuple[Array, Array] | None = None,
    ) -> None:
        """The active lanes access ``size`` bytes at their offsets. Faults on a race. ``same``: see `Team.write`."""
        self._require_grid(state, space)
        warps, lanes = self._who(state)
        shadow, site = self.shadow(space), self._site(state.instruction)
        if writes:
            conflict = self.team.write(shadow, warps, lanes, offsets, size, site, strength, same)
        else:
            conflict = self.team.read(shadow, warps, lanes, offsets, size, site, strength)
        if conflict is not None:
            guilty = np.zeros(state.lanes.shape, np.bool_)
            guilty[tuple(place[conflict.index] for place in np.nonzero(state.lanes))] = True
            state.fault(conflict.message, guilty)

    @contextmanager
    def storing(
        self, state: State, space: str, data: Array, offsets: Array, octets: Array, strength: int = WEAK
    ) -> Iterator[None]:
        """Around a store by the active lanes of bytes [lanes, size] into ``data``: a write to memory, see `touch`."""
        places = offsets[:, None] + np.arange(octets.shape[1])
        before = (data[places] == octets).all(axis=1)
        yield
        after = (data[places] == octets).all(axis=1)
        same = before, after
        self.touch(state, space, offsets, octets.shape[1], writes=True, strength=strength, same=same)

    def start(self, state: State, space: str, offsets: Array, size: int, *, writes: bool) -> dict[int, int]:
        """Like `touch`, of copies in flight: a record by warp."""
        self._require_grid(state, space)
        warps, lanes = self._who(state)
        site = self._site(state.instruction)
        records, conflict = self.team.start(self.shadow(space), warps, lanes, offsets, size, site, writes=writes)
        if conflict is not None:
            state.fault(conflict.message, warp=int(warps[conflict.index]))
        return dict(zip(dict.fromkeys(warps.tolist()), records, strict=True))

    def strong(
        self, state: State, space: str, offsets: Array, scope: int, order: str, *, reads: bool, writes: bool
    ) -> None:
        """The active lanes have done strong accesses of a location each (8.5, "Release and acquire patterns")."""
        warps, lanes = self._who(state)
        memory = -1 if space == "global" else self.team.first
        for warp, lane, offset in zip(warps.tolist(), lanes.tolist(), offsets.tolist(), strict=True):
            key = memory, offset
            if reads:
                self.team.observe(key, warp, lane, scope, acquire=order in ("acquire", "acq_rel"))
            if writes:
                self.team.publish(key, warp, lane, scope, release=order in ("release", "acq_rel"), rmw=reads)

    # ---- asynchronous work -----------------------------------------------------------------------

    def issue(
        self,
        state: State,
        space: str,
        warps: Sequence[int],
        lane: int,
        offsets: Array,
        size: int,
        *,
        writes: bool,
        strength: int = WEAK,
    ) -> int:
        """The async proxy will access these bytes for a lane, or for warps together (lane -1): the record."""
        self._require_grid(state, space)
        proxy = ASYNC_SHARED if space == "shared" else ASYNC_GLOBAL
        record, conflict = self.team.issue(
            self.shadow(space), warps, lane, offsets, size, self._site(state.instruction), writes=writes, proxy=proxy,
            strength=strength,
        )  # fmt: skip
        if conflict is not None:
            self._fault(state, conflict, int(warps[0]))
        return record

    def message(self, state: State, warp: int, lane: int, offsets: Array, size: int) -> int:
        """A lane's st.async, of the generic proxy, will write these bytes of shared memory: the record."""
        site = self._site(state.instruction)
        record, conflict = self.team.issue(self.shared, [warp], lane, offsets, size, site, writes=True)
        if conflict is not None:
            self._fault(state, conflict, warp)
        return record

    def _fault(self, state: State, conflict: Conflict, warp: int) -> NoReturn:
        state.fault(conflict.message, warp=warp)

    def group_ended(self, leader: int, warps: Sequence[int], records: Sequence[int]) -> None:
        """The warps of a warpgroup have waited for products, which read shared memory."""
        block = leader // self.team.warps
        column, time = self._groups.get(leader) or (self.team.column(block), 0)
        self._groups[leader] = column, time + 1
        self.team.settle(records, column=column, time=time + 1)
        for warp in warps:
            self.team.learn(warp, column, time + 1)

    # ---- fences ----------------------------------------------------------------------------------

    def fence(self, state: State, scope: int) -> None:
        """fence.sc, fence.acq_rel or membar by the active lanes."""
        for row, warp in enumerate(state.selected().tolist()):
            if state.lanes[row].any():
                self.team.fence(warp, state.lanes[row], scope)

    def proxy_fence(self, state: State, proxies: Sequence[int]) -> None:
        """fence.proxy.async by the active lanes."""
        if self.races.proxies < PROXIES:
            return
        for row, warp in enumerate(state.selected().tolist()):
            if state.lanes[row].any():
                self.team.proxy_fence(warp, proxies, state.lanes[row])

    def meet(self, state: State) -> None:
        """bar.warp.sync of the active lanes."""
        for row, warp in enumerate(state.selected().tolist()):
            if state.lanes[row].any():
                self.team.synchronize(warp, state.lanes[row])


__all__ = ["ASYNC_GLOBAL", "ASYNC_PROXY", "ASYNC_SHARED", "PROXIES", "SCOPES", "Ordering", "Token"]
