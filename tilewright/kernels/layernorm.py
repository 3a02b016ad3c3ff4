"""Layer normalisation of the rows of a matrix, with a residual and a bias (backward: `norm_backward`)."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import (
    LONG_COLUMNS,
    WIDEST,
    is_spread,
    layer_tiles,
    long_tiles,
    spread_tiles,
    store_weighted,
    sum_of,
    weights,
)


@tw.kernel
def layernorm(
    x: tw.Tensor,
    weight: tw.Tensor,
    y: tw.Tensor,
    eps: tw.float32,
    residual: tw.Tensor = None,
    total: tw.Tensor = None,
    bias: tw.Tensor = None,
    mean: tw.Tensor = None,
    inverse: tw.Tensor = None,
    *,
    BM: tw.constexpr = 1,
    BN: tw.constexpr = 4096,
    READ: tw.constexpr = None,
    EARLY: tw.constexpr = False,
) -> None:
    """``y = (t - mean(t)) / sqrt(var(t) + eps) * weight + bias`` with ``t = x + residual``. Grid: (cdiv(M, BM),).

    x, residual, total and y (M, N) of rows up to BN elements, weight and bias (N,), mean and inverse (M,) float32.
    Writes t to ``total``, the mean and 1 / sqrt(...), which `norm_backward` needs, to ``mean`` and ``inverse``;
    all from residual on may be absent. The variance is that of the row minus its mean, in float32. READ: a hint to the
    cache for x and the residual. EARLY: weight and bias are read with the row, not behind its sums.
    """
    m = tw.program_id(0)
    row = sum_of(x, residual, m, 0, BM, BN, READ)
    if total is not None:
        tw.store(total, (m, 0), row.to(total.dtype))
    if EARLY:
        factors, offsets = weights(weight, bias, 0, BN)
    middle = tw.sum(row, axis=1) / x.shape[1]
    row = row - middle[:, None]
    if x.shape[1] < BN:
        row = tw.where((tw.arange(BN) < x.shape[1])[None, :], row, 0.0)
    scale = tw.rsqrt(tw.sum(row * row, axis=1) / x.shape[1] + eps)
    if mean is not None:
        tw.store(mean, m, middle)
    if inverse is not None:
        tw.store(inverse, m, scale)
    if not EARLY:
        factors, offsets = weights(weight, bias, 0, BN)
    store_weighted(y, m, 0, row * scale[:, None], factors, offsets)


@tw.kernel
def layernorm_long(
    x: tw.Tensor,
    weight: tw.Tensor,
    y: tw.Tensor,
    eps: tw.float32,
    residual: tw.Tensor = None,
    total: tw.Tensor = None,
    bias: tw.Tensor = None,
    mean: tw.Tensor = None,
    inverse: tw.Tensor = None,
    *,
    BN: tw.constexpr = LONG_COLUMNS,
) -> None:
    """`layernorm` of rows of any length, BN elements at a time. Grid: (M,). Reads each element twice.

    Mean and squared deviations of each block join those of the blocks before (Chan, Golub and LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances", 1979).
    """
    m, columns = tw.program_id(0), x.shape[1]
    blocks = tw.cdiv(columns, BN)
    middle, spread = 0.0, 0.0
    for j in tw.range(blocks):
        row = sum_of(x, residual, m, j, 1, BN, None)
        if total is not None:
            tw.store(total, (m, j), row.to(total.dtype))
        before = (j * BN).to(tw.float32)
        count = tw.minimum(BN, columns - j * BN).to(tw.float32)
        own = tw.sum(row) / count
        apart = tw.where((j * BN + tw.arange(BN) < columns)[None, :], row - own, 0.0)
        step, share = own - middle, count / (before + count)
        spread = spread + tw.sum(apart * apart) + step * step * (before * share)
        middle = middle + step * share
    scale = tw.rsqrt(spread / columns + eps)
    if mean is not None:
        tw.store(mean, m, middle)
    if inverse is not None:
        tw.store(inverse, m, scale)
    for j in tw.range(blocks):
        row = (sum_of(x, residual, m, j, 1, BN, None) - middle) * scale
        store_weighted(y, m, j, row, *weights(weight, bias, j, BN))


def layer_rows(x: Any, weight: Any, y: Any, eps: float, **optional: Any) -> None:
    """`layernorm` of rows of any length on arrays of NumPy or torch; ``optional``: what it may be given by name.

    Long rows of 16 bits are faster read twice than spread (docs/performance.md), with a residual all are.
    """
    if x.itemsize == 4 and optional.get("residual") is None and is_spread(x):
        layernorm[(x.shape[0],)](x, weight, y, eps, **optional, **spread_tiles(x.shape[1]))
        return
    if x.shape[1] > WIDEST:
        layernorm_long[(x.shape[0],)](x, weight, y, eps, **optional, **long_tiles("layernorm", x.shape[1]))
        return
    meta = layer_tiles(x.shape[0], x.shape[1], x.itemsize)
    layernorm[(tw.cdiv(x.shape[0], meta["BM"]),)](x, weight, y, eps, **optional, **meta)


def reference(
    x: np.ndarray[Any, Any],
    weight: np.ndarray[Any, Any],
    eps: float,
    residual: np.ndarray[Any, Any] | None = None,
    bias: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """In float64."""
    exact = x.astype(np.float64) + (0 if residual is None else residual.astype(np.float64))
    rows: np.ndarray[Any, Any] = _normal(exact, eps)[0] * weight.astype(np.float64)
    return rows if bias is None else rows + bias.astype(np.float64)


def reference_backward(
    dy: np.ndarray[Any, Any], x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], eps: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """dx, dweight and dbias in float64."""
    gradient = dy.astype(np.float64)
    normal, factor = _normal(x.astype(np.float64), eps)
    wide = gradient * weight.astype(np.float64)
    along = (wide * normal).mean(axis=1, keepdims=True)
    dx = (wide - normal * along - wide.mean(axis=1, keepdims=True)) * factor
    return dx, (gradient * normal).sum(axis=0), gradient.sum(axis=0)


def _normal(exact: np.ndarray[Any, Any], eps: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    factor = 1 / np.sqrt(exact.var(axis=1, keepdims=True) + eps)
    return (exact - exact.mean(axis=1, keepdims=True)) * factor, factor
