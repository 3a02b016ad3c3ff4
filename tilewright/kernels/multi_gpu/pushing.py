"""Programs that copy the own rank's rows to all peers while the other programs of a launch compute.

A persistent kernel runs its programs in their order, each block every ``period``-th. The first ``communicators`` of
each of the first ``rounds`` periods push, for as long as the others take for a tile: then all blocks end together.
`Pushers` chooses the numbers.
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
    source: Any, m: Any, n: Any, BM: tw.constexpr, BN: tw.constexpr, PARTS: tw.constexpr, after: Any = None
) -> Any:
    """The tile (m, n) of BM by BN elements, as PARTS tiles of columns, all of them on their way at once."""
    tiles: Any = ()
    for part in tw.static_range(PARTS):
        tiles = (*tiles, tw.load(source, (m, n * PARTS + part), (BM, BN // PARTS), after=after))
    return tiles


@tw.function
def put_parts(target: Any, m: Any, n: Any, tiles: Any, PARTS: tw.constexpr) -> Any:
    """Put what `load_parts` gave to the same place of another rank's matrix; gives the tokens."""
    tokens: Any = ()
    for part in tw.static_range(PARTS):
        tokens = (*tokens, tw.put(target, (m, n * PARTS + part), tiles[part]))
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
    def choose(cls, programs: int, own_tiles: int, communicators: int | None = None, units: int = UNITS) -> Pushers:
        """About ``programs`` programs that push, so many that each takes as long as a tile, on as few blocks as can be.

        No program that waits for a peer may come before one that pushes, or a block could wait for what the same
        block of a peer would do later. So all of them lie before the end of the ``own_tiles`` programs that wait for
        nothing, and where these are few the launch begins with pushing programs alone. ``communicators``: on how many
        of the ``units`` blocks, where that is not to be chosen.
        """
        for blocks in range(1, units // 2) if communicators is None else [min(communicators, units - 1)]:
            rounds = min(tw.cdiv(programs, blocks), own_tiles // (units - blocks))
            if rounds >= 1 and (blocks * rounds >= programs or communicators is not None):
                return cls(blocks, rounds, units)
        blocks = min(communicators or programs, units // 2)
        return cls(blocks, 1, blocks)


__all__ = ["Pushers", "load_parts", "place_of", "put_parts"]
