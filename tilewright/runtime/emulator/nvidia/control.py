"""Control flow, barriers, fences, registers (PTX ISA 9.7.11, 9.7.12.1 to 9.7.12.4, 9.7.18, 9.7.19).

Control handlers find the program counters of their active lanes already moved on; they change them,
or block the lanes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.runtime.emulator.memory import BASE
from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.clusters import complete
from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.launch import NamedBarrier
from tilewright.runtime.emulator.nvidia.mbarrier import publish
from tilewright.runtime.emulator.nvidia.operands import address, dest, integer, source
from tilewright.runtime.emulator.nvidia.ordering import ASYNC_GLOBAL, ASYNC_SHARED, SCOPES
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.spaces import LOCAL_WINDOW
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import LANES, TYPES

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.launch import Launch

_BARRIERS = 16


@instruction("bra", ends_run=True)
def _branch(inst: Instruction) -> Execute:
    inst.flag("uni")
    (target,) = inst.operands
    if not isinstance(target, syntax.Name) or target.text not in inst.kernel.labels:
        raise Problem("unknown label")
    destination = inst.kernel.labels[target.text]

    def execute(state: State) -> None:
        if state.full:
            state.pc[state.w] = destination
        else:
            state.pc[state.w] = np.where(state.lanes, destination, state.pc[state.w])

    return execute


@instruction("ret", "exit", ends_run=True)
def _exit(inst: Instruction) -> Execute:
    inst.flag("uni")

    def execute(state: State) -> None:
        state.exited[state.w] |= state.lanes
        state.launch.effects += 1
        ended = state.exited[state.w].all(axis=1)
        for warp in state.selected()[ended]:
            _warp_ended(state, int(warp))

    return execute


def _warp_ended(state: State, warp: int) -> None:
    """A warp has ended: its products must be done, and with the last one all copies to and from shared memory."""
    launch = state.launch
    leader = warp - int(state.rank[warp]) % 4
    if any(launch.products.get(leader, [])):
        state.fault("the warp ends while a wgmma is in flight", warp=warp)
    block = int(state.block[warp])
    complete(state, block // launch.cluster)
    of_block = slice(block * state.warps_per_block, (block + 1) * state.warps_per_block)
    if not state.exited[of_block].all():
        return
    if launch.ordering is not None:
        launch.ordering.grid_awaited(state, of_block, warp)
    for work in launch.copies:
        if work.block == block:
            state.instruction = work.instruction
            state.fault("the block ends while a copy into its shared memory is in flight", warp=warp)
    for (owner, _), groups in launch.stores.items():
        for store in (s for group in groups for s in group):
            if state.block[owner] == block and not store.waited_reading:
                state.instruction = store.instruction
                state.fault("the block ends while a bulk copy still reads its shared memory", warp=owner)


@instruction("trap", ends_run=True)
def _trap(inst: Instruction) -> Execute:
    return lambda state: state.fault("the kernel trapped")


@instruction("griddepcontrol.wait")
def _await_grid(inst: Instruction) -> Execute:
    """Launches come one after the other; the race detector notes who has waited for the one before (9.7.13.13)."""

    def execute(state: State) -> None:
        if state.launch.ordering is not None:
            state.launch.ordering.await_grid(state)

    return execute


@instruction("brkpt", "pmevent", "griddepcontrol.launch_dependents")
def _nothing(inst: Instruction) -> Execute:
    inst.modifiers.clear()
    return lambda state: None


@instruction("nanosleep", ends_run=True)
def _sleep(inst: Instruction) -> Execute:
    inst.type("u32")

    def execute(state: State) -> None:
        state.launch.yielded.update(int(w) for w in state.selected())

    return execute


# --- fences ----------------------------------------------------------------------------------------


def _acquire_maps(inst: Instruction) -> Execute:
    """What lies at an address is known to be a tensor map, in the block of the thread."""
    place = address(inst, inst.operands[0])

    def execute(state: State) -> None:
        found = np.broadcast_to(place(state), state.lanes.shape)
        for row, warp in enumerate(state.selected().tolist()):
            block = int(state.block[warp])
            state.launch.acquired_maps.update((block, int(at)) for at in found[row][state.lanes[row]])

    return execute


@instruction("fence", "membar")
def _fence(inst: Instruction) -> Execute:
    """Memory is coherent here at all times: fences matter to the checks alone."""
    words, inst.modifiers = inst.modifiers, []
    known = {
        "sc", "acq_rel", "acquire", "release", "relaxed", "cta", "cluster", "gpu", "sys", "gl", "proxy", "alias",
        "async", "async::generic", "global", "shared::cta", "shared::cluster", "mbarrier_init",
        "sync_restrict::shared::cta", "sync_restrict::shared::cluster", "tensormap::generic",
    }  # fmt: skip
    for word in words:
        if word not in known:
            raise Problem(f"the modifier .{word} is not implemented")
    if "mbarrier_init" in words:
        return _publish_barriers
    if "tensormap::generic" in words and "acquire" in words:
        return _acquire_maps(inst)
    if "proxy" in words:
        return _proxy_fence(words) if "async" in words else lambda state: None
    scope = SCOPES[next((word for word in words if word in SCOPES), "sys")]

    def execute(state: State) -> None:
        if state.launch.ordering is not None:
            state.launch.ordering.fence(state, scope)

    return execute


def _proxy_fence(words: Sequence[str]) -> Execute:
    """fence.proxy.async, of all memory or of one state space."""
    spaces = {word.partition("::")[0] for word in words} & {"shared", "global"} or {"shared", "global"}
    proxies = [number for space, number in (("shared", ASYNC_SHARED), ("global", ASYNC_GLOBAL)) if space in spaces]

    def execute(state: State) -> None:
        if state.launch.ordering is not None:
            state.launch.ordering.proxy_fence(state, proxies)
        if "shared" in spaces:
            state.launch.shared.fence(state)
            _publish_barriers(state)

    return execute


def _publish_barriers(state: State) -> None:
    """Initialised mbarriers become visible to the async proxy (9.7.12.4, fence.mbarrier_init and fence.proxy.async)."""
    blocks = {int(b) for b in state.selected_blocks()[state.lanes.any(axis=1)]}
    for (block, _), barrier in state.launch.barriers.items():
        if block in blocks:
            barrier.published = True


# --- named barriers --------------------------------------------------------------------------------


@instruction(
    "bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync", "bar.arrive", "bar.cta.arrive", "barrier.arrive",
    "barrier.cta.arrive", "bar.red", "bar.cta.red", "barrier.red", "barrier.cta.red", ends_run=True, gathers="warp",
)  # fmt: skip
def _barrier(inst: Instruction) -> Execute:
    """bar.sync a{, b}; bar.arrive a, b; bar.red.op d, a{, b}, {!}c. Every warp counts as 32 threads."""
    inst.flag("aligned")
    kind = inst.name.rpartition(".")[2]
    operands = list(inst.operands)
    deliver: Callable[[State, int, int], None] | None = None
    predicate = None
    if kind == "red":
        deliver = _reduction(inst, operands.pop(0))
        predicate = source(inst, operands.pop(), "pred")
    number = source(inst, operands[0], "u32")
    count = source(inst, operands[1], "u32") if len(operands) > 1 else None

    def execute(state: State) -> None:
        numbers = np.broadcast_to(number(state), state.lanes.shape)
        counts = None if count is None else np.broadcast_to(count(state), state.lanes.shape)
        holds = None if predicate is None else np.broadcast_to(predicate(state), state.lanes.shape) & state.lanes
        state.require_defined("a barrier's operand")
        lanes = state.lanes.copy()
        for row, warp in enumerate(state.selected().tolist()):
            if not lanes[row].any():
                continue
            lane = int(lanes[row].argmax())
            expected = state.warps_per_block * LANES if counts is None else int(counts[row, lane])
            barrier = _arrive(state, warp, int(numbers[row, lane]), expected)
            if state.launch.ordering is not None:
                barrier.token.join(state.launch.ordering.team.release(warp, lanes[row]))
            if holds is not None and deliver is not None:
                barrier.held += int(holds[row].sum())
                barrier.total += int(lanes[row].sum())
                barrier.deliver.append((warp, lanes[row], deliver))
            if kind != "arrive":
                barrier.waiting.append((warp, lanes[row]))
                state.blocked[warp] |= lanes[row]
                state.launch.waits[warp] = f"barrier {int(numbers[row, lane])}"
            if barrier.arrived == barrier.expected:
                _release(state, int(state.block[warp]), int(numbers[row, lane]), barrier)

    return execute


def _arrive(state: State, warp: int, number: int, expected: int) -> NamedBarrier:
    if not 0 <= number < _BARRIERS:
        state.fault(f"there is no barrier {number}: a block has {_BARRIERS}", warp=warp)
    if expected % LANES or not 0 < expected <= state.warps_per_block * LANES:
        state.fault(
            f"barrier {number} cannot wait for {expected} threads of {state.warps_per_block * LANES}", warp=warp
        )
    barrier = state.launch.named.setdefault((int(state.block[warp]), number), NamedBarrier())
    if barrier.arrived and barrier.expected != expected:
        state.fault(f"barrier {number} expects {barrier.expected} threads, this warp says {expected}", warp=warp)
    if any(waiter == warp for waiter, _ in barrier.waiting):
        state.fault(f"the warp arrives twice at barrier {number}", warp=warp)
    barrier.expected = expected
    barrier.arrived += LANES
    state.launch.effects += 1
    return barrier


def _release(state: State, block: int, number: int, barrier: NamedBarrier) -> None:
    del state.launch.named[block, number]
    publish(state, block)
    for warp, lanes in barrier.waiting:
        state.wake(warp, lanes)
        state.launch.waits.pop(warp, None)
        if state.launch.ordering is not None:
            state.launch.ordering.team.acquire(warp, barrier.token, lanes)
    before = state.w, state.count, state.lanes, state.full, state.mask
    for warp, lanes, deliver in barrier.deliver:
        state.select(np.array([warp]), lanes[None])
        deliver(state, barrier.held, barrier.total)
    state.w, state.count, state.lanes, state.full, state.mask = before


def _reduction(inst: Instruction, destination: syntax.Operand) -> Callable[[State, int, int], None]:
    operation = inst.one_of("popc", "and", "or")
    write = dest(inst, destination, inst.type("u32", "pred"))

    def deliver(state: State, held: int, total: int) -> None:
        value: Any = np.uint32(held) if operation == "popc" else np.bool_(held == total if operation == "and" else held)
        write(state, np.full((1, 1), value))

    return deliver


# --- registers -------------------------------------------------------------------------------------


@instruction("setmaxnreg.inc", "setmaxnreg.dec", ends_run=True, gathers="warpgroup")
def _set_max_registers(inst: Instruction) -> Execute:
    """Hand registers to the block's pool, or wait for them (9.7.19.5)."""
    inst.flag("sync"), inst.flag("aligned")
    inst.type("u32")
    count = integer(inst.operands[0])
    if not 24 <= count <= 256 or count % 8:
        raise Problem(f"{count} registers: must be a multiple of 8 from 24 to 256")
    increases = inst.name.endswith("inc")

    def execute(state: State) -> None:
        launch = state.launch
        for row, warp in enumerate(state.selected().tolist()):
            now, block = launch.registers[warp], int(state.block[warp])
            if increases and count < now:
                state.fault(f"setmaxnreg.inc to {count} of a warp that has {now} registers a thread", warp=warp)
            if not increases and count > now:
                state.fault(f"setmaxnreg.dec to {count} of a warp that has {now} registers a thread", warp=warp)
            if increases and launch.free_registers[block] < count - now:
                state.blocked[warp] |= state.lanes[row]
                launch.register_waiters.append((warp, state.lanes[row].copy(), count))
                launch.waits[warp] = f"{count - now} registers a thread (setmaxnreg)"
                continue
            launch.free_registers[block] += now - count
            launch.registers[warp] = count
        _grant_registers(state, launch)

    return execute


def _grant_registers(state: State, launch: Launch) -> None:
    left = []
    for warp, lanes, count in launch.register_waiters:
        block, now = int(state.block[warp]), launch.registers[warp]
        if launch.free_registers[block] >= count - now:
            launch.free_registers[block] -= count - now
            launch.registers[warp] = count
            state.wake(warp, lanes)
            launch.waits.pop(warp, None)
        else:
            left.append((warp, lanes, count))
    launch.register_waiters = left


# --- calls -----------------------------------------------------------------------------------------


@instruction("call", ends_run=True)
def _call(inst: Instruction) -> Execute:
    """The functions that the driver brings: vprintf and __assertfail (CUDA C++ Programming Guide)."""
    inst.flag("uni")
    operands = list(inst.operands)
    result = operands.pop(0) if isinstance(operands[0], syntax.Group) else None
    function = operands[0]
    name = function.text if isinstance(function, syntax.Name) else ""
    arguments = operands[1].parts if len(operands) > 1 and isinstance(operands[1], syntax.Group) else ()
    places = []
    for argument in arguments:
        text = argument.text if isinstance(argument, syntax.Name) else ""
        if text not in inst.kernel.local_offsets:
            raise Problem(f"argument {text} is no parameter of the call")
        places.append(inst.kernel.local_offsets[text])
    if name == "vprintf":
        first = result.parts[0] if isinstance(result, syntax.Group) else None
        where = inst.kernel.local_offsets.get(first.text) if isinstance(first, syntax.Name) else None
        return lambda state: _print(state, places[0], places[1], where)
    if name == "__assertfail":
        return lambda state: _assert_fails(state, places)
    raise Problem(f"a call of {name}, which the emulator does not know")


def _local(state: State, thread: int, offset: int, size: int) -> int:
    start = thread * state.launch.kernel.local_bytes + offset
    return int.from_bytes(state.launch.local[start : start + size].tobytes(), "little")


def _read_bytes(state: State, thread: int, address: int, size: int) -> bytes:
    if LOCAL_WINDOW <= address < LOCAL_WINDOW + (1 << 24):
        start = thread * state.launch.kernel.local_bytes + address - LOCAL_WINDOW
        return state.launch.local[start : start + size].tobytes()
    start = address - BASE
    return state.launch.memory.data[start : start + size].tobytes()


def _text(state: State, thread: int, address: int) -> str:
    data = _read_bytes(state, thread, address, 4096)
    return data[: data.find(b"\0")].decode(errors="replace")


_DIRECTIVE = re.compile(r"%[-+ #0]*\d*(?:\.\d+)?(hh|h|ll|l)?([diouxXcspfFeEgGaA%])")


def format_text(text: str, fetch: Callable[[int], bytes], string: Callable[[int], str]) -> str:
    """printf's formatting; ``fetch(size)`` gives the next argument, aligned to its size."""

    def replace(match: re.Match[str]) -> str:
        length, kind = match[1] or "", match[2]
        directive = match[0].replace(length, "") if length else match[0]
        if kind == "%":
            return "%"
        if kind in "fFeEgGaA":
            value = float(np.frombuffer(fetch(8), np.float64)[0])
            return value.hex() if kind in "aA" else directive % value
        if kind == "s":
            return directive % string(int.from_bytes(fetch(8), "little"))
        if kind == "p":
            return hex(int.from_bytes(fetch(8), "little"))
        size = 8 if length in ("l", "ll") else 4
        number = int.from_bytes(fetch(size), "little", signed=kind in "di")
        return directive.replace("u", "d").replace("i", "d") % number

    return _DIRECTIVE.sub(replace, text)


def _print(state: State, format_place: int, arguments_place: int, result: int | None) -> None:
    for row, warp in enumerate(state.selected().tolist()):
        for lane in np.nonzero(state.lanes[row])[0].tolist():
            thread = warp * LANES + lane
            text = _text(state, thread, _local(state, thread, format_place, 8))
            state.launch.statistics.printed.append(
                _formatted(state, thread, text, _local(state, thread, arguments_place, 8))
            )
            if result is not None:
                start = thread * state.launch.kernel.local_bytes + result
                state.launch.local[start : start + 4] = 0
                state.launch.local_written[start : start + 4] = True


def _formatted(state: State, thread: int, text: str, buffer: int) -> str:
    at = 0

    def fetch(size: int) -> bytes:
        nonlocal at
        at = -(-at // size) * size
        data = _read_bytes(state, thread, buffer + at, size)
        at += size
        return data

    return format_text(text, fetch, lambda address: _text(state, thread, address))


def _assert_fails(state: State, places: list[int]) -> None:
    row = int(state.lanes.any(axis=1).argmax())
    thread = int(state.selected()[row]) * LANES + int(state.lanes[row].argmax())
    message, file = (_text(state, thread, _local(state, thread, places[i], 8)) for i in (0, 1))
    line = _local(state, thread, places[2], 4)
    state.fault(f"assertion failed at {file}:{line}: {message}")


__all__ = ["TYPES"]
