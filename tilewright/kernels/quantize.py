"""Matrices as 8-bit floats with a float32 scale for each row or block: ``x`` is about ``q * scale``."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import row_major

#: the largest finite number of each format (OCP 8-bit floating point specification)
E4M3_MAX, E5M2_MAX = 448.0, 57344.0


@tw.function
def scales(largest, dtype):
    """What the largest magnitude of a row or block is divided by so that all of it fits; 1 for zeros."""
    limit = E4M3_MAX
    if dtype == tw.float8_e5m2:
        limit = E5M2_MAX
    return tw.where(largest > 0.0, largest / limit, 1.0)


@tw.kernel
def quantize_rows(
    x: tw.Tensor, q: tw.Tensor, scale: tw.Tensor, *, BM: tw.constexpr = 1, BN: tw.constexpr = 4096
) -> None:
    """One scale a row of up to BN elements: x, q (M, N), scale (M,) float32. Grid: (cdiv(M, BM),)."""
    m = tw.program_id(0)
    row = tw.load(x, (m, 0), (BM, BN)).to(tw.float32)
    s = scales(tw.max(tw.abs(row), axis=1), q.dtype)
    tw.store(scale, m, s)
    tw.store(q, (m, 0), (row / s[:, None]).to(q.dtype))


@tw.kernel
def quantize_blocks(
    x: tw.Tensor,
    q: tw.Tensor,
    scale: tw.Tensor,
    *,
    ROWS: tw.constexpr = 1,
    COLUMNS: tw.constexpr = 128,
    BM: tw.constexpr = 16,
    BN: tw.constexpr = 256,
) -> None:
    """One scale a block of (ROWS, COLUMNS): x, q (M, N), scale (cdiv(M, ROWS), cdiv(N, COLUMNS)) float32.

    (1, 128) for activations, (128, 128) for weights. BM and BN are multiples of the block. Grid: `row_major_grid`.
    """
    m, n = row_major(x.shape[1], BN)
    blocks = tw.load(x, (m, n), (BM, BN)).to(tw.float32).reshape(BM // ROWS, ROWS, BN // COLUMNS, COLUMNS)
    s = scales(tw.max(tw.abs(blocks), axis=(1, 3)), q.dtype)
    tw.store(scale, (m, n), s)
    tw.store(q, (m, n), (blocks / s[:, None, :, None]).reshape(BM, BN).to(q.dtype))


def reference(
    x: np.ndarray[Any, Any], rows: int, columns: int, limit: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``x / scale`` of each element in float64, not rounded to 8 bits, and the scales of blocks (rows, columns)."""
    m, n = x.shape
    padded = np.pad(np.abs(x.astype(np.float64)), ((0, -m % rows), (0, -n % columns)))
    largest = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).max(axis=(1, 3))
    scale = np.where(largest > 0, largest / limit, 1.0)
    return x / np.repeat(np.repeat(scale, rows, 0), columns, 1)[:m, :n], scale
