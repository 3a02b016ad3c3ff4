"""Early returns: what follows an ``if`` that returns moves into the branches that go on.

So behind an ``if`` all of whose paths return nothing is left, a return ends its branch, and control flow stays
structured. Returns inside of loops stay where they are: those of unrolled loops end the function, others are errors.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from copy import deepcopy


def with_structured_returns(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements, with every return outside of loops as the last of its branch."""
    for position, statement in enumerate(body):
        if isinstance(statement, ast.Return):
            return body[: position + 1]
        if isinstance(statement, ast.If) and any(True for _ in last_returns([statement])):
            rest = body[position + 1 :]
            taken, other = statement.body, statement.orelse
            if not _returns(taken):
                taken = [*taken, *(rest if _returns(other) else deepcopy(rest))]  # liveness keeps what it knows by node
            if not _returns(other):
                other = [*other, *rest]
            statement.body, statement.orelse = with_structured_returns(taken), with_structured_returns(other)
            return body[: position + 1]
    return body


def last_returns(body: Sequence[ast.stmt]) -> Iterator[ast.Return]:
    """Returns of these statements that no loop is around."""
    for statement in body:
        if isinstance(statement, ast.Return):
            yield statement
        elif isinstance(statement, ast.If):
            yield from last_returns([*statement.body, *statement.orelse])


def _returns(body: Sequence[ast.stmt]) -> bool:
    """Whether every path through the statements returns."""
    last = body[-1] if body else None
    return isinstance(last, ast.Return) or (isinstance(last, ast.If) and _returns(last.body) and _returns(last.orelse))


__all__ = ["last_returns", "with_structured_returns"]
