"""Launching a kernel: dispatch of its workgroups in batches, to the end or a slice at a time."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

# importing the modules fills the table of instructions
from tilewright.runtime.emulator.amd import (  # noqa: F401
    control,
    lanes,
    lds,
    mfma,
    salu,
    scaled_mfma,
    valu_convert,
    valu_float,
    valu_integer,
    vmem,
)
from tilewright.runtime.emulator.amd.batch import KERNARG_SLACK, Batch, Job
from tilewright.runtime.emulator.amd.decode import Kernel, decode_kernel
from tilewright.runtime.emulator.amd.errors import DecodeError, EmulatorError, EmulatorFault
from tilewright.runtime.emulator.amd.hazards import check_hazards
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.amd.ordering import new_races, new_shadow
from tilewright.runtime.emulator.amd.registry import ARCHITECTURES
from tilewright.runtime.emulator.amd.state import LANES
from tilewright.runtime.emulator.memory import BASE, GlobalMemory
from tilewright.runtime.emulator.races import Races, Shadow

_U32 = np.uint32
#: steps between two looks at whether the launch may go on
_SLICE = 100_000


@dataclass
class LaunchStatistics:
    """What a launch executed: instructions by mnemonic, counted once per wave."""

    waves: int = 0
    #: instructions, each counted for every wave that executed it
    instructions: int = 0
    #: steps of the emulator: one instruction for a group of waves
    steps: int = 0
    by_mnemonic: Counter[str] = field(default_factory=Counter)


class Progress(enum.Enum):
    """Where a launch stands. Of a blocked one all waves wait for memory to change, or for such a wave."""

    RUNNING = "running"
    BLOCKED = "blocked"
    DONE = "done"


class Launch:
    """A kernel that runs a slice at a time, next to others in the same memory.

    Whoever holds several calls `advance` of each in turn. If all that are not done are blocked, and
    the memory's ``version`` has not changed since the first of them was, they are in a deadlock,
    which `deadlock` describes as a fault.
    """

    def __init__(self, job: Job, batch_waves: int, resident: int | None) -> None:
        self._job = job
        self._groups = prod(job.grid)
        self._per_batch = max(1, batch_waves // job.waves_per_group)
        self._resident = resident or self._groups
        self._started = 0
        self._live: list[Batch] = []
        self._open = True
        self.statistics = LaunchStatistics()

    def advance(self, limit: int) -> Progress:
        """Go on for about ``limit`` steps. EmulatorFault if the kernel does something wrong."""
        if not self._open:
            return Progress.DONE
        try:
            with np.errstate(all="ignore"):
                progress = self._advance(limit)
        except BaseException:
            self.close()
            raise
        if progress is Progress.DONE:
            self.close()
        return progress

    def _advance(self, limit: int) -> Progress:
        steps = 0
        while steps < limit:
            made = 0
            for batch in self._live:
                made += batch.advance(limit - steps - made)
            steps += made
            self.statistics.steps += made
            self._live = [batch for batch in self._live if not batch.finished]
            if not self._live or not made:
                started = self._start_batch()
                if not self._live:
                    return Progress.DONE
                if not started and not made:
                    return Progress.BLOCKED
        return Progress.RUNNING

    def _start_batch(self) -> bool:
        """Give the next workgroups to the GPU, if there are any and it has room."""
        room = self._resident - sum(batch.groups for batch in self._live)
        count = min(self._per_batch, self._groups - self._started, room)
        if count <= 0:
            return False
        self._live.append(Batch(self._job, self._started, count))
        self._started += count
        self.statistics.waves += count * self._job.waves_per_group
        return True

    def deadlock(self) -> EmulatorFault:
        """The fault of a launch that is blocked for good."""
        waiting, inst, wave = self._live[0].stuck()
        per = self._job.waves_per_group
        return EmulatorFault(
            f"deadlock: no wave can run\n  {waiting}",
            instruction=inst.text,
            line=inst.line,
            wave=(self._live[0].first_group + wave // per, wave % per),
            source=inst.source,
        )

    def hang(self) -> EmulatorFault:
        """The fault of a launch that makes steps but no end."""
        return self._live[0].fault(f"the kernel still runs after {self.statistics.steps} steps: it hangs")

    def close(self) -> None:
        """Free what the launch holds in memory, and count what it executed."""
        if self._open:
            self._open = False
            self._job.memory.free(self._job.kernarg_address)
            self._job.memory.free(self._job.packet_address)
            for inst, count in zip(self._job.kernel.instructions, self._job.executed.tolist(), strict=True):
                if count:
                    self.statistics.instructions += count
                    self.statistics.by_mnemonic[inst.name] += count


class AmdEmulator:
    """One kernel of an assembly text, decoded for ``arch`` ("gfx942" or "gfx950").

    Raises DecodeError naming every instruction that is not implemented, and EmulatorFault where too
    few wait states lie behind a matrix instruction (`hazards`).
    """

    def __init__(self, asm_text: str, kernel_name: str, arch: str) -> None:
        if arch not in ARCHITECTURES:
            raise DecodeError(f"unknown architecture {arch}: {', '.join(ARCHITECTURES)} are emulated")
        self.arch = arch
        self.kernel: Kernel = decode_kernel(asm_text, kernel_name, arch)
        for inst, problem in check_hazards(self.kernel):
            raise EmulatorFault(problem, instruction=inst.text, line=inst.line, source=inst.source)

    def start(
        self,
        memory: GlobalMemory,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        kernarg: bytes,
        *,
        dynamic_lds: int = 0,
        poison: bool = True,
        strict_barriers: bool = True,
        batch_waves: int = 256,
        resident: int | None = None,
        seed: int | None = None,
        races: Races | bool = True,
        shadow: Shadow | None = None,
        rank: int = 0,
    ) -> Launch:
        """Begin to run ``grid`` workgroups of ``block`` work-items (each up to three numbers); memory changes in place.

        ``dynamic_lds``: bytes beyond the kernel's static LDS. ``poison``: fault where a never-written
        register takes effect. ``strict_barriers``: fault where a wave ends while another of its
        workgroup waits at a barrier (the hardware lets the survivors pass; in a kernel of ours it is
        a bug). ``batch_waves``: about how many waves run in step. ``resident``: how many workgroups
        the GPU holds at a time (default: all). ``seed`` picks a random legal interleaving of waves and
        times at which data lands in LDS; without it they are deterministic, and data lands at its wait.
        ``races``: detect them; launches that run together share a detector, made by
        `ordering.new_races`, and the ``shadow`` of their memory, and each is another ``rank``.
        """
        grid3, block3 = _three(grid), _three(block)
        threads = prod(block3)
        if not 0 < threads <= 1024 or prod(grid3) <= 0:
            raise EmulatorError(f"cannot launch grid {grid3} of blocks {block3}")
        limit = self.kernel.get("kernarg_size")
        if len(kernarg) < limit:
            raise EmulatorError(f"the kernel reads {limit} bytes of arguments, {len(kernarg)} were given")
        kernarg_address = memory.allocate(np.frombuffer(kernarg + bytes(KERNARG_SLACK), np.uint8), "kernarg")
        packet_address = memory.allocate(_dispatch_packet(grid3, block3), "dispatch packet")
        detector = new_races() if races is True else races or None
        if detector is not None and shadow is None:
            shadow = global_shadow(memory, -(-threads // LANES))
        if shadow is not None:
            shadow.grow(memory.data.size)
        job = Job(
            kernel=self.kernel,
            memory=memory,
            grid=grid3,
            block=block3,
            kernarg=kernarg,
            kernarg_address=kernarg_address,
            packet_address=packet_address,
            dynamic_lds=dynamic_lds,
            poison=poison,
            strict_barriers=strict_barriers,
            races=detector,
            shadow=shadow,
            rank=rank,
            random=None if seed is None else np.random.default_rng(seed),
            executed=np.zeros(len(self.kernel.instructions), np.int64),
        )
        return Launch(job, batch_waves, resident)

    def launch(
        self,
        memory: GlobalMemory,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        kernarg: bytes,
        *,
        max_steps: int = 50_000_000,
        **options: Any,
    ) -> LaunchStatistics:
        """Run to the end; the parameters are those of `start`. After ``max_steps`` steps a kernel counts as hung."""
        launch = self.start(memory, grid, block, kernarg, **options)
        try:
            while (progress := launch.advance(min(_SLICE, max_steps))) is not Progress.DONE:
                if progress is Progress.BLOCKED:
                    raise launch.deadlock()
                if launch.statistics.steps >= max_steps:
                    raise launch.hang()
        finally:
            launch.close()
        return launch.statistics


def global_shadow(memory: GlobalMemory, waves_per_group: int) -> Shadow:
    """The race detector's shadow of an address space."""
    return new_shadow(memory.data.size, waves_per_group, lambda offset: f"byte {memory.describe(BASE + offset)}")


def _three(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1, 1)[:3]
    return x, y, z


def _dispatch_packet(grid: tuple[int, int, int], block: tuple[int, int, int]) -> Array:
    """The hsa_kernel_dispatch_packet_t that dispatch_ptr names: sizes only."""
    packet = np.zeros(64, np.uint8)
    packet[4:10] = np.array(block, np.uint16).view(np.uint8)
    packet[12:24] = np.array([g * b for g, b in zip(grid, block, strict=True)], _U32).view(np.uint8)
    return packet


__all__ = ["AmdEmulator", "Launch", "LaunchStatistics", "Progress", "global_shadow"]
