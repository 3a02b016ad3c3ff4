"""schedule: whether roles hand tiles to each other, or every warp copies ahead for itself.

Targets without hardware for roles have no choice. On the others a function whose dots all fit the asynchronous matrix
unit gets roles, as one with large tiles of float64 or exact float32 does, whose consumers compute from registers
(`tilewright.passes.matrix.default_schedule`). One dot that does not fit (its dtype, precision or shape) sends the
whole function through prefetch. The option ``schedule=`` overrules it.
How many warps were asked for is checked here too, before layouts divide by them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.core import Function, IRError, Operation
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import TileType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import (
    ALTERNATE,
    PREFETCH,
    ROLES,
    SCHEDULES,
    WGMMA_ROWS,
    default_schedule,
    divides,
    from_registers,
    operand_shape,
    role_obstacle,
)

#: warps that issue one wgmma
WARPGROUP = 4
#: threads of a block, and elements that they may hold of one tile: 256 registers each
MOST_THREADS, MOST_ELEMENTS = 1024, 1 << 18


@register_pass("schedule")
class Schedule(FunctionPass):
    """Sets the attribute ``schedule`` of functions with dots where the target leaves a choice."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        wanted = context.options.schedule
        if wanted not in (None, *SCHEDULES):
            raise IRError(f"unknown schedule {wanted!r}", function.loc, f"one of {', '.join(map(repr, SCHEDULES))}")
        if wanted is not None and wanted != PREFETCH:
            wanted = ROLES  # how the roles share the work is for `turns` and `alternate` to say
        dots = [op for op in function.walk() if isinstance(op, Dot)]
        warps = context.options.num_warps
        if warps is not None and warps & (warps - 1):
            power = 1 << warps.bit_length() - 1
            hint = f"use num_warps={power} or num_warps={2 * power}"
            raise IRError(f"num_warps={warps} is not a power of two", function.loc, hint)
        if warps is not None and warps * context.target.warp_size > MOST_THREADS:
            hint = f"use num_warps={MOST_THREADS // context.target.warp_size} or fewer"
            raise IRError(f"num_warps={warps}: a block has at most {MOST_THREADS} threads", function.loc, hint)
        for op in function.walk():
            check_sizes(op)
        if not dots:
            return
        obstacle = role_obstacle(function, context.target, warps) if wanted == ROLES else None
        if obstacle is not None:
            raise obstacle
        if context.target.has("setmaxnreg"):
            function.attributes["schedule"] = wanted or default_schedule(function, context.target, warps)
        if warps is not None and function.attributes.get("schedule") == ROLES and context.options.schedule != ALTERNATE:
            check_rows(warps, dots)


def check_sizes(op: Operation) -> None:
    """Raise IRError for a tile that no block holds: to find out by compiling it takes minutes."""
    for type_ in (result.type for result in op.results):
        if isinstance(type_, TileType) and type_.size > MOST_ELEMENTS:
            message = f"a tile of shape {type_.shape} has {type_.size} elements, a block holds at most {MOST_ELEMENTS}"
            raise IRError(message, op.loc, "load smaller tiles, in a loop or in more programs")


def check_rows(warps: int, dots: Sequence[Dot]) -> None:
    """Raise IRError where an asynchronous product cannot be divided among the warpgroups."""
    groups = warps // WARPGROUP
    for dot in dots:
        rows = operand_shape(dot, "a")[0]
        if not from_registers(dot) and not divides(dot, groups):
            message = f"num_warps={warps}: {rows} rows do not divide among {groups} groups of {WARPGROUP} warps"
            hint = f"each group takes a multiple of {WGMMA_ROWS} rows, or columns of {WGMMA_ROWS}"
            raise IRError(message, dot.loc, hint)
