"""Program flow: branches, barriers, the end of a wave (ISA chapter 4, "Program Flow Control").

A handler leaves the next program counter of the selected waves in ``state.pc``; on entry it already
holds the fall-through.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tilewright.runtime.emulator.amd.counters import Counter, wait_counts
from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.operands import EXEC, VCC, Array
from tilewright.runtime.emulator.amd.registry import define, instruction
from tilewright.runtime.emulator.amd.state import WaveState


def _branch(condition: Callable[[WaveState], Array]) -> Callable[[WaveState, Instruction], None]:
    def execute(state: WaveState, inst: Instruction) -> None:
        taken = condition(state)
        state.require_defined_scalar("a branch")
        state.pc[state.w] = np.where(taken, inst.target, state.pc[state.w])

    return execute


_CONDITIONS: dict[str, Callable[[WaveState], Array]] = {
    "s_branch": lambda state: np.ones(1, np.bool_),
    "s_cbranch_scc0": lambda state: ~state.scc_selected,
    "s_cbranch_scc1": lambda state: state.scc_selected,
    "s_cbranch_vccz": lambda state: state.read_sgpr64(VCC) == 0,
    "s_cbranch_vccnz": lambda state: state.read_sgpr64(VCC) != 0,
    "s_cbranch_execz": lambda state: state.read_sgpr64(EXEC) == 0,
    "s_cbranch_execnz": lambda state: state.read_sgpr64(EXEC) != 0,
}
for _name, _condition in _CONDITIONS.items():
    define(_name, _branch(_condition), ends_run=True)


@instruction("s_endpgm", ends_run=True)
def _end(state: WaveState, inst: Instruction) -> None:
    """What is in flight still completes."""
    state.done[state.w] = True
    state.counters.wait(state.w, 0, 0)
    if state.memory.underway:
        state.memory.land(state.counters.finished[Counter.VECTOR])


@instruction("s_barrier", ends_run=True)
def _barrier(state: WaveState, inst: Instruction) -> None:
    """The machine releases a workgroup once all of its waves wait."""
    state.waiting[state.w] = True


@instruction("s_waitcnt")
def _wait(state: WaveState, inst: Instruction) -> None:
    """Memory operations beyond the counts are finished: registers may be used, LDS holds what was loaded to it."""
    vector, lgkm = wait_counts(inst.settings)
    state.counters.wait(state.w, vector, lgkm)
    if vector is not None and state.memory.underway:
        state.memory.land(state.counters.finished[Counter.VECTOR])
    if state.memory.order is not None:
        state.memory.order.waited(state.selected)


@instruction("s_trap", ends_run=True)
def _trap(state: WaveState, inst: Instruction) -> None:
    state.fault("the kernel trapped")
