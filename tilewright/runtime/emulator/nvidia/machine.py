"""Launching a kernel: dispatch of blocks to warps, and the loop that steps them.

Blocks run in batches, all warps of a batch in step: one NumPy operation executes an instruction for
every lane that stands at it. Lanes at the smallest program counter go first until they reach others;
after a while those that waited longest do. With a seed the choice is random, and asynchronous copies
land at random times; without, they land when nothing else can run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod

import numpy as np

# importing the modules fills the table of instructions
from tilewright.runtime.emulator.errors import EmulatorError, EmulatorFault
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
    warp,
    wgmma,
)
from tilewright.runtime.emulator.nvidia.clusters import cluster_blocks
from tilewright.runtime.emulator.nvidia.decode import Instruction, Kernel, decode_kernel
from tilewright.runtime.emulator.nvidia.launch import REGISTER_FILE, Launch
from tilewright.runtime.emulator.nvidia.state import FAR, State
from tilewright.runtime.emulator.nvidia.syntax import Variable, type_bytes
from tilewright.runtime.emulator.nvidia.types import LANES, TYPES, Array

#: after so many turns the warps that waited longest get one
_PATIENCE = 64


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


def _three(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1, 1)[:3]
    return x, y, z


class PtxEmulator:
    """One entry of a PTX text, decoded. DecodeError names every instruction that is not implemented."""

    def __init__(self, ptx: str, entry: str) -> None:
        self.kernel: Kernel = decode_kernel(ptx, entry)

    def launch(
        self,
        memory: GlobalMemory,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        parameters: bytes,
        *,
        shared_bytes: int = 0,
        seed: int | None = None,
        registers: int | None = None,
        batch_warps: int = 256,
        max_steps: int = 50_000_000,
    ) -> LaunchStatistics:
        """Run ``grid`` blocks of ``block`` threads (each up to three numbers); memory changes in place.

        ``parameters`` are the bytes of the kernel's parameters, ``shared_bytes`` the dynamic shared
        memory. ``seed`` picks a random legal interleaving. ``registers``: per thread at the start, of
        which setmaxnreg moves some (default: what a block's threads can have). ``batch_warps``: about
        how many warps run in step. ``max_steps``: the bound after which a kernel counts as hung.
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
            registers = min(256, REGISTER_FILE // (warps_per_block * LANES) // 8 * 8)
        cluster = cluster_blocks(kernel, grid3)
        blocks_per_batch = max(1, batch_warps // warps_per_block // cluster) * cluster
        statistics = LaunchStatistics()
        placed = _place_variables(kernel, memory)
        address = memory.allocate(np.frombuffer(parameters.ljust(1, b"\0"), np.uint8), "the parameters")
        try:
            with np.errstate(all="ignore"):
                for first in range(0, prod(grid3), blocks_per_batch):
                    count = min(blocks_per_batch, prod(grid3) - first)
                    launch = Launch(
                        kernel, memory, grid3, block3, shared_bytes, address, placed, count, warps_per_block,
                        None if seed is None else seed + first, statistics.printed, registers, cluster,
                    )  # fmt: skip
                    _Batch(launch, first, count, warps_per_block, threads).run(max_steps, statistics)
        finally:
            for place in (address, *placed.values()):
                memory.free(place)
        return statistics


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


class _Batch:
    """Some consecutive blocks, running in step."""

    def __init__(self, launch: Launch, first: int, blocks: int, warps_per_block: int, threads: int) -> None:
        self.launch, self.code = launch, launch.kernel.instructions
        self.state = State(launch, first, blocks, warps_per_block, threads)
        self.executed = np.zeros(len(self.code) + 1, np.int64)
        self.turns = 0
        self.last_turn = np.zeros(self.state.warps, np.int64)

    def run(self, max_steps: int, statistics: LaunchStatistics) -> None:
        """Step until every thread has exited; then what bulk stores still have to write is written."""
        state = self.state
        try:
            while True:
                ready = state.ready.min(axis=1)
                if not (ready < FAR).any():
                    if state.exited.all():
                        break
                    if not self._land():
                        self._deadlock()
                    continue
                if self.launch.random is not None and self.launch.copies and self.launch.random.random() < 0.2:
                    self._land()
                    continue
                self._turn(ready)
                if state.tick > max_steps:
                    state.fault(f"the kernel still runs after {max_steps} steps: it hangs")
            for groups in self.launch.stores.values():
                for store in (s for group in groups for s in group):
                    state.instruction = store.instruction
                    store.finish(state, False)
        finally:
            statistics.steps += state.tick
            statistics.warps += state.warps
            statistics.instructions += int(self.executed.sum())
            for inst, count in zip(self.code, self.executed, strict=False):
                if count:
                    statistics.by_opcode[inst.name] += int(count)

    # ---- scheduling ------------------------------------------------------------------------------

    def _land(self) -> bool:
        """Complete one copy into shared memory. False if there is none."""
        pending, random = self.launch.copies, self.launch.random
        if not pending:
            return False
        work = pending.pop(0 if random is None else random.randrange(len(pending)))
        self.state.instruction = work.instruction
        work.complete(self.state)
        return True

    def _choose(self, ready: Array) -> int:
        """The program counter whose lanes run next."""
        launch = self.launch
        if launch.yielded:
            held = np.zeros(self.state.warps, np.bool_)
            held[list(launch.yielded)] = True
            others = ready[~held & (ready < FAR)]
            if not others.size:
                launch.yielded.clear()
                self._land()  # those that poll wait for something
            else:
                ready = np.where(held, FAR, ready)
        if launch.random is not None:
            places = np.unique(ready[ready < FAR])
            return int(launch.random.choice(places.tolist()))
        if self.turns % _PATIENCE == 0:
            waited = np.where(ready < FAR, self.last_turn, FAR)
            return int(ready[int(waited.argmin())])
        return int(ready.min())

    def _turn(self, ready: Array) -> None:
        """Run the lanes at one program counter until they branch, reach others, or gather."""
        state, code = self.state, self.code
        self.turns += 1
        pc = self._choose(ready)
        if pc >= len(code):
            state.fault("execution runs past the end of the kernel")
        inst = code[pc]
        at = state.ready == pc
        if inst.gathers:
            self._gather(inst, pc)
            return
        warps = np.nonzero(at.any(axis=1))[0]
        warps = self._thin(warps)
        state.select(warps, at[warps])
        self.last_turn[warps] = self.turns
        beyond = state.ready[state.ready > pc]
        stop = int(beyond.min()) if beyond.size else FAR
        count = len(code)
        while True:
            self.executed[pc] += state.count
            state.begin(inst)
            pc += 1
            if inst.ends_run:
                state.pc[state.w] = np.where(state.lanes, pc, state.pc[state.w])
                self._execute(inst)
                break
            self._execute(inst)
            if pc >= stop or pc >= count or code[pc].gathers:
                state.pc[state.w] = np.where(state.lanes, pc, state.pc[state.w])
                break
            inst = code[pc]
        state.refresh()

    def _thin(self, warps: Array) -> Array:
        """With a seed, sometimes only some of the warps go."""
        random = self.launch.random
        if random is None or len(warps) == 1 or random.random() < 0.5:
            return warps
        chosen = [w for w in warps.tolist() if random.random() < 0.5]
        return np.array(chosen or [int(warps[0])])

    def _gather(self, inst: Instruction, pc: int) -> None:
        """Execute an instruction for the warps (warpgroups) whose lanes have all reached it; others wait."""
        state = self.state
        here = (state.pc == pc) & ~state.exited & ~state.blocked
        warps = np.nonzero(here.any(axis=1))[0]
        state.select(warps, here[warps])
        state.begin(inst)
        needed = ~state.exited[warps]
        if inst.membermask is not None:
            mask = np.broadcast_to(inst.membermask(state), here[warps].shape)
            state.require_defined("the membermask")
            first = mask[np.arange(len(warps)), here[warps].argmax(axis=1)]
            needed = needed & warp.unpack_mask(first)
        complete = np.zeros(state.warps, np.bool_)
        complete[warps] = (here[warps] | ~needed).all(axis=1)
        if inst.gathers == "warpgroup":
            group = np.arange(state.warps) - state.rank % 4
            whole = np.zeros(state.warps, np.bool_)
            np.logical_and.at(together := np.ones(state.warps, np.bool_), group, complete)
            whole[:] = together[group] & (state.warps_per_block - (state.rank - state.rank % 4) >= 4)
            complete = whole
        late = warps[~complete[warps]]
        if late.size:
            state.gathering[late] |= here[late]
            stopped = state.exited[late] | state.blocked[late] | state.gathering[late]
            state.ready[late] = np.where(stopped, FAR, state.pc[late])
            for warp_ in late.tolist():
                self.launch.waits[warp_] = f"the other threads of its {inst.gathers}, at line {inst.line}: {inst.text}"
        chosen = warps[complete[warps]]
        if not chosen.size:
            return
        for warp_ in chosen.tolist():
            self.launch.waits.pop(warp_, None)
        state.gathering[chosen] &= ~here[chosen]
        state.select(chosen, here[chosen])
        self.last_turn[chosen] = self.turns
        self.executed[pc] += state.count
        state.begin(inst)
        state.pc[state.w] = np.where(state.lanes, pc + 1, state.pc[state.w])
        self._execute(inst)
        state.refresh()

    def _execute(self, inst: Instruction) -> None:
        state = self.state
        assert inst.execute is not None
        try:
            if inst.guard < 0:
                inst.execute(state)
                return
            taken = state.read(inst.guard)
            state.require_defined("the guard")
            lanes = state.lanes & (~taken if inst.guard_negated else taken)
            if inst.gathers and (lanes.any(axis=1) != (lanes == state.lanes).all(axis=1)).any():
                state.fault("the guard of an instruction that a whole warp executes differs between its lanes")
            if lanes.any():
                with state.restricted(lanes):
                    inst.execute(state)
        except EmulatorError:
            raise
        except Exception as error:
            raise EmulatorFault(
                f"the emulator failed: {type(error).__name__}: {error}",
                instruction=inst.text,
                line=inst.line,
                source=inst.source,
            ) from error

    def _deadlock(self) -> None:
        """Nobody can run: say what each warp waits for."""
        state = self.state
        lines: dict[str, list[str]] = {}
        first = None
        for warp_ in range(state.warps):
            if state.exited[warp_].all():
                continue
            first = warp_ if first is None else first
            reason = self.launch.waits.get(warp_, "nothing known")
            reason = reason if isinstance(reason, str) else reason()
            lines.setdefault(reason, []).append(state.name(warp_))
        ended = int(state.exited.all(axis=1).sum())
        text = "".join(
            f"\n  {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''} "
            f"wait{'s' if len(names) == 1 else ''} for {reason}"
            for reason, names in lines.items()
        )
        text += self._barrier_counts()
        more = f" ({ended} warps have ended)" if ended else ""
        inst = None
        if first is not None:
            lanes = np.nonzero(~state.exited[first])[0]
            place = int(state.pc[first, int(lanes[0])])
            inst = self.code[min(max(place, 0), len(self.code) - 1)]
        raise EmulatorFault(
            f"deadlock: no warp can run{more}{text}",
            instruction=inst.text if inst else "",
            line=inst.line if inst else 0,
            source=inst.source if inst else "",
        )

    def _barrier_counts(self) -> str:
        lines = [
            f"\n  barrier {number} of block {self.launch.block_index(self.state.first_block + block)} has "
            f"{barrier.arrived} of {barrier.expected} threads"
            for (block, number), barrier in self.launch.named.items()
            if number >= 0
        ]
        return "".join(lines[:8])
