"""Launching a kernel: its variables and parameters in memory, its blocks in batches.

A batch, some whole clusters, is what runs in step (see `batch`). The next one starts when one has ended, or beside it
when nothing gets on without: blocks may wait for each other as far as they are resident together.
"""

from __future__ import annotations

import random
from math import prod
from typing import Any

import numpy as np

# importing the modules fills the table of instructions
from tilewright.runtime.emulator.errors import EmulatorError
from tilewright.runtime.emulator.memory import GlobalMemory
from tilewright.runtime.emulator.nvidia import (  # noqa: F401
    access,
    clusters,
    compare,
    control,
    convert,
    copies,
    floating,
    integer,
    mbarrier,
    mma,
    thread_copies,
    warp,
    wgmma,
)
from tilewright.runtime.emulator.nvidia.batch import Batch, Outcome
from tilewright.runtime.emulator.nvidia.clusters import cluster_blocks
from tilewright.runtime.emulator.nvidia.decode import Kernel, decode_kernel
from tilewright.runtime.emulator.nvidia.launch import REGISTER_FILE, Launch, LaunchStatistics
from tilewright.runtime.emulator.nvidia.ordering import ASYNC_PROXY, PROXIES
from tilewright.runtime.emulator.nvidia.syntax import Variable, type_bytes
from tilewright.runtime.emulator.nvidia.types import LANES, TYPES, Array
from tilewright.runtime.emulator.races import Races
from tilewright.runtime.emulator.together import Machine, Setting, Stuck, run_together

#: steps after which a kernel counts as hung
_MAX_STEPS = 50_000_000
#: turns with no effect after which further blocks start beside those that run
_STALLED = 1000


def _three(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1, 1)[:3]
    return x, y, z


class PtxEmulator:
    """One entry of a PTX text, decoded. DecodeError names every instruction that is not implemented."""

    def __init__(self, ptx: str, entry: str) -> None:
        self.kernel: Kernel = decode_kernel(ptx, entry)

    def races(self) -> Races:
        """A new race detector, with the views of the async proxy if the kernel uses it."""
        uses = any(inst.name.startswith(ASYNC_PROXY) for inst in self.kernel.instructions)
        return Races(LANES, lane_agents=True, proxies=PROXIES if uses else 1)

    def launch(
        self,
        memory: GlobalMemory,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        parameters: bytes,
        *,
        seed: int | None = None,
        races: bool = False,
        **options: Any,
    ) -> LaunchStatistics:
        """Run a launch alone to its end; memory changes in place. ``options`` as of `start`.

        ``seed`` picks a random legal interleaving, ``races`` switches the race detector on.
        """
        setting = Setting(seed, self.races() if races else None)
        run = self.start(memory, grid, block, parameters, setting, **options)
        run_together([run], seed, progress=False)
        return run.statistics

    def start(
        self,
        memory: GlobalMemory,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        parameters: bytes,
        setting: Setting,
        *,
        shared_bytes: int = 0,
        registers: int | None = None,
        batch_warps: int | None = None,
        max_steps: int | None = None,
    ) -> PtxRun:
        """A launch of ``grid`` blocks of ``block`` threads (each up to three numbers), for `run_together`.

        ``parameters`` are the bytes of the kernel's parameters, ``shared_bytes`` the dynamic shared
        memory. ``registers``: per thread at the start, of which setmaxnreg moves some (default: what a
        block's threads can have). ``batch_warps``: about how many warps run in step (default 256, 64
        with the race detector). ``max_steps``: the bound after which a kernel counts as hung.
        """
        grid3, block3 = _three(grid), _three(block)
        threads = prod(block3)
        kernel = self.kernel
        if not 0 < threads <= 1024 or prod(grid3) <= 0:
            raise EmulatorError(f"cannot launch grid {grid3} of blocks {block3}")
        limit = kernel.directives.get("maxntid")
        if limit and threads > prod(limit):
            raise EmulatorError(f"blocks of {threads} threads: the kernel was compiled for at most {prod(limit)}")
        if len(parameters) < kernel.param_bytes:
            raise EmulatorError(
                f"the kernel has {kernel.param_bytes} bytes of parameters, {len(parameters)} were given"
            )
        warps_per_block = -(-threads // LANES)
        if registers is None:
            together = kernel.directives.get("minnctapersm", (1,))[0]
            registers = min(256, REGISTER_FILE // (together * warps_per_block * LANES) // 8 * 8)
        if batch_warps is None:
            batch_warps = 256 if setting.races is None else 64
        per_batch = max(1, batch_warps // warps_per_block)
        return PtxRun(
            kernel, memory, grid3, block3, parameters, setting, shared_bytes, registers, per_batch,
            _MAX_STEPS if max_steps is None else max_steps,
        )  # fmt: skip


class PtxRun(Machine):
    """A launch in progress: some batches of blocks that take turns, and blocks that have not started."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        setting: Setting,
        shared_bytes: int,
        registers: int,
        per_batch: int,
        max_steps: int,
    ) -> None:
        self.kernel, self.memory, self.grid, self.block = kernel, memory, grid, block
        self.name, self.rank, self.setting = kernel.name, setting.rank, setting
        self.blocks, self.blocks_ended = prod(grid), 0
        self.statistics = LaunchStatistics()
        self._shared_bytes, self._registers = shared_bytes, registers
        self._max_steps, self._cluster = max_steps, cluster_blocks(kernel, grid)
        self._per_batch = max(1, per_batch // self._cluster) * self._cluster
        self._placed = _place_variables(kernel, memory)
        self._address = memory.allocate(np.frombuffer(parameters.ljust(1, b"\0"), np.uint8), "the parameters")
        self._random = None if setting.seed is None else random.Random(setting.seed)
        self._active: list[Batch] = []
        self._next_block = self._turns = 0
        self._admit()

    def _admit(self) -> bool:
        """Start the next batch of whole clusters beside those that run. False if there is none, or no room."""
        resident = sum(batch.state.blocks for batch in self._active)
        room = self.blocks if self.setting.resident is None else self.setting.resident - resident
        room -= room % self._cluster
        count = min(self._per_batch, self.blocks - self._next_block, room if resident else max(room, self._cluster))
        if count <= 0:
            return False
        threads = prod(self.block)
        warps = -(-threads // LANES)
        launch = Launch(
            self.kernel, self.memory, self.grid, self.block, self._shared_bytes, self._address, self._placed, count,
            warps, self._registers, self.setting, self.statistics, self._next_block,
            self._cluster,
        )  # fmt: skip
        self._active.append(Batch(launch, self._next_block, count, warps, threads))
        self._next_block += count
        self.quiet = 0
        return True

    @property
    def ended(self) -> bool:
        return not self._active

    @property
    def instructions(self) -> int:
        return self.statistics.instructions + sum(int(batch.executed.sum()) for batch in self._active)

    def turn(self) -> bool:
        self._turns += 1
        order = list(range(len(self._active)))
        if self._random is not None:
            self._random.shuffle(order)
        else:
            order = [(place + self._turns) % len(order) for place in order]
        ran = any(self._turn_of(self._active[place]) for place in order)
        self.quiet = min((batch.quiet for batch in self._active), default=0)
        if not ran or self.quiet > _STALLED:
            ran = self._admit() or ran
        return ran

    def _turn_of(self, batch: Batch) -> bool:
        try:
            outcome = batch.turn(self._max_steps)
        except BaseException:
            batch.count_into(self.statistics)
            raise
        if outcome is Outcome.ENDED:
            batch.count_into(self.statistics)
            self._active.remove(batch)
            self.blocks_ended += batch.state.blocks
            if not self._active:
                self._admit()
        return outcome is not Outcome.WAITING

    def state(self) -> int:
        return hash(tuple(batch.fingerprint() for batch in self._active))

    def longest_wait(self) -> int:
        return max(batch.longest_wait() for batch in self._active)

    def stuck(self) -> Stuck:
        found = [batch.stuck() for batch in self._active]
        waiting = self.blocks - self._next_block
        more = f"\n  {waiting} blocks have not started: no more are resident at once" if waiting else ""
        first = found[0]
        return Stuck("".join(one.reasons for one in found) + more, first.instruction, first.line, first.source)

    def close(self) -> None:
        for place in (self._address, *self._placed.values()):
            self.memory.free(place)


def _place_variables(kernel: Kernel, memory: GlobalMemory) -> dict[str, int]:
    """Module variables (.global, .const) in global memory: their addresses."""
    placed: dict[str, int] = {}
    for variable in kernel.constants.values():
        placed[variable.name] = memory.allocate(_initial(variable, placed), variable.name)
    return placed


def _initial(variable: Variable, placed: dict[str, int]) -> Array:
    size = type_bytes(variable.element)
    data = bytearray(variable.size or size)
    for index, value in enumerate(variable.initial):
        if isinstance(value, str):
            if value not in placed:
                raise EmulatorError(f"the initialiser of {variable.name} names {value}, which has no address yet")
            value = placed[value]
        if isinstance(value, float):
            octets = np.array(value, TYPES[variable.element].dtype).tobytes()
        else:
            octets = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        data[index * size : (index + 1) * size] = octets
    return np.frombuffer(bytes(data), np.uint8)
