"""tile-order: which program a hardware block runs, and when.

A kernel with matrix products that is scheduled with roles becomes persistent: each block
walks the grid, so that copies for the next tile overlap the end of this one. Where two loads
follow different grid axes, the tiles that run at the same time form a square-ish window (groups of
``group`` rows), so that both operands are found in L2 again.
"""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Operation, Value, replace_uses
from tilewright.ir.tile_ops import BlockId, Dot, Load, NumBlocks, ProgramId
from tilewright.ir.types import ScalarType, i32
from tilewright.passes.analysis import enclosing_operations, program_axes
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import ROLES, schedule_of


@register_pass("tile-order")
class TileOrder(FunctionPass):
    """``persistent`` none: decide by the program. ``group``: rows of tiles in one L2 window."""

    group: int = 8
    persistent: bool | None = None

    def run_on_function(self, function: Function, context: PassContext) -> None:
        ids = [op for op in function.walk() if isinstance(op, ProgramId)]
        persistent = self.persistent
        if persistent is None:
            has_dots = any(isinstance(op, Dot) for op in function.walk())
            persistent = has_dots and schedule_of(function, context.target) == ROLES
        axes = reuse_axes(function)
        if not ids or not (persistent or axes):
            return
        body = function.body.block
        original = list(body.ops)
        body.set_ops([])
        b = Builder(body, function.loc)
        sizes = [b.num_programs(axis) for axis in range(3)]
        block = b.insert(BlockId(types=[ScalarType(i32)])).result
        if persistent:
            total = b.mul(b.mul(sizes[0], sizes[1]), sizes[2])
            blocks = b.insert(NumBlocks(types=[ScalarType(i32)])).result
            loop = b.for_loop(block, total, blocks, [], ["tile"])
            function.attributes["persistent"] = True
            with b.at(loop.body.block):
                self._number_tiles(b, function, ids, loop.index, sizes, axes, original)
                b.yield_()
        else:
            self._number_tiles(b, function, ids, block, sizes, axes, original)

    def _number_tiles(
        self,
        b: Builder,
        function: Function,
        ids: list[ProgramId],
        tile: Value,
        sizes: list[Value],
        axes: tuple[int, int] | None,
        original: list[Operation],
    ) -> None:
        """Decode ``tile`` into program ids, then place the original body behind."""
        programs = decode(b, tile, sizes, axes, self.group)
        for axis, value in enumerate(programs):
            value.hint = value.hint or f"program_{axis}"
        for op in original:
            if not isinstance(op, ProgramId):
                b.insert(op)
        _erase_nested(b.block, ids)
        replace_uses(function.body, {op.result: programs[op.axis] for op in ids})


def _erase_nested(block: Block, ids: list[ProgramId]) -> None:
    doomed = set(map(id, ids))
    for op in block.ops:
        for r in op.regions:
            r.block.set_ops([inner for inner in r.block.ops if id(inner) not in doomed])
            _erase_nested(r.block, ids)


def reuse_axes(function: Function) -> tuple[int, int] | None:
    """Two grid axes such that one load follows the first alone and another load the second alone."""
    loops = enclosing_operations(function)
    followed: set[frozenset[int]] = set()
    for op in function.walk():
        if isinstance(op, Load):
            parts = [program_axes(v, loops) for v in [op.view, *op.index]]
            followed.add(frozenset().union(*parts))
    for first in range(3):
        for second in range(first + 1, 3):
            alone = [any(first in f and second not in f for f in followed)]
            alone.append(any(second in f and first not in f for f in followed))
            if all(alone):
                return first, second
    return None


def decode(b: Builder, tile: Value, sizes: list[Value], axes: tuple[int, int] | None, group: int) -> list[Value]:
    """Program ids of a linear tile number: grouped along ``axes``, the third axis outermost; else axis 0 fastest."""
    if axes is None:
        x = b.binary("mod", tile, sizes[0])
        rest = b.binary("floordiv", tile, sizes[0])
        return [x, b.binary("mod", rest, sizes[1]), b.binary("floordiv", rest, sizes[1])]
    rows, columns = sizes[axes[0]], sizes[axes[1]]
    plane = b.mul(rows, columns)
    outer, inner = b.binary("floordiv", tile, plane), b.binary("mod", tile, plane)
    window = b.mul(columns, b.index(group))
    first = b.mul(b.binary("floordiv", inner, window), b.index(group))
    height = b.binary("min", b.sub(rows, first), b.index(group))
    place = b.binary("mod", inner, window)
    row = b.add(first, b.binary("mod", place, height))
    column = b.binary("floordiv", place, height)
    found = {axes[0]: row, axes[1]: column}
    return [found.get(axis, outer) for axis in range(3)]
