"""mbarrier objects (PTX ISA 9.7.12.15): arrival counts, transaction counts, phases.

The object is kept beside shared memory, whose bytes at its place must not be touched. A
``try_wait`` whose phase has not completed suspends the warp until it has (9.7.12.15.16 allows any
time limit): where nothing can complete it any more, that is a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.operands import address, dest, source
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.spaces import SHARED_WINDOW, locate
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import LANES, Array
from tilewright.runtime.emulator.races import Token

_MAX_COUNT, _MAX_TX = (1 << 20) - 1, (1 << 20) - 1


@dataclass(eq=False)
class Barrier:
    """Current phase: ``expected`` arrivals in each phase, ``pending`` in this one, ``tx`` bytes outstanding."""

    expected: int
    pending: int
    tx: int = 0
    phase: int = 0
    #: the warp that initialised it, and whether a barrier has told the others since
    owner: int = -1
    shared: bool = False
    #: the phase of the cluster's barrier that has told the other blocks; 0: none has
    known_from: int = 0
    #: visible to the async proxy
    published: bool = False
    waiting: list[tuple[int, Array]] = field(default_factory=list)
    #: what those know who arrived in this phase; and before, which who waits for a phase acquires
    arriving: Token = field(default_factory=Token)
    completed: Token = field(default_factory=Token)
    #: the column of the race detector's clocks that copies into shared memory belong to
    column: int = -1


def find_barrier(state: State, warp: int, place: int, block: int | None = None) -> Barrier:
    """The barrier at a shared address of a warp's block, or of another of its cluster. Faults where there is none."""
    own = int(state.block[warp])
    block = own if block is None else block
    barrier = state.launch.barriers.get((block, place))
    if barrier is None:
        state.fault(f"no mbarrier has been initialised at {place}", warp=warp)
    if block != own:
        if not barrier.known_from or state.launch.cluster_phase(own) < barrier.known_from:
            state.fault(
                f"the mbarrier at {place} of another block was initialised with no barrier of the cluster between",
                warp=warp,
            )
        return barrier
    if not barrier.shared and barrier.owner != warp:
        state.fault(
            f"the mbarrier at {place} was initialised by {state.name(barrier.owner)}, with no barrier between",
            warp=warp,
        )
    return barrier


def publish(state: State, block: int) -> None:
    """A barrier of any kind has let warps of a block go on: what was done before it is known to them.

    Coarse: warps that did not take part are not told apart.
    """
    state.launch.shared.publish(block)
    for (owner, _), barrier in state.launch.barriers.items():
        if owner == block:
            barrier.shared = True


def change(state: State, block: int, barrier: Barrier, arrivals: int = 0, tx: int = 0, warp: int | None = None) -> None:
    """``arrivals`` arrive and the transaction count grows by ``tx``; completes the phase if nothing is left."""
    state.launch.effects += 1
    barrier.tx += tx
    if abs(barrier.tx) > _MAX_TX:
        state.fault(f"the transaction count of an mbarrier overflows: {barrier.tx}", warp=warp)
    if arrivals > barrier.pending:
        state.fault(
            f"{arrivals} arrivals at an mbarrier that waits for {barrier.pending} more in this phase "
            f"(of {barrier.expected})",
            warp=warp,
        )
    barrier.pending -= arrivals
    if barrier.pending == 0 and barrier.tx == 0:
        barrier.phase += 1
        barrier.pending = barrier.expected
        publish(state, block)
        _release(state, block, barrier)
        for waiter, lanes in barrier.waiting:
            state.wake(waiter, lanes)
            state.launch.waits.pop(waiter, None)
        barrier.waiting.clear()


def _release(state: State, block: int, barrier: Barrier) -> None:
    """A phase has completed: what its arrivals know, and its copies, are known to those who see that."""
    ordering = state.launch.ordering
    if ordering is None:
        return
    barrier.completed.join(barrier.arriving)
    if barrier.column >= 0:
        barrier.completed.join(ordering.team.column_token(block, barrier.column, barrier.phase))


def landed(state: State, block: int, barrier: Barrier, records: list[int]) -> None:
    """Copies that count at the barrier have landed: they are behind its present phase."""
    ordering = state.launch.ordering
    if ordering is None:
        return
    if barrier.column < 0:
        barrier.column = ordering.team.column(block)
    ordering.team.settle(records, column=barrier.column, time=barrier.phase + 1, block=block)


def _place(inst: Instruction, position: int) -> Callable[[State], Array]:
    """The shared address of an mbarrier operand; generic addresses are translated."""
    space = inst.one_of("shared", "shared::cta", "shared::cluster", default="")
    where = address(inst, inst.operands[position])

    def read(state: State) -> Array:
        at = np.broadcast_to(where(state), state.lanes.shape)
        state.require_defined("the address of an mbarrier")
        at = at if space else at - SHARED_WINDOW
        bad = ((at & 7) != 0) & state.lanes
        if bad.any():
            state.fault("misaligned mbarrier: it has 8 bytes", bad)
        return at

    return read


def _qualifiers(inst: Instruction) -> bool:
    """Take the order, the scope and the type. Whether the operation orders memory: it does unless .relaxed."""
    order = inst.one_of("release", "acquire", "relaxed", default="")
    inst.one_of("cta", "cluster", default="")
    inst.type("b64")
    return order != "relaxed"


def _each(state: State) -> list[tuple[int, int, int]]:
    """(row, warp, lane) of every active lane."""
    warps = state.selected().tolist()
    rows, lanes = np.nonzero(state.lanes)
    return [(row, warps[row], lane) for row, lane in zip(rows.tolist(), lanes.tolist(), strict=True)]


@instruction("mbarrier.init", ends_run=True)
def _init(inst: Instruction) -> Execute:
    where, count = _place(inst, 0), source(inst, inst.operands[1], "u32")
    inst.type("b64")

    def execute(state: State) -> None:
        at, counts = where(state), np.broadcast_to(count(state), state.lanes.shape)
        state.require_defined("the count of an mbarrier")
        shared = state.launch.shared
        for row, warp, lane in _each(state):
            place, number, block = int(at[row, lane]), int(counts[row, lane]), int(state.block[warp])
            if not shared.first <= place <= shared.size - 8:
                state.fault(f"an mbarrier outside shared memory, at {place}", warp=warp)
            if not 1 <= number <= _MAX_COUNT:
                state.fault(f"an mbarrier cannot count {number} arrivals", warp=warp)
            if (block, place) in state.launch.barriers:
                state.fault(f"the mbarrier at {place} is initialised a second time", warp=warp)
            state.launch.barriers[block, place] = Barrier(number, number, owner=warp)
            shared.barrier[block, place // 4 : place // 4 + 2] = True
            shared.barriers_exist = True

    return execute


@instruction("mbarrier.inval", ends_run=True)
def _invalidate(inst: Instruction) -> Execute:
    where = _place(inst, 0)
    inst.type("b64")

    def execute(state: State) -> None:
        at = where(state)
        for row, warp, lane in _each(state):
            place, block = int(at[row, lane]), int(state.block[warp])
            if find_barrier(state, warp, place).waiting:
                state.fault("an mbarrier is invalidated while warps wait for it", warp=warp)
            del state.launch.barriers[block, place]
            state.launch.shared.barrier[block, place // 4 : place // 4 + 2] = False

    return execute


@instruction("mbarrier.expect_tx", "mbarrier.complete_tx", ends_run=True)
def _transactions(inst: Instruction) -> Execute:
    sign = 1 if inst.name.endswith("expect_tx") else -1
    where, count = _place(inst, 0), source(inst, inst.operands[1], "u32")
    _qualifiers(inst)

    def execute(state: State) -> None:
        at, counts = where(state), np.broadcast_to(count(state), state.lanes.shape)
        state.require_defined("a transaction count")
        for row, warp, lane in _each(state):
            barrier = find_barrier(state, warp, int(at[row, lane]))
            change(state, int(state.block[warp]), barrier, 0, sign * int(counts[row, lane]), warp)

    return execute


@instruction("mbarrier.arrive", "mbarrier.arrive_drop", ends_run=True)
def _arrive(inst: Instruction) -> Execute:
    """{state|_,} [address]{, count}; .expect_tx first adds to the transaction count (9.7.12.15.13).

    At a shared::cluster address the barrier may be another block's.
    """
    expects, drops = inst.flag("expect_tx"), inst.name.endswith("drop")
    inst.flag("noComplete")
    first = 0 if _is_memory(inst.operands[0]) else 1
    write = dest(inst, inst.operands[0], "b64") if first else None
    where = _place(inst, first)
    count = source(inst, inst.operands[first + 1], "u32") if len(inst.operands) > first + 1 else None
    releases = _qualifiers(inst)

    def execute(state: State) -> None:
        at = where(state)
        counts = None if count is None else np.broadcast_to(count(state), state.lanes.shape)
        state.require_defined("an mbarrier's count")
        if releases:
            _release_lanes(state, at)
        token = np.zeros(state.lanes.shape, np.uint64)
        for row, warp, lane in _each(state):
            block, place = locate(state, warp, int(at[row, lane]))
            barrier = find_barrier(state, warp, place, block)
            number = 1 if counts is None else int(counts[row, lane])
            token[row, lane] = barrier.phase << 20 | barrier.pending
            arrivals = 1 if expects else number
            if expects:
                barrier.tx += number
            if drops:
                barrier.expected -= arrivals
            change(state, block, barrier, arrivals, 0, warp)
        if write is not None:
            write(state, token)

    return execute


def _release_lanes(state: State, at: Array) -> None:
    """The active lanes release what they know to the barriers at which they arrive."""
    ordering = state.launch.ordering
    if ordering is None:
        return
    for row, warp in enumerate(state.selected().tolist()):
        for place in set(at[row, state.lanes[row]].tolist()):
            block, own = locate(state, warp, place)
            barrier = find_barrier(state, warp, own, block)
            barrier.arriving.join(ordering.team.release(warp, state.lanes[row] & (at[row] == place)))


def _is_memory(operand: object) -> bool:
    return type(operand).__name__ == "Memory"


@instruction("mbarrier.pending_count")
def _pending_count(inst: Instruction) -> Execute:
    inst.type("b64")
    write, read = dest(inst, inst.operands[0], "u32"), source(inst, inst.operands[1], "b64")
    return lambda state: write(state, (read(state) & np.uint64(_MAX_COUNT)).astype(np.uint32))


@instruction("mbarrier.test_wait", "mbarrier.try_wait", ends_run=True)
def _wait(inst: Instruction) -> Execute:
    """p, [address], state or parity{, time limit}: whether that phase has completed."""
    suspends, parity = inst.name.endswith("try_wait"), inst.flag("parity")
    write = dest(inst, inst.operands[0], "pred")
    where = _place(inst, 1)
    what = source(inst, inst.operands[2], "u32" if parity else "b64")
    acquires = _qualifiers(inst)
    if not suspends and len(inst.operands) != 3:
        raise Problem("takes 3 operands")

    def complete(state: State, barrier: Barrier, value: int, warp: int) -> bool:
        if parity:
            if value > 1:
                state.fault(f"the phase parity {value} is neither 0 nor 1", warp=warp)
            return barrier.phase & 1 != value
        return barrier.phase != value >> 20

    def execute(state: State) -> None:
        at, values = where(state), np.broadcast_to(what(state), state.lanes.shape)
        state.require_defined("the phase of an mbarrier")
        done = np.zeros(state.lanes.shape, np.bool_)
        proceed = state.lanes.copy()
        for row, warp in enumerate(state.selected().tolist()):
            lanes = np.nonzero(state.lanes[row])[0]
            if not lanes.size:
                continue
            places, wanted = at[row, lanes], values[row, lanes]
            if (places == places[0]).all() and (wanted == wanted[0]).all():
                barrier = find_barrier(state, warp, int(places[0]))
                done[row] = complete(state, barrier, int(wanted[0]), warp)
                if acquires and done[row, 0] and state.launch.ordering is not None:
                    state.launch.ordering.team.acquire(warp, barrier.completed, state.lanes[row])
            else:
                for lane in lanes.tolist():
                    barrier = find_barrier(state, warp, int(at[row, lane]))
                    done[row, lane] = complete(state, barrier, int(values[row, lane]), warp)
                    if acquires and done[row, lane] and state.launch.ordering is not None:
                        state.launch.ordering.team.acquire(warp, barrier.completed, lane)
            if done[row, lanes].any():
                continue
            if suspends:
                _suspend(state, row, warp, {int(p) for p in places})
                proceed[row] = False
            else:
                state.launch.yielded.add(warp)
        with state.restricted(proceed):
            if proceed.any():
                write(state, done)

    return execute


def _suspend(state: State, row: int, warp: int, places: set[int]) -> None:
    """Block the warp's active lanes at the instruction, until one of the barriers completes a phase."""
    lanes = state.lanes[row].copy()
    state.pc[warp, lanes] -= 1
    state.blocked[warp] |= lanes
    barriers = {place: find_barrier(state, warp, place) for place in sorted(places)}
    for barrier in barriers.values():
        barrier.waiting.append((warp, lanes))

    def describe() -> str:
        return " or ".join(
            f"the mbarrier at {place} (phase {barrier.phase}, {barrier.pending} of {barrier.expected} arrivals and "
            f"{barrier.tx} bytes missing)"
            for place, barrier in barriers.items()
        )

    state.launch.waits[warp] = describe


__all__ = ["LANES", "Barrier", "change", "find_barrier"]
