"""The table of instructions: opcode -> the function that binds its operands and gives what executes it.

A binder runs once, when the text is decoded: it takes the modifiers that it knows off the
instruction (one left over is a decode error) and returns a closure over readers and writers of the
operands. Opcodes are looked up by their longest entry: ``cp.async.bulk.tensor`` before ``cp.async``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewright.runtime.emulator.nvidia.decode import Instruction
    from tilewright.runtime.emulator.nvidia.state import State

#: executes one instruction for the warps selected in the state
Execute = Callable[["State"], None]
Binder = Callable[["Instruction"], Execute]


@dataclass(frozen=True)
class Row:
    """``ends_run``: warps regroup after it. ``gathers``: "warp" or "warpgroup" whose lanes must meet before it."""

    binder: Binder
    ends_run: bool
    gathers: str


TABLE: dict[str, Row] = {}


def instruction(*names: str, ends_run: bool = False, gathers: str = "") -> Callable[[Binder], Binder]:
    """Decorator: the function binds the instructions ``names``."""

    def register(binder: Binder) -> Binder:
        for name in names:
            if name in TABLE:
                raise ValueError(f"instruction {name} is defined twice")
            TABLE[name] = Row(binder, ends_run, gathers)
        return binder

    return register


def find(opcode: str) -> tuple[str, Row] | None:
    """The table's row of an opcode with modifiers, and its name there."""
    parts = opcode.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in TABLE:
            return name, TABLE[name]
    return None
