"""schedule: whether roles hand tiles to each other, or every warp copies ahead for itself.

Targets without hardware for roles have no choice. On the others a function whose dots all fit the asynchronous matrix
unit gets roles, as one with large tiles of float64 or exact float32 does, whose consumers compute from registers
(`tilewright.passes.matrix.default_schedule`). One dot that does not fit (its dtype, precision or shape) sends the
whole function through prefetch. The option ``schedule=`` overrules it.
"""

from __future__ import annotations

from tilewright.ir.core import Function, IRError
from tilewright.ir.tile_ops import Dot
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import PREFETCH, ROLES, default_schedule, role_obstacle


@register_pass("schedule")
class Schedule(FunctionPass):
    """Sets the attribute ``schedule`` of functions with dots where the target leaves a choice."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        wanted = context.options.schedule
        if wanted not in (None, ROLES, PREFETCH):
            raise IRError(f"unknown schedule {wanted!r}", function.loc, f"one of {ROLES!r} and {PREFETCH!r}")
        if not any(isinstance(op, Dot) for op in function.walk()):
            return
        warps = context.options.num_warps
        obstacle = role_obstacle(function, context.target, warps) if wanted == ROLES else None
        if obstacle is not None:
            raise obstacle
        if context.target.has("setmaxnreg"):
            function.attributes["schedule"] = wanted or default_schedule(function, context.target, warps)
