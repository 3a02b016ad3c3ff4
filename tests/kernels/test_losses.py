"""Softmax backward and cross-entropy on the interpreter and the emulated GPUs against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import DEVICES, Array, check, launch, normal, poisoned, strided

import tilewright as tw
from tilewright.kernels import cross_entropy as entropy_module
from tilewright.kernels.cross_entropy import blocks, cross_entropy, cross_entropy_backward
from tilewright.kernels.rows import row_major_grid
from tilewright.kernels.softmax import reference, reference_backward, softmax_backward

IGNORED = -100
TILES = {"BN": 1024, "LANES": 512}


def forward(device: str, logits: Array, target: Array, **meta: float) -> tuple[Array, Array]:
    loss, lse = poisoned(len(target)), poisoned(len(target))
    launch(device, cross_entropy, (len(target),), logits, target, loss, lse, IGNORED, **TILES, **meta)
    return loss, lse


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_softmax_backward(device: str, dtype: str) -> None:
    dy, y = strided(5, 200, dtype=dtype), reference(normal(5, 200, seed=1)).astype(strided(1, 1, dtype=dtype).dtype)
    dx = poisoned(5, 200, dtype=dtype)
    launch(device, softmax_backward, (3,), dy, y, dx, BM=2, BN=256)
    check(dx, reference_backward(dy, y), dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy(device: str, dtype: str, smoothing: float) -> None:
    logits, target = strided(5, 3001, dtype=dtype), np.array([0, 3000, IGNORED, 17, 1024])
    loss, lse = forward(device, logits, target, SMOOTHING=smoothing)
    exact, exact_lse = entropy_module.reference(logits, target, IGNORED, smoothing)
    check(loss, exact)
    check(lse, exact_lse)
    assert loss[2] == 0
    dlogits, dloss = poisoned(5, 3001, dtype=dtype), normal(5, seed=1)
    args = (logits, target, lse, dloss, dlogits, IGNORED)
    launch(device, cross_entropy_backward, row_major_grid(5, 3001, 1, 1024), *args, SMOOTHING=smoothing, BN=1024)
    check(dlogits, entropy_module.reference_backward(logits, target, dloss, IGNORED, smoothing), dtype)
    assert (dlogits[2] == 0).all()


def test_blocks_whose_logits_grow_and_fall() -> None:
    """Every block raises the maximum, or none after the first does; logits of +-1e4."""
    rising = np.linspace(-1e4, 1e4, 5000, dtype=np.float32)
    logits, target = np.stack([rising, rising[::-1], normal(5000) * 1e4]), np.array([4999, 4999, 7], np.int32)
    exact, exact_lse = entropy_module.reference(logits, target)
    loss, lse = forward("cpu", logits, target)
    np.testing.assert_allclose(loss, exact, rtol=1e-6, atol=2e-3)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-6)


def test_infinities_and_not_a_number() -> None:
    logits, target = normal(4, 1500), np.array([3, 3, 3, 3], np.int32)
    logits[0, 1400], logits[1, 1400], logits[2, 1400] = -np.inf, np.inf, np.nan
    loss, _ = forward("cpu", logits, target)
    assert np.isfinite(loss[[0, 3]]).all() and np.isnan(loss[2]) and not np.isfinite(loss[1])


def test_rows_that_are_ignored_may_hold_anything() -> None:
    logits, target, out = np.full((1, 100), np.nan, np.float32), np.array([IGNORED]), poisoned(1, 100)
    loss, lse = forward("cpu", logits, target)
    cross_entropy_backward[(1,)](logits, target, lse, np.ones(1, np.float32), out, IGNORED, BN=1024)
    assert loss[0] == 0 and (out == 0).all()


def test_every_column_of_a_vocabulary_counts() -> None:
    """128k classes with the tiles that the benchmark takes."""
    logits, target = normal(1, 131072, dtype="bf16"), np.array([131071])
    loss, lse = poisoned(1), poisoned(1)
    cross_entropy[(1,)](logits, target, loss, lse, IGNORED, **blocks(2))
    check(loss, entropy_module.reference(logits, target)[0])
    assert tw.cdiv(131072, blocks(2)["BN"]) > 1
