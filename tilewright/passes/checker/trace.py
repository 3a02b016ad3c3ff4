"""What a role did on some inputs: the events of one execution, which the machine plays against those of other roles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tilewright.ir.core import Operation
from tilewright.passes.checker.scenarios import Inputs


class Infeasible(Exception):
    """No execution has these inputs, or none that ends."""


@dataclass(slots=True)
class Event:
    """One step of a role: ``kind`` names the rule of the machine, the rest are its arguments."""

    kind: str
    op: Operation
    ring: Any = None
    count: int = 0
    #: (region, dim along which each warpgroup keeps to its part or None, how elements are spread over threads)
    access: Any = None
    other: Any = None
    #: of a tensor that ranks share; see `places`
    place: Any = None


@dataclass(frozen=True, slots=True)
class BulkCopy:
    """What a copy of the engine does: the bytes that it announces to its own block's barrier for all copies of the
    stage, and whether it arrives there; the bytes that it brings to each block that it writes.
    """

    announced: int
    arrives: bool
    brings: int
    multicast: bool


@dataclass(eq=False)
class Run:
    """One execution of a role."""

    inputs: Inputs
    env: dict[Any, Any]
    most_events: int
    events: list[Event] = field(default_factory=list)
    #: groups of the matrix unit that were issued, and that are known to be finished
    issued: int = 0
    retired: int = 0
    cut: bool = False
    shortened: bool = False
    #: (loop, ran once: 1, more than once: 2) and (branch, which)
    covered: set[tuple[Operation, int]] = field(default_factory=set)

    def make_room(self) -> None:
        """Raises Full where there are as many events as there may be."""
        if len(self.events) >= self.most_events:
            raise Full


class Full(Exception):
    """The trace is as long as it may be."""
