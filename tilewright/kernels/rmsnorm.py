"""Root-mean-square normalisation of the rows of a matrix, with a residual and a bias (backward: `norm_backward`)."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import (
    LONG_COLUMNS,
    WIDEST,
    is_spread,
    long_tiles,
    norm_tiles,
    spread_norm_tiles,
    store_weighted,
    sum_of,
    weights,
)


@tw.kernel
def rmsnorm(
    x: tw.Tensor,
    weight: tw.Tensor,
    y: tw.Tensor,
    eps: tw.float32,
    residual: tw.Tensor = None,
    total: tw.Tensor = None,
    bias: tw.Tensor = None,
    inverse: tw.Tensor = None,
    *,
    BM: tw.constexpr = 1,
    BN: tw.constexpr = 4096,
    READ: tw.constexpr = None,
    AGAIN: tw.constexpr = False,
) -> None:
    """``y = t / sqrt(mean(t ** 2) + eps) * weight + bias`` with ``t = x + residual``. Grid: (cdiv(M, BM),).

    x, residual, total and y (M, N) of rows up to BN elements, weight and bias (N,), inverse (M,) float32. Writes t to
    ``total`` and 1 / sqrt(...), which `norm_backward` needs, to ``inverse``; each of the last four may be absent.
    Computes in float32, reads and writes each element once. READ: a hint to the cache for x and the residual. AGAIN:
    rows do not wait in registers for their sums but are read once more: from the cache with "evict_last", else from
    shared memory where copies can bring them (`tilewright.passes.waiting_rows`).
    """
    m = tw.program_id(0)
    row = sum_of(x, residual, m, 0, BM, BN, READ)
    if total is not None and not AGAIN:
        tw.store(total, (m, 0), row.to(total.dtype))
    scale = tw.rsqrt(tw.sum(row * row, axis=1) / x.shape[1] + eps)
    if inverse is not None:
        tw.store(inverse, m, scale)
    if AGAIN:
        row = sum_of(x, residual, m, 0, BM, BN, "evict_first")
        if total is not None:
            tw.store(total, (m, 0), row.to(total.dtype))
    store_weighted(y, m, 0, row * scale[:, None], *weights(weight, bias, 0, BN))


@tw.kernel
def rmsnorm_long(
    x: tw.Tensor,
    weight: tw.Tensor,
    y: tw.Tensor,
    eps: tw.float32,
    residual: tw.Tensor = None,
    total: tw.Tensor = None,
    bias: tw.Tensor = None,
    inverse: tw.Tensor = None,
    *,
    BN: tw.constexpr = LONG_COLUMNS,
) -> None:
    """`rmsnorm` of rows of any length, BN elements at a time. Grid: (M,).

    The last block waits in registers; the others are read again, the latest first: those are in the cache still.
    """
    m, columns = tw.program_id(0), x.shape[1]
    last = tw.cdiv(columns, BN) - 1
    squares = tw.zeros((1, BN), tw.float32)
    for j in tw.range(last):
        row = sum_of(x, residual, m, j, 1, BN, "evict_last")
        if total is not None:
            tw.store(total, (m, j), row.to(total.dtype))
        squares = squares + row * row
    row = sum_of(x, residual, m, last, 1, BN, "evict_first")
    if total is not None:
        tw.store(total, (m, last), row.to(total.dtype))
    squares = squares + row * row
    scale = tw.rsqrt(tw.sum(squares, axis=1) / columns + eps)
    if inverse is not None:
        tw.store(inverse, m, scale)
    store_weighted(y, m, last, row * scale[:, None], *weights(weight, bias, last, BN))
    for k in tw.range(last):
        again = sum_of(x, residual, m, last - 1 - k, 1, BN, "evict_first")
        store_weighted(y, m, last - 1 - k, again * scale[:, None], *weights(weight, bias, last - 1 - k, BN))


def rms_rows(x: Any, weight: Any, y: Any, eps: float, **optional: Any) -> None:
    """`rmsnorm` of rows of any length on arrays of NumPy or torch; ``optional``: what it may be given by name."""
    (rows, columns), residual = x.shape, optional.get("residual") is not None
    if is_spread(x):
        rmsnorm[(rows,)](x, weight, y, eps, **optional, **spread_norm_tiles(columns, residual))
        return
    if columns > WIDEST:
        meta = long_tiles("rmsnorm with a residual" if residual else "rmsnorm", columns)
        rmsnorm_long[(rows,)](x, weight, y, eps, **optional, **meta)
        return
    meta = norm_tiles(rows, columns, residual)
    rmsnorm[(tw.cdiv(rows, meta["BM"]),)](x, weight, y, eps, **optional, **meta)


def reference(
    x: np.ndarray[Any, Any],
    weight: np.ndarray[Any, Any],
    eps: float,
    residual: np.ndarray[Any, Any] | None = None,
    bias: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """In float64."""
    exact = x.astype(np.float64) + (0 if residual is None else residual.astype(np.float64))
    rows: np.ndarray[Any, Any] = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + eps)
    rows = rows * weight.astype(np.float64)
    return rows if bias is None else rows + bias.astype(np.float64)


def reference_backward(
    dy: np.ndarray[Any, Any], x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], eps: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """dx, dweight and dbias in float64."""
    exact, gradient = x.astype(np.float64), dy.astype(np.float64)
    factor = 1 / np.sqrt((exact**2).mean(axis=1, keepdims=True) + eps)
    normal, wide = exact * factor, gradient * weight.astype(np.float64)
    dx = (wide - normal * (wide * normal).mean(axis=1, keepdims=True)) * factor
    return dx, (gradient * normal).sum(axis=0), gradient.sum(axis=0)
