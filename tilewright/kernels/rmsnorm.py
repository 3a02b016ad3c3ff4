"""Root-mean-square normalisation of the rows of a matrix, with a residual and a bias, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


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
    ``total`` and 1 / sqrt(...), which `rmsnorm_backward` needs, to ``inverse``; each of the last four may be absent.
    Computes in float32, reads and writes each element once.
    """
    m = tw.program_id(0)
    row = tw.load(x, (m, 0), (BM, BN)).to(tw.float32)
    if residual is not None:
        row = row + tw.load(residual, (m, 0), (BM, BN)).to(tw.float32)
    if total is not None:
        tw.store(total, (m, 0), row.to(total.dtype))
    scale = tw.rsqrt(tw.sum(row * row, axis=1) / x.shape[1] + eps)
    if inverse is not None:
        tw.store(inverse, m, scale)
    # here, not above: cached rows that need not wait in registers
    out = row * scale[:, None] * tw.load(weight, 0, BN).to(tw.float32)
    if bias is not None:
        out = out + tw.load(bias, 0, BN).to(tw.float32)
    tw.store(y, (m, 0), out.to(y.dtype))


@tw.kernel
def rmsnorm_backward(
    dy: tw.Tensor,
    x: tw.Tensor,
    weight: tw.Tensor,
    inverse: tw.Tensor,
    dx: tw.Tensor,
    partial: tw.Tensor,
    dtotal: tw.Tensor = None,
    *,
    BIAS: tw.constexpr = False,
    BM: tw.constexpr = 1,
    BN: tw.constexpr = 4096,
) -> None:
    """``dx`` of `rmsnorm`, and sums over rows for the gradients of the weight and, with BIAS, of the bias.

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
        factor = tw.load(inverse, m, BM)[:, None]
        normal = tw.load(x, (m, 0), (BM, BN)).to(tw.float32) * factor
        gradient = tw.load(dy, (m, 0), (BM, BN)).to(tw.float32)
        dweight = dweight + gradient * normal
        if BIAS:
            dbias = dbias + gradient
        gradient = gradient * scale
        along = tw.sum(gradient * normal, axis=1)[:, None] / columns
        out = (gradient - normal * along) * factor
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
