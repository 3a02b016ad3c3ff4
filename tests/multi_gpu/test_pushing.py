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


@pytest.mark.parametrize("communicators", [1, 3, 16])
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("own_tiles", [0, 7, 40, 1000])
def test_every_program_has_one_place(communicators: int, rounds: int, own_tiles: int) -> None:
    pushers = Pushers.choose(communicators, rounds, own_tiles, units=20)
    tiles = 2 * own_tiles + 5
    out = np.full((pushers.programs + tiles, 2), -1, np.int32)
    places[len(out),](out, pushers.communicators, pushers.rounds, pushers.period)
    pushing = out[:, 0] == 1
    np.testing.assert_array_equal(out[pushing, 1], np.arange(pushers.programs))
    np.testing.assert_array_equal(out[~pushing, 1], np.arange(tiles))
    first_that_waits = np.flatnonzero(~pushing)[own_tiles]
    assert np.flatnonzero(pushing)[-1] < first_that_waits


def test_pushing_takes_a_few_blocks_for_as_long_as_asked() -> None:
    assert Pushers.choose(16, 2, 512, units=132) == Pushers(16, 2, 132)
    assert Pushers.choose(16, 2, 200, units=132) == Pushers(16, 1, 132), "own tiles fill one round"
    assert Pushers.choose(16, 2, 100, units=132) == Pushers(16, 1, 16), "not even that"
