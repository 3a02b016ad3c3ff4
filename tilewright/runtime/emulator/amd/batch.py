"""Workgroups that run together: their initial registers, and the loop that steps their waves.

All waves of a batch run in step: one NumPy operation executes an instruction for every wave that
stands at it. Where waves diverge, those at the smallest program counter go first, until they reach
the others or a control instruction; a seed picks waves at random instead, and lets data that is on
its way to LDS land at random times before its wait.

A wave that comes back to the start of a short loop with every register as it was and no memory changed
in between waits for somebody else: it sleeps until memory changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from tilewright.runtime.emulator.amd.counters import Counter
from tilewright.runtime.emulator.amd.decode import Instruction, Kernel
from tilewright.runtime.emulator.amd.errors import EmulatorError, EmulatorFault
from tilewright.runtime.emulator.amd.memory import MemorySystem
from tilewright.runtime.emulator.amd.mode import initial_mode
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.amd.ordering import WaveOrder
from tilewright.runtime.emulator.amd.state import LANES, WaveState, pack_lanes
from tilewright.runtime.emulator.memory import GlobalMemory
from tilewright.runtime.emulator.races import Races

_U32 = np.uint32
#: bytes after the kernel arguments that a widened scalar load may touch
KERNARG_SLACK = 64
_FAR = 1 << 62
#: a loop of at most so many instructions may be one that waits for memory
_SPIN_LENGTH = 64
#: so often the waves that are furthest on go first, so that no loop keeps the others from running
_FAIRNESS = 256


@dataclass(frozen=True)
class Job:
    """What all batches of a launch share. ``races`` is None without a race detector."""

    kernel: Kernel
    memory: GlobalMemory
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    kernarg: bytes
    kernarg_address: int
    packet_address: int
    dynamic_lds: int
    poison: bool
    strict_barriers: bool
    races: Races | None
    rank: int
    ranks: int
    random: np.random.Generator | None
    #: how many waves executed each instruction
    executed: Array

    @property
    def waves_per_group(self) -> int:
        """Waves of a workgroup."""
        return -(-prod(self.block) // LANES)


class Batch:
    """``groups`` consecutive workgroups from number ``first_group``, running in step."""

    def __init__(self, job: Job, first_group: int, groups: int) -> None:
        kernel = job.kernel
        self.job, self.kernel, self.first_group, self.groups = job, kernel, first_group, groups
        waves = groups * job.waves_per_group
        scratch = kernel.get("private_segment_fixed_size")
        lds_bytes = kernel.get("group_segment_fixed_size") + job.dynamic_lds
        self.memory = MemorySystem(job.memory, groups, lds_bytes, scratch, waves * LANES, kernel.arch)
        mode = initial_mode(kernel)
        self.state = WaveState(waves, job.waves_per_group, kernel.vector_registers, self.memory, job.poison, mode)
        self.state.first_group = first_group
        self.state.accumulators = kernel.get("accum_offset", 256)
        if job.races is not None:
            order = WaveOrder(job.races, self.state.counters, groups, job.waves_per_group, self.name, job.rank)
            self.memory.detect_races(order, job.races.of_memory(job.memory))
        self._turn = 0
        #: what a wave looked like at its last backward branch, and the version of memory then
        self._before: dict[int, tuple[int, int]] = {}
        #: the version of memory for whose change each wave waits, or -1
        self._asleep = np.full(waves, -1, np.int64)
        self._initialise()

    def name(self, wave: int) -> str:
        """A wave in messages."""
        per = self.job.waves_per_group
        where = f" on GPU {self.job.rank}" if self.job.ranks > 1 else ""
        return f"wave {wave % per} of workgroup {self.first_group + wave // per}{where}"

    def _initialise(self) -> None:
        """Initial registers (LLVM AMDGPU usage, "Initial Kernel Execution State"; ISA chapter 3)."""
        state, kernel, job = self.state, self.kernel, self.job
        grid, block = job.grid, job.block
        register = 0

        def put(value: int | Array, words: int = 1) -> None:
            nonlocal register
            for part in range(words):
                word = value >> 32 * part & 0xFFFFFFFF if isinstance(value, int) else value
                state.write_sgpr(register, np.asarray(word).astype(_U32))
                register += 1

        pointers = {
            "dispatch_ptr": job.packet_address,
            "queue_ptr": 0,
            "kernarg_segment_ptr": job.kernarg_address,
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
            words = np.frombuffer((job.kernarg + bytes(KERNARG_SLACK + 4 * preload))[start : start + 4 * preload], _U32)
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

    @property
    def finished(self) -> bool:
        """Whether all waves have ended."""
        return bool(self.state.done.all())

    def advance(self, limit: int) -> int:
        """Run for about ``limit`` steps; how many were made, 0 if no wave can run."""
        state = self.state
        steps = 0
        while steps < limit:
            if state.waiting.any():
                self._release_barriers()
            runnable = ~(state.done | state.waiting | (self._asleep == self._version))
            if not runnable.any():
                break
            steps += self._run_group(runnable)
        return steps

    @property
    def _version(self) -> int:
        return self.job.memory.version + self.memory.version

    def _choose(self, runnable: Array) -> tuple[int, Array, int]:
        """The program counter at which to go on, which waves do, and for how many instructions at most."""
        state, random = self.state, self.job.random
        self._turn += 1
        if random is None:
            at = state.pc[runnable]
            pc = int(at.max() if self._turn % _FAIRNESS == 0 else at.min())
            return pc, runnable & (state.pc == pc), _FAR
        pc = int(state.pc[random.choice(np.nonzero(runnable)[0])])
        standing = runnable & (state.pc == pc)
        # the same waves of all workgroups, mostly, so that they still run in step
        shape = (self.groups, state.waves_per_group)
        rows = random.random(state.waves_per_group) < random.choice([0.3, 1.0])
        groups = random.random(self.groups) < random.choice([0.3, 1.0, 1.0])
        chosen = standing & (groups[:, None] & rows[None]).reshape(-1) if prod(shape) > 1 else standing
        if self.memory.underway and random.random() < 0.5:
            finished, issued = state.counters.finished[Counter.VECTOR], state.counters.issued[Counter.VECTOR]
            self.memory.land(random.integers(finished, issued, endpoint=True))
        return pc, chosen if chosen.any() else standing, int(random.geometric(0.15))

    def _run_group(self, runnable: Array) -> int:
        """Run waves that stand at one program counter until they branch or reach other waves."""
        state, code = self.state, self.kernel.instructions
        pc, chosen, limit = self._choose(runnable)
        others = state.pc[runnable & ~chosen & (state.pc > pc)]
        stop = min(int(others.min()) if others.size else _FAR, pc + limit)
        state.select(None if chosen.all() else np.nonzero(chosen)[0])
        first = pc
        while pc < stop:
            if pc >= len(code):
                state.fault("execution runs past the end of the kernel")
            inst = code[pc]
            state.begin(inst)
            pc += 1
            self.job.executed[pc - 1] += state.count
            if inst.ends_run:
                state.pc[state.w] = pc
                self._execute()
                if 0 <= inst.target < pc and self._may_spin(inst, pc):
                    self._watch(inst)
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
                f"the emulator failed: {type(error).__name__}: {error}",
                instruction=current.text,
                line=current.line,
                source=current.source,
            ) from error

    # ---- waiting -------------------------------------------------------------------------------

    def _may_spin(self, inst: Instruction, end: int) -> bool:
        """Whether the loop that ``inst`` closes is short and polls memory: an atomic load, or one of LDS."""
        if inst.polls is None:
            body = self.kernel.instructions[inst.target : end]
            inst.polls = len(body) <= _SPIN_LENGTH and any(_polls(member) for member in body)
        return inst.polls

    def _watch(self, inst: Instruction) -> None:
        """Waves at the end of such a loop sleep if nothing has changed since they were here last."""
        state, version = self.state, self._version
        for wave in state.selected.tolist():
            if state.pc[wave] != inst.target:
                self._before.pop(wave, None)
                continue
            registers = (state.sgprs[:, wave].tobytes(), state.vgprs[:, wave].tobytes())
            look = hash((inst.line, bool(state.scc[wave]), int(state.exec_bits[wave]), *registers))
            if self._before.get(wave) == (look, version):
                self._asleep[wave] = version
            self._before[wave] = look, version

    def fault(self, message: str) -> EmulatorFault:
        """A fault of the instruction at which a wave that can run stands."""
        state = self.state
        wave = int((~state.done).argmax())
        inst = self.kernel.instructions[min(int(state.pc[wave]), len(self.kernel.instructions) - 1)]
        place = (self.first_group + wave // state.waves_per_group, wave % state.waves_per_group)
        return EmulatorFault(message, instruction=inst.text, line=inst.line, wave=place, source=inst.source)

    def stuck(self) -> tuple[list[str], Instruction]:
        """Why nobody can run: a line for each wave that has not ended, and the instruction of the first."""
        state, code = self.state, self.kernel.instructions
        reasons = []
        waves = np.nonzero(~state.done)[0].tolist()
        stands = [code[int(state.pc[wave]) - int(state.waiting[wave])] for wave in waves]
        for wave, inst in zip(waves[:16], stands, strict=False):
            doing = "waits at a barrier" if state.waiting[wave] else "waits for memory to change in the loop"
            reasons.append(f"{self.name(wave)} {doing} at line {inst.line}: {inst.text}")
        if len(waves) > 16:
            reasons.append(f"and {len(waves) - 16} more")
        return reasons, stands[0]

    def _release_barriers(self) -> None:
        """Release every workgroup whose live waves all wait (ISA chapter 4, "S_BARRIER")."""
        state = self.state
        shape = (self.groups, state.waves_per_group)
        waiting, done = state.waiting.reshape(shape), state.done.reshape(shape)
        stuck = waiting.any(axis=1) & (waiting | done).all(axis=1)
        if not stuck.any():
            return
        mismatched = stuck & done.any(axis=1)
        if self.job.strict_barriers and mismatched.any():
            self._fault_at_barrier(int(mismatched.argmax()))
        waiting[stuck] = False
        if self.memory.order is not None:
            self.memory.order.barrier(np.nonzero(stuck)[0])

    def _fault_at_barrier(self, group: int) -> None:
        state = self.state
        per = state.waves_per_group
        waiting, done = (flags[group * per : group * per + per] for flags in (state.waiting, state.done))
        wave = int(waiting.argmax())
        inst = self.kernel.instructions[int(state.pc[group * per + wave]) - 1]
        raise EmulatorFault(
            f"barrier mismatch: this wave waits while waves {np.nonzero(done)[0].tolist()} of its workgroup have ended",
            instruction=inst.text,
            line=inst.line,
            wave=(self.first_group + group, wave),
            source=inst.source,
        )


def _polls(inst: Instruction) -> bool:
    if inst.name.startswith("ds_read"):
        return True
    returns = inst.flag("sc0") or inst.flag("sc1")
    return returns and inst.name.startswith(("global_", "flat_", "buffer_load", "buffer_atomic"))


__all__ = ["KERNARG_SLACK", "Batch", "Job"]
