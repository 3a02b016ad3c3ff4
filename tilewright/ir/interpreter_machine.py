"""The machine that interprets IR: values, threads of control, the table of rules, and how an operation executes.

A rule computes an operation's results from its operands. Rules of operations that hold regions or may block are
generators: they yield `Blocked` until they can go on, so that roles run side by side.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir.core import Function, IRError, Operation, Region, Value


@dataclass(slots=True)
class View:
    """A view of global memory: a strided array and the element where index 0 begins (tile.offset_view).

    ``ranks``: of a symmetric view, the arrays of all ranks.
    """

    array: np.ndarray
    origin: tuple[int, ...]
    ranks: tuple[np.ndarray, ...] = ()

    def derive(self, change: Callable[[np.ndarray], np.ndarray], origin: tuple[int, ...]) -> View:
        """The view of a part of the array, on each rank."""
        return View(change(self.array), origin, tuple(change(array) for array in self.ranks))


@dataclass(eq=False, slots=True)
class InFlight:
    """An accumulator that the matrix unit still works on: only async.dot and async.wait may take it."""

    array: np.ndarray
    group: Any


@dataclass(slots=True)
class Blocked:
    """Why an operation cannot go on: it is resumed once ``ready()`` holds."""

    ready: Callable[[], bool]
    op: Operation
    text: str
    #: threads that started inside the operation, and what each of them waits for
    inner: dict[Thread, Blocked] = field(default_factory=dict)


Steps = Generator[Blocked, None, Any]


def await_condition(ready: Callable[[], bool], op: Operation, text: str) -> Iterator[Blocked]:
    """Go on when ``ready()`` holds; ``text``: what is waited for."""
    if not ready():
        yield Blocked(ready, op, text)


class Trap(Exception):
    """A rule of the machine is broken; becomes an `IRError` with the operation's name and location."""


@dataclass(eq=False)
class Thread:
    """What one role (or the code outside roles) has in flight. See `tilewright.ir.interpreter_async`."""

    name: str
    groups: list[Any] = field(default_factory=list)  # dots in flight, oldest first
    copies: dict[str, list[Any]] = field(default_factory=dict)  # copies by token kind, oldest first
    stores: list[Any] = field(default_factory=list)  # bulk stores, oldest first
    writes: list[Any] = field(default_factory=list)  # slots stored to since the last publish
    role: Operation | None = None
    #: what this thread knows to have happened: the last event of each thread (a vector clock)
    clock: dict[Thread, int] = field(default_factory=dict)


@dataclass(eq=False)
class Program:
    """One program of the grid, or one block of a persistent kernel."""

    function: Function
    grid: tuple[int, int, int]
    ids: tuple[int, int, int] | None
    block_id: int
    num_blocks: int
    slots: list[Any] = field(default_factory=list)
    threads: list[Thread] = field(default_factory=list)
    barrier: Any = None
    #: what `tilewright.ir.interpreter_async` found in the function: for each ring, who publishes and releases it
    ring_users: dict[Value, Any] = field(default_factory=dict)
    cache: dict[Value, Any] = field(default_factory=dict)
    #: the programs of the cluster by rank, this one included, and what others reach of it
    peers: list[Program] = field(default_factory=list)
    rings: dict[Value, Any] = field(default_factory=dict)
    buffers: dict[Value, Any] = field(default_factory=dict)
    cluster_barrier: Any = None
    #: of `interpreter_cluster`: by mailbox what has come, and whether the others' are known to be there
    mailboxes: dict[Any, Any] = field(default_factory=dict)
    knows_mailboxes: bool = False
    ended: bool = False
    #: what the programs of all ranks share (`interpreter_comm.World`), and which rank this program runs on
    world: Any = None
    world_rank: int = 0

    @property
    def rank(self) -> int:
        """The block's number in its cluster."""
        return self.peers.index(self) if self.peers else 0


class Frame:
    """The values of one thread of control."""

    def __init__(self, program: Program, thread: Thread, values: dict[Value, Any]):
        self.program, self.thread, self.values = program, thread, values
        self.pending_roles: list[Operation] = []

    def raw(self, value: Value) -> Any:
        """A value as it is, accumulators in flight included."""
        return self.values[value]

    def read(self, value: Value) -> Any:
        """A value that the operation looks at."""
        found = self.values[value]
        if isinstance(found, InFlight):
            name = f"%{value.hint}" if value.hint else "an accumulator"
            raise Trap(f"reads {name} while its dot is in flight; only the results of async.wait may be read")
        return found

    def reads(self, values: Sequence[Value]) -> list[Any]:
        return [self.read(v) for v in values]

    def ints(self, values: Sequence[Value]) -> list[int]:
        return [int(self.read(v)) for v in values]


Rule = Callable[[Frame, Any], Any]
#: operation class -> (rule, whether it is a generator)
RULES: dict[type[Operation], tuple[Rule, bool]] = {}


def rule(cls: type[Operation]) -> Callable[[Rule], Rule]:
    """Register the rule of an operation class: gives the result, or a list for any other number of results."""

    def register(fn: Rule) -> Rule:
        RULES[cls] = fn, inspect.isgeneratorfunction(fn)
        return fn

    return register


# --- execution ------------------------------------------------------------------------------


def run_region(frame: Frame, region: Region, args: Sequence[Any] = ()) -> Steps:
    """Execute a region's block; gives the yielded values."""
    block = region.block
    frame.values.update(zip(block.args, args, strict=True))
    for op in block.ops:
        if op.terminator:
            return [frame.raw(v) for v in op.operands]
        yield from execute(frame, op)
    return []


def execute(frame: Frame, op: Operation) -> Steps:
    """One operation, its results stored, its faults given the source location."""
    found = RULES.get(type(op))
    try:
        if found is None:
            raise Trap("the interpreter has no rule for this operation")
        apply, blocking = found
        result = (yield from apply(frame, op)) if blocking else apply(frame, op)
    except IRError:
        raise
    except Exception as error:
        raise fault(op, str(error) or type(error).__name__) from error
    if len(op.results) == 1 and not isinstance(result, list):
        frame.values[op.results[0]] = result
    else:
        frame.values.update(zip(op.results, result or [], strict=True))


def fault(op: Operation, message: str) -> IRError:
    """An error of the running program at an operation."""
    return IRError(f"'{op.name}': {message}", op.loc)


# --- global memory --------------------------------------------------------------------------


def _window(view: View, index: Sequence[int], shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The slices of the array and of the tile where the tile at ``index`` lies inside the view."""
    outer, inner = [], []
    for origin, i, n, size in zip(view.origin, index, shape, view.array.shape, strict=True):
        start = origin + i * n
        first, last = max(start, 0), min(start + n, size)
        last = max(last, first)
        outer.append(slice(first, last))
        inner.append(slice(first - start, last - start) if last > first else slice(0, 0))
    return tuple(outer), tuple(inner)


def load_tile(view: View, index: Sequence[int], shape: tuple[int, ...], pad: float) -> np.ndarray:
    """A copy of the tile at ``index`` (counted in tiles), ``pad`` outside the view."""
    outer, inner = _window(view, index, shape)
    found = view.array[outer]
    if found.shape == shape:
        return found.copy()
    tile = np.full(shape, numerics.constant(pad, numerics.dtype_of(view.array)), view.array.dtype)
    tile[inner] = found
    return tile


def store_tile(view: View, index: Sequence[int], tile: np.ndarray) -> None:
    """Write the part of the tile at ``index`` that lies inside the view."""
    outer, inner = _window(view, index, tile.shape)
    view.array[outer] = tile[inner]
