"""Layer normalisation of the rows of a matrix, with a residual and a bias, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


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
) -> None:
    """``y = (t - mean(t)) / sqrt(var(t) + eps) * weight + bias`` with ``t = x + residual``. Grid: (cdiv(M, BM),).

    x, residual, total and y (M, N) of rows up to BN elements, weight and bias (N,), mean and inverse (M,) float32.
    Writes t to ``total``, the mean and 1 / sqrt(...), which `layernorm_backward` needs, to ``mean`` and ``inverse``;
    all from residual on may be absent. The variance is that of the centred row, in float32.
    """
    m = tw.program_id(0)
    row = tw.load(x, (m, 0), (BM, BN)).to(tw.float32)
    if residual is not None:
        row = row + tw.load(residual, (m, 0), (BM, BN)).to(tw.float32)
    if total is not None:
        tw.store(total, (m, 0), row.to(total.dtype))
    middle = tw.sum(row, axis=1) / x.shape[1]
    row = row - middle[:, None]
    if x.shape[1] < BN:
        row = tw.where((tw.arange(BN) < x.shape[1])[None, :], row, 0.0)
    scale = tw.rsqrt(tw.sum(row * row, axis=1) / x.shape[1] + eps)
    if mean is not None:
        tw.store(mean, m, middle)
    if inverse is not None:
        tw.store(inverse, m, scale)
    # here, not above: cached rows that need not wait in registers
    out = row * scale[:, None] * tw.load(weight, 0, BN).to(tw.float32)
    if bias is not None:
        out = out + tw.load(bias, 0, BN).to(tw.float32)
    tw.store(y, (m, 0), out.to(y.dtype))


@tw.kernel
def layernorm_backward(
    dy: tw.Tensor,
    x: tw.Tensor,
    weight: tw.Tensor,
    mean: tw.Tensor,
    inverse: tw.Tensor,
    dx: tw.Tensor,
    partial: tw.Tensor,
    dtotal: tw.Tensor = None,
    *,
    BIAS: tw.constexpr = False,
    BM: tw.constexpr = 1,
    BN: tw.constexpr = 4096,
) -> None:
    """``dx`` of `layernorm`, and sums over rows for the gradients of the weight and, with BIAS, of the bias.

    dy, x and dx (M, N); x is what was normalised: with a residual their sum. ``dtotal`` (M, N) is the gradient that
    reaches this sum on other ways, added to dx. partial (P, 1 + BIAS, N) float32: the sums of each program's rows, for
    `column_sums` to add up. Grid: (P,), any P.
    """
    p = tw.program_id(0)
    columns = x.shape[1]
    scale = tw.load(weight, 0, BN).to(tw.float32)
    dweight = tw.zeros((BM, BN), tw.float32)
    dbias = tw.zeros((BM, BN), tw.float32)
    for m in tw.range(p, tw.cdiv(x.shape[0], BM), tw.num_programs(0)):
        factor, middle = tw.load(inverse, m, BM)[:, None], tw.load(mean, m, BM)[:, None]
        normal = (tw.load(x, (m, 0), (BM, BN)).to(tw.float32) - middle) * factor
        gradient = tw.load(dy, (m, 0), (BM, BN)).to(tw.float32)  # 0 outside: what x reads there is of no account
        dweight = dweight + gradient * normal
        if BIAS:
            dbias = dbias + gradient
        gradient = gradient * scale
        along = tw.sum(gradient * normal, axis=1)[:, None] / columns
        out = (gradient - normal * along - tw.sum(gradient, axis=1)[:, None] / columns) * factor
        if dtotal is not None:
            out = out + tw.load(dtotal, (m, 0), (BM, BN)).to(tw.float32)
        tw.store(dx, (m, 0), out.to(dx.dtype))
    tw.store(partial, (p, 0, 0), tw.sum(dweight, axis=0)[None, None, :])
    if BIAS:
        tw.store(partial, (p, 1, 0), tw.sum(dbias, axis=0)[None, None, :])


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
