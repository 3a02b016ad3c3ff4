"""check-schedule: prove that roles, rings, waits, fences and barriers fit together, or say where they do not.

The pass runs the scheduled program's control flow on small inputs (`checker.scenarios`) and the roles' asynchronous
operations on an abstract machine (`checker.machine`) in which every unit finishes as late as the waits allow. It finds
deadlocks, wrong arrival counts, slots read before they are written or overwritten before they are read, results read
in flight, missing proxy fences, and bulk stores that outlive the block's shared memory. It changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tilewright.ir.core import Function, Operation
from tilewright.passes.checker.block_events import BLOCK
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.machine import Machine
from tilewright.passes.checker.model import Model
from tilewright.passes.checker.program import RoleProgram
from tilewright.passes.checker.scenarios import Inputs, find_leaves, larger, more_scenarios, scenarios, with_more_tiles
from tilewright.passes.checker.trace import Infeasible, Run
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: events of one role that a scenario follows, and steps of all threads and scenarios after which no other is begun
MOST_EVENTS, MOST_STEPS = 1500, 12000
#: inputs to try for code that the usual ones do not reach
MOST_TRIES = 16
#: events of one role when a fault seen in shortened loops is looked for in the loops as they are
MOST_CONFIRMED = 50000


@register_pass("check-schedule")
class CheckSchedule(FunctionPass):
    """The last pass of the default pipelines, unless the environment says ``TILEWRIGHT_CHECK_SCHEDULE=0``."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        check(function, context)


@dataclass
class Result:
    """What a schedule was checked on."""

    inputs: list[Inputs] = field(default_factory=list)
    steps: int = 0
    #: loops and branches of each role that no inputs reached: (operation, 1: once, 2: more than once) or branch
    missed: set[tuple[Operation, int]] = field(default_factory=set)


def check(function: Function, context: PassContext) -> Result:
    """Check one function. Raises IRError."""
    model, result = Model(function, context.target), Result()
    if not model.asynchronous:
        return result
    programs = [RoleProgram(model, role, BLOCK) for role in model.roles]
    leaves = find_leaves(model, {value for program in programs for value in program.compiler.needed})
    result.missed = {goal for program in programs for goal in program.goals}
    for inputs in scenarios(model, leaves):
        if result.steps <= MOST_STEPS:
            _check_on(model, programs, inputs, result)
    if result.missed:
        for inputs in more_scenarios(model, leaves, MOST_TRIES):
            missed = set(result.missed)
            if missed and result.steps <= MOST_STEPS and _reaches(model, programs, inputs, missed):
                _check_on(model, programs, with_more_tiles(model, inputs), result)
                for more in larger(model, leaves, inputs):
                    if _reaches(model, programs, more, missed):
                        _check_on(model, programs, more, result)
    return result


def _trace(model: Model, programs: list[RoleProgram], inputs: Inputs, most_events: int) -> list[list[Run]]:
    """For each block of the cluster the runs of its roles."""
    return [[program.trace(inputs.of_block(rank), most_events) for program in programs] for rank in range(model.ctas)]


def _reaches(model: Model, programs: list[RoleProgram], inputs: Inputs, missed: set[tuple[Operation, int]]) -> bool:
    """Whether something runs that has not run before, or goes wrong before the roles even meet."""
    try:
        runs = [run for block in _trace(model, programs, inputs, MOST_EVENTS) for run in block]
        return any(run.covered & missed for run in runs)
    except Fault:
        return True
    except Infeasible:
        return False


def _check_on(model: Model, programs: list[RoleProgram], inputs: Inputs, result: Result) -> None:
    runs: list[list[Run]] = []
    try:
        runs = _trace(model, programs, inputs, MOST_EVENTS)
        result.steps += Machine(model, runs).run()
    except Infeasible:
        return
    except Fault as fault:
        ranks = range(model.ctas)
        if inputs.most_trips is None or not any(_shortens(p, inputs.of_block(r)) for p in programs for r in ranks):
            raise fault.error(str(inputs)) from None
        result.steps += _confirm(model, programs, inputs)
    result.inputs.append(inputs)
    for run in (run for block in runs for run in block):
        result.missed -= run.covered


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
        return Machine(model, _trace(model, programs, inputs, MOST_CONFIRMED)).run()
    except Fault as fault:
        raise fault.error(str(inputs)) from None


__all__ = ["CheckSchedule", "Result", "check"]
