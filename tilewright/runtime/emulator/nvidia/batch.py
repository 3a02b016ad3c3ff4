"""A batch of blocks: the loop that steps their warps.

All warps of a batch run in step: one NumPy operation executes an instruction for every lane that
stands at it. Lanes at the smallest program counter go first until they reach others; after a while
those that waited longest do. With a seed the choice is random, and asynchronous copies land at
random times; without, they land when nothing else can run.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.emulator.errors import EmulatorError, EmulatorFault
from tilewright.runtime.emulator.nvidia import warp
from tilewright.runtime.emulator.nvidia.launch import BulkStore, Launch, LaunchStatistics, Work
from tilewright.runtime.emulator.nvidia.state import FAR, State
from tilewright.runtime.emulator.nvidia.types import Array
from tilewright.runtime.emulator.together import Stuck

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.decode import Instruction

#: after so many turns the warps that waited longest get one
_PATIENCE = 64
#: turns with no effect after which a copy in flight lands: somebody may poll for what comes of it
_POLLING = 256
#: with a seed: how often something in flight lands instead of a turn
_LANDING = 0.2


class Outcome(Enum):
    """What became of a turn."""

    RAN, WAITING, ENDED = range(3)


class Batch:
    """Some consecutive blocks, running in step. ``quiet``: turns since the last effect that others can see."""

    def __init__(self, launch: Launch, first: int, blocks: int, warps_per_block: int, threads: int) -> None:
        self.launch, self.code = launch, launch.kernel.instructions
        self.state = State(launch, first, blocks, warps_per_block, threads)
        self.executed = np.zeros(len(self.code) + 1, np.int64)
        self.turns = self.quiet = 0
        self._effects = 0
        self.last_turn = np.zeros(self.state.warps, np.int64)

    def turn(self, max_steps: int) -> Outcome:
        """Run the lanes at one place, or land something; at the end, write what bulk stores still have to."""
        state, launch = self.state, self.launch
        ready = state.ready.min(axis=1)
        if not (ready < FAR).any():
            if state.exited.all():
                self._finish()
                return Outcome.ENDED
            return Outcome.RAN if self._land() else Outcome.WAITING
        if launch.random is not None and launch.random.random() < _LANDING and self._land():
            return Outcome.RAN
        self._run(ready)
        if state.tick > max_steps:
            state.fault(f"the kernel still runs after {max_steps} steps: it hangs")
        if launch.effects != self._effects:
            self._effects, self.quiet = launch.effects, 0
        else:
            self.quiet += 1
            if self.quiet % _POLLING == 0 and self._land():
                self.quiet = 0
        return Outcome.RAN

    def longest_wait(self) -> int:
        """For how many turns a warp that can run has not had one, at most."""
        ready = self.state.ready.min(axis=1) < FAR
        return int((self.turns - self.last_turn[ready]).max()) if ready.any() else 0

    def fingerprint(self) -> int:
        """A hash of the registers and program counters."""
        state = self.state
        parts = [state.pc, state.ready, *state.files]
        return hash(b"".join(part.tobytes() for part in parts))

    def count_into(self, statistics: LaunchStatistics) -> None:
        """Add what has been executed."""
        statistics.steps += self.state.tick
        statistics.warps += self.state.warps
        statistics.instructions += int(self.executed.sum())
        for inst, count in zip(self.code, self.executed, strict=False):
            if count:
                statistics.by_opcode[inst.name] += int(count)

    def _finish(self) -> None:
        state = self.state
        for groups in self.launch.stores.values():
            for store in (s for group in groups for s in group):
                state.instruction = store.instruction
                store.finish(state, False)

    # ---- scheduling ------------------------------------------------------------------------------

    def _land(self) -> bool:
        """Complete one copy into shared memory; with a seed anything in flight. False if there is none."""
        launch, random = self.launch, self.launch.random
        if random is None:
            if not launch.copies:
                return False
            work: Work | BulkStore = launch.copies.pop(0)
        else:
            flying: list[Work | BulkStore] = [*launch.copies, *launch.thread_work(), *launch.bulk_stores()]
            if not flying:
                return False
            work = random.choice(flying)
            launch.copies = [other for other in launch.copies if other is not work]
        self.state.instruction = work.instruction
        work.finish(self.state)
        launch.effects += 1
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

    def _run(self, ready: Array) -> None:
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

    # ---- reports ---------------------------------------------------------------------------------

    def stuck(self) -> Stuck:
        """What each warp waits for, or where it polls."""
        state = self.state
        lines: dict[str, list[str]] = {}
        first = None
        for number in range(state.warps):
            if state.exited[number].all():
                continue
            first = number if first is None else first
            lines.setdefault(self._reason(number), []).append(state.name(number))
        ended = int(state.exited.all(axis=1).sum())
        text = f" ({ended} warps have ended)" if ended else ""
        for reason, names in lines.items():
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            verb = "waits" if len(names) == 1 else "wait"
            text += f"\n  {', '.join(names[:8])}{more} {verb} for {reason}"
        text += self._barrier_counts()
        inst = None if first is None else self._instruction_of(first)
        return Stuck(text, inst.text, inst.line, inst.source) if inst else Stuck(text)

    def _reason(self, number: int) -> str:
        if (self.state.ready[number] < FAR).any():
            inst = self._instruction_of(number)
            return f"what it polls at line {inst.line}: {inst.text}"
        reason = self.launch.waits.get(number, "nothing known")
        return reason if isinstance(reason, str) else reason()

    def _instruction_of(self, number: int) -> Instruction:
        """Where the first live lane of a warp stands."""
        lane = int((~self.state.exited[number]).argmax())
        return self.code[min(max(int(self.state.pc[number, lane]), 0), len(self.code) - 1)]

    def _barrier_counts(self) -> str:
        lines = [
            f"\n  barrier {number} of block {self.launch.block_index(self.state.first_block + block)} has "
            f"{barrier.arrived} of {barrier.expected} threads"
            for (block, number), barrier in self.launch.named.items()
            if number >= 0
        ]
        return "".join(lines[:8])
