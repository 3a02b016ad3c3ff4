"""mma: issue matrix products asynchronously and keep groups in flight.

On a unit that reads shared memory and runs beside the warps (wgmma), a `tile.dot` becomes an issue
and a wait where its result is first needed. Where a loop only accumulates, the wait moves one
iteration on: the groups of iteration i run while iteration i + 1 is issued, so the stages they read
are released one iteration later too.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir.async_ops import Alloc, AsyncDot, Await, Barrier, LocalStore, Publish, Release, buffer_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Operation, Value, replace_uses, uses_of
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Constant, Dot, For, While, Yield
from tilewright.ir.types import BufferType, RingType, SlotType, TileType
from tilewright.passes.analysis import enclosing_operations
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import MatrixUnit, matrix_unit

#: part of the shared memory that operands may take before further slots for those made in registers
MOST_SHARED = 0.75


@register_pass("mma")
class Mma(FunctionPass):
    """``in_flight``: let accumulating loops keep one iteration's groups in flight."""

    in_flight: bool = True

    def run_on_function(self, function: Function, context: PassContext) -> None:
        dots = [op for op in function.walk() if isinstance(op, Dot)]
        if not dots:
            return
        unit = matrix_unit(context.target, function)
        if not unit.asynchronous:
            return
        warps = int(function.attributes["num_warps"])
        buffers: dict[tuple[SlotType, int], Value] = {}
        taken: dict[tuple[SlotType, Block | None], int] = {}
        for dot in [dot for dot in dots if not isinstance(dot.b.type, SlotType)]:
            slot = _operand_slot(dot, unit, warps)
            number = taken[slot, dot.parent] = taken.get((slot, dot.parent), -1) + 1
            if (slot, number) not in buffers:
                top = Builder(function.body.block, dot.loc)
                with top.at(function.body.block, 0):
                    slots = 2 if _loop_of(dot) is not None and _leaves_room(function, slot, context.target) else 1
                    buffers[slot, number] = top.alloc(slot, hint=dot.b.hint, stages=slots)
            _share_operand(dot, buffers[slot, number])
        _share_kept_rows(function, unit, context.target)
        for block in list({id(d.parent): d.parent for d in dots}.values()):
            assert block is not None
            loop = _accumulating_loop(function, block) if self.in_flight else None
            if loop is not None:
                _keep_in_flight(function, loop)
            else:
                _issue_and_wait(function, block)


def _operand_slot(dot: Dot, unit: MatrixUnit, warps: int) -> SlotType:
    """The slot for an operand b that was computed in registers."""
    layout = unit.shared("b", dot, None, warps)
    tile = dot.b.type
    assert isinstance(tile, TileType)
    if layout is None:
        raise IRError("operand b is too narrow for shared memory", dot.loc, "make K a multiple of 16")
    return SlotType(tile.shape, tile.dtype, layout)


def _loop_of(dot: Dot) -> For | None:
    """The loop whose iterations are numbered by its index and issue the dot once each."""
    region = dot.parent.parent if dot.parent is not None else None
    loop = region.parent if region is not None else None
    return loop if isinstance(loop, For) and isinstance(loop.step.op, Constant) and loop.step.op.value == 1 else None


def _leaves_room(function: Function, slot: SlotType, target: Target) -> bool:
    """Whether another slot leaves enough of the shared memory to rings and to staged stores."""
    buffers = [op.result.type for op in function.walk() if isinstance(op, Alloc)]
    taken = sum(buffer.bytes for buffer in buffers if isinstance(buffer, BufferType))
    return taken + 2 * slot.bytes <= MOST_SHARED * target.shared_bytes


def _share_operand(dot: Dot, buffer: Value) -> None:
    """Write operand b to shared memory. Dots of different blocks, which follow each other, take one buffer in turn.

    Of two slots the iterations of a loop take one each in turn: all warps have read a slot when they meet behind the
    writes to the other.
    """
    assert dot.parent is not None and isinstance(buffer.type, BufferType)
    loop = _loop_of(dot) if buffer.type.stages > 1 else None
    b = Builder(dot.parent, dot.loc)
    if loop is not None:
        assert loop.parent is not None
        with b.at(loop.parent, loop.parent.ops.index(loop)):
            b.insert(Barrier(scope="role"))  # the loop before, if any, may have ended with the same slot
    with b.at(dot.parent, dot.parent.ops.index(dot)):
        slot = b.slot(buffer, b.index(0) if loop is None else loop.index)
        if loop is None:
            b.insert(Barrier(scope="role"))  # earlier readers of the buffer have finished
        b.insert(LocalStore(dot.b, slot))
        b.insert(Barrier(scope="role"))
    dot.b = slot


def _share_kept_rows(function: Function, unit: MatrixUnit, target: Target) -> None:
    """Write operands a that loops of several dots keep in registers to shared memory, in front of the loops.

    ptxas 13.0 was seen to give the registers of such an operand to the accumulators of the loop's next dot, which the
    second iteration then read. What each iteration makes anew is safe.
    """
    loops, warps = enclosing_operations(function), int(function.attributes["num_warps"])
    shared: dict[tuple[Value, Operation], Value] = {}
    for dot in [op for op in function.walk() if isinstance(op, Dot) and isinstance(op.a.type, TileType)]:
        loop, tile = _outermost_that_keeps(dot.a, dot, loops), dot.a.type
        if loop is None or sum(isinstance(op, Dot) for op in loop.walk()) == 1:
            continue
        layout = unit.shared("a", dot, None, warps)
        if layout is None:
            continue
        if (dot.a, loop) not in shared:
            assert isinstance(tile, TileType) and loop.parent is not None
            slot = SlotType(tile.shape, tile.dtype, layout)
            if not _leaves_room(function, slot, target):
                continue
            top, b = Builder(function.body.block, dot.loc), Builder(loop.parent, dot.loc)
            with top.at(function.body.block, 0):
                buffer = top.alloc(slot, hint=dot.a.hint, stages=1)
            with b.at(loop.parent, loop.parent.ops.index(loop)):
                shared[dot.a, loop] = b.slot(buffer, b.index(0))
                b.insert(Barrier(scope="role"))  # an earlier round's readers have finished
                b.insert(LocalStore(dot.a, shared[dot.a, loop]))
                b.insert(Barrier(scope="role"))
        dot.a = shared[dot.a, loop]


def _outermost_that_keeps(value: Value, dot: Dot, loops: dict[Block, Operation]) -> Operation | None:
    """The outermost loop around a dot that ``value`` comes from before of."""
    found, block = None, dot.parent
    while block is not None and block in loops:
        op = loops[block]
        if value in block.args or (value.op is not None and value.op.parent is block):
            break
        if isinstance(op, For | While):
            found = op
        block = op.parent
    return found


@dataclass
class _Group:
    """A dot that was issued and not yet awaited. ``result`` is its value before the pass."""

    result: Value
    flying: Value
    token: Value
    #: operand a
    operand: Value
    rings: set[Value]
    buffers: set[Value]


def _issue_and_wait(function: Function, block: Block) -> None:
    """Issue each dot where it stands and wait where its result is first needed.

    The unit finishes groups in order, so waiting for one leaves exactly the younger ones in flight. Operands are given
    back behind the first wait that shows that they were read. What a dot takes from registers in the next iteration
    has the registers of what it takes in this one, so that is waited for too: ptxas would serialise all (C7513).
    """
    mapping: dict[Value, Value] = {}
    uses, successors = uses_of(function.body), _successors(block)
    flying: list[_Group] = []
    held: list[Release] = []
    old = list(block.ops)
    block.set_ops([])
    b = Builder(block)
    for op in old:
        b.loc = op.loc
        chained = op.acc if isinstance(op, Dot) and uses[op.acc] == [op] else None
        replaced = {value for value, successor in successors.items() if successor in op.results}
        needed = [n for n, group in enumerate(flying) if group.operand in replaced or _needs(op, group, chained)]
        if (op.terminator and flying) or any(_refills(op, release.ring, held) for release in held):
            needed = [len(flying) - 1]
        if needed:
            flying = _wait(b, flying, max(needed), mapping)
            held = _release_read(b, held, flying)
        if isinstance(op, Release) and any(op.ring in group.rings for group in flying):
            held.append(op)
        elif isinstance(op, Dot):
            flying.append(_issue(b, op, flying))
        else:
            b.insert(op)
    if flying:
        _wait(b, flying, len(flying) - 1, mapping)
        _release_read(b, held, [])
    replace_uses(function.body, mapping)


def _release_read(b: Builder, held: list[Release], flying: list[_Group]) -> list[Release]:
    """Place the releases of rings that no group in flight reads; gives the others."""
    unread = [release for release in held if not any(release.ring in group.rings for group in flying)]
    for release in unread:
        b.insert(release)
    return [release for release in held if release not in unread]


def _refills(op: Operation, ring: Value, held: list[Release]) -> bool:
    """Whether an operation waits for a later use of the ring while all of its stages may be held."""
    waits = [o for o in op.walk() if isinstance(o, Await) and o.ring is ring]
    all_held = sum(release.ring is ring for release in held) >= _stages(ring)
    return bool(waits) and (all_held or op not in waits)


def _needs(op: Operation, group: _Group, chained: Value | None) -> bool:
    """The operation reads a group's result, or writes or (further inside) gives back memory that the group reads."""
    inside = list(op.walk())
    if any(isinstance(o, Dot | AsyncDot) for o in inside[1:]):
        return True  # groups are counted within one block
    if any(group.result in o.operands for o in inside):
        return group.result is not chained
    return any(
        (isinstance(o, Release) and o.ring in group.rings and o is not op)
        or (isinstance(o, LocalStore) and buffer_of(o.slot) in group.buffers)
        for o in inside
    )


def _successors(block: Block) -> dict[Value, Value]:
    """What a loop carries into an iteration -> what this one hands to the next."""
    loop = block.parent.parent if block.parent is not None else None
    terminator = block.terminator
    if not isinstance(loop, For) or not isinstance(terminator, Yield):
        return {}
    return dict(zip(loop.carried, terminator.values, strict=True))


def _issue(b: Builder, dot: Dot, flying: list[_Group]) -> _Group:
    """Issue a dot; an accumulator still in flight passes on to it."""
    acc = next((g.flying for g in flying if g.result is dot.acc), dot.acc)
    result, token = b.async_dot(dot.a, dot.b, acc)
    result.hint = dot.result.hint
    buffers = {buffer_of(v) for v in (dot.a, dot.b) if isinstance(v.type, SlotType)}
    rings = {buffer.op.ring for buffer in buffers if isinstance(buffer.op, Alloc) and buffer.op.ring is not None}
    return _Group(dot.result, result, token, dot.a, rings, buffers)


def _wait(b: Builder, flying: list[_Group], last: int, mapping: dict[Value, Value]) -> list[_Group]:
    """Wait for the groups up to number ``last``; gives those still in flight."""
    retired, rest = flying[: last + 1], flying[last + 1 :]
    passed_on = {g.flying.op.acc for g in flying if isinstance(g.flying.op, AsyncDot)}
    readable = [g for g in retired if g.flying not in passed_on]
    results = b.wait([g.flying for g in readable], retired[-1].token, pending=len(rest))
    mapping.update({g.result: value for g, value in zip(readable, results, strict=True)})
    return rest


@dataclass
class _Accumulation:
    """A loop whose only use of its dots' results is to accumulate, and the releases that follow them."""

    loop: For
    dots: list[Dot]
    releases: list[Release]


def _accumulating_loop(function: Function, block: Block) -> _Accumulation | None:
    """The loop around ``block`` if each dot's accumulator is carried, untouched, to its own next issue."""
    region = block.parent
    loop = region.parent if region is not None else None
    if not isinstance(loop, For):
        return None
    inside = [op for op in loop.body.walk() if isinstance(op, Dot)]
    dots = [op for op in block.ops if isinstance(op, Dot)]
    if len(inside) != len(dots):
        return None
    uses = uses_of(function.body)
    terminator = block.terminator
    assert isinstance(terminator, Yield)
    for dot in dots:
        if dot.acc not in loop.carried or not isinstance(dot.a.type, SlotType):
            return None
        position = loop.carried.index(dot.acc)
        if uses[dot.acc] != [dot] or uses[dot.result] != [terminator] or terminator.values[position] is not dot.result:
            return None
    releases = [op for op in block.ops if isinstance(op, Release)]
    if any(r.count not in loop.carried or _stages(r.ring) < 2 for r in releases):
        return None  # the stage of the iteration before is still being read when this one's is awaited
    after_dots = block.ops.index(dots[-1])
    if any(block.ops.index(r) < after_dots for r in releases) and len(dots) > 1:
        return None
    return _Accumulation(loop, dots, releases)


def _stages(ring: Value) -> int:
    assert isinstance(ring.type, RingType)
    return ring.type.stages


def _keep_in_flight(function: Function, found: _Accumulation) -> None:
    block = found.loop.body.block
    mapping: dict[Value, Value] = {}
    b = Builder(block)
    for dot in found.dots:
        b.loc = dot.loc
        with b.at(block, block.ops.index(dot)):
            flying, _ = b.async_dot(dot.a, dot.b, dot.acc)
            flying.hint = dot.result.hint
            mapping[dot.result] = flying
        last = block.ops.index(dot)
        block.ops.remove(dot)
    replace_uses(function.body, mapping)
    with b.at(block, last):
        b.wait(pending=len(found.dots))
    _delay_releases(b, found)
    _hand_over_early(b, found.loop)
    _finish(function, found)


def _delay_releases(b: Builder, found: _Accumulation) -> None:
    """Release the stage of the previous iteration, whose groups the wait has retired."""
    loop, block = found.loop, found.loop.body.block
    for release in found.releases:
        with b.at(block, block.ops.index(release)):
            started = b.compare("gt", loop.index, loop.lo)
            branch = b.if_else(started)
            with b.at(branch.then_body.block):
                b.insert(Release(release.ring, b.sub(release.count, b.index(1))))
                b.yield_()
            with b.at(branch.else_body.block):
                b.yield_()
        block.ops.remove(release)


def _hand_over_early(b: Builder, loop: For) -> None:
    """What is published right behind the loop goes behind the last iteration's last wait for a ring.

    Such a publication hands a turn over (`tilewright.passes.alternate`): whose turn is next gets ready meanwhile.
    """
    block, outer = loop.body.block, loop.parent
    assert outer is not None
    behind = outer.ops.index(loop) + 1
    waits = [position for position, op in enumerate(block.ops) if isinstance(op, Await)]
    turns = [op for op in outer.ops[behind : behind + 1] if isinstance(op, Publish) and not op.tokens]
    for turn in turns if waits else []:
        outer.ops.remove(turn)
        with b.at(block, waits[-1] + 1):
            _publish_unless(b, b.compare("lt", b.add(loop.index, loop.step), loop.hi), turn)
        with b.at(outer, behind):
            _publish_unless(b, b.compare("lt", loop.lo, loop.hi), turn)


def _publish_unless(b: Builder, condition: Value, turn: Publish) -> None:
    branch = b.if_else(condition)
    with b.at(branch.then_body.block):
        b.yield_()
    with b.at(branch.else_body.block):
        b.insert(Publish(turn.ring, turn.count, []))
        b.yield_()


def _finish(function: Function, found: _Accumulation) -> None:
    """Behind the loop: wait for the last groups, release the last stage."""
    loop = found.loop
    outer = loop.parent
    assert outer is not None
    results = [loop.results[loop.carried.index(d.acc)] for d in found.dots]
    b = Builder(outer, loop.loc)
    position = outer.ops.index(loop) + 1
    with b.at(outer, position):
        waited = b.wait(results)
        if found.releases:
            branch = b.if_else(b.compare("gt", loop.hi, loop.lo))
            with b.at(branch.then_body.block):
                for release in found.releases:
                    count = loop.results[loop.carried.index(release.count)]
                    b.insert(Release(release.ring, b.sub(count, b.index(1))))
                b.yield_()
            with b.at(branch.else_body.block):
                b.yield_()
        wait = waited[0].op
    mapping = dict(zip(results, waited, strict=True))
    for op in function.walk():
        if op is not wait:
            op.replace_operands(mapping)
