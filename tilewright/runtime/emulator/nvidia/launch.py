"""What one batch of blocks shares with its launch: memories, barriers, asynchronous work, output."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.memory import GlobalMemory
from tilewright.runtime.emulator.nvidia.decode import Kernel
from tilewright.runtime.emulator.nvidia.ordering import Ordering
from tilewright.runtime.emulator.nvidia.shared_memory import SharedMemory
from tilewright.runtime.emulator.nvidia.types import LANES, Array
from tilewright.runtime.emulator.races import Token
from tilewright.runtime.emulator.together import Setting

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.clusters import ClusterBarrier
    from tilewright.runtime.emulator.nvidia.decode import Instruction
    from tilewright.runtime.emulator.nvidia.mbarrier import Barrier
    from tilewright.runtime.emulator.nvidia.state import State
    from tilewright.runtime.emulator.nvidia.wgmma import Product

#: 32-bit registers of an SM
REGISTER_FILE = 65536


@dataclass(eq=False)
class Work:
    """An asynchronous operation. ``complete`` does it; ``instruction`` issued it.

    ``unprotect`` ends the protection of its memory once somebody has waited for it, however early it happened.
    """

    block: int
    warp: int
    instruction: Instruction
    complete: Callable[[State], None]
    unprotect: Callable[[], None] = lambda: None
    done: bool = False
    waited: bool = False
    #: its accesses, by number in the race detector
    records: list[int] = field(default_factory=list)

    def finish(self, state: State) -> None:
        """Do it, if that has not happened."""
        if not self.done:
            self.done = True
            self.complete(state)

    def wait(self, state: State) -> None:
        """Its threads wait for it, or something does for them."""
        self.finish(state)
        if not self.waited:
            self.waited = True
            self.unprotect()
            if state.launch.ordering is not None:
                state.launch.ordering.team.settle(self.records)


@dataclass(eq=False)
class BulkStore:
    """A bulk copy out of shared memory: it reads first (``read``), writes later (``write``).

    ``unprotect`` ends the protection of what it reads, at the wait for that.
    """

    block: int
    instruction: Instruction
    read: Callable[[], None]
    write: Callable[[], None]
    unprotect: Callable[[], None]
    has_read: bool = False
    has_written: bool = False
    waited_reading: bool = False
    waited: bool = False
    #: its accesses of shared and of global memory, by number in the race detector
    reads: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)

    def finish(self, state: State, reading_only: bool = False) -> None:
        """Do what is left of it."""
        if not self.has_read:
            self.has_read = True
            self.read()
        if not reading_only and not self.has_written:
            self.has_written = True
            self.write()

    def wait(self, state: State, reading_only: bool) -> None:
        """Its thread waits until it has read, or until it has written too."""
        self.finish(state, reading_only)
        ended = [] if self.waited_reading else self.reads
        if not self.waited_reading:
            self.waited_reading = True
            self.unprotect()
        if not reading_only and not self.waited:
            self.waited = True
            ended = [*ended, *self.writes]
        if state.launch.ordering is not None:
            state.launch.ordering.team.settle(ended)


@dataclass(eq=False)
class NamedBarrier:
    """One of a block's 16 barriers: threads expected and arrived, and (warp, lanes, what to do on release)."""

    expected: int = 0
    arrived: int = 0
    waiting: list[tuple[int, Array]] = field(default_factory=list)
    #: partial results of bar.red: threads for which the predicate held, threads in all
    held: int = 0
    total: int = 0
    deliver: list[tuple[int, Array, Callable[[State, int, int], None]]] = field(default_factory=list)
    #: what those who arrived know
    token: Token = field(default_factory=Token)


@dataclass
class LaunchStatistics:
    """What a launch executed. ``printed`` is the output of device prints."""

    warps: int = 0
    #: instructions, each counted for every warp that executed it
    instructions: int = 0
    #: steps of the emulator: one instruction for a group of warps
    steps: int = 0
    by_opcode: Counter[str] = field(default_factory=Counter)
    printed: list[str] = field(default_factory=list)


class Launch:
    """A batch of blocks of one launch."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_shared: int,
        param_address: int,
        symbols: dict[str, int],
        blocks: int,
        warps_per_block: int,
        registers: int,
        setting: Setting,
        statistics: LaunchStatistics,
        first_block: int,
        cluster: int = 1,
    ) -> None:
        self.kernel: Kernel = kernel
        self.memory, self.grid, self.block = memory, grid, block
        self.dynamic_shared: int = dynamic_shared
        self.shared_bytes: int = kernel.dynamic_offset + dynamic_shared
        self.param_address, self.symbols = param_address, symbols
        self.shared = SharedMemory(blocks, self.shared_bytes, min(1024, self.shared_bytes))
        self.local = np.zeros(blocks * warps_per_block * LANES * kernel.local_bytes + 16, np.uint8)
        self.local_written = np.zeros(self.local.size, np.bool_)
        self.random = None if setting.seed is None else random.Random(f"{setting.seed} {setting.rank} {first_block}")
        #: the GPU, where there are several
        self.gpu = setting.rank if setting.ranks > 1 else None
        self.statistics = statistics
        #: blocks of a cluster, and barrier.cluster by the cluster's number
        self.cluster: int = cluster
        self.cluster_barriers: dict[int, ClusterBarrier] = {}
        self.ordering: Ordering | None = None
        if setting.races is not None:
            self.ordering = Ordering(setting.races, self, first_block, blocks, warps_per_block)
        #: counts what others can see: stores, arrivals, landings
        self.effects = 0
        #: mbarriers by (block, address)
        self.barriers: dict[tuple[int, int], Barrier] = {}
        #: (block, address) of tensor maps in global memory behind a fence of the block
        self.acquired_maps: set[tuple[int, int]] = set()
        self.named: dict[tuple[int, int], NamedBarrier] = {}
        #: copies into shared memory that have not landed, oldest first
        self.copies: list[Work] = []
        #: bulk stores of a thread (warp, lane): groups, the last of which is open
        self.stores: dict[tuple[int, int], list[list[BulkStore]]] = {}
        #: cp.async of a warp: groups, the last of which is open
        self.thread_copies: dict[int, list[list[Work]]] = {}
        #: wgmma of a warpgroup (its first warp): groups, the last of which is open
        self.products: dict[int, list[list[Product]]] = {}
        #: the tick of each warp's last wgmma.fence
        self.product_fence: dict[int, int] = {}
        #: what a blocked warp waits for
        self.waits: dict[int, str | Callable[[], str]] = {}
        #: registers per thread by warp, and those free in each block
        self.registers = [registers] * (blocks * warps_per_block)
        self.free_registers = [0] * blocks
        self.register_waiters: list[tuple[int, Array, int]] = []
        #: warps that found nothing to do and let others go first
        self.yielded: set[int] = set()

    def thread_work(self) -> list[Work]:
        """The cp.async that have not landed."""
        return [w for groups in self.thread_copies.values() for group in groups for w in group if not w.done]

    def bulk_stores(self) -> list[BulkStore]:
        """The bulk stores that have not written."""
        return [s for groups in self.stores.values() for group in groups for s in group if not s.has_written]

    def cluster_phase(self, block: int) -> int:
        """The last phase of the cluster's barrier that a warp of a block has waited for; 0: it has not waited."""
        barrier = self.cluster_barriers.get(block // self.cluster)
        return 0 if barrier is None else barrier.waited.get(block, 0)

    def block_index(self, linear: int) -> str:
        """A block's index as text: ``3``, or ``(3, 1, 0)`` of a grid of several dimensions."""
        return block_name(self.grid, linear)

    def warp_name(self, linear: int, rank: int) -> str:
        """A warp by its block and its rank there, of several GPUs also by its GPU, for messages."""
        return warp_name(self.grid, self.gpu, linear, rank)


def block_name(grid: tuple[int, int, int], linear: int) -> str:
    """A block's index as text."""
    x, y, z = grid
    if y == z == 1:
        return str(linear)
    return str((linear % x, linear // x % y, linear // (x * y)))


def warp_name(grid: tuple[int, int, int], gpu: int | None, linear: int, rank: int) -> str:
    """A warp by GPU (None: there is one), block and its rank in that."""
    place = "" if gpu is None else f"rank {gpu}, "
    return f"{place}block {block_name(grid, linear)}, warp {rank}"
