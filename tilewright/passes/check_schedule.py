"""check-schedule: prove that roles, rings, waits, fences and barriers fit together, or say where they do not.

The pass runs the scheduled program's control flow on small inputs (`checker.scenarios`) and the roles' asynchronous
operations on an abstract machine (`checker.machine`) in which every unit finishes as late as the waits allow. It finds
deadlocks, wrong arrival counts, slots read before they are written or overwritten before they are read, results read
in flight, missing proxy fences, and bulk stores that outlive the block's shared memory. It changes nothing.
"""

from __future__ import annotations

import os

from tilewright.ir.core import Function
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.machine import Machine
from tilewright.passes.checker.model import Model
from tilewright.passes.checker.program import Infeasible, RoleProgram, Run
from tilewright.passes.checker.scenarios import Inputs, find_leaves, scenarios
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: events of one role that a scenario follows, and steps of all threads and scenarios after which no other is begun
MOST_EVENTS, MOST_STEPS = 1500, 12000
#: events of one role when a fault seen in shortened loops is looked for in the loops as they are
MOST_CONFIRMED = 50000


@register_pass("check-schedule")
class CheckSchedule(FunctionPass):
    """Runs at the end of the default pipelines. The environment variable ``TILEWRIGHT_CHECK_SCHEDULE=0`` skips it."""

    enabled: bool = True

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if self.enabled and os.environ.get("TILEWRIGHT_CHECK_SCHEDULE", "1") != "0":
            check(function, context)


def check(function: Function, context: PassContext) -> list[Inputs]:
    """Check one function; gives the inputs that it was checked on. Raises IRError."""
    model = Model(function, context.target)
    if not model.asynchronous:
        return []
    programs = [RoleProgram(model, role) for role in model.roles]
    needed = {value for program in programs for value in program.compiler.needed}
    done, steps = [], 0
    for inputs in scenarios(model, find_leaves(model, needed)):
        if steps > MOST_STEPS:
            break
        try:
            steps += _check_on(model, programs, inputs)
        except Infeasible:
            continue
        done.append(inputs)
    return done


def _check_on(model: Model, programs: list[RoleProgram], inputs: Inputs) -> int:
    runs: list[Run] = []
    try:
        for program in programs:
            runs.append(program.trace(inputs, MOST_EVENTS))
        return Machine(model, runs).run()
    except Fault as fault:
        if inputs.most_trips is not None and any(_shortens(p, inputs) for p in programs):
            return _confirm(model, programs, inputs)
        raise fault.error(str(inputs)) from None


def _shortens(program: RoleProgram, inputs: Inputs) -> bool:
    """Whether loops of the role were shortened on these inputs."""
    try:
        return program.trace(inputs, MOST_EVENTS).shortened
    except Fault:
        return True


def _confirm(model: Model, programs: list[RoleProgram], inputs: Inputs) -> int:
    """Loops were shortened, which may be what went wrong: look again with the loops as they are."""
    inputs.most_trips = None
    try:
        return Machine(model, [program.trace(inputs, MOST_CONFIRMED) for program in programs]).run()
    except Fault as fault:
        raise fault.error(str(inputs)) from None


__all__ = ["CheckSchedule", "check"]
