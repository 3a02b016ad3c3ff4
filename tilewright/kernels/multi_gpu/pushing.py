"""Programs that copy the own rank's rows to all peers while the other programs of a launch compute.

A persistent kernel runs its programs in their order, each block every ``period``-th. The first ``communicators`` of
each of the first ``rounds`` periods push; so the blocks that push in one round compute in the next, and pushing that
takes as long as ``rounds`` tiles costs that many tiles on few blocks. `Pushers` chooses the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tilewright as tw

#: programs of a persistent kernel that run at the same time: the SMs of an H100 or H200
UNITS = 132


@tw.function
def place_of(communicators: Any, rounds: Any, period: Any) -> Any:
    """Of this program: whether it pushes, its number among those that push, and its number among the others."""
    round_, slot = tw.program_id(0) // period, tw.program_id(0) % period
    pushes = round_ < rounds and slot < communicators
    return pushes, round_ * communicators + slot, tw.program_id(0) - tw.minimum(round_ + 1, rounds) * communicators


@tw.function
def load_parts(
    source: Any, row: Any, column: Any, BM: tw.constexpr, WIDTH: tw.constexpr, PARTS: tw.constexpr, after: Any = None
) -> Any:
    """The tile (BM, WIDTH) at (row, column) of a matrix, as PARTS tiles of rows, all of them on their way at once."""
    tiles: Any = ()
    for part in tw.static_range(PARTS):
        place = row * PARTS + part, column
        tiles = (*tiles, tw.load(source, place, (BM // PARTS, WIDTH), after=after))
    return tiles


@tw.function
def put_parts(target: Any, row: Any, column: Any, tiles: Any, PARTS: tw.constexpr) -> Any:
    """Put what `load_parts` gave to the same place of another rank's matrix; gives the tokens."""
    tokens: Any = ()
    for part in tw.static_range(PARTS):
        tokens = (*tokens, tw.put(target, (row * PARTS + part, column), tiles[part]))
    return tokens


@dataclass(frozen=True)
class Pushers:
    """Which programs push: arguments of `place_of`, and how many there are."""

    communicators: int
    rounds: int
    period: int

    @property
    def programs(self) -> int:
        return self.communicators * self.rounds

    @classmethod
    def choose(cls, communicators: int, rounds: int, own_tiles: int, units: int = UNITS) -> Pushers:
        """``communicators`` blocks of ``units`` for up to ``rounds`` rounds of tiles.

        No program that waits for a peer may come before one that pushes, or a block could wait for what the same
        block of a peer would do later. So all pushing programs lie before the end of the ``own_tiles`` programs that
        wait for nothing; where these are few, the launch begins with pushing programs alone.
        """
        communicators = min(communicators, units - 1)
        rounds = min(rounds, own_tiles // (units - communicators))
        if rounds < 1:
            return cls(communicators, 1, communicators)
        return cls(communicators, rounds, units)


__all__ = ["Pushers", "load_parts", "place_of", "put_parts"]
