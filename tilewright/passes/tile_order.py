"""tile-order: which program a hardware block runs, and when.

A kernel with matrix products that is scheduled with roles becomes persistent: each block
walks the grid, so that copies for the next tile overlap the end of this one. Where two loads
follow different grid axes, the tiles that run at the same time form a square-ish window (groups of
``group`` rows), so that both operands are found in L2 again. Where programs further along an axis run
longer or shorter loops (a triangular product), the long ones go first within a window of ``group`` places along
the other axes, so that the blocks end together and what programs of a place share stays in L2. Blocks that walk
over programs take equally many; where these are few and of different lengths, the hardware balances them better
(``persistent=False``).

Some GPUs consist of chiplets, each with an L2 of its own, and deal blocks to them in turn (AMD Instinct: eight XCDs).
There neighbouring tiles would all fetch the same operands into every L2. So blocks are renumbered such that one chiplet
gets ``chunk`` neighbours in a row; the end of the grid that fills no whole round stays as it is.

With clusters of blocks (`tilewright.passes.clusters`) the loop walks groups of neighbours along one axis, and each
block runs its member of the group. Where the axis ends within a group, blocks without a member run the last one's
beside it, without its effects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Operation, Value, replace_uses
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import (
    Binary,
    BlockId,
    Constant,
    Dim,
    Dot,
    For,
    Load,
    NumBlocks,
    NumPrograms,
    ProgramId,
)
from tilewright.ir.types import ScalarType, i32
from tilewright.passes.analysis import enclosing_operations, program_axes
from tilewright.passes.clusters import choose_axis, cluster_size, guard_effects
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import ROLES, schedule_of
from tilewright.passes.spread import is_spread, program_blocks


@register_pass("tile-order")
class TileOrder(FunctionPass):
    """``persistent`` none: decide by the program. ``group``: rows of tiles in one L2 window.

    ``chunk``: neighbouring tiles of one chiplet. None for both: what suits the target. ``num_ctas``: blocks of a
    cluster; None leaves it to the option of that name.
    """

    group: int | None = None
    chunk: int | None = None
    persistent: bool | None = None
    num_ctas: int | None = None

    def run_on_function(self, function: Function, context: PassContext) -> None:
        ids = [op for op in function.walk() if isinstance(op, ProgramId)]
        ctas = self.num_ctas or context.options.num_ctas or 1
        communicates = bool(function.attributes.get("communicates"))
        if communicates and ctas > 1:
            message = "programs that communicate with other ranks do not run in clusters"
            raise IRError(message, function.loc, "leave out num_ctas")
        cluster = None if is_spread(function) else _join_clusters(function, context.target, ctas)
        named = context.options.persistent if self.persistent is None else self.persistent
        persistent = named
        if persistent is None:
            has_dots = any(isinstance(op, Dot) for op in function.walk())
            persistent = has_dots and schedule_of(function, context.target) == ROLES
        persistent |= cluster is not None
        axes = reuse_axes(function)
        longest = sloping_axis(function) if (persistent or named is not None) and axes is None else None
        chiplets = 1 if persistent or not shares_neighbours(function) else context.target.chiplets
        if communicates:  # ranks wait for programs of others that come before theirs along axis 2: it stays the slowest
            axes, longest, chiplets = axes if axes == (0, 1) else None, None, 1
        if not ids or not (persistent or axes or longest or chiplets > 1):
            return
        order = _Order(axes, longest, self.group or context.target.tile_group)
        body = function.body.block
        original = list(body.ops)
        body.set_ops([])
        b = Builder(body, function.loc)
        sizes = [b.num_programs(axis) for axis in range(3)]
        block = b.insert(BlockId(types=[ScalarType(i32)])).result
        if is_spread(function):
            block = b.binary("floordiv", block, b.index(program_blocks(function)))
        if persistent:
            _walk(b, function, ids, block, sizes, order, original, cluster)
            return
        tile = block
        if chiplets > 1:
            total = b.mul(b.mul(sizes[0], sizes[1]), sizes[2])
            tile = by_chiplet(b, block, total, chiplets, self.chunk or context.target.chiplet_chunk)
        _place_programs(b, function, ids, order.decode(b, tile, sizes), original)


@dataclass(frozen=True)
class _Order:
    """``axes``: two along which rows of ``group`` tiles run at the same time; ``longest``: one along which they get
    longer (1) or shorter (-1)."""

    axes: tuple[int, int] | None
    longest: tuple[int, int] | None
    group: int

    def decode(self, b: Builder, tile: Value, sizes: list[Value]) -> list[Value]:
        """Program ids of a linear tile number."""
        if self.longest is not None:
            return decode_longest_first(b, tile, sizes, *self.longest, self.group)
        return decode(b, tile, sizes, self.axes, self.group)

    def of_groups(self, cluster: _Cluster) -> _Order:
        """The same window where tiles are groups of a cluster's programs."""
        if self.axes is None or self.axes[0] != cluster.axis:
            return self
        return replace(self, group=max(1, self.group // cluster.ctas))


def _walk(
    b: Builder,
    function: Function,
    ids: list[ProgramId],
    block: Value,
    sizes: list[Value],
    order: _Order,
    original: list[Operation],
    cluster: _Cluster | None,
) -> None:
    """The persistent loop of a block, or of the blocks of a cluster together."""
    function.attributes["persistent"] = True
    if cluster is not None:
        sizes, order = cluster.group(b, block, sizes), order.of_groups(cluster)
    total = b.mul(b.mul(sizes[0], sizes[1]), sizes[2])
    blocks = b.insert(NumBlocks(types=[ScalarType(i32)])).result
    if cluster is not None:
        block = b.binary("floordiv", block, b.index(cluster.ctas))
    if cluster is not None or is_spread(function):
        blocks = b.binary("floordiv", blocks, b.index(cluster_size(function)))
    loop = b.for_loop(block, total, blocks, [], ["tile"])
    with b.at(loop.body.block):
        programs = order.decode(b, loop.index, sizes)
        valid = None if cluster is None else cluster.pick(b, programs)
        _place_programs(b, function, ids, programs, original)
        if valid is not None:
            guard_effects(loop.body.block, valid)
        b.yield_()


def _place_programs(
    b: Builder, function: Function, ids: list[ProgramId], programs: list[Value], original: list[Operation]
) -> None:
    """Place the original body where ``programs`` are its ids."""
    for axis, value in enumerate(programs):
        value.hint = value.hint or f"program_{axis}"
    for op in original:
        if not isinstance(op, ProgramId):
            b.insert(op)
    _erase_nested(b.block, ids)
    replace_uses(function.body, {op.result: programs[op.axis] for op in ids})


@dataclass
class _Cluster:
    """Groups of ``ctas`` neighbours along ``axis``, of which each block runs a member."""

    ctas: int
    axis: int
    #: the block's member, and the size of the grid along the axis
    member: Value | None = None
    size: Value | None = None

    def group(self, b: Builder, block: Value, sizes: list[Value]) -> list[Value]:
        """The sizes of the grid of groups."""
        ctas, groups = b.index(self.ctas), list(sizes)
        self.member, self.size = b.binary("mod", block, ctas), sizes[self.axis]
        groups[self.axis] = b.binary("floordiv", b.add(self.size, b.index(self.ctas - 1)), ctas)
        return groups

    def pick(self, b: Builder, programs: list[Value]) -> Value:
        """Replace the group's number by the member's; gives whether the grid has it."""
        assert self.member is not None and self.size is not None
        place = b.add(b.mul(programs[self.axis], b.index(self.ctas)), self.member)
        programs[self.axis] = b.binary("min", place, b.sub(self.size, b.index(1)))
        return b.compare("lt", place, self.size)


def _join_clusters(function: Function, target: Target, ctas: int) -> _Cluster | None:
    """The clusters of a function, if there are to be any; writes them down as attributes."""
    axis = choose_axis(function, target, ctas) if ctas > 1 else None
    if axis is None:
        return None
    function.attributes["num_ctas"], function.attributes["cluster_axis"] = ctas, axis
    return _Cluster(ctas, axis)


def _erase_nested(block: Block, ids: list[ProgramId]) -> None:
    doomed = set(map(id, ids))
    for op in block.ops:
        for r in op.regions:
            r.block.set_ops([inner for inner in r.block.ops if id(inner) not in doomed])
            _erase_nested(r.block, ids)


def loaded_axes(function: Function) -> set[frozenset[int]]:
    """For each load, the grid axes that its address follows."""
    loops = enclosing_operations(function)
    followed: set[frozenset[int]] = set()
    for op in function.walk():
        if isinstance(op, Load):
            parts = [program_axes(v, loops) for v in [op.view, *op.index]]
            followed.add(frozenset().union(*parts))
    return followed


def reuse_axes(function: Function) -> tuple[int, int] | None:
    """Two grid axes such that one load follows the first alone and another load the second alone."""
    followed = loaded_axes(function)
    for first in range(3):
        for second in range(first + 1, 3):
            alone = [any(first in f and second not in f for f in followed)]
            alone.append(any(second in f and first not in f for f in followed))
            if all(alone):
                return first, second
    return None


def shares_neighbours(function: Function) -> bool:
    """Whether neighbouring programs load the same tiles and others do not: order matters to caches."""
    followed = loaded_axes(function)
    used = frozenset().union(*followed) if followed else frozenset()
    return any(f and f != used for f in followed)


def by_chiplet(b: Builder, block: Value, total: Value, chiplets: int, chunk: int) -> Value:
    """The tile of a block where blocks are dealt to ``chiplets`` in turn: ``chunk`` neighbours on each."""
    period = b.index(chiplets * chunk)
    whole = b.mul(b.binary("floordiv", total, period), period)
    chiplet, local = b.binary("mod", block, b.index(chiplets)), b.binary("floordiv", block, b.index(chiplets))
    period_start = b.mul(b.binary("floordiv", local, b.index(chunk)), period)
    place = b.add(b.mul(chiplet, b.index(chunk)), b.binary("mod", local, b.index(chunk)))
    return b.select(b.compare("lt", block, whole), b.add(period_start, place), block)


def decode(b: Builder, tile: Value, sizes: list[Value], axes: tuple[int, int] | None, group: int) -> list[Value]:
    """Program ids of a linear tile number: grouped along ``axes``, the third axis outermost; else axis 0 fastest."""
    if axes is None:
        sizes = [_positive(b, size) for size in sizes]
        x = b.binary("mod", tile, sizes[0])
        rest = b.binary("floordiv", tile, sizes[0])
        return [x, b.binary("mod", rest, sizes[1]), b.binary("floordiv", rest, sizes[1])]
    rows, columns = sizes[axes[0]], sizes[axes[1]]
    plane = _positive(b, b.mul(rows, columns))
    outer, inner = b.binary("floordiv", tile, plane), b.binary("mod", tile, plane)
    window = _positive(b, b.mul(columns, b.index(group)))
    first = _at_least(b, b.mul(b.binary("floordiv", inner, window), b.index(group)), 0)
    height = _positive(b, b.binary("min", b.sub(rows, first), b.index(group)))
    place = b.binary("mod", inner, window)
    row = b.add(first, b.binary("mod", place, height))
    column = b.binary("floordiv", place, height)
    found = {axes[0]: row, axes[1]: column}
    return [found.get(axis, outer) for axis in range(3)]


def _positive(b: Builder, size: Value) -> Value:
    """A size of a part of the grid, which is 1 at least."""
    return _at_least(b, size, 1)


def _at_least(b: Builder, value: Value, least: int) -> Value:
    """A number of programs that is no less: said so, divisions by it and of it are cheap (`lower.ranges`)."""
    return b.binary("max", value, b.index(least))


def sloping_axis(function: Function) -> tuple[int, int] | None:
    """A grid axis along which some loop with matrix products gets longer (1) or shorter (-1)."""
    for op in function.walk():
        if isinstance(op, For) and any(isinstance(o, Dot) for o in op.body.walk()):
            for axis in range(3):
                slope = _direction(op.hi, axis), _direction(op.lo, axis)
                if slope in ((1, 0), (0, 1)):
                    return axis, 1 if slope[0] else -1
    return None


def _direction(value: Value, axis: int) -> int | None:
    """1 or -1 where a scalar only grows or falls along a grid axis, 0 where it does not depend on it, None: unknown."""
    op = value.op
    if isinstance(op, ProgramId):
        return 1 if op.axis == axis else 0
    if op is None or isinstance(op, Constant | Dim | NumPrograms):
        return 0
    if not isinstance(op, Binary):
        return None
    left, right = _direction(op.lhs, axis), _direction(op.rhs, axis)
    if left is None or right is None:
        return None
    if op.fn in ("mul", "floordiv"):
        constant = op.rhs.op.value if isinstance(op.rhs.op, Constant) else 0
        return left if constant > 0 else 0 if left == right == 0 else None
    if op.fn == "sub":
        right = -right
    elif op.fn not in ("add", "min", "max"):
        return 0 if left == right == 0 else None
    return left or right if left * right >= 0 else None


def decode_longest_first(b: Builder, tile: Value, sizes: list[Value], axis: int, slope: int, group: int) -> list[Value]:
    """Program ids of a linear tile number: ``axis`` falls (``slope`` 1) or rises, slowest in windows of ``group``
    other places."""
    first, second = (a for a in range(3) if a != axis)
    places = b.mul(sizes[first], sizes[second])
    window = _positive(b, b.mul(sizes[axis], b.index(group)))
    start = _at_least(b, b.mul(b.binary("floordiv", tile, window), b.index(group)), 0)
    width = _positive(b, b.binary("min", b.sub(places, start), b.index(group)))
    inner = b.binary("mod", tile, window)
    place = b.add(start, b.binary("mod", inner, width))
    long = b.binary("floordiv", inner, width)
    if slope > 0:
        long = b.sub(b.sub(sizes[axis], b.index(1)), long)
    fast = _positive(b, sizes[first])
    found = {axis: long, first: b.binary("mod", place, fast), second: b.binary("floordiv", place, fast)}
    return [found[a] for a in range(3)]
