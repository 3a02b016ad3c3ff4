"""Launching a kernel: dispatch of its workgroups in batches, in turns with other launches or alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import numpy as np

# importing the modules fills the table of instructions
from tilewright.runtime.emulator.amd import (  # noqa: F401
    control,
    hwreg,
    lanes,
    lds,
    mfma,
    salu,
    scaled_mfma,
    sparse_mfma,
    valu_blocks,
    valu_convert,
    valu_float,
    valu_integer,
    valu_scaled,
    vmem,
)
from tilewright.runtime.emulator.amd.batch import KERNARG_SLACK, Batch, Job
from tilewright.runtime.emulator.amd.decode import Kernel, decode_kernel
from tilewright.runtime.emulator.amd.errors import DecodeError, EmulatorError, EmulatorFault
from tilewright.runtime.emulator.amd.hazards import check_hazards
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.amd.ordering import new_races
from tilewright.runtime.emulator.amd.registry import ARCHITECTURES
from tilewright.runtime.emulator.amd.wait_states import check_wait_states
from tilewright.runtime.emulator.memory import GlobalMemory
from tilewright.runtime.emulator.together import Machine, Setting, Stuck

_U32 = np.uint32
#: steps of one turn
_TURN = 10_000


@dataclass
class LaunchStatistics:
    """What a launch executed: instructions by mnemonic, counted once per wave."""

    waves: int = 0
    #: instructions, each counted for every wave that executed it
    instructions: int = 0
    #: steps of the emulator: one instruction for a group of waves
    steps: int = 0
    by_mnemonic: Counter[str] = field(default_factory=Counter)


class Launch(Machine):
    """A kernel that runs in turns, next to others in the same memory (see `run_together`).

    It cannot go on where all its waves wait for memory to change, or for such a wave.
    """

    def __init__(self, job: Job, name: str, batch_waves: int, resident: int | None) -> None:
        self._job = job
        self.name, self.rank = name, job.rank
        self.blocks = prod(job.grid)
        self._per_batch = max(1, batch_waves // job.waves_per_group)
        self._resident = resident or self.blocks
        self._started = 0
        self._live: list[Batch] = []
        self._open = True
        self.statistics = LaunchStatistics()

    @property
    def ended(self) -> bool:
        """Whether all workgroups have run to their ends."""
        return self._started == self.blocks and not self._live

    @property
    def instructions(self) -> int:
        """Instructions executed, counted for every wave."""
        return int(self._job.executed.sum())

    def turn(self, limit: int = _TURN) -> bool:
        """Make about ``limit`` steps. False if no wave can run. EmulatorFault for faults."""
        version, steps = self._job.memory.version, 0
        try:
            with np.errstate(all="ignore"):
                while steps < limit:
                    made = sum(batch.advance(limit - steps) for batch in self._live)
                    steps += made
                    self._retire()
                    if (not self._live or not made) and not self._start_batch():
                        break
        finally:
            self.statistics.steps += steps
        self.quiet = self.quiet + 1 if self._job.memory.version == version else 0
        if self.ended:
            self.close()
        return steps > 0

    def _retire(self) -> None:
        for batch in self._live:
            self.blocks_ended += batch.groups if batch.finished else 0
        self._live = [batch for batch in self._live if not batch.finished]

    def _start_batch(self) -> bool:
        """Give the next workgroups to the GPU, if there are any and it has room."""
        room = self._resident - sum(batch.groups for batch in self._live)
        count = min(self._per_batch, self.blocks - self._started, room)
        if count <= 0:
            return False
        self._live.append(Batch(self._job, self._started, count))
        self._started += count
        self.statistics.waves += count * self._job.waves_per_group
        return True

    def state(self) -> int:
        """A hash of the registers and program counters of all waves that run."""
        return hash(tuple(batch.state.look() for batch in self._live))

    def longest_wait(self) -> int:
        """Every wave that can run has run when a turn ends, or waits only for its equals."""
        return 0

    def stuck(self) -> Stuck:
        """Where the waves wait."""
        if not self._live:
            return Stuck("")
        reasons, inst = self._live[0].stuck()
        return Stuck("".join(f"\n  {reason}" for reason in reasons), inst.text, inst.line, inst.source)

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
        for inst, problem in chain(check_hazards(self.kernel), check_wait_states(self.kernel)):
            raise EmulatorFault(problem, instruction=inst.text, line=inst.line, source=inst.source)

    def start(
        self,
        memory: GlobalMemory,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        kernarg: bytes,
        setting: Setting,
        *,
        dynamic_lds: int = 0,
        poison: bool = True,
        strict_barriers: bool = True,
        batch_waves: int = 256,
    ) -> Launch:
        """Begin to run ``grid`` workgroups of ``block`` work-items (each up to three numbers); memory changes in place.

        ``dynamic_lds``: bytes beyond the kernel's static LDS. ``poison``: fault where a never-written
        register takes effect. ``strict_barriers``: fault where a wave ends while another of its
        workgroup waits at a barrier (the hardware lets the survivors pass; in a kernel of ours it is
        a bug). ``batch_waves``: about how many waves run in step.
        """
        grid3, block3 = _three(grid), _three(block)
        threads = prod(block3)
        if not 0 < threads <= 1024 or prod(grid3) <= 0:
            raise EmulatorError(f"cannot launch grid {grid3} of blocks {block3}")
        limit = self.kernel.get("kernarg_size")
        if len(kernarg) < limit:
            raise EmulatorError(f"the kernel reads {limit} bytes of arguments, {len(kernarg)} were given")
        job = Job(
            kernel=self.kernel,
            memory=memory,
            grid=grid3,
            block=block3,
            kernarg=kernarg,
            kernarg_address=memory.allocate(np.frombuffer(kernarg + bytes(KERNARG_SLACK), np.uint8), "kernarg"),
            packet_address=memory.allocate(_dispatch_packet(grid3, block3), "dispatch packet"),
            dynamic_lds=dynamic_lds,
            poison=poison,
            strict_barriers=strict_barriers,
            races=setting.races,
            rank=setting.rank,
            ranks=setting.ranks,
            random=None if setting.seed is None else np.random.default_rng((setting.seed, setting.rank)),
            executed=np.zeros(len(self.kernel.instructions), np.int64),
        )
        return Launch(job, self.kernel.name, batch_waves, setting.resident)

    def launch(
        self,
        memory: GlobalMemory,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        kernarg: bytes,
        *,
        seed: int | None = None,
        races: bool = True,
        resident: int | None = None,
        max_steps: int = 50_000_000,
        **options: Any,
    ) -> LaunchStatistics:
        """Run to the end, alone; the other parameters are those of `start` and of its setting.

        After ``max_steps`` steps a kernel counts as hung.
        """
        setting = Setting(seed, new_races() if races else None, resident=resident)
        launch = self.start(memory, grid, block, kernarg, setting, **options)
        try:
            while not launch.ended:
                if not launch.turn(min(_TURN, max_steps)):
                    stuck = launch.stuck()
                    raise EmulatorFault(
                        f"deadlock: no wave can run{stuck.reasons}",
                        instruction=stuck.instruction,
                        line=stuck.line,
                        source=stuck.source,
                    )
                if launch.statistics.steps >= max_steps and not launch.ended:
                    raise launch.hang()
        finally:
            launch.close()
        return launch.statistics


def _three(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1, 1)[:3]
    return x, y, z


def _dispatch_packet(grid: tuple[int, int, int], block: tuple[int, int, int]) -> Array:
    """The hsa_kernel_dispatch_packet_t that dispatch_ptr names: sizes only."""
    packet = np.zeros(64, np.uint8)
    packet[4:10] = np.array(block, np.uint16).view(np.uint8)
    packet[12:24] = np.array([g * b for g, b in zip(grid, block, strict=True)], _U32).view(np.uint8)
    return packet


__all__ = ["AmdEmulator", "Launch", "LaunchStatistics"]
