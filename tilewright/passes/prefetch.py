"""prefetch: placed loads travel through registers into shared memory, one iteration ahead of their use.

For targets whose threads copy for themselves (no roles). Each load that placement sent through shared
memory becomes a load into registers, a store into a slot, a barrier, and local loads in front of the
matrix products. Where the direction of wide accesses differs between global and shared memory, a
conversion turns it, and the layouts are chosen so that this renames registers only (`copy_layouts`).

In a loop whose load addresses depend on nothing but the loop's index and values from outside, the loads
of the next iteration are issued before the products of this one and written behind them::

    %next = tile.load ... [i + 1]              // in flight during the products
    %a = async.local_load %slot[i]             // written one iteration ago
    %acc1 = tile.dot %a, ...
    async.local_store %next, %slot[i + 1]
    async.barrier

With two stages one barrier an iteration is enough; with one, a second keeps the writes behind all reads.
The last iteration loads a tile that nobody reads: loads are bounds-checked, so it may lie outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.ir.async_ops import Alloc, Barrier, LocalStore
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import view_root
from tilewright.ir.core import Block, Effect, Function, Operation, Value, replace_uses, uses_of
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, For, Load, Subview, Transpose, While, Yield
from tilewright.ir.types import BufferType, SlotType, TileType, ViewType
from tilewright.passes.analysis import ancestor_in, enclosing_operations
from tilewright.passes.copy_layouts import CopyLayouts, copy_layouts
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import PREFETCH, schedule_of
from tilewright.passes.shared_needs import SharedNeeds

#: stages beyond the second would only hold what registers hold anyway
MOST_STAGES = 2
#: an operand of at most this many bytes per thread is read once outside the loops around its dot and kept
KEPT_BYTES = 256


@dataclass
class Transit:
    """One placed load: its way through registers, and its buffer."""

    load: Load
    slot: SlotType
    layouts: CopyLayouts
    buffer: Value | None = None

    def issue(self, b: Builder, mapping: dict[Value, Value]) -> Value:
        """The load into registers, with the address mapped."""
        load = self.load
        tile = TileType(self.slot.shape, self.slot.dtype, self.layouts.load)
        view, index = mapping.get(load.view, load.view), [mapping.get(v, v) for v in load.index]
        after = [mapping.get(v, v) for v in load.after]
        hints = [load.result.hint]
        op = Load(view, index, after, types=[tile], pad=load.pad, evict=load.evict, loc=load.loc, hints=hints)
        return b.insert(op).result

    def write(self, b: Builder, value: Value, count: Value) -> None:
        """Registers into the slot for ``count``."""
        assert self.buffer is not None
        if self.layouts.turns:
            value = b.convert(value, self.layouts.store)
        b.insert(LocalStore(value, b.slot(self.buffer, count)))


@dataclass
class Group:
    """Transits of one block that are written together. ``ahead``: in a loop, one iteration before their use."""

    block: Block
    transits: list[Transit]
    ahead: bool
    stages: int = 1


@register_pass("prefetch")
class Prefetch(FunctionPass):
    """``num_stages`` fixes the slots of each prefetched load; None: two where shared memory allows, else one.

    More than two count as two: what runs further ahead would wait in registers, not in slots.
    """

    num_stages: int | None = None

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if schedule_of(function, context.target) != PREFETCH:
            return
        warps = int(function.attributes.get("num_warps", 0))
        loads = [op for op in function.walk() if isinstance(op, Load) and op.shared is not None]
        if not loads:
            return
        loops = enclosing_operations(function)
        groups = find_groups([transit(load, warps, context.target) for load in loads], loops)
        self._choose_stages(function, groups, context)
        allocate(function, groups)
        for group in groups:
            if group.ahead:
                loop = loops[group.block]
                assert isinstance(loop, For)
                _prefetch(function, loop, group)
            else:
                _in_place(function, group, _repeats(group.block, loops))

    def _choose_stages(self, function: Function, groups: list[Group], context: PassContext) -> None:
        wanted = self.num_stages or context.options.num_stages
        needs = SharedNeeds(function)
        for group in groups:
            if group.ahead and wanted != 1:
                group.stages = MOST_STAGES
                if wanted is None and needed_bytes(function, needs, groups) > context.target.shared_bytes:
                    group.stages = 1


def needed_bytes(function: Function, needs: SharedNeeds, groups: Sequence[Group]) -> int:
    """Shared memory at the worst moment if each group had the stages that it has now."""
    loops = enclosing_operations(function)
    return needs.bytes_with(
        (t.load, t.slot, group.stages, needs.lifetime(_span(function, group, loops)))
        for group in groups
        for t in group.transits
    )


def _span(function: Function, group: Group, loops: dict[Block, Operation]) -> list[Operation]:
    """The operations between which the slots of a group are in use."""
    if group.ahead:
        return [loops[group.block]]
    readers = [ancestor_in(d, group.block) for t in group.transits for d in _dots(function, t)]
    return [op for op in readers if op is not None]


def transit(load: Load, warps: int, target: Target) -> Transit:
    """The way of a placed load through registers."""
    tile, view, shared = load.result.type, load.view.type, load.shared
    assert isinstance(tile, TileType) and isinstance(view, ViewType) and shared is not None
    layouts = copy_layouts(tile.shape, tile.dtype.bits, view.contiguous_axis, shared.order[0], warps, target.warp_size)
    return Transit(load, SlotType(tile.shape, tile.dtype, shared), layouts)


def find_groups(transits: list[Transit], loops: dict[Block, Operation]) -> list[Group]:
    """Group by block and by whether the load can run an iteration ahead."""
    groups: dict[tuple[int, bool], Group] = {}
    for transit in transits:
        block = transit.load.parent
        assert block is not None
        ahead = isinstance(loops.get(block), For) and address_slice(transit.load) is not None
        groups.setdefault((id(block), ahead), Group(block, [], ahead)).transits.append(transit)
    return list(groups.values())


def address_slice(load: Load) -> list[Operation] | None:
    """The operations of a loop's body that compute the load's address, in order.

    None where it waits for other ranks inside the body, or where the address depends on carried values, on tiles or on
    control flow inside the body.
    """
    block = load.parent
    assert block is not None
    needed: set[Operation] = set()
    pending = [load.view, *load.index, *load.after]
    while pending:
        value = pending.pop()
        if value.owner is block:
            if value is not block.args[0]:
                return None  # carried from iteration to iteration
            continue
        op = value.op
        if op is None or op.parent is not block or op in needed:
            continue
        if op.regions or op.effect != Effect.PURE or any(isinstance(v.type, TileType) for v in op.operands):
            return None
        needed.add(op)
        pending += op.operands
    return [op for op in block.ops if op in needed]


def follows_index(load: Load, loop: For) -> bool:
    """Whether the address changes with the loop's index, and with nothing else that the loop computes."""
    address = address_slice(load)
    return address is not None and any(loop.index in op.operands for op in (load, *address))


def allocate(function: Function, groups: list[Group]) -> None:
    """A buffer for each load, with the stages of its group."""
    b = Builder(function.body.block, function.loc)
    with b.at(function.body.block, 0):
        for group in groups:
            for t in group.transits:
                type_ = BufferType(group.stages, t.slot)
                t.buffer = b.insert(Alloc(None, types=[type_], hints=[_name(t.load)])).result


def _name(load: Load) -> str:
    """For dumps and messages: the tile's name, else its tensor's."""
    return load.result.hint or view_root(load.view).hint


def _repeats(block: Block, loops: dict[Block, Operation]) -> bool:
    """Whether a block may run more than once."""
    while block in loops:
        op = loops[block]
        if isinstance(op, For | While):
            return True
        assert op.parent is not None
        block = op.parent
    return False


# --- loads that stay where they are -------------------------------------------------------------


def _in_place(function: Function, group: Group, repeats: bool) -> None:
    """Write the slots before the first reader; in a loop only after everybody has read the last content."""
    block = group.block
    b = Builder(block)
    waiting: list[tuple[Transit, Value]] = []
    readers = {id(t): [r for r in (ancestor_in(d, block) for d in _dots(function, t)) if r] for t in group.transits}
    zero: Value | None = None
    mine = {id(t.load): t for t in group.transits}
    old = list(block.ops)
    block.set_ops([])
    for op in old:
        b.loc = op.loc
        if any(op in readers[id(t)] for t, _ in waiting):
            if repeats:
                b.insert(Barrier())
            zero = b.index(0)
            for transit, value in waiting:
                transit.write(b, value, zero)
            b.insert(Barrier())
            waiting = []
        if id(op) in mine:
            transit = mine[id(op)]
            waiting.append((transit, transit.issue(b, {})))
        else:
            b.insert(op)
    for transit in group.transits:
        read_slots(function, transit, block, None)


# --- loads that run ahead -----------------------------------------------------------------------


def _prefetch(function: Function, loop: For, group: Group) -> None:
    block, outer = loop.body.block, loop.parent
    assert outer is not None
    loads = [t.load for t in group.transits]
    slices = [op for op in block.ops if any(op in (address_slice(load) or []) for load in loads)]
    b = Builder(outer, loop.loc)
    with b.at(outer, outer.ops.index(loop)):
        first = b.index(0)
        _write_all(b, group.transits, _issue_all(b, group.transits, slices, {loop.index: loop.lo}), first)
        b.insert(Barrier())
    count = carry(loop, first, "count") if group.stages > 1 else None
    block.set_ops([op for op in block.ops if op not in loads])
    with b.at(block, 0):
        following = b.add(loop.index, loop.step)
        values = _issue_all(b, group.transits, slices, {loop.index: following})
    terminator = block.terminator
    assert isinstance(terminator, Yield)
    with b.at(block, len(block.ops) - 1):
        if count is None:
            b.insert(Barrier())  # everybody has read the slot
            _write_all(b, group.transits, values, b.index(0))
        else:
            after = b.add(count, b.index(1))
            _write_all(b, group.transits, values, after)
            terminator.values = [*terminator.values, after]
        b.insert(Barrier())
    for transit in group.transits:
        read_slots(function, transit, block, count)


def _issue_all(
    b: Builder, transits: list[Transit], slices: Sequence[Operation], mapping: dict[Value, Value]
) -> list[Value]:
    """Clone the address computations for another loop index, then load."""
    mapping = clone_address(b, slices, mapping)
    return [t.issue(b, mapping) for t in transits]


def clone_address(b: Builder, slices: Sequence[Operation], mapping: dict[Value, Value]) -> dict[Value, Value]:
    """Clone address computations for the loop index in ``mapping``; ``mapping`` with what they compute.

    The index may lie behind the loop's end, where a tile's bounds make a load harmless. The leading dimensions that a
    subview fixes have no such bounds: there the index is kept inside.
    """
    mapping = dict(mapping)
    for op in slices:
        clone = op.clone(mapping)
        if isinstance(op, Subview) and isinstance(clone, Subview):
            for axis, (old, new) in enumerate(zip(op.index, clone.index, strict=True)):
                if new is not old:
                    last = b.sub(b.dim(clone.view, axis), b.index(1))
                    clone.index[axis] = b.binary("max", b.binary("min", new, last), b.index(0))
        b.insert(clone)
    return mapping


def _write_all(b: Builder, transits: list[Transit], values: list[Value], count: Value) -> None:
    for transit, value in zip(transits, values, strict=True):
        transit.write(b, value, count)


def carry(loop: For, initial: Value, hint: str) -> Value:
    """Carry one more value through the loop (its yield is extended by the caller); the body's argument."""
    loop.inits = [*loop.inits, initial]
    loop.results.append(Value(initial.type, loop, hint))
    carried = Value(initial.type, loop.body.block, hint)
    loop.body.block.args.append(carried)
    return carried


# --- readers ------------------------------------------------------------------------------------


def _dots(function: Function, transit: Transit) -> list[Operation]:
    uses, found, pending = uses_of(function.body), [], [transit.load.result]
    while pending:
        for op in uses.get(pending.pop(), []):
            if isinstance(op, Transpose):
                pending.append(op.result)
            else:
                found.append(op)
    return found


def read_slots(function: Function, transit: Transit, block: Block, count: Value | None) -> None:
    """Let the dots read the slot; transpositions on the way become views of it."""
    uses = uses_of(function.body)
    pending: list[tuple[Value, tuple[Transpose, ...]]] = [(transit.load.result, ())]
    while pending:
        value, path = pending.pop()
        for op in dict.fromkeys(uses.get(value, [])):
            if isinstance(op, Transpose):
                pending.append((op.result, (*path, op)))
            else:
                assert isinstance(op, Dot)
                for position in (0, 1):
                    if op.groups[position] == [value]:
                        op.groups[position] = [_local_load(transit, op, path, block, count)]
        for op in path[-1:]:
            if op.parent is not None and op in op.parent.ops:
                op.parent.ops.remove(op)


def read_slot(function: Function, transit: Transit, block: Block, count: Value) -> None:
    """Let whoever uses the tile have it from the slot, read once in front of the first use."""
    assert transit.buffer is not None
    value = transit.load.result
    readers = [op for op in (ancestor_in(user, block) for user in uses_of(function.body).get(value, [])) if op]
    if not readers:
        return
    b = Builder(block, transit.load.loc)
    with b.at(block, min(map(block.ops.index, readers))):
        loaded = b.local_load(b.slot(transit.buffer, count))
    loaded.hint = value.hint
    replace_uses(function.body, {value: loaded})


def _local_load(transit: Transit, dot: Dot, path: tuple[Transpose, ...], block: Block, count: Value | None) -> Value:
    """Read the slot in front of the dot, or once in the load's own block where the operand may be kept."""
    assert transit.buffer is not None and dot.parent is not None
    place: Operation = dot
    outside = ancestor_in(dot, block)
    kept = transit.layouts.load.num_registers * transit.slot.dtype.bytes <= KEPT_BYTES
    if outside is not None and kept:
        place = outside
    assert place.parent is not None
    b = Builder(place.parent, dot.loc)
    with b.at(place.parent, place.parent.ops.index(place)):
        slot = b.slot(transit.buffer, count if count is not None else b.index(0))
        for op in path:
            slot = b.transpose_slot(slot, op.perm)
        loaded = b.local_load(slot)
    loaded.hint = transit.load.result.hint
    return loaded
