"""Which small launches a protocol is meant for: sizes, scalars and grids on which every flag finds its other side.

What a kernel's arguments have to do with its grid is known to its caller alone. So inputs are looked for on which, for
a given number of ranks, every wait is met by a signal, every signal by a wait of the rank that it goes to, and no flag
is signalled twice or lies outside its tensor: such inputs *fit*. The search starts from the smallest sizes and changes
what brings more flags together; `tw.assume` narrows it. What a protocol does wrong on inputs that fit is a fault;
that inputs do not fit is one only if none do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from tilewright.ir.comm_ops import WaitFlags
from tilewright.ir.core import Value
from tilewright.ir.types import ViewType
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.model import Model
from tilewright.passes.checker.places import Place
from tilewright.passes.checker.program import RoleProgram
from tilewright.passes.checker.scalars import root_axis
from tilewright.passes.checker.scenarios import Inputs, Leaves
from tilewright.passes.checker.trace import Event, Infeasible, Run

#: launches to try for one number of ranks, those that the search goes on from, and changes from the smallest sizes
MOST_TRIES, MOST_KEPT, MOST_CHANGES = 160, 3, 4
#: programs of a rank, and events of one role, that a launch may have
MOST_PROGRAMS, MOST_EVENTS = 16, 600
#: further inputs that fit, for loops and branches that the first ones do not reach
MOST_MORE = 2

#: what a launch is made of: ("grid", axis), ("dim", (tensor, axis)) or ("scalar", parameter)
Knob = tuple[str, Any]
Sizes = tuple[int, ...]
#: for each block of each rank the runs of the roles by number
Runs = list[dict[int, Run]]


@dataclass(eq=False)
class Launch:
    """One launch of a world: what each block does."""

    world: int
    inputs: Inputs
    #: one block for each program
    runs: Runs
    #: flags that found their other side, and what went wrong
    met: int = 0
    wrong: int = 0
    #: a first flag at fault
    unmet: Event | None = None

    @property
    def fits(self) -> bool:
        return not self.wrong

    @property
    def share_wrong(self) -> float:
        return self.wrong / (self.wrong + self.met) if self.wrong else 0.0

    @property
    def covered(self) -> set[Any]:
        return {goal for roles in self.runs for run in roles.values() for goal in run.covered}

    def text(self, blocks: int | None = None) -> str:
        """As a message names it. ``blocks``: of each rank, if not one for each program."""
        parts = str(self.inputs).rsplit(", block", 1)[0]
        how = "each program in a block of its own" if blocks is None else f"{blocks} block on each rank"
        return f"{self.world} ranks, {parts}, {how}"


@dataclass(eq=False)
class Search:
    """Looks for launches that fit."""

    model: Model
    programs: Sequence[RoleProgram]
    leaves: Leaves
    tried: dict[tuple[int, Sizes], Launch | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for op in self.model.ops:
            if isinstance(op, WaitFlags):
                for axis in range(op.flags.type.rank):  # type: ignore[union-attr]
                    root, number = root_axis(op.flags, axis)
                    if isinstance(root.type, ViewType) and root.type.shape[number] is None:
                        self.leaves.dims.setdefault((root, number), 1)
        self.knobs: list[Knob] = [("grid", axis) for axis in range(3)]
        self.knobs += [("dim", leaf) for leaf in self.leaves.dims]
        self.knobs += [("scalar", leaf) for leaf in self.leaves.scalars]
        self.steps = [1, 1, 1, *self.leaves.dims.values(), *self.leaves.scalars.values()]

    @property
    def persistent(self) -> bool:
        return bool(self.model.function.attributes.get("persistent"))

    # --- search -------------------------------------------------------------------------------------

    def launches(self, world: int) -> tuple[list[Launch], Launch | None]:
        """The launches that fit, the smallest first, and the best of the others."""
        budget = len(self.tried) + MOST_TRIES
        start = (1,) * len(self.knobs)
        best: list[tuple[Sizes, Launch]] = []
        frontier = [start]
        for _ in range(MOST_CHANGES + 1):
            found = [(sizes, launch) for sizes in frontier if (launch := self._try(world, sizes, budget)) is not None]
            best = sorted([*best, *found], key=lambda item: (item[1].share_wrong, sum(item[0])))[:MOST_KEPT]
            if best and best[0][1].fits:
                break
            frontier = [new for sizes, _ in best or [(start, None)] for new in _changed(sizes, values(world))]
        fitting = [(sizes, launch) for sizes, launch in best if launch.fits]
        if not fitting:
            return [], best[0][1] if best else None
        return [fitting[0][1], *self._more(world, *fitting[0], budget)], None

    def _more(self, world: int, sizes: Sizes, first: Launch, budget: int) -> Iterator[Launch]:
        """Launches that reach what the first one does not."""
        missed = {goal for program in self.programs for goal in program.goals} - first.covered
        given = 0
        for new in _changed(sizes, (2, 0)):
            for larger in (new, *_changed(new, values(world))):
                if not missed or given == MOST_MORE:
                    return
                launch = self._try(world, larger, budget)
                if launch is not None and launch.fits and launch.covered & missed:
                    missed -= launch.covered
                    given += 1
                    yield launch
                    break

    def _try(self, world: int, sizes: Sizes, budget: int) -> Launch | None:
        key = world, sizes
        if key not in self.tried:
            if len(self.tried) >= budget:
                return None
            self.tried[key] = self._launch(world, sizes)
        return self.tried[key]

    def _launch(self, world: int, sizes: Sizes) -> Launch | None:
        inputs = self._inputs(world, sizes)
        programs = prod(inputs.grid)
        if not 0 < programs <= MOST_PROGRAMS:
            return None
        try:
            launch = Launch(world, inputs, self.trace(inputs, programs))
        except (Infeasible, Fault):
            return None
        if any(run.cut for roles in launch.runs for run in roles.values()):
            return None
        rehearse(launch)
        return launch

    def _inputs(self, world: int, sizes: Sizes) -> Inputs:
        period = self.model.most_stages
        inputs = Inputs(world=world, most_trips=2 * period + 2, period=period)
        grid = [1, 1, 1]
        for (kind, what), size, step in zip(self.knobs, sizes, self.steps, strict=True):
            if kind == "grid":
                grid[what] = size
            elif kind == "dim":
                inputs.dims[what] = size * step
            else:
                inputs.scalars[what] = _scalar(what, size * step)
        inputs.grid = (grid[0], grid[1], grid[2])
        return inputs

    def trace(self, inputs: Inputs, blocks: int) -> Runs:
        """What each block of each rank does. Raises Fault, Infeasible."""
        runs: Runs = []
        x, y, _ = inputs.grid
        for rank in range(inputs.world):
            for block in range(blocks):
                ids = block % x, block // x % y, block // (x * y)
                own = replace(inputs, rank=rank, block=block, blocks=blocks, ids=ids)
                runs.append({p.role.number: p.trace(own, MOST_EVENTS * (1 if blocks > 1 else 4)) for p in self.programs})
        return runs


def values(world: int) -> tuple[int, ...]:
    """Sizes beside 1 that have something to do with a number of ranks."""
    return tuple(sorted({2, world, world + 1, 2 * world, 2 * world + 1}))


def _changed(sizes: Sizes, to: Sequence[int]) -> Iterator[Sizes]:
    """The same with one size changed."""
    for position, size in enumerate(sizes):
        for value in to:
            if value != size and (value or position > 2):
                yield (*sizes[:position], value, *sizes[position + 1 :])


def _scalar(param: Value, size: int) -> Any:
    name = param.type.dtype.name  # type: ignore[union-attr]
    return bool(size % 2) if name == "i1" else size if name[0] == "i" else float(size)


# --- rehearsal ------------------------------------------------------------------------------------


def rehearse(launch: Launch) -> None:
    """Bring signals and waits together, whatever else holds blocks up."""
    signals: dict[Any, Event] = {}
    awaited: set[Any] = set()
    waits: list[tuple[int, Event]] = []
    outside = 0
    for number, roles in enumerate(launch.runs):
        for event in (event for run in roles.values() for event in run.events):
            if event.kind not in ("signal", "wait_flags"):
                continue
            place = event.place
            if not _inside(place, launch):
                outside += 1
            elif event.kind == "wait_flags":
                waits.append((number, event))
                awaited.update((place.root, place.rank, index) for index in place.elements())
            else:
                flag = (place.root, place.rank, place.elements()[0])
                outside += flag in signals
                signals[flag] = event
    never = [flag for flag in awaited if flag not in signals]
    unread = [flag for flag in signals if flag not in awaited]
    launch.met = len(awaited) - len(never)
    launch.wrong = outside + len(never) + len(unread)
    launch.unmet = signals[unread[0]] if unread else None


def _inside(place: Place, launch: Launch) -> bool:
    if not 0 <= place.rank < launch.world:
        return False
    for axis, (first, end) in enumerate(place.box):
        known = place.root.type.shape[axis]  # type: ignore[union-attr]
        size = known if known is not None else launch.inputs.dims.get((place.root, axis))
        if first < 0 or (size is not None and end > size):
            return False
    return True


def goes_on(runs: Runs) -> bool:
    """Whether every role comes to its end if each goes through its signals and waits in order."""
    signalled: set[Any] = set()
    pending = [
        [event for event in run.events if event.kind in ("signal", "wait_flags")] for roles in runs for run in roles.values()
    ]
    moved = True
    while moved:
        moved = False
        for events in pending:
            while events:
                place = events[0].place
                flags = {(place.root, place.rank, index) for index in place.elements()}
                if events[0].kind == "signal":
                    signalled |= flags
                elif not flags <= signalled:
                    break
                del events[0]
                moved = True
    return not any(pending)


__all__ = ["Launch", "Runs", "Search", "goes_on"]
