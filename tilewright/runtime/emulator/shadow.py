"""Who touched each byte of a memory: what the race detector remembers of accesses.

An access is a row of the `AccessTable`, one for each warp that executes an instruction; a `Shadow`
holds, for each byte, the rows of the last write and of reads since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.runtime.emulator.errors import EmulatorError

Array = NDArray[Any]

_I32 = np.int32


@dataclass(frozen=True)
class Site:
    """An instruction, for messages: its text, its line in the assembly, the line of the tile program."""

    text: str
    line: int
    source: str

    def __str__(self) -> str:
        origin = f"\n  from {self.source}" if self.source else ""
        return f"\n  line {self.line}: {self.text}{origin}"


@dataclass(frozen=True)
class Conflict:
    """A race: of the accesses given, number ``index`` races at byte ``offset``."""

    index: int
    offset: int
    message: str


class Shadow:
    """Who touched each of ``size`` bytes last: codes ``record << lane bits | lane``, 0 for nobody.

    ``slots``: how many readers since the last write are remembered (by warp, modulo); ``describe``
    names a byte in messages.
    """

    def __init__(self, size: int, slots: int, describe: Callable[[int], str]) -> None:
        size = -(-size // 64) * 64
        self.size, self.describe = size, describe
        self.writes = np.zeros(size, _I32)
        self.reads = np.zeros((slots, size), _I32)

    def grow(self, size: int) -> None:
        """Room for ``size`` bytes."""
        if size > self.size:
            more = -(-size // 64) * 64 - self.size
            self.writes = np.concatenate([self.writes, np.zeros(more, _I32)])
            self.reads = np.concatenate([self.reads, np.zeros((len(self.reads), more), _I32)], axis=1)
            self.size += more


class AccessTable:
    """Accesses, one for each warp that an instruction executes for: columns of a table that grows."""

    FIELDS = ("column", "spread", "time", "home", "warp", "lane", "site", "strength", "proxy")

    def __init__(self) -> None:
        self.count = 1
        self.capacity = 1 << 12
        for name in self.FIELDS:
            setattr(self, name, np.zeros(self.capacity, _I32))

    column: Array
    spread: Array
    time: Array
    home: Array
    warp: Array
    lane: Array
    site: Array
    strength: Array
    proxy: Array

    def add(self, count: int, limit: int, **values: Any) -> int:
        """Append ``count`` records; the number of the first."""
        first = self.count
        self.count += count
        if self.count >= limit:
            raise EmulatorError("more accesses than the race detector can number: switch it off for this launch")
        while self.count > self.capacity:
            for name in self.FIELDS:
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(self.capacity, _I32)]))
            self.capacity *= 2
        for name, value in values.items():
            getattr(self, name)[first : self.count] = value
        return first


def cells(memory: Array, offsets: Array, size: int) -> Array:
    """The codes of each access [..., n, size]; the accesses are aligned where that is the same for all."""
    if size & (size - 1) == 0 and size <= 64 and not (offsets & (size - 1)).any():
        return memory.reshape(*memory.shape[:-1], -1, size)[..., offsets // size, :]
    return memory[..., offsets[:, None] + np.arange(size)]


def set_cells(memory: Array, offsets: Array, size: int, codes: Array | int) -> None:
    if size & (size - 1) == 0 and size <= 64 and not (offsets & (size - 1)).any():
        memory.reshape(*memory.shape[:-1], -1, size)[..., offsets // size, :] = codes
    else:
        memory[..., offsets[:, None] + np.arange(size)] = codes


def coarse(codes: Array) -> tuple[Array, int]:
    """Codes [n, bytes] of which neighbours are equal: one of each group, and the size of the groups."""
    count, size = codes.shape
    for step in (size, 4, 2):
        if 1 < step <= size and size % step == 0:
            groups = codes.reshape(count, -1, step)
            if (groups == groups[:, :, :1]).all():
                return groups[:, :, 0], step
    return codes, 1
