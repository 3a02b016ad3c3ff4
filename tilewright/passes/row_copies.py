"""row-copies: in functions without products, which loads of loops travel ahead through shared memory.

They get a plain shared layout and the engine ``cp_async``; `tilewright.passes.copy_ahead` makes the copies. What is too
small for a copy is left to `tilewright.passes.load_ahead`.
"""

from __future__ import annotations

from tilewright.ir.core import Function
from tilewright.ir.layout import SharedLayout
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, For, Load, Reduce
from tilewright.ir.types import TileType
from tilewright.passes.analysis import enclosing_operations, view_root, written_tensors
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import PREFETCH
from tilewright.passes.placement import early_address, thread_engine
from tilewright.passes.prefetch import follows_index
from tilewright.passes.warp_count import default_warps

ENGINE = "cp_async"
#: what a load of a row should bring at least to travel through shared memory
LEAST_ROW_BYTES = 1024


@register_pass("row-copies")
class RowCopies(FunctionPass):
    """Sets ``shared`` and ``engine`` of the loads; then also the function's ``schedule`` and ``num_warps``."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if any(isinstance(op, Dot) for op in function.walk()):
            return
        loads = row_loads(function, context.target)
        for load in loads:
            load.shared, load.engine = plain_layout(load), ENGINE
        if loads:
            function.attributes["schedule"] = PREFETCH
            function.attributes["num_warps"] = context.options.num_warps or default_warps(function, context.target)


def row_loads(function: Function, target: Target) -> list[Load]:
    """Loads that can travel ahead through shared memory in loops where threads meet at reductions of rows.

    There registers are precious: what is reduced waits in them, so that few blocks run side by side and hide little.
    Functions that communicate keep their order.
    """
    loops, written, found = enclosing_operations(function), written_tensors(function), []
    if any(op.base_name.startswith("comm.") for op in function.walk()):
        return []
    for loop in [op for op in function.walk() if isinstance(op, For) and _reduces_rows(op)]:
        for load in [op for op in loop.body.block.ops if isinstance(op, Load)]:
            tile = load.result.type
            assert isinstance(tile, TileType)
            if tile.size * tile.dtype.bytes < LEAST_ROW_BYTES or load.after or view_root(load.view) in written:
                continue
            if not follows_index(load, loop):  # what stays the same stays in the cache
                continue
            load.shared = plain_layout(load)
            if early_address(load, loops, written) and thread_engine(load, target) == ENGINE:
                found.append(load)
            load.shared = None
    return found


def _reduces_rows(loop: For) -> bool:
    """Whether the body itself reduces whole tiles, or along another axis than the first."""
    ops = [op for op in loop.body.block.ops if isinstance(op, Reduce)]
    return any(isinstance(op.source.type, TileType) and (op.axis > 0 or op.source.type.rank == 1) for op in ops)


def plain_layout(load: Load) -> SharedLayout:
    """The shared layout of a row's tile: packed, the last axis first."""
    tile = load.result.type
    assert isinstance(tile, TileType)
    return SharedLayout(tile.shape, tile.dtype.bits, tuple(reversed(range(tile.rank))))
