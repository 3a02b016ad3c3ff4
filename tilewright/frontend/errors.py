"""Errors of the frontend: a message, the place in the user's source, and what to do about it."""

from __future__ import annotations

import difflib
import linecache
from collections.abc import Iterable
from typing import Any

from tilewright.ir.core import UNKNOWN, Location


class CompileError(Exception):
    """The kernel breaks a rule of the language.

    ``str()`` shows ``file:line:column: error: message``, the source line with the offending span
    underlined, the chain of inlined calls, and a hint that says what to do.

    ``argument`` names the argument of the call at fault; the visitor turns it into a location.
    """

    def __init__(
        self,
        message: str,
        loc: Location = UNKNOWN,
        hint: str = "",
        length: int = 1,
        argument: str | None = None,
    ):
        super().__init__(message, loc, hint, length, argument)
        self.message, self.loc, self.hint, self.length, self.argument = message, loc, hint, length, argument
        self.source_line = _source_line(loc)

    def locate(self, loc: Location, length: int) -> None:
        """Give the error a place unless it has one."""
        if self.loc == UNKNOWN:
            self.loc, self.length, self.source_line = loc, length, _source_line(loc)

    @property
    def trace(self) -> list[Location]:
        """The calls that inlined the faulty code, innermost first."""
        calls, caller = [], self.loc.caller
        while caller is not None:
            calls.append(caller)
            caller = caller.caller
        return calls

    def __str__(self) -> str:
        if self.loc == UNKNOWN:
            lines = [f"error: {self.message}"]
        else:
            lines = [f"{place(self.loc)}: error: {self.message}", *self._excerpt()]
        for caller in self.trace:
            lines.append(f"  called from {place(caller)}")
            lines += _quoted(caller.line, _source_line(caller))
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def _excerpt(self) -> list[str]:
        if not self.source_line:
            return []
        gutter = len(f"{self.loc.line:>5}")
        length = max(1, min(self.length, len(self.source_line) - self.loc.column + 1))
        return [
            *_quoted(self.loc.line, self.source_line),
            f"{'':{gutter}} | {' ' * (self.loc.column - 1)}{'^' * length}",
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.loc, self.hint, self.length, self.argument)


class ArgumentError(CompileError, TypeError):
    """The arguments of a launch or a compilation do not fit the kernel's parameters."""


def suggestion(name: str, names: Iterable[str]) -> str:
    """``did you mean 'x'?`` or nothing."""
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f"did you mean '{close[0]}'?" if close else ""


def place(loc: Location) -> str:
    """``file:line:column``, as editors and terminals understand it."""
    return f"{loc.file}:{loc.line}:{loc.column}"


def _quoted(line: int, text: str) -> list[str]:
    return [f"{line:>5} | {text}"] if text else []


def _source_line(loc: Location) -> str:
    return "" if loc == UNKNOWN else linecache.getline(loc.file, loc.line).rstrip().replace("\t", " ")


__all__ = ["ArgumentError", "CompileError", "place", "suggestion"]
