"""Lowering of ``comm.*``: addresses of other ranks' tensors, puts by ordinary stores, flags, and the control block.

A flag and the words of control blocks hold the number of the last launch that set them, so nothing is ever reset; a
wait polls until the difference to this launch's number, which may wrap, is not negative (`tilewright.ir.abi.Control`).

Order: a signal is a store with release semantics among all GPUs by one thread. A wait polls with acquiring loads, or,
where one thread does, without order and then has a fence. What makes that the order of all threads is in the IR
already (`tilewright.passes.rank_order`).

A wait that takes longer than the control block's limit writes a fault record and stops the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from tilewright.backends.lower.context import Lowering, TokenRef, ViewRef, lowers
from tilewright.backends.lower.coordinates import sole_holder
from tilewright.backends.lower.entry import WorldRef
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.memory import TileAccess, run_if, store_tile, tile_access
from tilewright.backends.lower.shared import shared_address, shared_pointer
from tilewright.backends.mlir_builder import Type
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import comm_ops
from tilewright.ir.abi import Control, Fault, kernel_number
from tilewright.ir.async_ops import Fence
from tilewright.ir.core import Location

WORD, ADDRESS = 4, 8
#: words that one thread looks at before it decides
GLANCE = 8


# --- ranks, puts --------------------------------------------------------------------------------


@lowers(comm_ops.Rank)
def lower_rank(lw: Lowering, op: comm_ops.Rank) -> None:
    lw.define(op.result, _world(lw).rank)


@lowers(comm_ops.WorldSize)
def lower_world_size(lw: Lowering, op: comm_ops.WorldSize) -> None:
    lw.define(op.result, _world(lw).size)


@lowers(comm_ops.Peer)
def lower_peer(lw: Lowering, op: comm_ops.Peer) -> None:
    view, rank = lw.view(op.view), lw.scalar(op.rank)
    assert view.table is not None
    lw.define(op.result, replace(view, base=_address(lw, view.table, rank), table=None, peer=rank))


@lowers(comm_ops.Join)
def lower_join(lw: Lowering, op: comm_ops.Join) -> None:
    lw.define(op.result, TokenRef(comm_ops.PUT.kind))


@lowers(comm_ops.Put)
def lower_put(lw: Lowering, op: comm_ops.Put) -> None:
    layout, values = lw.layout(op.value), lw.registers(op.value)
    access = tile_access(lw, op.view, op.index, layout)
    run_if(lw, sole_holder(lw, layout), lambda: store_tile(lw, access, values))
    lw.define(op.result, TokenRef(comm_ops.PUT.kind))


@lowers(comm_ops.ReducePut)
def lower_reduce_put(lw: Lowering, op: comm_ops.ReducePut) -> None:
    """Element by element, each by the first thread that holds it."""
    layout, values = lw.layout(op.value), lw.registers(op.value)
    access, holder = TileAccess(lw, lw.view(op.view), op.index, layout), sole_holder(lw, layout)
    done: set[tuple[int, ...]] = set()
    for register, coordinate in enumerate(layout.table("register").tolist()):
        if tuple(coordinate) not in done:
            done.add(tuple(coordinate))
            conditions = [c for c in (holder, access.inside(register)) if c is not None]
            pointer, value = access.pointer(register), values[register]
            condition = reduce(lw.fb.and_, conditions) if conditions else None
            run_if(lw, condition, lambda p=pointer, v=value: lw.ops.add_to_memory(lw, p, v, access.view.dtype))  # type: ignore[misc]
    lw.define(op.result, TokenRef(comm_ops.PUT.kind))


# --- flags --------------------------------------------------------------------------------------


@lowers(comm_ops.Signal)
def lower_signal(lw: Lowering, op: comm_ops.Signal) -> None:
    flag, fb = lw.view(op.flag), lw.fb
    assert flag.table is not None
    base, launch = _address(lw, flag.table, lw.scalar(op.peer)), launch_number(lw)
    pointer = fb.gep(base, lw.index.value(lw.index.mul(flag.offset, WORD), 64))
    run_if(lw, _first_thread(lw), lambda: lw.ops.store_release(lw, launch, pointer))


@lowers(comm_ops.WaitFlags)
def lower_wait(lw: Lowering, op: comm_ops.WaitFlags) -> None:
    run_if(lw, None if op.when is None else lw.scalar(op.when), lambda: _wait_for(lw, op))
    lw.define(op.result, TokenRef(comm_ops.FLAG.kind))


@lowers(comm_ops.WaitEarlier)
def lower_wait_earlier(lw: Lowering, op: comm_ops.WaitEarlier) -> None:
    _wait_for(lw, op, lw.fb.sub(launch_number(lw), lw.scalar(op.launches)))
    lw.define(op.result, TokenRef(comm_ops.FLAG.kind))


def _wait_for(lw: Lowering, op: comm_ops.WaitFlags | comm_ops.WaitEarlier, launch: mlir.Value | None = None) -> None:
    """Until all flags of a view are those of a ``launch``, by default of this one."""
    fb, math, view = lw.fb, lw.index, lw.view(op.flags)
    count = math.narrow(reduce(math.mul, view.shape, 1))
    param = lw.function.params.index(comm_ops.view_root(op.flags))

    def flag(number: mlir.Value) -> Awaited:
        offset = _element(lw, view, number)
        pointer = fb.gep(view.base, math.value(math.mul(offset, WORD), 64))
        return Awaited(pointer, math.value(math.narrow(offset)), fb.i32(-1), line_of(op.loc), param, launch)

    _poll_each(lw, count, flag)


def _element(lw: Lowering, view: ViewRef, number: mlir.Value) -> IntLike:
    """How many elements behind the tensor's first one the ``number``-th of a view lies, row-major."""
    math, rest = lw.index, number
    offset = view.offset
    for axis in reversed(range(view.rank)):
        size = view.shape[axis]
        place: IntLike = rest
        if axis:
            place = lw.fb.urem(rest, math.value(size))
            rest = lw.fb.udiv(rest, math.value(size))
        offset = math.add(
            math.wide(offset), math.mul(math.wide(math.add(place, view.origin[axis])), view.strides[axis])
        )
    return offset


@lowers(Fence)
def lower_fence(lw: Lowering, op: Fence) -> None:
    """Between ranks; other kinds are the targets'."""
    if op.proxy not in ("release", "acquire"):
        raise lw.error(f"no fence for proxy {op.proxy!r}")
    lw.ops.fence(lw, op.proxy)


# --- a launch's beginning and end -----------------------------------------------------------------


@lowers(comm_ops.Enter)
def lower_enter(lw: Lowering, op: comm_ops.Enter) -> None:
    """The number and the count of blocks are one word, so that a block gets the number by counting itself in.

    Nothing else tells the next launch its number, and no order is needed for that: launches follow one another.
    """
    fb, world = lw.fb, _learn_number(lw, op)
    first = reduce(fb.or_, [lw.ops.block_id(lw, axis) for axis in range(3)])

    def tell(peer: mlir.Value) -> None:
        # no release: what was done before this launch is over, for other GPUs too
        fb.store(launch_number(lw), _own_word(lw, peer, Control.ENTERED), WORD, ordering="monotonic")

    with fb.if_then(fb.icmp("eq", first, 0)):
        _each(lw, lw.scope.thread, world.size, lw.scope.num_threads(lw.target.warp_size), tell)


def _learn_number(lw: Lowering, op: comm_ops.Enter) -> WorldRef:
    fb, i32, i64, world = lw.fb, lw.fb.types.i32, lw.fb.types.i64, _world(lw)
    if op.place is None:
        raise lw.error("a launch's number has no place: the shared-memory plan must run first")
    place, word = shared_pointer(lw, shared_address(lw, op.place)), _control(lw, Control.EPOCH)
    blocks = reduce(fb.mul, [lw.ops.num_blocks(lw, axis) for axis in range(3)])
    warp = lw.target.warp_size  # the last one counts while the first one looks at who has entered
    first = fb.icmp("eq", lw.scope.thread, lw.scope.num_threads(warp) - warp)

    def count() -> list[mlir.Value]:
        return [fb.atomicrmw("add", word, fb.i64(1 << 32), "monotonic", lw.ops.device_scope, 2 * WORD)]

    (before,) = fb.if_else(first, [i64], count, lambda: [fb.i64(0)])
    entered = _entered_early(lw)
    with fb.if_then(first):
        begun, number = fb.trunc(fb.lshr(before, 32), i32), fb.add(fb.trunc(before, i32), 1)
        fb.store(number, place, WORD)
        with fb.if_then(fb.icmp("eq", begun, fb.sub(blocks, 1))):
            fb.store(fb.zext(number, i64), word, 2 * WORD, ordering="monotonic")
    lw.ops.barrier(lw, "block")
    lw.entry.world = replace(world, launch=fb.load(place, i32, WORD), entered=entered)
    if op.lent:
        lw.ops.barrier(lw, "block")
    return lw.entry.world


def _entered_early(lw: Lowering) -> mlir.Value | None:
    """What the first ranks have told, one in each lane of the first warp, for a credit that seldom has to wait.

    None where no such credit is to come: of the whole block, and for the launch before.
    """
    fb, size = lw.fb, _world(lw).size
    credits = [op for op in lw.function.body.block.ops if isinstance(op, comm_ops.Credit)]
    if not any(op.in_turn and op.peer is None for op in credits):
        return None

    def look() -> list[mlir.Value]:
        word = _control(lw, Control.ENTERED, fb.smin(lw.scope.lane, fb.sub(size, 1)))
        return [fb.load(word, fb.types.i32, WORD, ordering="acquire")]

    return fb.if_else(fb.icmp("eq", lw.scope.warp, 0), [fb.types.i32], look, lambda: [fb.i32(0)])[0]


@lowers(comm_ops.Turn)
def lower_turn(lw: Lowering, op: comm_ops.Turn) -> None:
    lw.define(op.result, lw.fb.and_(launch_number(lw), 1))


@lowers(comm_ops.Credit)
def lower_credit(lw: Lowering, op: comm_ops.Credit) -> None:
    fb, world = lw.fb, _world(lw)
    number = fb.sub(launch_number(lw), 1) if op.in_turn else None

    def entry(peer: mlir.Value) -> Awaited:
        return Awaited(_control(lw, Control.ENTERED, peer), fb.i32(Fault.ENTRY), peer, line_of(op.loc), number=number)

    if op.peer is None and op.in_turn and world.entered is not None:
        assert number is not None
        known = fb.and_(_is_reached(lw, world.entered, number), fb.icmp("sle", world.size, lw.target.warp_size))
        with fb.if_then(fb.icmp("eq", lw.scope.warp, 0)), fb.if_then(fb.not_(lw.ops.all_lanes(lw, known))):
            _poll_each(lw, world.size, entry)
    elif op.peer is None:
        _poll_each(lw, world.size, entry)
    else:
        peer = lw.scalar(op.peer)
        _poll_each(lw, 1, lambda _: entry(peer))
    lw.define(op.result, TokenRef(comm_ops.FLAG.kind))


@lowers(comm_ops.Leave)
def lower_leave(lw: Lowering, op: comm_ops.Leave) -> None:
    """A thread of the last block ends the launch for the rank: it knows what all blocks have done, by their count."""
    fb, world, scope = lw.fb, _world(lw), lw.ops.device_scope
    blocks = reduce(fb.mul, [lw.ops.num_blocks(lw, axis) for axis in range(3)])

    def end() -> None:
        fb.fence("release", scope)  # LLVM leaves an order of the update itself out of PTX
        before = fb.atomicrmw("add", _control(lw, Control.ENDED), fb.i32(1), "monotonic", scope, WORD)
        fb.fence("acquire", scope)
        with fb.if_then(fb.icmp("eq", before, fb.sub(blocks, 1))):
            _each(lw, fb.i32(0), world.size, 1, lambda peer: _tell(lw, peer, Control.LEFT))
            fb.store(fb.i32(0), _control(lw, Control.ENDED), WORD, ordering="monotonic")
            _each(lw, fb.i32(0), world.size, 1, await_end)
            fb.fence("acquire")

    def await_end(peer: mlir.Value) -> None:
        word = _control(lw, Control.LEFT, peer)
        _poll(lw, Awaited(word, fb.i32(Fault.EXIT), peer, line_of(lw.function.loc)), alone=True)

    with fb.if_then(fb.icmp("eq", lw.scope.thread, 0)):
        end()


def line_of(loc: Location) -> int:
    """The line in the kernel's file: of the outermost call where helpers were inlined."""
    while loc.caller is not None:
        loc = loc.caller
    return loc.line


# --- polling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Awaited:
    """A word that a launch's number will be in, and what a fault record says of it: see `tilewright.ir.abi.Fault`.

    ``number``: of the launch, where that is not the present one.
    """

    pointer: mlir.Value
    flag: mlir.Value
    peer: mlir.Value
    line: int
    param: int = -1
    number: mlir.Value | None = None


def _poll_each(lw: Lowering, count: IntLike, word: Callable[[mlir.Value], Awaited]) -> None:
    """Wait for words 0 to ``count`` - 1: by the lanes of the scope's first warp, or by its one thread.

    All lanes poll until what all of them wait for is there, those without a word of their own the last one. So the
    warp stays together, which ptxas wants to know: behind a loop that lanes leave one by one it takes all warps to be
    apart, gives up uniform registers, and each wgmma of the kernel then waits for its descriptors.
    """
    fb, warp, math = lw.fb, lw.target.warp_size, lw.index
    last = math.value(math.sub(count, 1))
    if lw.scope.single_thread:
        if count == 1:
            _poll(lw, word(fb.i32(0)))
        else:
            _poll_alone(lw, count, lambda number: word(fb.smin(number, last)))
        fb.fence("acquire")
        return
    # acquiring loads cost less than a fence, which waits for what the thread has written too
    with fb.if_then(fb.icmp("eq", lw.scope.warp, 0)):
        if isinstance(count, int) and 0 < count <= warp:
            _poll(lw, word(fb.i32(0) if count == 1 else fb.umin(lw.scope.lane, count - 1)), "acquire")
        else:
            own = lw.scope.lane
            _each(
                lw, fb.i32(0), count, warp, lambda first: _poll(lw, word(fb.smin(fb.add(first, own), last)), "acquire")
            )


def _poll_alone(lw: Lowering, count: IntLike, word: Callable[[mlir.Value], Awaited]) -> None:
    """One thread polls all words: it looks at `GLANCE` of them at a time, and waits where one is missing."""
    fb = lw.fb

    def glance(first: mlir.Value) -> None:
        words = [_reached(lw, word(fb.add(first, number))) for number in range(GLANCE)]
        with fb.if_then(fb.not_(reduce(fb.and_, words))):
            _each(lw, fb.i32(0), GLANCE, 1, lambda number: _poll(lw, word(fb.add(first, number))))

    _each(lw, fb.i32(0), count, GLANCE, glance)


def _each(lw: Lowering, first: mlir.Value, count: IntLike, step: int, body: Callable[[mlir.Value], None]) -> None:
    with lw.fb.for_loop(first, lw.index.value(count), step, unroll=False) as loop:
        body(loop.index)


def _reached(lw: Lowering, awaited: Awaited, ordering: str = "monotonic") -> mlir.Value:
    """i1: the number of this launch, or of a later one, is there. Behind a monotonic look there must be a fence."""
    word = lw.fb.load(awaited.pointer, lw.fb.types.i32, WORD, ordering=ordering)
    return _is_reached(lw, word, launch_number(lw) if awaited.number is None else awaited.number)


def _is_reached(lw: Lowering, word: mlir.Value, number: mlir.Value) -> mlir.Value:
    """i1: a word is of the launch ``number`` or of a later one."""
    return lw.fb.icmp("sge", lw.fb.sub(word, number), 0)


def _poll(lw: Lowering, awaited: Awaited, ordering: str = "monotonic", alone: bool | None = None) -> None:
    """Look at a word until it is `_reached`."""
    poll(lw, lambda: (_reached(lw, awaited, ordering), []), awaited, alone)


def poll(
    lw: Lowering,
    look: Callable[[], tuple[mlir.Value, list[mlir.Value]]],
    awaited: Awaited,
    alone: bool | None = None,
    types: Sequence[Type] = (),
) -> list[mlir.Value]:
    """Look until what is awaited is there. ``look`` says so (i1), and gives values of ``types``; the last come back.

    All lanes of a warp look, each for itself, and go on together; ``alone``: one thread does (by default where one
    thread runs the scope).
    """
    fb, i64 = lw.fb, lw.fb.types.i64
    alone = lw.scope.single_thread if alone is None else alone

    def together(condition: mlir.Value) -> mlir.Value:
        return condition if alone else lw.ops.all_lanes(lw, condition)

    slow, again, waited, late = (fb.block() for _ in range(4))
    looking, done = fb.block(i64), fb.block(*types)
    own, found = look()
    fb.cond_br(together(own), done, slow, found)
    fb.position_at_end(slow)
    milliseconds = fb.load(_control(lw, Control.TIMEOUT), fb.types.i32, WORD, ordering="monotonic")
    limited = together(fb.icmp("ne", milliseconds, 0))
    limit = fb.mul(fb.zext(milliseconds, i64), 1_000_000)
    # the clock is not looked at where there is no limit: an emulator then sees that nothing changes
    (start,) = fb.if_else(limited, [i64], lambda: [lw.ops.nanoseconds(lw)], lambda: [fb.i64(0)])
    fb.br(looking, [start])
    fb.position_at_end(looking)
    (start,) = looking.arguments
    lw.ops.pause(lw)
    own, found = look()
    fb.cond_br(together(own), done, again, found)
    fb.position_at_end(again)
    fb.cond_br(limited, waited, looking, else_arguments=[start])
    fb.position_at_end(waited)
    passed = fb.sub(lw.ops.nanoseconds(lw), start)
    fb.cond_br(together(fb.icmp("ugt", passed, limit)), late, looking, else_arguments=[start])
    fb.position_at_end(late)
    with fb.if_then(fb.not_(own)):
        _leave_record(lw, awaited)
    fb.intrinsic("llvm.trap", None)
    fb.br(done, found)
    fb.position_at_end(done)
    return list(done.arguments)


def _leave_record(lw: Lowering, awaited: Awaited) -> None:
    """Tell the host who waited for what."""
    fb, world = lw.fb, _world(lw)
    record = fb.load(_control(lw, Control.FAULT), fb.types.ptr(1), ADDRESS)
    words = {
        Fault.LINE: fb.i32(awaited.line),
        Fault.FLAG: awaited.flag,
        Fault.PEER: awaited.peer,
        Fault.RANK: world.rank,
        Fault.KERNEL: fb.i32(kernel_number(lw.entry.abi.name)),
        Fault.PARAM: fb.i32(awaited.param),
    }
    for place, word in words.items():
        fb.store(word, fb.gep(record, WORD * place), WORD, ordering="monotonic")
    lw.ops.store_release(lw, fb.i32(1), fb.gep(record, WORD * Fault.KIND))


# --- addresses, threads ---------------------------------------------------------------------------


def _world(lw: Lowering) -> WorldRef:
    if lw.entry.world is None:
        raise lw.error("the function does not say that it communicates")
    return lw.entry.world


def launch_number(lw: Lowering) -> mlir.Value:
    launch = _world(lw).launch
    if launch is None:
        raise lw.error("no comm.enter in front: the pass communicate must run first")
    return launch


def _address(lw: Lowering, table: mlir.Value, rank: mlir.Value) -> mlir.Value:
    """The pointer that a table has for a rank."""
    place = lw.index.value(lw.index.mul(lw.index.wide(rank), ADDRESS), 64)
    return lw.fb.load(lw.fb.gep(table, place), lw.fb.types.ptr(1), ADDRESS, invariant=True)


def _control(lw: Lowering, word: int, peer: mlir.Value | None = None, base: mlir.Value | None = None) -> mlir.Value:
    """The pointer to a word of a control block (by default the own one), or to that of a rank in a row of words."""
    place: IntLike = WORD * word
    if peer is not None:
        place = lw.index.add(lw.index.mul(lw.index.wide(peer), WORD), place)
    return lw.fb.gep(base if base is not None else _world(lw).control, lw.index.value(place, 64))


def _tell(lw: Lowering, peer: mlir.Value, row: int) -> None:
    """Write this launch's number to the own place in a row of a rank's control block."""
    lw.ops.store_release(lw, launch_number(lw), _own_word(lw, peer, row))


def _own_word(lw: Lowering, peer: mlir.Value, row: int) -> mlir.Value:
    """The pointer to the own place in a row of a rank's control block."""
    world = _world(lw)
    return _control(lw, row, world.rank, _address(lw, world.controls, peer))


def _first_thread(lw: Lowering) -> mlir.Value | None:
    """i1: the thread that acts for the scope; None where one thread runs the code anyway."""
    return None if lw.scope.single_thread else lw.fb.icmp("eq", lw.scope.thread, 0)
