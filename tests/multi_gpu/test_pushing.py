"""Which programs push: all of them before any that waits."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright as tw
from tilewright.kernels.multi_gpu.pushing import Pushers, place_of


@tw.kernel
def places(out: tw.Tensor, communicators: tw.int32, rounds: tw.int32, period: tw.int32) -> None:
    """``out[i]``: what `place_of` tells program i."""
    pushes, number, other = place_of(communicators, rounds, period)
    tw.store(out[tw.program_id(0)], 0, pushes.to(tw.int32))
    tw.store(out[tw.program_id(0)], 1, tw.where(pushes, number, other))


@pytest.mark.parametrize("communicators", [None, 1, 16])
@pytest.mark.parametrize("programs", [1, 7, 50])
@pytest.mark.parametrize("own_tiles", [0, 7, 40, 1000])
def test_every_program_has_one_place(communicators: int | None, programs: int, own_tiles: int) -> None:
    pushers = Pushers.choose(programs, own_tiles, communicators, units=20)
    tiles = 2 * own_tiles + 5
    out = np.full((pushers.programs + tiles, 2), -1, np.int32)
    places[len(out),](out, pushers.communicators, pushers.rounds, pushers.period)
    pushing = out[:, 0] == 1
    np.testing.assert_array_equal(out[pushing, 1], np.arange(pushers.programs))
    np.testing.assert_array_equal(out[~pushing, 1], np.arange(tiles))
    first_that_waits = np.flatnonzero(~pushing)[own_tiles]
    assert np.flatnonzero(pushing)[-1] < first_that_waits


def test_pushing_programs_take_few_blocks() -> None:
    assert Pushers.choose(120, 1320, units=132) == Pushers(12, 10, 132)
    assert Pushers.choose(120, 264, units=132) == Pushers(44, 3, 132), "all within the own tiles"
    assert Pushers.choose(120, 1320, communicators=30, units=132) == Pushers(30, 4, 132)
    assert Pushers.choose(20, 10, units=132) == Pushers(20, 1, 20), "not even one round"
