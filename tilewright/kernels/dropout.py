"""Dropout whose mask is a function of seed and position: nothing is stored, the backward pass draws it again."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.random import at_least, philox, reference_philox
from tilewright.kernels.rows import row_major


@tw.kernel
def dropout(
    x: tw.Tensor,
    y: tw.Tensor,
    rate: tw.float32,
    seed: tw.int64,
    sequence: tw.int32,
    *,
    BM: tw.constexpr = 4,
    BN: tw.constexpr = 1024,
) -> None:
    """``y = x / (1 - rate)`` where a random number in [0, 1) is at least ``rate``, else 0; x, y (M, N).

    The number for element (i, j) is word j % 4 of Philox's counter (j // 4, i, sequence, 0) under the key ``seed``: the
    same on every target, for every tile shape and layout of x. With dy for x this is the backward pass.
    Grid: `row_major_grid`.
    """
    m, n = row_major(x.shape[1], BN)
    value = tw.load(x, (m, n), (BM, BN))
    rows = tw.broadcast_to((m * BM + tw.arange(BM))[:, None], (BM, BN // 4))
    fours = tw.broadcast_to((n * (BN // 4) + tw.arange(BN // 4))[None, :], (BM, BN // 4))
    zero = tw.zeros((BM, BN // 4), tw.int32)
    a, b, c, d = philox(fours, rows, zero + sequence, zero, seed.to(tw.int32), (seed >> 32).to(tw.int32))
    bits = tw.cat((a[:, :, None], b[:, :, None], c[:, :, None], d[:, :, None]), axis=2).reshape(BM, BN)
    scale = 1.0 / (1.0 - rate)
    tw.store(y, (m, n), tw.where(at_least(bits, rate), value.to(tw.float32) * scale, 0.0).to(y.dtype))


def kept(rows: int, columns: int, rate: float, seed: int, sequence: int) -> np.ndarray[Any, Any]:
    """The mask of `dropout`, True where elements stay."""
    i, j = np.indices((rows, -(-columns // 4)))
    words = reference_philox((j, i, np.full_like(i, sequence), np.zeros_like(i)), (seed, seed >> 32))
    bits = np.stack(words, axis=2).reshape(rows, -1)[:, :columns]
    mask: np.ndarray[Any, Any] = (bits >> 8).astype(np.float32) * np.float32(2**-24) >= np.float32(rate)
    return mask


def reference(x: np.ndarray[Any, Any], rate: float, seed: int, sequence: int = 0) -> np.ndarray[Any, Any]:
    """In float64."""
    rows, columns = x.shape
    return np.where(kept(rows, columns, rate, seed, sequence), x.astype(np.float64) / (1 - rate), 0.0)
