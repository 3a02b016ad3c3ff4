"""Launching: dispatch of workgroups to waves, and the loop that steps them.

Workgroups run in batches, all waves of a batch in step: one NumPy operation executes an instruction
for every wave that stands at it. Where waves diverge, those at the smallest program counter go
first, until they reach the others or a control instruction. Which waves run when is deterministic.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod

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
from tilewright.runtime.emulator.amd.decode import Kernel, decode_kernel
from tilewright.runtime.emulator.amd.errors import DecodeError, EmulatorError, EmulatorFault
from tilewright.runtime.emulator.amd.memory import MemorySystem
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.amd.registry import ARCHITECTURES
from tilewright.runtime.emulator.amd.state import LANES, WaveState, pack_lanes
from tilewright.runtime.emulator.memory import GlobalMemory

_U32 = np.uint32
#: bytes after the kernel arguments that a widened scalar load may touch
_KERNARG_SLACK = 64
_FAR = 1 << 62


@dataclass
class LaunchStatistics:
    """What a launch executed: instructions by mnemonic, counted once per wave."""

    waves: int = 0
    #: instructions, each counted for every wave that executed it
    instructions: int = 0
    #: steps of the emulator: one instruction for a group of waves
    steps: int = 0
    by_mnemonic: Counter[str] = field(default_factory=Counter)


class AmdEmulator:
    """One kernel of an assembly text, decoded for ``arch`` ("gfx942" or "gfx950").

    Raises DecodeError naming every instruction that is not implemented.
    """

    def __init__(self, asm_text: str, kernel_name: str, arch: str) -> None:
        if arch not in ARCHITECTURES:
            raise DecodeError(f"unknown architecture {arch}: {', '.join(ARCHITECTURES)} are emulated")
        self.arch = arch
        self.kernel: Kernel = decode_kernel(asm_text, kernel_name, arch)

    def launch(
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
        max_steps: int = 50_000_000,
    ) -> LaunchStatistics:
        """Run ``grid`` workgroups of ``block`` work-items (each up to three numbers); memory changes in place.

        ``dynamic_lds``: bytes beyond the kernel's static LDS. ``poison``: fault where a never-written
        register takes effect. ``strict_barriers``: fault where a wave ends while another of its
        workgroup waits at a barrier (the hardware lets the survivors pass; in a kernel of ours it is
        a bug). ``batch_waves``: about how many waves run in step. ``max_steps``: the bound after
        which a kernel counts as hung.
        """
        grid3, block3 = _three(grid), _three(block)
        threads = prod(block3)
        if not 0 < threads <= 1024 or prod(grid3) <= 0:
            raise EmulatorError(f"cannot launch grid {grid3} of blocks {block3}")
        limit = self.kernel.get("kernarg_size")
        if len(kernarg) < limit:
            raise EmulatorError(f"the kernel reads {limit} bytes of arguments, {len(kernarg)} were given")
        addresses = _LaunchAddresses(
            kernarg=memory.allocate(np.frombuffer(kernarg + bytes(_KERNARG_SLACK), np.uint8), "kernarg"),
            packet=memory.allocate(_dispatch_packet(grid3, block3), "dispatch packet"),
        )
        waves_per_group = -(-threads // LANES)
        groups_per_batch = max(1, batch_waves // waves_per_group)
        statistics = LaunchStatistics()
        groups = prod(grid3)
        try:
            with np.errstate(all="ignore"):
                for first in range(0, groups, groups_per_batch):
                    count = min(groups_per_batch, groups - first)
                    batch = _Batch(self.kernel, memory, first, count, waves_per_group, dynamic_lds, poison)
                    batch.initialise(grid3, block3, kernarg, addresses)
                    batch.run(strict_barriers, max_steps, statistics)
                    statistics.waves += count * waves_per_group
        finally:
            memory.free(addresses.kernarg)
            memory.free(addresses.packet)
        return statistics


@dataclass(frozen=True)
class _LaunchAddresses:
    kernarg: int
    packet: int


def _three(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1, 1)[:3]
    return x, y, z


def _dispatch_packet(grid: tuple[int, int, int], block: tuple[int, int, int]) -> Array:
    """The hsa_kernel_dispatch_packet_t that dispatch_ptr names: sizes only."""
    packet = np.zeros(64, np.uint8)
    packet[4:10] = np.array(block, np.uint16).view(np.uint8)
    packet[12:24] = np.array([g * b for g, b in zip(grid, block, strict=True)], _U32).view(np.uint8)
    return packet


class _Batch:
    """Some consecutive workgroups, running in step."""

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        first_group: int,
        groups: int,
        waves_per_group: int,
        dynamic_lds: int,
        poison: bool,
    ) -> None:
        self.kernel, self.first_group, self.groups = kernel, first_group, groups
        waves = groups * waves_per_group
        scratch = kernel.get("private_segment_fixed_size")
        lds_bytes = kernel.get("group_segment_fixed_size") + dynamic_lds
        self.memory = MemorySystem(memory, groups, lds_bytes, scratch, waves * LANES, kernel.arch)
        self.state = WaveState(waves, waves_per_group, kernel.vector_registers, self.memory, poison)
        self.state.first_group = first_group

    def initialise(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        kernarg: bytes,
        addresses: _LaunchAddresses,
    ) -> None:
        """Initial registers (LLVM AMDGPU usage, "Initial Kernel Execution State"; ISA chapter 3)."""
        state, kernel = self.state, self.kernel
        register = 0

        def put(value: int | Array, words: int = 1) -> None:
            nonlocal register
            for part in range(words):
                word = value >> 32 * part & 0xFFFFFFFF if isinstance(value, int) else value
                state.write_sgpr(register, np.asarray(word).astype(_U32))
                register += 1

        pointers = {
            "dispatch_ptr": addresses.packet,
            "queue_ptr": 0,
            "kernarg_segment_ptr": addresses.kernarg,
            "dispatch_id": 0,
        }
        for name, value in pointers.items():
            if kernel.get(f"user_sgpr_{name}"):
                put(value, 2)
        if kernel.get("user_sgpr_private_segment_size"):
            put(kernel.get("private_segment_fixed_size"))
        preload = kernel.get("user_sgpr_kernarg_preload_length")
        if preload:
            start = 4 * kernel.get("user_sgpr_kernarg_preload_offset")
            words = np.frombuffer((kernarg + bytes(_KERNARG_SLACK + 4 * preload))[start : start + 4 * preload], _U32)
            for word in words:
                put(int(word))
        register = max(register, kernel.get("user_sgpr_count"))
        group = np.arange(state.waves) // state.waves_per_group + self.first_group
        group_ids = (group % grid[0], group // grid[0] % grid[1], group // (grid[0] * grid[1]))
        for axis, ids in zip("xyz", group_ids, strict=True):
            if kernel.get(f"system_sgpr_workgroup_id_{axis}", int(axis == "x")):
                put(ids)
        wave = np.arange(state.waves) % state.waves_per_group
        item = wave[:, None] * LANES + np.arange(LANES)
        packed = item % block[0] | item // block[0] % block[1] << 10 | item // (block[0] * block[1]) << 20
        state.write_vgpr(0, packed.astype(_U32))
        state.write_exec(pack_lanes(item < prod(block)))

    # ---- stepping ------------------------------------------------------------------------------

    def run(self, strict_barriers: bool, max_steps: int, statistics: LaunchStatistics) -> None:
        """Step until every wave has ended."""
        state = self.state
        executed = np.zeros(len(self.kernel.instructions), np.int64)
        steps = 0
        try:
            while True:
                runnable = ~(state.done | state.waiting)
                if not runnable.any():
                    if state.done.all():
                        break
                    self._release_barriers(strict_barriers)
                    continue
                steps += self._run_group(runnable, executed)
                if steps > max_steps:
                    state.fault(f"the kernel still runs after {max_steps} steps: it hangs")
                if state.waiting.any():
                    self._release_barriers(strict_barriers)
        finally:
            statistics.steps += steps
            statistics.instructions += int(executed.sum())
            for inst, count in zip(self.kernel.instructions, executed, strict=True):
                if count:
                    statistics.by_mnemonic[inst.name] += int(count)

    def _run_group(self, runnable: Array, executed: Array) -> int:
        """Run the waves at the smallest program counter until they branch or reach other waves."""
        state, code = self.state, self.kernel.instructions
        pc = int(state.pc[runnable].min())
        chosen = runnable & (state.pc == pc)
        others = state.pc[runnable & ~chosen]
        stop = int(others.min()) if others.size else _FAR
        state.select(None if chosen.all() else np.nonzero(chosen)[0])
        first = pc
        while pc < stop:
            if pc >= len(code):
                state.fault("execution runs past the end of the kernel")
            inst = code[pc]
            state.begin(inst)
            pc += 1
            executed[pc - 1] += state.count
            if inst.ends_run:
                state.pc[state.w] = pc
                self._execute()
                break
            self._execute()
        else:
            state.pc[state.w] = pc
        self.memory.clock += pc - first
        return pc - first

    def _execute(self) -> None:
        state = self.state
        current = state.instruction
        assert current is not None and current.handler is not None
        try:
            current.handler(state, current)
        except EmulatorError:
            raise
        except Exception as error:
            raise EmulatorFault(
                f"the emulator failed: {type(error).__name__}: {error}", instruction=current.text, line=current.line
            ) from error

    def _release_barriers(self, strict: bool) -> None:
        """Release every workgroup whose live waves all wait (ISA chapter 4, "S_BARRIER")."""
        state = self.state
        shape = (self.groups, state.waves_per_group)
        waiting, done = state.waiting.reshape(shape), state.done.reshape(shape)
        stuck = waiting.any(axis=1) & (waiting | done).all(axis=1)
        mismatched = stuck & done.any(axis=1)
        if strict and mismatched.any():
            group = int(mismatched.argmax())
            wave = int(waiting[group].argmax())
            pc = int(state.pc.reshape(shape)[group, wave]) - 1
            inst = self.kernel.instructions[pc]
            ended = np.nonzero(done[group])[0].tolist()
            raise EmulatorFault(
                f"barrier mismatch: this wave waits while waves {ended} of its workgroup have ended",
                instruction=inst.text,
                line=inst.line,
                wave=(self.first_group + group, wave),
            )
        waiting[stuck] = False


__all__ = ["AmdEmulator", "LaunchStatistics"]
