"""What the checker reports: a fault with the operations at fault and the events that lead to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from tilewright.ir.core import UNKNOWN, IRError, Operation

#: lines of a sequence: longer ones leave out their middle
MOST_LINES = 40


class Fault(Exception):
    """A schedule is wrong. ``events``: (who, event) in order; the last ones are those at fault."""

    def __init__(
        self,
        message: str,
        op: Operation,
        other: Operation | None = None,
        hint: str = "",
        events: Sequence[tuple[str, Any]] = (),
        kind: str = "",
    ):
        super().__init__(message)
        self.message, self.op, self.other, self.hint, self.events = message, op, other, hint, list(events)
        self.kind = kind or message.split(":")[0]

    def error(self, inputs: str) -> IRError:
        """The error as users read it."""
        lines = [self.message]
        lines += [f"  {text}" for text in places(self.op, self.other)]
        if self.events:
            lines.append(f"shortest failing sequence ({inputs}):")
            lines += sequence(self.events)
        return IRError("\n".join(lines), self.op.loc, self.hint)


def places(op: Operation, other: Operation | None) -> list[str]:
    ops = [op] if other is None or other is op else [other, op]
    return [f"'{o.name}' at {place(o)}" for o in ops]


def place(op: Operation) -> str:
    return "an unknown line" if op.loc == UNKNOWN else str(op.loc)


def sequence(events: Sequence[tuple[str, Any]]) -> list[str]:
    """One line for each operation, or for the operations of one role on one use of a ring, with the source line."""
    lines: list[str] = []
    last: tuple[str, Any, int] | None = None
    for who, event in events:
        key = (who, event.ring, event.count)
        if event.ring is not None and key == last:
            head, _, tail = lines[-1].partition(" %")
            lines[-1] = f"{head}, {_name(event)} %{tail}"
        else:
            lines.append(f"  {who}: {describe(event)}")
        last = key
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        lines = [*lines[:half], f"  ... {len(lines) - 2 * half} more ...", *lines[-half:]]
    return lines


def describe(event: Any) -> str:
    """The text of one event."""
    op, what = event.op, _name(event)
    if event.ring is not None:
        ring = event.ring
        what += f" {ring.label} use {event.count} (stage {event.count % ring.stages})"
    if event.kind in ("signal", "wait_flags"):
        what += f" {event.place}"
    for attribute in ("pending", "scope"):
        if attribute in op.attributes:
            what += f" {attribute}={op.attributes[attribute]}"
    return what if op.loc == UNKNOWN else f"{what}    {PurePath(op.loc.file).name}:{op.loc.line}:{op.loc.column}"


def _name(event: Any) -> str:
    return str(event.op.name.removeprefix("async."))
