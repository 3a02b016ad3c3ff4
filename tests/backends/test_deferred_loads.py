"""Operands that wait in shared memory for their dot, next to scratch that takes over memory which is done with."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw


@tw.kernel
def product_and_back(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor):
    """``c = (a b) b^T + a``: the second dot reads b's slot again, behind a conversion of the first one's result."""
    m = tw.program_id(0)
    left = tw.load(a, (m, 0), (32, 64))
    right = tw.load(b, (0, 0), (64, 64))
    first = tw.dot(left, right).to(a.dtype)
    tw.store(c, (m, 0), tw.dot(first, right.T, left.to(c.dtype)))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "gfx942", "gfx950"])
def test_the_slot_is_read_before_scratch_takes_its_place(target: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((96, 64)).astype(dtype), rng.standard_normal((64, 64)).astype(dtype)
    c = np.full((96, 64), np.nan, np.float32)
    tw.emulate(target).launch(product_and_back, (3,), a, b, c)
    first = (a.astype(np.float64) @ b.astype(np.float64)).astype(dtype).astype(np.float64)
    exact = first @ b.T.astype(np.float64) + a.astype(np.float64)
    assert np.linalg.norm(c - exact) / np.linalg.norm(exact) < 5e-3
