"""The environment variables that tilewright reads, typed. `tilewright env` lists them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PREFIX = "TILEWRIGHT_"


class VariableError(ValueError):
    """The text of an environment variable means nothing; the message names the variable."""


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
        """The value; VariableError names the variable when its text does not parse."""
        text = os.environ.get(self.full_name)
        if text is None or text == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise VariableError(f"{self.full_name}={text!r}: {error}") from None


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


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < 2e6:
        raise ValueError("expected seconds from 0 to 2000000")
    return seconds


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _bytes(text: str) -> int:
    digits = text.strip().lower().removesuffix("b").removesuffix("i")
    number, unit = (digits[:-1], digits[-1]) if digits[-1:].isalpha() else (digits, "")
    if unit not in _UNITS or not number.strip().isdecimal():
        raise ValueError("expected bytes, or a size such as 500M or 2GiB")
    return int(number) * _UNITS[unit]


def default_cache_dir() -> Path:
    """``~/.cache/tilewright``, or its place under ``XDG_CACHE_HOME``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "tilewright"


CACHE_DIR: Variable[Path | None] = Variable(
    "CACHE_DIR", _path, None, "directory of compiled kernels and tuning results (default: ~/.cache/tilewright)"
)
CACHE_SIZE: Variable[int] = Variable(
    "CACHE_SIZE", _bytes, 2 * 2**30, "bytes that compiled kernels may take on disk, e.g. 500M; 0 keeps none"
)
ALWAYS_COMPILE: Variable[bool] = Variable(
    "ALWAYS_COMPILE", _flag, False, "compile every kernel anew, whatever the cache holds, and store the result"
)
CHECK_SCHEDULE: Variable[bool] = Variable(
    "CHECK_SCHEDULE",
    _flag,
    True,
    "prove schedules before generating code (passes check-schedule, check-protocol); 0 skips it",
)
DUMP_DIR: Variable[Path | None] = Variable(
    "DUMP_DIR", _path, None, "directory for one IR file per pass and the emitted assembly of every kernel"
)
INTERPRET: Variable[bool] = Variable(
    "INTERPRET", _flag, False, "run every launch in the NumPy interpreter, whatever device its arrays live on"
)
LAUNCH_OVERLAP: Variable[bool] = Variable(
    "LAUNCH_OVERLAP", _flag, True, "let launches begin while the one before them in their stream ends; 0 never does"
)
PRINT_AUTOTUNING: Variable[bool] = Variable(
    "PRINT_AUTOTUNING", _flag, False, "print what the autotuner measured of each configuration, and its choice"
)
TUNING_FILE: Variable[Path | None] = Variable(
    "TUNING_FILE", _path, None, "JSON file of the autotuner's choices (default: tuning.json in the cache directory)"
)
WAIT_TIMEOUT: Variable[float] = Variable(
    "WAIT_TIMEOUT", _seconds, 30.0, "seconds after which a kernel that waits for another GPU gives up; 0: never"
)
PTXAS: Variable[str | None] = Variable("PTXAS", _text, None, "the ptxas program to use")

VARIABLES: tuple[Variable[Any], ...] = (
    ALWAYS_COMPILE,
    CACHE_DIR,
    CACHE_SIZE,
    CHECK_SCHEDULE,
    DUMP_DIR,
    INTERPRET,
    LAUNCH_OVERLAP,
    PRINT_AUTOTUNING,
    PTXAS,
    TUNING_FILE,
    WAIT_TIMEOUT,
)
