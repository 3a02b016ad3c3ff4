"""Which small launches a protocol is meant for: sizes, scalars and grids on which every flag finds its other side.

What a kernel's arguments have to do with its grid is known to its caller alone. So inputs are looked for on which, for
a given number of ranks, every wait is met by a signal, every signal by a wait of the rank that it goes to, and no flag
is signalled twice or lies outside its tensor: such inputs *fit*. The search starts from the smallest sizes and changes
what brings more flags together; `tw.assume` narrows it. What a protocol does wrong on inputs that fit is a fault;
that inputs do not fit is one only if none do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import prod
from typing import Any

from tilewright.ir.comm_ops import Signal, WaitFlags
from tilewright.ir.core import Operation, Value
from tilewright.ir.packet_ops import Send
from tilewright.ir.tile_ops import Binary, BlockId, Constant, Dim, For, NumBlocks, NumPrograms, ProgramId
from tilewright.ir.types import ScalarType, ViewType
from tilewright.passes.checker.faults import Fault
from tilewright.passes.checker.model import Model
from tilewright.passes.checker.places import Place
from tilewright.passes.checker.program import RoleProgram, control
from tilewright.passes.checker.protocol_program import flags_depend_on_data
from tilewright.passes.checker.scalars import root_axis
from tilewright.passes.checker.scenarios import Inputs, Leaves, find_leaves
from tilewright.passes.checker.trace import Event, Infeasible, Run

#: launches to try for one number of ranks, those that the search goes on from, and changes from the smallest sizes
MOST_TRIES, MOST_KEPT, MOST_CHANGES = 160, 3, 4
#: programs of a rank, and events of one role, that a launch may have
MOST_PROGRAMS, MOST_EVENTS = 16, 2000
#: further launches that fit, for loops and branches that the first one does not reach, and tries for them
MOST_MORE, MOST_TRIES_FOR_MORE = 2, 32

#: what a launch is made of: ("grid", axis), ("dim", (tensor, axis)), ("scalar", parameter), and ("seed", None) for what
#: data decides
Knob = tuple[str, Any]
Sizes = tuple[int, ...]
#: for each block of each rank the runs of the roles by number
Runs = list[dict[int, Run]]


@dataclass(eq=False)
class Launch:
    """One launch of a world, with a block for each program."""

    world: int
    inputs: Inputs
    #: of each block the signals and waits
    runs: Runs
    #: flags that found their other side, and what went wrong
    met: int = 0
    wrong: int = 0
    #: the signal of a flag that nobody waits for, and what names a flag that does not exist
    unread: Event | None = None
    outside: Event | None = None

    @property
    def share_wrong(self) -> float:
        """1 also where no flag is used."""
        return self.wrong / (self.wrong + self.met) if self.met else 1.0

    @property
    def covered(self) -> set[Any]:
        return _covered(self.runs)

    def text(self, blocks: int) -> str:
        """As a message names it. ``blocks``: of each rank."""
        parts = str(self.inputs).rsplit(", block", 1)[0]
        programs = prod(self.inputs.grid)
        how = ", a block for each program" if blocks == programs else f", {blocks} blocks on each"
        how = "" if programs == 1 else ", one block on each" if blocks == 1 else how
        return f"{self.world} ranks{how}, {parts}"


@dataclass(eq=False)
class Search:
    """Looks for launches that fit. ``programs``: the roles' signals and waits."""

    model: Model
    programs: Sequence[RoleProgram]
    #: all sizes and scalars that decide what roles do
    leaves: Leaves
    tried: dict[tuple[int, Sizes], Launch | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        waits = [op for op in self.model.ops if isinstance(op, WaitFlags)]
        waited = {root_axis(op.flags, axis) for op in waits for axis in range(len(_shape(op.flags)))}
        open_sizes = {(root, axis) for root, axis in waited if _shape(root)[axis] is None}
        for leaf in open_sizes:
            self.leaves.dims.setdefault(leaf, 1)
        self.uses_flags = any(isinstance(op, Signal | WaitFlags | Send) for op in self.model.ops)
        self.tiles = _tile_sizes(self.model)
        needed = find_leaves(self.model, {value for program in self.programs for value in program.compiler.needed})
        #: sizes of flag tensors, which only say how many flags a wait is for: as many as are signalled
        self.counted = open_sizes - set(needed.dims)
        dims = [leaf for leaf in self.leaves.dims if leaf in needed.dims]
        self.knobs: list[Knob] = [("grid", axis) for axis in range(3)]
        self.knobs += [("dim", leaf) for leaf in dims]
        self.knobs += [("scalar", leaf) for leaf in needed.scalars]
        if flags_depend_on_data(self.programs):
            self.knobs.append(("seed", None))
        self.steps = [1 if kind in ("grid", "seed") else self.tiles.get(what, 1) for kind, what in self.knobs]

    # --- search -------------------------------------------------------------------------------------

    def launches(self, world: int, more: bool) -> tuple[list[Launch], Launch | None]:
        """The launches that fit, and the best of the others if none does. One that uses no flags fits if all are so.

        ``more`` than one, if that reaches more code.
        """
        start, most = (1,) * len(self.knobs), len(self.tried) + MOST_TRIES
        best: list[tuple[Sizes, Launch]] = []
        frontier: Iterable[Sizes] = [start]
        for _ in range(MOST_CHANGES + 1):
            for sizes in frontier:
                launch = self._try(world, sizes, most)
                if launch is None:
                    continue
                if not launch.wrong and (launch.met or not self.uses_flags):
                    return [launch, *(self._more(world, sizes, launch) if more else ())], None
                best.append((sizes, launch))
            best = sorted(best, key=lambda item: (item[1].share_wrong, not item[1].wrong, sum(item[0])))[:MOST_KEPT]
            frontier = [new for sizes in [s for s, _ in best] or [start] for new in _changed(sizes, values(world))]
        using = [launch for _, launch in best if launch.wrong]
        return [launch for _, launch in best[: not using]], using[0] if using else None

    def _more(self, world: int, sizes: Sizes, first: Launch) -> Iterator[Launch]:
        """Launches that reach what the first one does not."""
        missed = {goal for program in self.programs for goal in _goals(program)} - self._reached(first)
        most, given = len(self.tried) + MOST_TRIES_FOR_MORE, 0
        changed = list(_changed(sizes, (2, 0)))
        for larger in chain(changed, (further for new in changed for further in _changed(new, values(world)))):
            if not missed or given == MOST_MORE:
                return
            launch = self._try(world, larger, most)
            if launch is not None and not launch.wrong and self._reached(launch) & missed:
                missed -= self._reached(launch)
                given += 1
                yield launch

    def _reached(self, launch: Launch) -> set[Any]:
        """What a launch covers, also where a block goes from one program to the next."""
        try:
            return launch.covered | _covered(trace(self.programs, launch.inputs, 1))
        except (Infeasible, Fault):
            return launch.covered

    def used_flags(self) -> tuple[set[Value], set[Value]]:
        """The tensors whose flags some launch that was tried signals, and waits for."""
        launches = (launch for launch in self.tried.values() if launch is not None)
        roles = (run for launch in launches for block in launch.runs for run in block.values())
        used = {(event.kind, event.place.root) for run in roles for event in run.events}
        return {root for kind, root in used if kind == "signal"}, {root for kind, root in used if kind == "wait_flags"}

    def _try(self, world: int, sizes: Sizes, most: int) -> Launch | None:
        key = world, sizes
        if key not in self.tried:
            if len(self.tried) >= most:
                return None
            self.tried[key] = self._launch(world, sizes)
        return self.tried[key]

    def _launch(self, world: int, sizes: Sizes) -> Launch | None:
        inputs = self._inputs(world, sizes)
        programs = prod(inputs.grid)
        if not 0 < programs <= MOST_PROGRAMS:
            return None
        try:
            launch = Launch(world, inputs, self._count_flags(inputs, trace(self.programs, inputs, programs)))
        except (Infeasible, Fault):
            return None
        rehearse(launch)
        return launch

    def _count_flags(self, inputs: Inputs, runs: Runs) -> Runs:
        """Give the tensors of flags the sizes that signals ask for."""
        events = [event for roles in runs for run in roles.values() for event in run.events if event.kind == "signal"]
        sizes = {
            (root, axis): max((event.place.box[axis][1] for event in events if event.place.root is root), default=1)
            for root, axis in self.counted
        }
        if all(inputs.dims[leaf] == size for leaf, size in sizes.items()):
            return runs
        inputs.dims.update(sizes)
        return trace(self.programs, inputs, len(runs) // inputs.world)

    def _inputs(self, world: int, sizes: Sizes) -> Inputs:
        inputs = Inputs(world=world, most_trips=2, period=self.model.most_stages)
        # what has no say in flags is as large as any tile: what one loop writes by large ones others read by small ones
        largest = max((self.tiles.get(leaf, 1) for leaf in self.leaves.dims), default=1)
        inputs.dims = {leaf: 1 if leaf in self.counted else largest for leaf in self.leaves.dims}
        inputs.scalars = {leaf: _scalar(leaf, self.tiles.get(leaf, 1)) for leaf in self.leaves.scalars}
        grid = [1, 1, 1]
        for (kind, what), size, step in zip(self.knobs, sizes, self.steps, strict=True):
            if kind == "grid":
                grid[what] = size
            elif kind == "seed":
                inputs.seed = size
            elif kind == "dim":
                inputs.dims[what] = size * step
            else:
                inputs.scalars[what] = _scalar(what, size * step)
        inputs.grid = (grid[0], grid[1], grid[2])
        return inputs


def trace(programs: Sequence[RoleProgram], inputs: Inputs, blocks: int) -> Runs:
    """What each of ``blocks`` blocks of each rank does. Raises Fault, Infeasible."""
    runs: Runs = []
    x, y, _ = inputs.grid
    for rank in range(inputs.world):
        for block in range(blocks):
            ids = block % x, block // x % y, block // (x * y)
            own = replace(inputs, rank=rank, block=block, blocks=blocks, ids=ids)
            runs.append({program.role.number: program.trace(own, MOST_EVENTS) for program in programs})
    if any(run.cut for roles in runs for run in roles.values()):
        raise Infeasible("a role does too much")
    return runs


def _covered(runs: Runs) -> set[Any]:
    return {goal for roles in runs for run in roles.values() for goal in run.covered}


def _goals(program: RoleProgram) -> Iterator[tuple[Operation, int]]:
    """How often loops may run (2: more than once) and which branches may be taken, where sizes have a say in it."""
    for op, times in program.goals:
        if isinstance(op, For) and isinstance(op.step.op, NumBlocks):
            continue  # over the programs of a block: one each
        values, pending = set(), control(op)
        while pending:
            value = pending.pop()
            if value not in values:
                values.add(value)
                pending += program.compiler.sources(value)
        if any(value.op is None or isinstance(value.op, Dim | ProgramId | NumPrograms | BlockId) for value in values):
            yield op, times
            if isinstance(op, For):
                yield op, 0


def _shape(view: Value) -> tuple[int | None, ...]:
    assert isinstance(view.type, ViewType)
    return view.type.shape


def _tile_sizes(model: Model) -> dict[Any, int]:
    """What sizes and scalars are divided by, or counted in, just as they are or with a constant added."""
    found: dict[Any, int] = {}
    for op in model.ops:
        value, step = None, None
        if isinstance(op, Binary) and op.fn == "floordiv":
            value, step = op.lhs, op.rhs.op
        elif isinstance(op, For):
            value, step = op.hi, op.step.op
        if value is None or not isinstance(step, Constant):
            continue
        while isinstance(value.op, Binary) and value.op.fn in ("add", "sub") and isinstance(value.op.rhs.op, Constant):
            value = value.op.lhs
        key = root_axis(value.op.view, value.op.axis) if isinstance(value.op, Dim) else value
        found[key] = max(found.get(key, 1), int(step.value))
    return found


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
    assert isinstance(param.type, ScalarType)
    name = param.type.dtype.name
    return bool(size % 2) if name == "i1" else size if name[0] == "i" else float(size)


# --- rehearsal ------------------------------------------------------------------------------------


def rehearse(launch: Launch) -> None:
    """Bring signals and waits together, whatever else holds blocks up."""
    signals: dict[Any, Event] = {}
    awaited: set[Any] = set()
    wrong = 0
    for event in (event for roles in launch.runs for run in roles.values() for event in run.events):
        place = event.place
        if event.kind not in ("signal", "wait_flags"):
            continue
        if not _inside(place, launch):
            wrong += 1
            launch.outside = event
        elif event.kind == "wait_flags":
            awaited.update((place.root, place.rank, index) for index in place.elements())
        else:
            flag = (place.root, place.rank, place.elements()[0])
            wrong += flag in signals
            signals[flag] = event
    never = [flag for flag in awaited if flag not in signals]
    unread = [flag for flag in signals if flag not in awaited]
    launch.met = len(awaited) - len(never)
    launch.wrong = wrong + len(never) + len(unread)
    launch.unread = signals[unread[0]] if unread else None


def _inside(place: Place, launch: Launch) -> bool:
    if not 0 <= place.rank < launch.world:
        return False
    for axis, (first, end) in enumerate(place.box):
        known = _shape(place.root)[axis]
        size = known if known is not None else launch.inputs.dims.get((place.root, axis))
        if first < 0 or (size is not None and end > size):
            return False
    return True


def goes_on(runs: Runs) -> bool:
    """Whether every role comes to its end if each goes through its signals and waits in order."""
    signalled: set[Any] = set()
    every = [run.events for roles in runs for run in roles.values()]
    pending = [[event for event in events if event.kind in ("signal", "wait_flags")] for events in every]
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


def all_met(runs: Runs) -> bool:
    """Whether every flag that is waited for is signalled by somebody, sooner or later."""
    used: dict[str, set[Any]] = {"signal": set(), "wait_flags": set()}
    for event in (event for roles in runs for run in roles.values() for event in run.events):
        if event.kind in used:
            used[event.kind].update((event.place.root, event.place.rank, index) for index in event.place.elements())
    return used["wait_flags"] <= used["signal"]


__all__ = ["Launch", "Runs", "Search", "all_met", "goes_on", "trace"]
