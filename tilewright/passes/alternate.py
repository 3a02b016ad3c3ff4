"""alternate: two groups of consumers work on whole tiles in turn: one's epilogue runs under the other's products.

The consumers of a persistent kernel share each tile, and no matrix product runs while they convert and store it. Here
they split into two roles of one warpgroup each, and every role works on every second tile of its block::

    async.role @consumer_0 { tile.for %tile = %block to %tiles step 2 %blocks {
        await the turn; products; pass the turn; epilogue; count the ring's uses by the tile after this one } }
    async.role @consumer_1 { count the uses by the first tile; tile.for %tile = %block + %blocks ... the same }

The rings carry the tiles one behind the other as before, so a role must know how many uses the other's tiles take: it
runs their scalar code. The main loops take turns, from a tile's first `async.await` to its last: parity tells only two
neighbouring uses of a stage apart, so no role may await a use while an earlier one is still to come. The turn is a ring
without a buffer; a tile awaits the turn of the tile before it. ("Ping-pong" kernels of CUTLASS order theirs likewise.)
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.async_ops import Await, MakeRing, Publish, Release, Role
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Operation, Region, Value, replace_uses
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Binary, Broadcast, Cast, Constant, Dot, ExpandDims, For, NumBlocks, Yield
from tilewright.ir.types import SlotType, TileType
from tilewright.passes.dce import eliminate_dead_code, has_effect
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import ALTERNATE, result_type
from tilewright.passes.roles import WARPGROUP, distribute_registers

#: consumers that alternate
GROUPS = 2
#: accumulators of one thread beyond which a warpgroup cannot hold a tile beside its addresses and counts
MOST_ACCUMULATORS = 160
#: accumulators of one thread from which on alternating is the default
LEAST_ACCUMULATORS = 128


@register_pass("alternate")
class Alternate(FunctionPass):
    """Applies where it can and pays (`obstacle`, `pays`), unless the option ``schedule`` names a choice."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        wanted = context.options.schedule
        if wanted not in (None, ALTERNATE):
            return
        problem = obstacle(function, context)
        if problem is None and (wanted == ALTERNATE or pays(function, context.target)):
            _alternate(function, context.target)
        elif problem is not None and wanted == ALTERNATE:
            raise problem


def obstacle(function: Function, context: PassContext) -> IRError | None:
    """Why a function's consumers cannot take tiles in turn; None where they can."""
    hint, warps = "leave out schedule=", GROUPS * WARPGROUP
    if context.options.num_ctas not in (None, 1):
        return IRError(
            "consumers of blocks in clusters do not alternate", function.loc, f"leave out num_ctas=, or {hint}"
        )
    if _tile_loop(function) is None:
        return IRError("only the consumers of a persistent kernel can alternate", function.loc, hint)
    if context.options.num_warps not in (None, warps):
        return IRError(f"consumers that alternate have {warps} warps", function.loc, f"num_warps={warps}, or {hint}")
    for dot in (op for op in function.walk() if isinstance(op, Dot)):
        if _accumulators(dot) > MOST_ACCUMULATORS * WARPGROUP * context.target.warp_size:
            shape = result_type(dot).shape
            text = f"a tile of {shape} does not fit the registers of one warpgroup"
            return IRError(text, dot.loc, f"{hint}, or use a smaller tile, for example (128, 128)")
    return None


def pays(function: Function, target: Target) -> bool:
    """Whether the tile fills the registers of one warpgroup, and all that is done is to add up products and store them.

    Then alternating costs nothing but the last tile's epilogue, where two warpgroups would share the tile, and fills
    the matrix unit during epilogues where the tile has one warpgroup to begin with. Smaller tiles are chosen where the
    grid is small, and blocks have one tile. Other vector work needs registers, of which a warpgroup that holds such a
    tile has few left; between products, warpgroups that share a tile hide it better (`tilewright.passes.turns`).
    """
    dots = [op for op in function.walk() if isinstance(op, Dot)]
    lanes = WARPGROUP * target.warp_size
    fills = LEAST_ACCUMULATORS <= sum(_accumulators(dot) for dot in dots) / lanes <= MOST_ACCUMULATORS
    return fills and all(map(_only_accumulates, dots)) and not any(_computes(op, lanes) for op in function.walk())


def _computes(op: Operation, lanes: int) -> bool:
    """Whether an operation is vector work other than the rounding of a result, on more than an element of each lane."""
    tiles = any(isinstance(v.type, TileType) and v.type.size > lanes for v in op.results)
    return tiles and not op.regions and not isinstance(op, Broadcast | Cast | Constant | Dot | ExpandDims)


def _accumulators(dot: Dot) -> int:
    """Elements that a dot's accumulator takes; twice as many where it computes in parts."""
    return result_type(dot).size * (2 if dot.precision == "3xtf32" else 1)


def _only_accumulates(dot: Dot) -> bool:
    """Whether the dot adds up over a loop, and its operands come from shared memory as they are."""
    block = dot.parent
    assert block is not None
    carried = dot.acc.owner is block and dot.precision != "3xtf32"  # which splits its operands in between
    return carried and all(isinstance(v.type, SlotType) for v in (dot.a, dot.b))


def _consumer(function: Function) -> Role | None:
    roles = [op for op in function.body.block.ops if isinstance(op, Role) and not op.single_thread]
    return next((role for role in roles if any(isinstance(op, Await) for op in role.body.walk())), None)


def _tile_loop(function: Function) -> tuple[Role, For] | None:
    """The consumers and their loop over the tiles of a block."""
    role = _consumer(function)
    if role is None:
        return None
    loops = [op for op in role.body.block.ops if isinstance(op, For) and isinstance(op.step.op, NumBlocks)]
    return (role, loops[0]) if len(loops) == 1 else None


def _alternate(function: Function, target: Target) -> None:
    found = _tile_loop(function)
    assert found is not None
    role, loop = found
    body = function.body.block
    place, number = body.ops.index(role), role.body.block.ops.index(loop)
    body.ops.remove(role)
    producer, registers = distribute_registers(target, GROUPS * WARPGROUP, _engine(function))
    for op in body.ops:
        if isinstance(op, MakeRing):
            op.consumers = 1
        elif isinstance(op, Role):
            op.registers = producer
    b = Builder(body, role.loc)
    with b.at(body, place):
        for group in range(GROUPS):
            copy = role.body.clone({})
            b.insert(Role(regions=[copy], kind=f"{role.kind}_{group}", warps=WARPGROUP, registers=registers))
    with b.at(body, 0):
        turns = b.ring(GROUPS, hint="turns", producers=WARPGROUP * target.warp_size)
    for group in range(GROUPS):
        consumer = body.ops[place + 1 + group]
        assert isinstance(consumer, Role)
        tiles = consumer.body.block.ops[number]
        assert isinstance(tiles, For)
        _take_every_second(tiles, group, turns)
    function.attributes["num_warps"] = WARPGROUP
    function.attributes["threads"] = (1 + GROUPS) * WARPGROUP * target.warp_size
    eliminate_dead_code(function)
    _sum_up(function)


def _engine(function: Function) -> str:
    """Who copies; see `tilewright.passes.roles.PRODUCER_REGISTERS`."""
    roles = [op for op in function.body.block.ops if isinstance(op, Role)]
    return "tma" if any(role.single_thread for role in roles) else "threads"


def _take_every_second(loop: For, group: int, turns: Value) -> None:
    """Keep the tiles ``group``, ``group + GROUPS``, ... of a block; the others' uses of rings are only counted."""
    block, outer = loop.body.block, loop.parent
    assert outer is not None
    program = loop.body.clone({})
    b = Builder(outer, loop.loc)
    with b.at(outer, outer.ops.index(loop)):
        inits = list(loop.inits)
        start = loop.lo
        for _ in range(group):
            inits = _count(b, program, start, inits)
            start = b.add(start, loop.step)
        step = b.mul(loop.step, b.index(GROUPS))
        first = b.index(group)
    distance = loop.step
    loop.lo, loop.step, loop.inits = start, step, [*inits, first]
    number = Value(first.type, block, "number")
    block.args.append(number)
    loop.results.append(Value(first.type, loop, "number"))
    _order(block, number, turns)
    terminator = block.terminator
    assert isinstance(terminator, Yield)
    b = Builder(block, loop.loc)
    with b.at(block, block.ops.index(terminator)):
        values, tile = list(terminator.values), loop.index
        for _ in range(GROUPS - 1):
            tile = b.add(tile, distance)
            values = _count(b, program, tile, values)
        terminator.values = [*values, b.add(number, b.index(GROUPS))]


def _order(block: Block, number: Value, turns: Value) -> None:
    """Await the turn of the tile before, and pass the turn on behind the last wait for a ring."""
    waiting = [op for op in block.ops if any(isinstance(o, Await) for o in op.walk())]
    b = Builder(block, waiting[0].loc)
    with b.at(block, block.ops.index(waiting[-1]) + 1):
        b.insert(Publish(turns, number, []))
    with b.at(block, block.ops.index(waiting[0])):
        branch = b.if_else(b.compare("gt", number, b.index(0)))
        with b.at(branch.then_body.block):
            before = b.sub(number, b.index(1))
            b.insert(Await(turns, before))
            b.insert(Release(turns, before))
            b.yield_()
        with b.at(branch.else_body.block):
            b.yield_()


# --- tiles of the other group -----------------------------------------------------------------------


def _count(b: Builder, program: Region, tile: Value, carried: Sequence[Value]) -> list[Value]:
    """The values that a tile's program hands on, computed without what it does; only counts will be needed of them."""
    mapping: dict[Value, Value] = dict(zip(program.block.args, [tile, *carried], strict=True))
    terminator = program.block.terminator
    assert isinstance(terminator, Yield)
    for op in program.block.ops:
        if op is not terminator and not _acts(op):
            clone = b.insert(op.clone(mapping))
            for region in clone.regions:
                _drop_effects(region.block)
    return [mapping.get(v, v) for v in terminator.values]


def _acts(op: Operation) -> bool:
    return has_effect(op) and not op.regions


def _drop_effects(block: Block) -> None:
    block.set_ops([op for op in block.ops if not _acts(op)])
    for op in block.ops:
        for region in op.regions:
            _drop_effects(region.block)


def _sum_up(function: Function) -> None:
    """Loops that only count become ``init + trips * increment``."""
    for loop in [op for op in function.walk() if isinstance(op, For)]:
        terminator = loop.body.block.terminator
        assert isinstance(terminator, Yield) and loop.parent is not None
        steps = [_increment(x, value) for x, value in zip(loop.carried, terminator.values, strict=True)]
        counts = [step for step in steps if step is not None]
        if not counts or len(counts) < len(steps) or any(has_effect(op) or op.regions for op in loop.body.block.ops):
            continue
        b = Builder(loop.parent, loop.loc)
        with b.at(loop.parent, loop.parent.ops.index(loop)):
            length = b.add(b.sub(loop.hi, loop.lo), b.sub(loop.step, b.index(1)))
            trips = b.binary("max", b.binary("floordiv", length, loop.step), b.index(0))
            sums = [b.add(x, b.mul(trips, b.index(step))) for x, step in zip(loop.inits, counts, strict=True)]
        loop.parent.ops.remove(loop)
        replace_uses(function.body, dict(zip(loop.results, sums, strict=True)))


def _increment(argument: Value, value: Value) -> int | None:
    """How much a carried value grows with each iteration, where that is a constant."""
    total = 0
    while value is not argument:
        op = value.op
        if not isinstance(op, Binary) or op.fn != "add" or not isinstance(op.rhs.op, Constant):
            return None
        total += int(op.rhs.op.value)
        value = op.lhs
    return total
