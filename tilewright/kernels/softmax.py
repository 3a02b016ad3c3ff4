"""Softmax of the rows of a matrix, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def softmax(x: tw.Tensor, y: tw.Tensor, *, BM: tw.constexpr = 1, BN: tw.constexpr = 4096) -> None:
    """``y = softmax(x)`` along rows of up to BN elements; x and y (M, N). Grid: (cdiv(M, BM),).

    Computes in float32 and reads and writes each element once.
    """
    m = tw.program_id(0)
    row = tw.load(x, (m, 0), (BM, BN), pad=float("-inf")).to(tw.float32)
    e = tw.exp(row - tw.max(row, axis=1)[:, None])
    tw.store(y, (m, 0), (e / tw.sum(e, axis=1)[:, None]).to(y.dtype))


@tw.kernel
def softmax_backward(
    dy: tw.Tensor, y: tw.Tensor, dx: tw.Tensor, *, BM: tw.constexpr = 1, BN: tw.constexpr = 4096
) -> None:
    """``dx = y * (dy - sum(y * dy))`` along rows of up to BN elements, y = softmax(x); all (M, N).

    Grid: (cdiv(M, BM),). Computes in float32 and reads and writes each element once.
    """
    m = tw.program_id(0)
    row = tw.load(y, (m, 0), (BM, BN)).to(tw.float32)
    gradient = tw.load(dy, (m, 0), (BM, BN)).to(tw.float32)
    along = tw.sum(row * gradient, axis=1)
    tw.store(dx, (m, 0), (row * (gradient - along[:, None])).to(dx.dtype))


def reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Softmax of each row in float64."""
    e = np.exp(x.astype(np.float64) - x.astype(np.float64).max(axis=1, keepdims=True))
    rows: np.ndarray[Any, Any] = e / e.sum(axis=1, keepdims=True)
    return rows


def reference_backward(dy: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64."""
    row, gradient = y.astype(np.float64), dy.astype(np.float64)
    out: np.ndarray[Any, Any] = row * (gradient - (row * gradient).sum(axis=1, keepdims=True))
    return out
