"""check-protocol: prove that ranks which run a kernel together never meet in the wrong order, or say where they do.

For worlds of 2 and 3 ranks the pass looks for small launches that the protocol is meant for (`checker.rehearsal`) and
runs each on an abstract machine (`checker.protocol_machine`), with a block for each program and with one or two blocks
for all programs of a rank. It finds deadlocks, flags that are signalled twice, data that is read before it has arrived
or rewritten while it may be read, writes that may come after the launch of the rank whose memory they go to has ended,
accesses before it has begun, waits for a copy's reads where its writes matter, and missing proxy fences. It changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tilewright.ir.core import Function, Operation
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.model import Model
from tilewright.passes.checker.program import RoleProgram
from tilewright.passes.checker.protocol_machine import ProtocolMachine
from tilewright.passes.checker.protocol_program import (
    flag_programs,
    flags_depend_on_data,
    protocol_programs,
    touches_ranks,
)
from tilewright.passes.checker.rehearsal import Launch, Runs, Search, all_met, goes_on, trace
from tilewright.passes.checker.scenarios import find_leaves
from tilewright.passes.checker.trace import Event, Infeasible
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

#: numbers of ranks: with three, two of them act on the third without each other's knowledge
WORLDS = (2, 3)
#: hints where no launch fits, and where none goes on with one block on each rank
MISFIT = (
    "in no small launch that was tried every signal meets a wait. If the kernel is for none like this one, say which "
    "it is for: tw.assume(...) what holds of sizes, num_programs() and world_size()"
)
STUCK = "a block runs its programs in order: those that send must come before those that wait"


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
    #: launches looked at to find those
    tried: int = 0
    #: operations between ranks that none of them runs
    missed: set[Operation] = field(default_factory=set)


def check(function: Function, context: PassContext) -> Result:
    """Check one function. Raises IRError."""
    model, result = Model(function, context.target), Result()
    programs, flags = protocol_programs(model), flag_programs(model)
    if not flags:
        flags = programs  # what is left to search for is inputs that reach all of the program
    leaves = find_leaves(model, {value for program in programs for value in program.compiler.needed})
    search, checker = Search(model, flags, leaves), _Checker(model, programs, result)
    result.missed = {op for op in model.ops if touches_ranks(op)}
    for world in WORLDS:
        launches, other = search.launches(world, more=world == WORLDS[0])
        for number, launch in enumerate(launches):
            checker.check(launch, few=1 if number else 2)
        if not flags_depend_on_data(flags):
            checker.require(launches, other)
        elif other is not None:
            _require_both(search, other)
    result.tried = len(search.tried)
    return result


@dataclass(eq=False)
class _Checker:
    """Plays launches."""

    model: Model
    programs: list[RoleProgram]
    result: Result

    def check(self, launch: Launch, few: int) -> None:
        """A launch that fits, with a block for each program, and with up to ``few`` of them. Raises IRError.

        Few blocks may be too few for a launch, but not by signals that a block leaves out.
        """
        programs = len(launch.runs) // launch.world
        self._play(launch, programs)
        if not self._shares_blocks(launch):
            return
        together = self._trace(launch, 1)
        if goes_on(together) or not all_met(together):
            for blocks in range(1, min(programs, few + 1)):
                self._play(launch, blocks)

    def require(self, launches: list[Launch], other: Launch | None) -> None:
        """Raises IRError where no launch fits, or none goes on with one block on each rank. ``other``: the best one."""
        if other is not None:
            blocks = len(other.runs) // other.world
            self._play(other, blocks, MISFIT)
            for event, fault in ((other.outside, _outside), (other.unread, _unread)):
                if event is not None:
                    raise fault(event).error(other.text(blocks))
        shared = [launch for launch in launches if self._shares_blocks(launch)]
        if len(shared) == len(launches) and not any(goes_on(self._trace(launch, 1)) for launch in shared):
            for launch in shared:
                self._play(launch, 1, STUCK)

    def _shares_blocks(self, launch: Launch) -> bool:
        """Whether programs may have to share blocks."""
        return bool(self.model.function.attributes.get("persistent")) and len(launch.runs) > launch.world

    def _trace(self, launch: Launch, blocks: int) -> Runs:
        return trace(self.programs, launch.inputs, blocks)

    def _play(self, launch: Launch, blocks: int, hint: str = "") -> None:
        """``hint``: what to say of a fault, if not what comes with it."""
        runs: Runs = []
        try:
            runs = self._trace(launch, blocks)
            self.result.steps += ProtocolMachine(self.model, launch.world, runs).run()
        except Infeasible:
            return
        except Fault as fault:
            if launch.inputs.most_trips is not None and any(run.shortened for block in runs for run in block.values()):
                launch.inputs.most_trips = None  # shortened loops may be what is wrong: look again without
                self._play(launch, blocks, hint)
                return
            fault.hint = hint or fault.hint
            raise fault.error(launch.text(blocks)) from None
        self.result.launches.append(launch.text(blocks))
        self.result.missed -= {event.op for block in runs for run in block.values() for event in run.events}


def _require_both(search: Search, launch: Launch) -> None:
    """Where data decides which flags are used: those of a tensor are both signalled and waited for. Raises IRError."""
    signalled, awaited = search.used_flags()
    for event in (event for block in launch.runs for run in block.values() for event in run.events):
        root = event.place.root
        if event.kind == "signal" and root not in awaited:
            raise _unread(event).error(launch.text(1))
        if event.kind == "wait_flags" and root not in signalled:
            raise Fault(f"deadlock: nobody signals flags of %{root.hint}", event.op).error(launch.text(1))


def _unread(signal: Event) -> Fault:
    return Fault(
        f"nobody waits for flag {signal.place}: what it tells of may arrive after that rank's launch has ended",
        signal.op,
        hint=f"wait(flag) on the rank that it is sent to. {MISFIT}",
        kind="unread",
    )


def _outside(event: Event) -> Fault:
    return Fault(f"there is no flag {event.place}", event.op, hint=MISFIT, kind="outside")


__all__ = ["CheckProtocol", "Result", "check"]
