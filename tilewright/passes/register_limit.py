"""register-limit: the most registers that a thread may have, where a user says (``maxnreg=``).

A row of a matrix that waits in registers leaves few of them to other blocks, and an SM with few blocks hides little of
memory's latency: whoever knows better than the assembler's balance says so. Backends read the attribute ``maxnreg``.
A kernel asks for one limit on all targets: where threads cannot have so few, they have the fewest that they can.
"""

from __future__ import annotations

from tilewright.ir.async_ops import Role
from tilewright.ir.core import Function, IRError
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("register-limit")
class RegisterLimit(FunctionPass):
    """Sets the function's attribute ``maxnreg``; IRError where the target or the roles have no use for it."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        limit, target = context.options.maxnreg, context.target
        if limit is None:
            return
        most = target.registers_per_thread
        if limit > most:
            hint = f"use {most}, or leave out maxnreg"
            raise IRError(f"maxnreg={limit}: a thread of {target.name} has at most {most}", function.loc, hint)
        if any(isinstance(op, Role) and op.registers for op in function.walk()):
            raise IRError(
                f"maxnreg={limit}: the roles of '{function.name}' divide a block's registers among themselves",
                function.loc,
                'leave out maxnreg, or use schedule="prefetch", which has no roles',
            )
        function.attributes["maxnreg"] = max(limit, target.least_registers)
