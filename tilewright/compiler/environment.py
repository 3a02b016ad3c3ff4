"""The environment variables that tilewright reads, typed. `tilewright env` lists them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PREFIX = "TILEWRIGHT_"


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One variable: ``TILEWRIGHT_<name>``. `get` reads it at each call."""

    name: str
    parse: Callable[[str], T]
    default: T
    help: str

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    def get(self) -> T:
        """The value; ValueError names the variable when its text does not parse."""
        text = os.environ.get(self.full_name)
        if text is None or text == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ValueError(f"{self.full_name}={text!r}: {error}") from None


def _flag(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected 0 or 1")


def _path(text: str) -> Path | None:
    return Path(text).expanduser()


def _text(text: str) -> str | None:
    return text


DUMP_DIR: Variable[Path | None] = Variable(
    "DUMP_DIR", _path, None, "directory for one IR file per pass and the emitted assembly of every kernel"
)
INTERPRET: Variable[bool] = Variable(
    "INTERPRET", _flag, False, "run every launch in the NumPy interpreter, whatever device its arrays live on"
)
PTXAS: Variable[str | None] = Variable("PTXAS", _text, None, "the ptxas program to use")

VARIABLES: tuple[Variable[Any], ...] = (DUMP_DIR, INTERPRET, PTXAS)
