"""Scalars read from tensors (``tw.load`` without a shape): on every device, outside, and as what they decide."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import tilewright as tw

DEVICES = ["cpu", "emulate:sm_80", "emulate:sm_90a", "emulate:gfx942"]


@tw.kernel
def pick(x: tw.Tensor, where: tw.Tensor, y: tw.Tensor, *, PAD: tw.constexpr = 0):
    """y[i] = x[row, column] of the places in ``where``, one after the other."""
    for i in tw.range(where.shape[0]):
        value = tw.load(x, (tw.load(where, (i, 0)), tw.load(where, (i, 1))), pad=PAD)
        tw.store(y, i, value)


@tw.kernel
def ragged_sums(x: tw.Tensor, ends: tw.Tensor, y: tw.Tensor):
    """y[g] = the sum of x[ends[g]:ends[g + 1]]: bounds of a loop and of a mask come from memory."""
    g = tw.program_id(0)
    start, end = tw.load(ends, g), tw.load(ends, g + 1)
    total = tw.zeros((32,), tw.float32)
    for i in tw.range(tw.cdiv(end - start, 32)):
        part = tw.load(x.offset(start), i, 32)
        total += tw.where(start + i * 32 + tw.arange(0, 32) < end, part, 0.0)
    tw.store(y, g, tw.sum(total, axis=0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.int64, np.int8])
def test_elements_inside_and_outside(dtype, device):
    x = np.arange(1, 13).reshape(3, 4).astype(dtype)
    where = np.array([[0, 0], [2, 3], [1, 2], [3, 0], [0, 4], [-1, 1], [2, -1]], np.int32)
    y = np.zeros(len(where), dtype)
    tw.device(device).launch(pick, (1,), x, where, y, PAD=7)
    np.testing.assert_array_equal(y, [1, 12, 7, 7, 7, 7, 7])


@pytest.mark.parametrize("device", DEVICES)
def test_elements_of_views(device):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-1][:, ::-1].T
    y = np.zeros(2, np.float32)
    tw.device(device).launch(pick, (1,), x, np.array([[5, 1], [0, 1]], np.int32), y)
    np.testing.assert_array_equal(y, [17, 12])


@pytest.mark.parametrize("device", DEVICES)
def test_bounds_from_memory(device):
    ends = np.array([3, 3, 40, 41, 100], np.int32)
    x = np.random.default_rng(0).integers(-8, 8, 100).astype(np.float32)
    y = np.full(4, np.nan, np.float32)
    tw.device(device).launch(ragged_sums, (4,), x, ends, y)
    np.testing.assert_array_equal(y, [x[a:b].sum() for a, b in pairwise(ends)])


def test_an_index_for_each_dimension():
    with pytest.raises(tw.CompileError, match="1 indices for a tensor of rank 2"):
        pick_wrongly[(1,)](np.zeros((2, 2), np.float32), np.zeros(1, np.float32))


@tw.kernel
def pick_wrongly(x: tw.Tensor, y: tw.Tensor):
    tw.store(y, 0, tw.load(x, 0))
