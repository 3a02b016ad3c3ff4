"""Special registers (PTX ISA chapter 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.nvidia.types import LANES, Array

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.state import State

_LANE = np.arange(LANES)
#: nanoseconds that an instruction takes, so that clocks advance
_TICK_NS = 1


def _same(value: int) -> Array:
    return np.full((1, 1), value, np.uint64)


def _thread(axis: int) -> Callable[[State], Array]:
    def read(state: State) -> Array:
        x, y, _ = state.launch.block
        linear = state.rank[state.w][:, None] * LANES + _LANE
        value = (linear % x, linear // x % y, linear // (x * y))[axis]
        return value.astype(np.uint64)

    return read


def _block(axis: int) -> Callable[[State], Array]:
    def read(state: State) -> Array:
        x, y, _ = state.launch.grid
        linear = state.selected_blocks()[:, None] + state.first_block
        value = (linear % x, linear // x % y, linear // (x * y))[axis]
        return value.astype(np.uint64)

    return read


def _clock(state: State) -> Array:
    return _same(state.tick)


def _globaltimer(state: State) -> Array:
    return _same(1_000_000_000 + _TICK_NS * state.tick)


def _rank(state: State) -> Array:
    return (state.selected_blocks()[:, None] % state.launch.cluster).astype(np.uint64)


_READERS: dict[str, Callable[[State], Array]] = {
    "%laneid": lambda state: _LANE[None].astype(np.uint64),
    "%warpid": lambda state: state.rank[state.w][:, None].astype(np.uint64),
    "%nwarpid": lambda state: _same(64),
    "%smid": lambda state: (state.selected_blocks()[:, None] + state.first_block).astype(np.uint64) % np.uint64(132),
    "%nsmid": lambda state: _same(132),
    "%gridid": lambda state: _same(0),
    "%lanemask_eq": lambda state: (1 << _LANE[None]).astype(np.uint64),
    "%lanemask_lt": lambda state: ((1 << _LANE[None]) - 1).astype(np.uint64),
    "%lanemask_le": lambda state: ((2 << _LANE[None]) - 1).astype(np.uint64),
    "%lanemask_ge": lambda state: (0xFFFFFFFF & ~((1 << _LANE[None]) - 1)).astype(np.uint64),
    "%lanemask_gt": lambda state: (0xFFFFFFFF & ~((2 << _LANE[None]) - 1)).astype(np.uint64),
    "%clock": _clock,
    "%clock_hi": lambda state: _clock(state) >> np.uint64(32),
    "%clock64": _clock,
    "%globaltimer": _globaltimer,
    "%globaltimer_lo": _globaltimer,
    "%globaltimer_hi": lambda state: _globaltimer(state) >> np.uint64(32),
    "%dynamic_smem_size": lambda state: _same(state.launch.dynamic_shared),
    "%total_smem_size": lambda state: _same(state.launch.shared_bytes),
    "WARP_SZ": lambda state: _same(LANES),
    # a kernel without clusters runs in clusters of one block
    "%is_explicit_cluster": lambda state: _same("reqnctapercluster" in state.launch.kernel.directives),
    "%cluster_ctarank": _rank,
    "%cluster_nctarank": lambda state: _same(state.launch.cluster),
}


def _clusters(of: Callable[[State], Array]) -> Callable[[State], Array]:
    """Blocks along x, counted in clusters."""
    return lambda state: of(state) // np.uint64(state.launch.cluster)


def _extent(of_block: bool, axis: int) -> Callable[[State], Array]:
    return lambda state: _same((state.launch.block if of_block else state.launch.grid)[axis])


for _axis, _letter in enumerate("xyz"):
    _READERS[f"%tid.{_letter}"] = _thread(_axis)
    _READERS[f"%ctaid.{_letter}"] = _READERS[f"%clusterid.{_letter}"] = _block(_axis)
    _READERS[f"%ntid.{_letter}"] = _extent(True, _axis)
    _READERS[f"%nctaid.{_letter}"] = _extent(False, _axis)
    _READERS[f"%nclusterid.{_letter}"] = _READERS[f"%nctaid.{_letter}"]
    _READERS[f"%cluster_ctaid.{_letter}"] = lambda state: _same(0)
    _READERS[f"%cluster_nctaid.{_letter}"] = lambda state: _same(1)
_READERS["%clusterid.x"] = _clusters(_block(0))
_READERS["%nclusterid.x"] = _clusters(_extent(False, 0))
_READERS["%cluster_ctaid.x"], _READERS["%cluster_nctaid.x"] = _rank, _READERS["%cluster_nctarank"]


def special_reader(name: str) -> Callable[[State], Array] | None:
    """What reads a special register, as uint64 broadcastable to [selected, 32]; None for other names."""
    return _READERS.get(name)
