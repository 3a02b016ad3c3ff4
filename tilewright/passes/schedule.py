"""schedule: whether roles hand tiles to each other, or every warp copies ahead for itself.

Targets without hardware for roles have no choice. On the others a function whose dots all fit the asynchronous matrix
unit gets roles; one dot that does not (its dtype, precision or shape) sends the whole function through prefetch.
The option ``schedule=`` overrules it.
"""

from __future__ import annotations

from tilewright.ir.core import Function, IRError
from tilewright.ir.tile_ops import Dot
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import PREFETCH, ROLES, SCHEDULES, role_obstacle


@register_pass("schedule")
class Schedule(FunctionPass):
    """Sets the attribute ``schedule`` of functions with dots where the target leaves a choice."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        wanted = context.options.schedule
        if wanted not in (None, *SCHEDULES):
            raise IRError(f"unknown schedule {wanted!r}", function.loc, f"one of {', '.join(map(repr, SCHEDULES))}")
        if wanted is not None and wanted != PREFETCH:
            wanted = ROLES  # how the roles share the work is for `turns` and `alternate` to say
        if not any(isinstance(op, Dot) for op in function.walk()):
            return
        obstacle = role_obstacle(function, context.target)
        if wanted == ROLES and obstacle is not None:
            raise obstacle
        if context.target.has("setmaxnreg"):
            function.attributes["schedule"] = wanted or (ROLES if obstacle is None else PREFETCH)
