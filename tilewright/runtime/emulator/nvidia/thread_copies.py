"""cp.async (PTX ISA 9.7.9.25.3): copies of 4 to 16 bytes from global to shared memory that each thread starts.

A copy lands at the wait for its group, with a seed at any time before. What a copy in flight will
write stays protected until the wait.
"""

from __future__ import annotations

import numpy as np

from tilewright.runtime.emulator.memory import BASE
from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.copies import SHARED_SPACES, address_of, shared_place, take_hints
from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.launch import Work
from tilewright.runtime.emulator.nvidia.mbarrier import change, find_barrier
from tilewright.runtime.emulator.nvidia.operands import integer, source
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.spaces import SHARED_WINDOW, global_offsets
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import Array


@instruction("cp.async.ca.shared", "cp.async.cg.shared", "cp.async.ca.shared::cta", "cp.async.cg.shared::cta")
def _thread_copy(inst: Instruction) -> Execute:
    """[dst], [src], size{, bytes to read | ignore-src predicate}: the rest becomes zero (9.7.9.25.3.1)."""
    inst.flag("global")
    for hint in [m for m in inst.modifiers if m.startswith("L2::") and m != "L2::cache_hint"]:
        inst.flag(hint)
    take_hints(inst)
    to, from_ = address_of(inst, inst.operands[0]), address_of(inst, inst.operands[1])
    size = integer(inst.operands[2])
    if size not in ((16,) if ".cg." in inst.name else (4, 8, 16)):
        raise Problem(f"cannot copy {size} bytes")
    amount = ignore = None
    if len(inst.operands) > 3:
        last = inst.operands[3]
        name = last.operand if isinstance(last, syntax.Negated) else last
        number = inst.kernel.registers.get(name.text, -1) if isinstance(name, syntax.Name) else -1
        if number >= 0 and inst.kernel.widths[number] == 1:
            ignore = source(inst, last, "pred")
        else:
            amount = source(inst, last, "u32")

    def execute(state: State) -> None:
        shape = state.lanes.shape
        targets, sources = np.broadcast_to(to(state), shape), np.broadcast_to(from_(state), shape)
        targets = np.where(targets >= SHARED_WINDOW, targets - SHARED_WINDOW, targets)
        count = np.full(shape, size)
        if amount is not None:
            count = np.broadcast_to(amount(state), shape).astype(np.int64)
        if ignore is not None:
            count = np.where(np.broadcast_to(ignore(state), shape), 0, count)
        state.require_defined("an operand of the copy")
        if ((count > size) & state.lanes).any():
            state.fault(f"cp.async reads more than its {size} bytes", count > size)
        shared = state.launch.shared
        places = np.zeros(shape, np.int64)
        places[state.lanes] = shared.offsets(state, targets, size, "copy")
        ordering, records = state.launch.ordering, []
        for amount_read in np.unique(count[state.lanes & (count > 0)]).tolist():
            with state.restricted(state.lanes & (count == amount_read)):
                read = global_offsets(state, sources, size, amount_read)
                if ordering is not None:
                    records.append(ordering.start(state, "global", read, amount_read, writes=False))
        shared.check_target(state, places[state.lanes], size)
        if ordering is not None:
            records.append(ordering.start(state, "shared", places[state.lanes], size, writes=True))
        shared.mark_written(state, places[state.lanes], size)
        words = places[..., None] // 4 + np.arange(size // 4)
        assert state.instruction is not None
        for row, warp in enumerate(state.selected().tolist()):
            lanes = state.lanes[row]
            if lanes.any():
                work = _thread_work(
                    state,
                    warp,
                    places[row, lanes],
                    sources[row, lanes] - BASE,
                    count[row, lanes],
                    size,
                    words[row, lanes],
                )
                work.records += [by_warp[warp] for by_warp in records if warp in by_warp]
                state.launch.effects += 1
                state.launch.thread_copies.setdefault(warp, [[]])[-1].append(work)

    return execute


def _thread_work(state: State, warp: int, places: Array, sources: Array, count: Array, size: int, words: Array) -> Work:
    shared, memory = state.launch.shared, state.launch.memory
    incoming = shared.incoming.reshape(-1)
    incoming[words] = 1
    shared.in_flight += 1
    assert state.instruction is not None

    def complete(state: State) -> None:
        octets = np.arange(size)
        inside = octets < count[:, None]
        data = memory.data[np.where(inside, sources[:, None] + octets, 0)]
        shared.data.reshape(-1)[places[:, None] + octets] = np.where(inside, data, 0)
        shared.written.reshape(-1)[places[:, None] + octets] = True

    def landed() -> None:
        incoming[words] = 0
        shared.in_flight -= 1

    return Work(int(state.block[warp]), warp, state.instruction, complete, landed)


def _finish_groups(state: State, warp: int, pending: int) -> None:
    groups = state.launch.thread_copies.get(warp, [[]])
    closed = groups[:-1]
    done = closed[: max(0, len(closed) - pending)]
    for work in (w for group in done for w in group):
        work.wait(state)
    groups[:-1] = closed[len(done) :]


@instruction("cp.async.commit_group")
def _commit(inst: Instruction) -> Execute:
    """Groups are kept per warp: the lanes of a warp commit together."""

    def execute(state: State) -> None:
        for warp in state.selected()[state.lanes.any(axis=1)].tolist():
            state.launch.thread_copies.setdefault(warp, [[]]).append([])

    return execute


@instruction("cp.async.wait_group", "cp.async.wait_all", ends_run=True)
def _wait(inst: Instruction) -> Execute:
    pending = integer(inst.operands[0]) if inst.operands else 0
    everything = inst.name.endswith("all")

    def execute(state: State) -> None:
        for warp in state.selected()[state.lanes.any(axis=1)].tolist():
            if everything:
                state.launch.thread_copies.setdefault(warp, [[]]).append([])
            _finish_groups(state, warp, pending)

    return execute


@instruction("cp.async.mbarrier.arrive", ends_run=True)
def _arrive_when_copied(inst: Instruction) -> Execute:
    """An arrival at the barrier once the thread's copies have landed; without .noinc the phase expects it in addition.

    It is asynchronous work itself, and lands like a copy.
    """
    extra = not inst.flag("noinc")
    inst.one_of(*SHARED_SPACES, default="")
    inst.type("b64")
    where = address_of(inst, inst.operands[0])

    def execute(state: State) -> None:
        places = np.broadcast_to(where(state), state.lanes.shape)
        for row, warp in enumerate(state.selected().tolist()):
            lanes = state.lanes[row]
            if lanes.any():
                at = [shared_place(place) for place in places[row, lanes].tolist()]
                if extra:
                    for place in at:
                        find_barrier(state, warp, place).pending += 1
                _arrive_later(state, warp, lanes.copy(), at)

    return execute


def _arrive_later(state: State, warp: int, lanes: Array, places: list[int]) -> None:
    """Queue the arrival of these lanes, at their barriers, behind the copies that the warp has started."""
    launch = state.launch
    copies = [w for group in launch.thread_copies.get(warp, []) for w in group]
    assert state.instruction is not None

    def complete(state: State) -> None:
        for work in copies:
            work.wait(state)
        if launch.ordering is not None:
            token = launch.ordering.team.release(warp, lanes)
            for place in set(places):
                find_barrier(state, warp, place).arriving.join(token)
        for place in places:
            change(state, int(state.block[warp]), find_barrier(state, warp, place), 1, 0, warp)

    launch.copies.append(Work(int(state.block[warp]), warp, state.instruction, complete))
