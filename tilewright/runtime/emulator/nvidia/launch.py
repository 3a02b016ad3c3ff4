"""What one batch of blocks shares with its launch: memories, barriers, asynchronous work, output."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.memory import GlobalMemory
from tilewright.runtime.emulator.nvidia.decode import Kernel
from tilewright.runtime.emulator.nvidia.shared_memory import SharedMemory
from tilewright.runtime.emulator.nvidia.types import LANES, Array

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
    """An asynchronous operation that has not completed. ``complete`` does it; ``instruction`` issued it."""

    block: int
    warp: int
    instruction: Instruction
    complete: Callable[[State], None]


@dataclass(eq=False)
class BulkStore:
    """A bulk copy out of shared memory: it reads first (``read``), writes later (``write``)."""

    block: int
    instruction: Instruction
    read: Callable[[State], None]
    write: Callable[[State], None]
    has_read: bool = False
    has_written: bool = False

    def finish(self, state: State, reading_only: bool) -> None:
        """Do what is left of it."""
        if not self.has_read:
            self.read(state)
            self.has_read = True
        if not reading_only and not self.has_written:
            self.write(state)
            self.has_written = True


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
        seed: int | None,
        printed: list[str],
        registers: int,
        cluster: int = 1,
    ) -> None:
        self.kernel: Kernel = kernel
        self.memory, self.grid, self.block = memory, grid, block
        self.dynamic_shared: int = dynamic_shared
        self.shared_bytes: int = kernel.dynamic_offset + dynamic_shared
        self.param_address, self.symbols = param_address, symbols
        self.shared = SharedMemory(blocks, self.shared_bytes, min(1024, self.shared_bytes))
        self.local = np.zeros(blocks * warps_per_block * LANES * kernel.local_bytes + 16, np.uint8)
        self.random = None if seed is None else random.Random(seed)
        self.printed = printed
        #: mbarriers by (block, address)
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.named: dict[tuple[int, int], NamedBarrier] = {}
        #: blocks of a cluster, and barrier.cluster by the cluster's number
        self.cluster: int = cluster
        self.cluster_barriers: dict[int, ClusterBarrier] = {}
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

    def block_index(self, linear: int) -> str:
        """A block's index as text: ``3``, or ``(3, 1, 0)`` of a grid of several dimensions."""
        x, y, z = self.grid
        if y == z == 1:
            return str(linear)
        return str((linear % x, linear // x % y, linear // (x * y)))
