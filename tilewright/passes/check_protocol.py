"""check-protocol: prove that ranks which run a kernel together never meet in the wrong order, or say where they do.

For worlds of 2 and 3 ranks the pass looks for small launches that the protocol is meant for (`checker.rehearsal`) and
runs each on an abstract machine (`checker.protocol_machine`), with a block for each program and with one block for all
programs of a rank. It finds deadlocks, flags that are signalled twice, data that is read before it has arrived or
rewritten while it may be read, writes that may come after the launch of the rank whose memory they go to has ended,
accesses before it has begun, waits for a copy's reads where its writes matter, and missing proxy fences. It changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tilewright.ir.core import Function, IRError
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.model import Model
from tilewright.passes.checker.protocol_machine import ProtocolMachine
from tilewright.passes.checker.protocol_program import ProtocolProgram, relevant_roles
from tilewright.passes.checker.rehearsal import Launch, Runs, Search, goes_on
from tilewright.passes.checker.scenarios import find_leaves
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: numbers of ranks: with three, two of them act on the third without each other's knowledge
WORLDS = (2, 3)


@register_pass("check-protocol")
class CheckProtocol(FunctionPass):
    """For functions that communicate; with `check-schedule`, at the end of the default pipelines."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if function.attributes.get("communicates"):
            check(function, context)


@dataclass
class Result:
    """What a protocol was checked on."""

    launches: list[str] = field(default_factory=list)
    steps: int = 0
    tried: int = 0


def check(function: Function, context: PassContext) -> Result:
    """Check one function. Raises IRError."""
    model = Model(function, context.target)
    roles = relevant_roles(model)
    programs = [ProtocolProgram(model, role, roles) for role in roles]
    leaves = find_leaves(model, {value for program in programs for value in program.compiler.needed})
    search, result = Search(model, programs, leaves), Result()
    for world in WORLDS:
        launches, other = search.launches(world)
        checked = _Checked(model, roles, search, result)
        for launch in launches:
            checked.check(launch)
        if not any(program.by_data for program in programs):
            checked.require_progress(launches, other)
    result.tried = len(search.tried)
    return result


@dataclass(eq=False)
class _Checked:
    """The checks of the launches of one world."""

    model: Model
    roles: list
    search: Search
    result: Result
    #: whether some launch goes on with one block on each rank, and one that does not
    goes_on: bool = False
    stuck: tuple[Launch, Runs] | None = None

    def check(self, launch: Launch) -> None:
        """Raises IRError."""
        self._run(launch, launch.runs, launch.text())
        if not self.search.persistent or len(launch.runs) == launch.world:
            self.goes_on = True
            return
        runs = self.search.trace(launch.inputs, 1)
        if goes_on(runs):
            self.goes_on = True
            self._run(launch, runs, launch.text(blocks=1))
        elif self.stuck is None:
            self.stuck = launch, runs

    def require_progress(self, launches: list[Launch], other: Launch | None) -> None:
        """Raises IRError where no launch fits, or none goes on with one block on each rank."""
        if not launches and other is not None:
            self._run(other, other.runs, other.text())
            signal = other.unmet
            assert signal is not None
            raise Fault(
                f"nobody waits for flag {signal.place}: what it tells of may arrive after that rank's launch has ended",
                signal.op,
                hint="wait(flag) on the rank that it is sent to; tw.assume what holds of sizes, grid and world_size()",
                kind="unread",
            ).error(other.text())
        if not self.goes_on and self.stuck is not None:
            launch, runs = self.stuck
            self._run(launch, runs, launch.text(blocks=1))

    def _run(self, launch: Launch, runs: Runs, text: str) -> None:
        try:
            machine = ProtocolMachine(self.model, self.roles, launch.world, runs)
            self.result.steps += machine.run()
            machine.check_ends()
        except Fault as fault:
            raise fault.error(text) from None
        self.result.launches.append(text)


__all__ = ["CheckProtocol", "Result", "check"]
