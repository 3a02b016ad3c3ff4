"""Rules of the scheduled asynchronous code (``async.*``), with the completion times of the worst machine.

- A copy lands when somebody waits for it, no sooner; from its issue until then its slot holds poison, and reading
  the slot is an error. A bulk store reads its slot and writes its tile at the latest moment that the waits allow.
- A slot may be read by the thread that wrote it, that awaited the stage it was published with, or, after a block
  barrier, by all. After a release it may not.
- A dot's accumulator is computed at once but marked in flight; the slots that a dot in flight reads can be neither
  released nor overwritten.
- A slot may be overwritten by a thread that knows of the releases of its last use, through the ring (acquire) or
  through other waits; that the releases happen to have happened is not enough.
- A ring counts arrivals per use (not per parity): publishing a stage that is not free, releasing one that was not
  awaited, and arriving more often than declared are errors. One release by a role stands for all arrivals of the
  role, see `_weight`.

Roles run one at a time, each until it blocks, in the order of the text; when all are blocked, that is a deadlock.
The blocks of a cluster run in turns in the same way. What several of them copy is there when all have made their part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from random import Random
from typing import Any

import numpy as np

from tilewright.ir import async_ops as a
from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir.core import UNKNOWN, Function, IRError, Operation, Value
from tilewright.ir.interpreter_machine import (
    Blocked,
    Frame,
    InFlight,
    Program,
    Steps,
    Thread,
    Trap,
    View,
    await_condition,
    fault,
    rule,
    run_region,
)
from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.interpreter_shared import (
    BarrierState,
    Buffer,
    BulkStore,
    CopyInFlight,
    DotGroup,
    Phase,
    Ring,
    SharedCopy,
    SlotRef,
    SlotState,
    join,
    knows,
    signal,
)
from tilewright.ir.types import BufferType, RingType, SlotType

# --- arrivals -------------------------------------------------------------------------------

Users = tuple[list[Operation | None], list[Operation | None]]


def ring_users(function: Function) -> dict[Value, Users]:
    """For each ring, the roles that publish and that release it (None: code outside roles)."""
    users: dict[Value, Users] = {}
    for top in function.body.block.ops:
        role = top if isinstance(top, a.Role) else None
        for op in top.walk():
            if isinstance(op, a.Publish | a.Release):
                names = users.setdefault(op.ring, ([], []))[isinstance(op, a.Release)]
                if role not in names:
                    names.append(role)
    return users


def _weights(roles: Sequence[Operation | None], arrivals: int | Fraction) -> dict[Operation | None, Fraction]:
    """How many of a phase's arrivals one operation of each role stands for.

    The IR counts arrivals but does not say who makes them: one thread, warp or warpgroup of a role. The unit is
    the one for which the roles' arrivals add up to the phase's (all roles take part in each use), or else equal it
    one by one (roles take turns). Where no unit fits, all take part evenly.
    """
    choices = [{role: Fraction(unit(role)) for role in roles} for unit in _UNITS]
    for weights in choices:
        if sum(weights.values()) == arrivals:
            return weights
    for weights in choices:
        if all(weight == arrivals for weight in weights.values()):
            return weights
    return {role: Fraction(arrivals) / len(roles) for role in roles}


def _warps(role: Operation | None) -> int:
    return role.warps if isinstance(role, a.Role) and not role.single_thread else 1


def _warpgroups(role: Operation | None) -> int:
    return max(1, _warps(role) // 4)


_UNITS: tuple[Callable[[Operation | None], int], ...] = (
    _warpgroups, _warps, lambda role: 32 * _warps(role), lambda role: 1
)  # fmt: skip


# --- buffers and rings ------------------------------------------------------------------------

#: what buffers and rings wait for in clusters, where other blocks reach them
_OTHERS = "the other blocks of the cluster to make theirs"


@rule(a.Alloc)
def _alloc(frame: Frame, op: a.Alloc) -> Steps:
    type_ = op.result.type
    assert isinstance(type_, BufferType)
    shape = (type_.stages, *type_.slot.shape)
    memory = np.full(shape, numerics.poison(type_.slot.dtype), NUMPY[type_.slot.dtype])
    label = f"%{op.result.hint}" if op.result.hint else "a buffer"
    buffer = Buffer([SlotState(f"slot {i} of {label}", memory[i]) for i in range(type_.stages)])
    frame.program.slots += buffer.slots
    if op.ring is not None:
        frame.read(op.ring).buffers.append(buffer)
    frame.program.buffers[op.result] = buffer
    yield from await_condition(lambda: all(op.result in peer.buffers for peer in frame.program.peers), op, _OTHERS)
    return buffer


@rule(a.MakeRing)
def _ring(frame: Frame, op: a.MakeRing) -> Steps:
    type_, peers = op.result.type, frame.program.peers
    assert isinstance(type_, RingType)
    if op.ctas not in (1, len(peers)):
        raise Trap(f"{op.ctas} blocks use the ring in step, but the cluster has {max(1, len(peers))}")
    publishers, releasers = frame.program.ring_users.get(op.result, ([], []))
    ring = Ring(
        f"%{op.result.hint}" if op.result.hint else "the ring", type_.stages, op.producers, op.consumers,
        _weights(publishers, op.producers), _weights(releasers, Fraction(op.consumers, op.ctas)),
    )  # fmt: skip
    frame.program.rings[op.result] = ring
    yield from await_condition(lambda: all(op.result in peer.rings for peer in peers), op, _OTHERS)
    return ring


@rule(a.Slot)
def _slot(frame: Frame, op: a.Slot) -> SlotRef:
    buffer, count = frame.read(op.buffer), int(frame.read(op.count))
    state = buffer.slots[count % len(buffer.slots)]
    return SlotRef(state, state.array)


@rule(a.TransposeSlot)
def _transpose_slot(frame: Frame, op: a.TransposeSlot) -> SlotRef:
    ref = frame.read(op.slot)
    return SlotRef(ref.state, ref.array.transpose(op.perm))


@rule(a.Acquire)
def _acquire(frame: Frame, op: a.Acquire) -> Steps:
    ring, count = _use(frame, op)
    text = f"stage {count % ring.stages} of {ring.label} to be released (use {count - ring.stages})"
    yield from await_condition(lambda: ring.is_free(count), op, text)
    if count >= ring.stages:
        join(frame.thread.clock, ring.phase(count - ring.stages).release_clock)


@rule(a.Publish)
def _publish(frame: Frame, op: a.Publish) -> None:
    ring, count = _use(frame, op)
    if not ring.is_free(count):
        raise Trap(f"use {count} of {ring.label} is published, but use {count - ring.stages} is not released")
    phase, copies = ring.phase(count), frame.reads(op.tokens)
    if not all(isinstance(copy, CopyInFlight) for copy in copies):
        raise Trap("only tokens of async.copy can be published")
    phase.published += ring.publishers.get(frame.thread.role, Fraction(1))
    if phase.published > ring.producers:
        raise Trap(f"use {count} of {ring.label} is published more often than its {ring.producers} arrivals")
    phase.copies += copies
    stage = count % ring.stages
    covered = [*(b.slots[stage] for b in ring.buffers), *(c.ref.state for c in copies), *frame.thread.writes]
    phase.slots = list(dict.fromkeys([*phase.slots, *covered]))
    for slot in covered:
        slot.phase = phase
    signal(frame.thread, phase.publish_clock)
    frame.thread.writes.clear()


@rule(a.Await)
def _await(frame: Frame, op: a.Await) -> Steps:
    ring, count = _use(frame, op)
    text = f"stage {count % ring.stages} of {ring.label} to be published (use {count})"
    yield from await_condition(lambda: ring.is_full(count), op, text)
    phase = ring.phase(count)
    if phase.is_released:
        raise Trap(f"use {count} of {ring.label} is awaited after its release")
    phase.awaited.add(frame.thread)
    join(frame.thread.clock, phase.publish_clock)
    for copy in phase.copies:
        copy.land()
    for slot in phase.slots:
        slot.visible.add(frame.thread)


@rule(a.Release)
def _release(frame: Frame, op: a.Release) -> None:
    ring, count = _use(frame, op)
    phase = ring.phase(count)
    if frame.thread not in phase.awaited:
        raise Trap(f"use {count} of {ring.label} is released by {frame.thread.name}, which did not await it")
    for slot in phase.slots:
        _require_unread(slot, "is released", frame.thread)
        slot.visible.discard(frame.thread)
    signal(frame.thread, phase.release_clock)
    for other in _in_step(frame.program, op):
        phase = other.phase(count)
        phase.released += ring.releasers.get(frame.thread.role, Fraction(1))
        if phase.released > ring.consumers:
            raise Trap(f"use {count} of {ring.label} is released more often than its {ring.consumers} arrivals")
        join(phase.release_clock, frame.thread.clock)


def _in_step(program: Program, op: a.Release) -> list[Ring]:
    """The rings at whose barriers a release arrives."""
    if not isinstance(op.ring.op, a.MakeRing) or op.ring.op.ctas == 1:
        return [program.rings[op.ring]]
    return [peer.rings[op.ring] for peer in _alive(program)]


def _alive(program: Program) -> list[Program]:
    """The blocks of the cluster. Trap where one has ended and with it its shared memory."""
    for rank, peer in enumerate(program.peers):
        if peer.ended:
            raise Trap(f"reaches the shared memory of block {rank} of the cluster, which has ended")
    return program.peers


def _use(frame: Frame, op: Any) -> tuple[Ring, int]:
    return frame.read(op.ring), int(frame.read(op.count))


# --- slots ------------------------------------------------------------------------------------


def read_slot(frame: Frame, ref: SlotRef) -> np.ndarray:
    """The contents, after checks that this thread may look at them."""
    state = ref.state
    if state.copy is not None:
        raise Trap(f"{state.label} is read while a copy into it is in flight")
    if not state.written:
        raise Trap(f"{state.label} is read, but nothing was written to it")
    if frame.thread not in state.visible:
        raise Trap(
            f"{state.label} is read by {frame.thread.name}, which holds no stage of it (await before, release after)"
        )
    return ref.array


def tile_or_slot(frame: Frame, value: Value) -> np.ndarray:
    """The elements of a tile, or of a slot that may be read."""
    found = frame.read(value)
    return read_slot(frame, found) if isinstance(found, SlotRef) else found


def _require_unread(slot: SlotState, what: str, thread: Thread | None = None) -> None:
    """Trap where an asynchronous read of the slot (by ``thread``, or anybody's) is still in flight."""
    mine = None if thread is None else {*thread.groups, *thread.stores}
    for reader in slot.readers:
        if mine is None or reader in mine:
            name = "dot" if isinstance(reader, DotGroup) else "bulk store"
            raise Trap(f"{slot.label} {what} while a {name} in flight reads it")


def _overwrite(slot: SlotState, thread: Thread) -> None:
    """Check that the thread knows that nobody needs the slot's contents any more, and forget them."""
    if slot.copy is not None:
        raise Trap(f"{slot.label} is overwritten while a copy into it is in flight")
    _require_unread(slot, "is overwritten")
    _require_released(slot, slot.phase, thread)
    slot.visible.clear()


def _require_released(slot: SlotState, last: Phase | None, thread: Thread) -> None:
    """``last``: the use of the ring that the slot's contents were published with."""
    if last is not None and not last.is_released:
        raise Trap(f"{slot.label} is overwritten, but its stage is not released")
    if last is not None and not knows(thread, last.release_clock):
        raise Trap(f"{slot.label} is overwritten by {thread.name}, which did not wait for its release (acquire)")


@rule(a.LocalLoad)
def _local_load(frame: Frame, op: a.LocalLoad) -> np.ndarray:
    contents = read_slot(frame, frame.read(op.slot))
    return contents.copy() if op.at is None else contents[frame.read(op.at)]


@rule(a.LocalStore)
def _local_store(frame: Frame, op: a.LocalStore) -> None:
    ref, value = frame.read(op.slot), frame.read(op.value)
    _overwrite(ref.state, frame.thread)
    ref.array[...] = value
    ref.state.written = True
    ref.state.visible.add(frame.thread)
    frame.thread.writes.append(ref.state)


@rule(a.Copy)
def _copy(frame: Frame, op: a.Copy) -> CopyInFlight:
    ref, view = frame.read(op.slot), frame.read(op.view)
    assert isinstance(op.slot.type, SlotType)
    if op.multicast is not None:
        return _shared_copy(frame, op, ref, view)
    _overwrite(ref.state, frame.thread)
    ref.state.array[...] = numerics.poison(op.slot.type.dtype)
    copy = CopyInFlight(op, ref, view, frame.ints(op.index))
    ref.state.copy = copy
    frame.thread.copies.setdefault(str(op.result.type), []).append(copy)
    return copy


def _shared_copy(frame: Frame, op: a.Copy, ref: SlotRef, view: View) -> CopyInFlight:
    """This block's part of a copy, into the slots of all blocks of the cluster; the copy into its own."""
    program, index, buffer = frame.program, frame.ints(op.index), a.buffer_of(op.slot)
    assert isinstance(op.slot.type, SlotType)
    stage = program.buffers[buffer].slots.index(ref.state)
    for peer in _alive(program):
        slot = peer.buffers[buffer].slots[stage]
        copy = slot.copy
        if copy is None:
            _overwrite(slot, frame.thread)
            slot.array[...] = numerics.poison(op.slot.type.dtype)
            whole = SlotRef(slot, slot.array)
            copy = slot.copy = SharedCopy(op, whole, view, index, blocks=len(program.peers), last=slot.phase)
        elif not isinstance(copy, SharedCopy) or program.rank in copy.parts or copy.op is not op or copy.index != index:
            raise Trap(f"{slot.label} is overwritten while another copy into it is in flight")
        else:
            _require_released(slot, copy.last, frame.thread)
        copy.parts[program.rank] = view, index
    own = ref.state.copy
    assert own is not None
    return own


# --- matrix unit ------------------------------------------------------------------------------


@rule(a.AsyncDot)
def _async_dot(frame: Frame, op: a.AsyncDot) -> list[Any]:
    acc = frame.raw(op.acc)
    if isinstance(acc, InFlight):
        if acc.group not in frame.thread.groups and not acc.group.retired:
            raise Trap("the accumulator is in flight in another thread")
        acc = acc.array
    left, right = (tile_or_slot(frame, v) for v in (op.a, op.b))
    slots = [found.state for found in frame.reads([op.a, op.b]) if isinstance(found, SlotRef)]
    group = DotGroup(slots)
    for slot in slots:
        slot.readers.append(group)
    frame.thread.groups.append(group)
    return [InFlight(numerics.dot(left, right, acc), group), group]


@rule(a.Wait)
def _wait(frame: Frame, op: a.Wait) -> list[Any]:
    token = None if op.token is None else frame.raw(op.token)
    if isinstance(token, CopyInFlight):
        _wait_copies(frame, str(token.op.result.type), op.pending)
    else:
        for group in _older(frame.thread.groups, op.pending):
            group.retire()
    return [_waited(frame.raw(v), op.pending) for v in op.values]


def _waited(value: Any, pending: int) -> Any:
    if not isinstance(value, InFlight):
        return value  # the accumulator that a loop starts with
    if not value.group.retired:
        raise Trap(f"the dot of a value is among the {pending} that may stay in flight")
    return value.array


def _wait_copies(frame: Frame, kind: str, pending: int) -> None:
    for copy in _older(frame.thread.copies[kind], pending):
        copy.land()
        copy.ref.state.visible.add(frame.thread)


def _older(queue: list[Any], pending: int) -> list[Any]:
    """Take all but the youngest ``pending`` from a queue."""
    done = queue[: max(len(queue) - pending, 0)]
    del queue[: len(done)]
    return done


# --- stores, fences, barriers -------------------------------------------------------------------


@rule(a.BulkStore)
def _bulk_store(frame: Frame, op: a.BulkStore) -> None:
    ref = frame.read(op.slot)
    read_slot(frame, ref)
    store = BulkStore(ref, frame.read(op.view), frame.ints(op.index), op.update)
    ref.state.readers.append(store)
    frame.thread.stores.append(store)
    frame.thread.writes = [slot for slot in frame.thread.writes if slot is not ref.state]  # not for the next publish


@rule(a.BulkWait)
def _bulk_wait(frame: Frame, op: a.BulkWait) -> None:
    stores = frame.thread.stores
    if op.read:
        for store in stores[: max(len(stores) - op.pending, 0)]:
            store.read()
        return
    for store in _older(stores, op.pending):
        store.land()


@rule(a.Fence)
def _fence(frame: Frame, op: a.Fence) -> None:
    """Nothing: the interpreter sees one memory; missing fences are the schedule checker's to find."""


@rule(a.AwaitGrid)
def _await_grid(frame: Frame, op: a.AwaitGrid) -> None:
    """Nothing: the interpreter runs one launch after the other."""


@rule(a.Barrier)
def _barrier(frame: Frame, op: a.Barrier) -> Steps:
    """A block's barrier waits for all roles, a cluster's for all blocks. The threads of one role meet at once."""
    program = frame.program
    if op.scope == "cluster":
        first = program.peers[0]
        state = first.cluster_barrier = first.cluster_barrier or BarrierState()
        yield from _meet(frame, op, state, program.peers, "the other blocks at the cluster's barrier")
    elif op.scope == "block":
        state = program.barrier = program.barrier or BarrierState()
        yield from _meet(frame, op, state, [program], "the other roles at the block's barrier")


def _meet(frame: Frame, op: a.Barrier, state: BarrierState, programs: Sequence[Program], text: str) -> Steps:
    """Wait for all threads of ``programs``."""
    state.arrived += 1
    signal(frame.thread, state.clock)
    if state.arrived == sum(len(program.threads) for program in programs):
        state.arrived, state.generation = 0, state.generation + 1
        for program in programs:
            for slot in program.slots:
                if slot.visible:
                    slot.visible.update(program.threads)
            for thread in program.threads:
                join(thread.clock, state.clock)
        return
    generation = state.generation
    yield from await_condition(lambda: state.generation > generation, op, text)


@rule(a.TakeTurn)
@rule(a.PassTurn)
def _turn(frame: Frame, op: a.TakeTurn | a.PassTurn) -> None:
    """Nothing: the warpgroups of one role run as one."""


# --- roles ------------------------------------------------------------------------------------


@rule(a.Role)
def _role(frame: Frame, op: a.Role) -> list[Any]:
    frame.pending_roles.append(op)
    return []


#: operations that start together with the ones after them
ROLES = (a.Role,)


def run_roles(frame: Frame) -> Steps:
    """Run the roles met so far side by side, to their ends."""
    roles, frame.pending_roles = frame.pending_roles, []
    if not roles:
        return
    program = frame.program
    where = f"block {program.rank}, " if len(program.peers) > 1 else ""
    threads = [
        Thread(f"{where}role @{role.attributes['kind']}", role=role, clock=dict(frame.thread.clock)) for role in roles
    ]
    for slot in program.slots:
        if frame.thread in slot.visible:
            slot.visible.update(threads)
    program.threads = threads
    yield from interleave([(thread, _role_body(frame, thread)) for thread in threads])
    program.threads = [frame.thread]
    for thread in threads:
        join(frame.thread.clock, thread.clock)


def _role_body(outer: Frame, thread: Thread) -> Steps:
    frame = Frame(outer.program, thread, dict(outer.values))
    role = thread.role
    assert isinstance(role, a.Role)
    yield from run_region(frame, role.body)
    finish_thread(thread, role)


def drive(threads: Sequence[tuple[Thread, Steps]], random: Random | None = None) -> None:
    """Run threads to their ends; IRError when all that are left are blocked."""
    for blocked in interleave(threads, random):
        raise _deadlock(blocked.inner)


def interleave(threads: Sequence[tuple[Thread, Steps]], random: Random | None = None) -> Iterator[Blocked]:
    """Run threads round robin, or in rounds of any order, each until it blocks; yields when all that are left are."""
    waiting: dict[Thread, Blocked | None] = {thread: None for thread, _ in threads}
    steps = dict(threads)
    while waiting:
        moved, turn = False, list(waiting)
        if random is not None:
            random.shuffle(turn)
        for thread in turn:
            blocked = waiting[thread]
            if blocked is not None and not blocked.ready():
                continue
            moved = True
            try:
                waiting[thread] = next(steps[thread])
            except StopIteration:
                del waiting[thread]
        if not moved:
            stuck = {thread: blocked for thread, blocked in waiting.items() if blocked is not None}
            first = next(iter(stuck.values()))
            yield Blocked(lambda stuck=stuck: any(b.ready() for b in stuck.values()), first.op, first.text, stuck)  # type: ignore[misc]


def _deadlock(waiting: dict[Thread, Blocked]) -> IRError:
    stuck = list(_innermost(waiting))
    lines = []
    for thread, blocked in stuck:
        place = "" if blocked.op.loc == UNKNOWN else f" at {blocked.op.loc}"
        lines.append(f"{thread.name}: '{blocked.op.name}'{place} waits for {blocked.text}")
    loc = next((b.op.loc for _, b in stuck if b.op.loc != UNKNOWN), UNKNOWN)
    return IRError("deadlock: nothing can go on\n  " + "\n  ".join(lines), loc)


def _innermost(waiting: dict[Thread, Blocked]) -> Iterator[tuple[Thread, Blocked]]:
    for thread, blocked in waiting.items():
        if blocked.inner:
            yield from _innermost(blocked.inner)
        else:
            yield thread, blocked


def finish_thread(thread: Thread, role: Operation | None) -> None:
    """A thread's end: its bulk stores land, and no dot may be in flight."""
    for store in thread.stores:
        store.land()
    thread.stores.clear()
    if thread.groups:
        message = f"{thread.name} ends with {len(thread.groups)} dots in flight; async.wait for them"
        raise fault(role, message) if role is not None else IRError(message)


def finish_program(program: Program) -> None:
    """The end of a block: shared memory goes away, so that no copy may be on its way there."""
    for slot in program.slots:
        if slot.copy is not None:
            raise fault(
                slot.copy.op, f"the copy into {slot.label} is in flight when the program ends; nobody waits for it"
            )
