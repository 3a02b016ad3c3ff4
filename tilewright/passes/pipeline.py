"""pipeline: turn placed loads into asynchronous copies that travel through rings.

Loads of one block whose tiles are first and last used by the same operations share a ring, and so do
the loads of dots that follow each other at once. Each use of the ring is numbered by a running count
that is carried through all loops around it, so that the ring never drains between iterations of outer
loops::

    async.acquire %ring, %n              // producer: stage n mod stages is free
    %t = async.copy %A, [%m, %k], %slot
    async.publish %ring, %n, [%t]        // full when the copy has landed
    async.await %ring, %n                // consumer, before the first use
    ...
    async.release %ring, %n              // after the last use

The result is still one program; `roles` splits it. In clusters, copies of what all blocks want are shared
(`tilewright.passes.clusters`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tilewright.ir.async_ops import Acquire, Await, Barrier, Publish, Release
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Operation, Region, Value, replace_uses, uses_of
from tilewright.ir.tile_ops import Dot, For, If, Load, Pick, Transpose, While, Yield
from tilewright.ir.types import ScalarType, SlotType, TileType, i32
from tilewright.passes.analysis import ancestor_in, enclosing_operations
from tilewright.passes.clusters import cluster_size, shared_axis
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import ROLES, matrix_unit, schedule_of
from tilewright.passes.roles import registers_are_scarce

#: a copy and a use at the same time
LEAST_STAGES = 2


@dataclass
class Group:
    """Loads that share a ring, and the operations of their block between which they are read."""

    block: Block
    loads: list[Load]
    first_use: Operation
    last_use: Operation
    in_loop: bool
    ring: Value | None = None
    buffers: list[Value] = field(default_factory=list)
    #: copies that the blocks of a cluster share -> the dim along which they divide them
    shared: dict[Load, int] = field(default_factory=dict)


@register_pass("pipeline")
class Pipeline(FunctionPass):
    """``num_stages`` fixes the depth of all rings in loops; None leaves it to the shared-memory plan."""

    num_stages: int | None = None

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if schedule_of(function, context.target) != ROLES:
            return
        groups = find_groups(function)
        riders = _join_riders(function, groups)
        if not groups:
            return
        shared, ctas = any(group.shared for group in groups), cluster_size(function)
        if ctas > 1 and not shared:
            raise IRError(
                f"num_ctas={ctas}: the tiles that the programs of '{function.name}' have in common do not divide among "
                f"{ctas} blocks",
                function.loc,
                "use larger tiles, or leave out num_ctas",
            )
        stages = self.num_stages or context.options.num_stages
        self._allocate(function, groups, stages)
        rewriter = _Rewriter(groups)
        top = Builder(function.body.block, function.loc)
        with top.at(function.body.block, position=_after_allocations(function)):
            counts = {id(g): top.index(0) for g in groups}
        rewriter.rewrite(function.body.block, counts)
        _read_riders(function, context, riders, rewriter.slots)
        _use_slots(function, rewriter.slots)
        if not matrix_unit(context.target, function).reads_slots:
            _read_slots(function)
        if shared:  # other blocks may copy to this one, and arrive, until they end too
            with top.at(function.body.block):
                top.insert(Barrier(scope="cluster"))

    def _allocate(self, function: Function, groups: list[Group], stages: int | None) -> None:
        b = Builder(function.body.block, function.loc)
        with b.at(function.body.block, position=0):
            for group in groups:
                ctas = cluster_size(function) if group.shared else 1
                if group.in_loop:
                    group.ring = b.ring(stages or LEAST_STAGES, hint="ring", elastic=stages is None, ctas=ctas)
                else:
                    # once per program: a second stage lets a persistent block fetch the next program's tile
                    ahead = bool(function.attributes.get("persistent"))
                    group.ring = b.ring(1, hint="ring", elastic=ahead, ctas=ctas, **({"most": 2} if ahead else {}))
                for load in group.loads:
                    group.buffers.append(b.alloc(_slot_type(load), group.ring, hint=load.result.hint))


def find_groups(function: Function) -> list[Group]:
    """Placed loads by block and by the operations that first and last read them."""
    uses, loops = uses_of(function.body), enclosing_operations(function)
    groups: dict[tuple[int, int, int], Group] = {}
    for load in placed_loads(function):
        if is_rider(load, uses):
            continue
        block = load.parent
        assert block is not None
        readers = [ancestor_in(op, block) for op in _readers(load.result, uses)]
        positions = {id(op): i for i, op in enumerate(block.ops)}
        inside = sorted((op for op in readers if op is not None), key=lambda op: positions[id(op)])
        if not inside:
            continue
        first, last = inside[0], inside[-1]
        in_loop = _in_inner_loop(block, loops, function)
        group = groups.setdefault((id(block), id(first), id(last)), Group(block, [], first, last, in_loop))
        group.loads.append(load)
        axis = shared_axis(load, _slot_type(load), function)
        if axis is not None:
            group.shared[load] = axis
    return _merge_neighbours(list(groups.values()))


def placed_loads(function: Function) -> list[Load]:
    """Loads that travel through shared memory."""
    return [op for op in function.walk() if isinstance(op, Load) and op.shared is not None]


def is_rider(load: Load, uses: dict[Value, list[Operation]]) -> bool:
    """A vector, or a tile to be cast, that placement lets travel with dot operands; threads read it."""
    return not all(isinstance(op, Dot) for op in _readers(load.result, uses))


def _join_riders(function: Function, groups: list[Group]) -> list[Load]:
    """Let each rider join a group of its block whose tiles are loaded before they and it are used.

    The group is awaited for its first use and given back behind the last. Other riders stay loads into registers.
    """
    uses, joined = uses_of(function.body), []
    for load in [op for op in placed_loads(function) if is_rider(op, uses)]:
        block = load.parent
        assert block is not None
        order = {id(op): n for n, op in enumerate(block.ops)}
        readers = [ancestor_in(op, block) for op in _vector_readers(load, uses)]
        places = [order[id(op)] for op in readers if op is not None]
        group = next((g for g in groups if g.block is block and _loaded_before(g, load, places, order)), None)
        if group is None:
            _stay_behind(function, load)
            continue
        group.loads = sorted([*group.loads, load], key=lambda op: order[id(op)])
        group.first_use = block.ops[min(order[id(group.first_use)], *places)]
        group.last_use = block.ops[max(order[id(group.last_use)], *places)]
        joined.append(load)
    return joined


def _vector_readers(load: Load, uses: dict[Value, list[Operation]]) -> list[Operation]:
    """Operations that read a vector, or an element that is picked from it."""
    found: list[Operation] = []
    for op in uses.get(load.result, []):
        found += uses.get(op.result, []) if isinstance(op, Pick) else [op]
    return found


def _stay_behind(function: Function, load: Load) -> None:
    """Leave a vector to registers; of one with an element alone, load just that."""
    picks = [op for op in uses_of(function.body).get(load.result, []) if isinstance(op, Pick)]
    load.shared, load.engine = None, "threads"
    for pick in picks:
        assert pick.parent is not None and isinstance(load.result.type, TileType)
        b = Builder(pick.parent, load.loc)
        with b.at(pick.parent, pick.parent.ops.index(pick)):
            first = b.mul(load.index[0], b.index(load.result.type.size))
            element = b.element(load.view, [b.add(first, pick.index)])
        pick.parent.ops.remove(pick)
        replace_uses(function.body, {pick.result: element})


def _loaded_before(group: Group, load: Load, places: list[int], order: dict[int, int]) -> bool:
    loaded = max(order[id(op)] for op in [*group.loads, load])
    return bool(places) and loaded < min(order[id(group.first_use)], *places)


def _merge_neighbours(groups: list[Group]) -> list[Group]:
    """Groups read by one run of dots become one: the run can then stay in flight as a whole."""
    merged: list[Group] = []
    for group in groups:
        partner = next((g for g in merged if g.block is group.block and _adjoin(g, group)), None)
        if partner is None:
            merged.append(group)
            continue
        order = {id(op): n for n, op in enumerate(group.block.ops)}
        partner.loads = sorted(partner.loads + group.loads, key=lambda op: order[id(op)])
        partner.shared |= group.shared
        partner.first_use = min(partner.first_use, group.first_use, key=lambda op: order[id(op)])
        partner.last_use = max(partner.last_use, group.last_use, key=lambda op: order[id(op)])
    return merged


def _adjoin(one: Group, other: Group) -> bool:
    """Both are loaded before their first use, from which on to the last there are dots alone."""
    ops = one.block.ops
    start = min(ops.index(g.first_use) for g in (one, other))
    end = max(ops.index(g.last_use) for g in (one, other))
    loaded = max(ops.index(load) for g in (one, other) for load in g.loads)
    return loaded < start and all(isinstance(op, Dot) for op in ops[start : end + 1])


def _readers(value: Value, uses: dict[Value, list[Operation]]) -> list[Operation]:
    """Operations that read the tile, looking through transpositions."""
    found: list[Operation] = []
    for op in uses.get(value, []):
        found += _readers(op.result, uses) if isinstance(op, Transpose) else [op]
    return found


def _in_inner_loop(block: Block, loops: dict[Block, Operation], function: Function) -> bool:
    """Inside a loop other than the persistent one."""
    depth = 0
    while block in loops:
        depth += isinstance(loops[block], For | While)
        parent = loops[block].parent
        assert parent is not None
        block = parent
    return depth > (1 if function.attributes.get("persistent") else 0)


def _slot_type(load: Load) -> SlotType:
    tile = load.result.type
    assert isinstance(tile, TileType) and load.shared is not None
    return SlotType(tile.shape, tile.dtype, load.shared)


def _after_allocations(function: Function) -> int:
    ops = function.body.block.ops
    return sum(1 for op in ops if op.base_name in ("async.ring", "async.alloc"))


class _Rewriter:
    """Replaces loads by ring operations and threads the counts through the control flow."""

    def __init__(self, groups: list[Group]):
        self.groups = groups
        self.slots: dict[Value, Value] = {}  # load result -> slot

    def rewrite(self, block: Block, counts: dict[int, Value]) -> dict[int, Value]:
        """Rewrite a block; ``counts`` maps a group to its running count, as does the result."""
        here = [g for g in self.groups if g.block is block]
        old = list(block.ops)
        block.set_ops([])
        b = Builder(block)
        counts = dict(counts)
        for op in old:
            b.loc = op.loc
            for group in here:
                if op is group.first_use:
                    b.insert(Await(group.ring, counts[id(group)]))
            if isinstance(op, Load) and any(op in g.loads for g in here):
                (group,) = [g for g in here if op in g.loads]
                if op is group.loads[-1]:
                    self._produce(b, group, counts[id(group)])
            else:
                counts.update(self._nested(b, op, counts))
            for group in here:
                if op is group.last_use:
                    self._release(b, group, counts)
        return counts

    def _produce(self, b: Builder, group: Group, count: Value) -> None:
        assert group.ring is not None
        b.insert(Acquire(group.ring, count))
        tokens = []
        for load, buffer in zip(group.loads, group.buffers, strict=True):
            b.loc = load.loc
            slot = b.slot(buffer, count)
            slot.hint = load.result.hint
            part = group.shared.get(load)
            tokens.append(b.copy(load.view, load.index, slot, load.engine, load.pad, part, load.after, load.evict))
            self.slots[load.result] = slot
        b.insert(Publish(group.ring, count, tokens))

    def _release(self, b: Builder, group: Group, counts: dict[int, Value]) -> None:
        assert group.ring is not None
        b.insert(Release(group.ring, counts[id(group)]))
        counts[id(group)] = b.add(counts[id(group)], b.index(1))

    def _nested(self, b: Builder, op: Operation, counts: dict[int, Value]) -> dict[int, Value]:
        """Place an operation; if loads lie inside it, carry their counts through it."""
        inside = [g for g in self.groups if any(_contains(r, g.block) for r in op.regions)]
        if not inside:
            b.insert(op)
            return {}
        keys = [id(g) for g in inside]
        op.results += [Value(ScalarType(i32), op, "count") for _ in inside]
        if isinstance(op, For | While):
            op.inits = [*op.inits, *(counts[k] for k in keys)]
            args = [[Value(ScalarType(i32), r.block, "count") for _ in keys] for r in op.regions]
            for r, new in zip(op.regions, args, strict=True):
                r.block.args += new
            after = self.rewrite(op.regions[-1].block, {**counts, **dict(zip(keys, args[-1], strict=True))})
            _extend_yield(op.regions[-1], [after[k] for k in keys])
        else:
            assert isinstance(op, If)
            for r in op.regions:
                after = self.rewrite(r.block, counts)
                _extend_yield(r, [after[k] for k in keys])
        b.insert(op)
        return dict(zip(keys, op.results[-len(keys) :], strict=True))


def _contains(region: Region, block: Block) -> bool:
    return region.block is block or any(_contains(r, block) for op in region.block.ops for r in op.regions)


def _extend_yield(region: Region, values: list[Value]) -> None:
    terminator = region.block.terminator
    if isinstance(terminator, Yield):
        terminator.values = [*terminator.values, *values]
    else:
        region.block.append(Yield(values))


def _use_slots(function: Function, slots: dict[Value, Value]) -> None:
    """Let the dots read slots; transpositions become views of the slot."""
    block_of: dict[Value, Value] = dict(slots)
    doomed: list[Operation] = []
    for op in list(function.walk()):
        if isinstance(op, Transpose) and op.source in block_of:
            assert op.parent is not None
            slot, place = block_of[op.source], op.parent.ops.index(op)
            if slot.op is not None and slot.op.parent is op.parent:  # which comes with the last load of its group
                place = max(place, op.parent.ops.index(slot.op) + 1)
            b = Builder(op.parent, op.loc)
            with b.at(op.parent, place):
                block_of[op.result] = b.transpose_slot(slot, op.perm)
            doomed.append(op)
    replace_uses(function.body, block_of)
    for op in doomed:
        assert op.parent is not None
        op.parent.ops.remove(op)


def _read_riders(function: Function, context: PassContext, riders: list[Load], slots: dict[Value, Value]) -> None:
    """Read each rider behind the last dot before its first use, so that it arrives while that one is waited for; at
    the use itself where registers are scarce."""
    uses, scarce = uses_of(function.body), registers_are_scarce(function.body, function, context.target)
    for load in riders:
        slot = slots.pop(load.result)
        assert slot.op is not None and slot.op.parent is not None
        block = slot.op.parent
        readers = [ancestor_in(op, block) for op in _vector_readers(load, uses)]
        first = min(block.ops.index(op) for op in readers if op is not None)
        dots = [n for n, op in enumerate(block.ops[:first]) if isinstance(op, Dot) and n > block.ops.index(slot.op)]
        if dots and not scarce:
            first = dots[-1] + 1
        b = Builder(block, load.loc)
        picks = [op for op in uses[load.result] if isinstance(op, Pick)]
        with b.at(block, first):
            values = {pick.result: b.local_element(slot, pick.index) for pick in picks}
            if len(picks) < len(uses[load.result]):
                values[load.result] = b.local_load(slot)
        for old, new in values.items():
            new.hint = old.hint
        for pick in picks:
            assert pick.parent is not None
            pick.parent.ops.remove(pick)
        replace_uses(function.body, values)


def _read_slots(function: Function) -> None:
    """In front of dots with operands in registers: load the slots."""
    for dot in [op for op in function.walk() if isinstance(op, Dot)]:
        assert dot.parent is not None
        b = Builder(dot.parent, dot.loc)
        with b.at(dot.parent, dot.parent.ops.index(dot)):
            if isinstance(dot.a.type, SlotType):
                dot.a = b.local_load(dot.a)
            if isinstance(dot.b.type, SlotType):
                dot.b = b.local_load(dot.b)
