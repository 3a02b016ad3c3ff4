"""The table of instructions: mnemonic (without encoding suffix) -> the function that executes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewright.runtime.emulator.amd.decode import Instruction
    from tilewright.runtime.emulator.amd.state import WaveState

#: executes one instruction for the waves selected in the state
Handler = Callable[["WaveState", "Instruction"], None]

ARCHITECTURES = ("gfx942", "gfx950")


@dataclass(frozen=True)
class Entry:
    """A table row. ``ends_run``: the program counter may change, so that the waves regroup after it."""

    handler: Handler
    archs: tuple[str, ...]
    ends_run: bool


TABLE: dict[str, Entry] = {}


def define(name: str, handler: Handler, *, archs: tuple[str, ...] = ARCHITECTURES, ends_run: bool = False) -> None:
    """Enter an instruction into the table. A name may be entered once."""
    if name in TABLE:
        raise ValueError(f"instruction {name} is defined twice")
    TABLE[name] = Entry(handler, archs, ends_run)


def instruction(
    *names: str, archs: tuple[str, ...] = ARCHITECTURES, ends_run: bool = False
) -> Callable[[Handler], Handler]:
    """Decorator: the function executes the instructions ``names``."""

    def register(handler: Handler) -> Handler:
        for name in names:
            define(name, handler, archs=archs, ends_run=ends_run)
        return handler

    return register
