"""Root-mean-square normalisation of the rows of a matrix, with a residual and a bias (backward: `norm_backward`)."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import LONG_COLUMNS, LONG_TILES, WIDEST, norm_tiles, store_weighted, sum_of


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
) -> None:
    """``y = t / sqrt(mean(t ** 2) + eps) * weight + bias`` with ``t = x + residual``. Grid: (cdiv(M, BM),).

    x, residual, total and y (M, N) of rows up to BN elements, weight and bias (N,), inverse (M,) float32. Writes t to
    ``total`` and 1 / sqrt(...), which `norm_backward` needs, to ``inverse``; each of the last four may be absent.
    Computes in float32, reads and writes each element once.
    """
    m = tw.program_id(0)
    row = sum_of(x, residual, m, 0, BM, BN)
    if total is not None:
        tw.store(total, (m, 0), row.to(total.dtype))
    scale = tw.rsqrt(tw.sum(row * row, axis=1) / x.shape[1] + eps)
    if inverse is not None:
        tw.store(inverse, m, scale)
    store_weighted(y, m, 0, row * scale[:, None], weight, bias, BN)


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
    """`rmsnorm` of rows of any length, BN elements at a time. Grid: (M,). Reads each element twice."""
    m = tw.program_id(0)
    blocks = tw.cdiv(x.shape[1], BN)
    squares = tw.zeros((1, BN), tw.float32)
    for j in tw.range(blocks):
        row = sum_of(x, residual, m, j, 1, BN)
        if total is not None:
            tw.store(total, (m, j), row.to(total.dtype))
        squares = squares + row * row
    scale = tw.rsqrt(tw.sum(squares, axis=1) / x.shape[1] + eps)
    if inverse is not None:
        tw.store(inverse, m, scale)
    for j in tw.range(blocks):
        store_weighted(y, m, j, sum_of(x, residual, m, j, 1, BN) * scale[:, None], weight, bias, BN)


def rms_rows(x: Any, weight: Any, y: Any, eps: float, **optional: Any) -> None:
    """`rmsnorm` of rows of any length on arrays of NumPy or torch; ``optional``: what it may be given by name."""
    if x.shape[1] > WIDEST:
        rmsnorm_long[(x.shape[0],)](x, weight, y, eps, **optional, **LONG_TILES)
        return
    meta = norm_tiles(*x.shape)
    rmsnorm[(tw.cdiv(x.shape[0], meta["BM"]),)](x, weight, y, eps, **optional, **meta)


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
