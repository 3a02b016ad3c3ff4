"""Softmax of the rows of a matrix, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import LEAST, LOG2_E, LONG_COLUMNS, LONG_TILES, LONG_WARPS, WIDEST, softmax_tiles


@tw.kernel
def softmax(x: tw.Tensor, y: tw.Tensor, *, BM: tw.constexpr = 1, BN: tw.constexpr = 4096) -> None:
    """``y = softmax(x)`` along rows of up to BN elements; x and y (M, N). Grid: (cdiv(M, BM),).

    Computes in float32 and reads and writes each element once.
    """
    m = tw.program_id(0)
    row = tw.load(x, (m, 0), (BM, BN), pad=float("-inf")).to(tw.float32)
    e = tw.exp2((row - tw.max(row, axis=1)[:, None]) * LOG2_E)
    tw.store(y, (m, 0), (e * (1.0 / tw.sum(e, axis=1))[:, None]).to(y.dtype))


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


@tw.kernel
def softmax_long(x: tw.Tensor, y: tw.Tensor, *, BN: tw.constexpr = LONG_COLUMNS) -> None:
    """`softmax` of rows of any length, BN elements at a time. Grid: (M,). Reads each element twice.

    Each of BN columns keeps a maximum and a sum of its own, so that no block waits for an exchange between threads.
    """
    m = tw.program_id(0)
    blocks = tw.cdiv(x.shape[1], BN)
    top, total = tw.full((1, BN), LEAST, tw.float32), tw.zeros((1, BN), tw.float32)
    for j in tw.range(blocks):
        row = tw.load(x, (m, j), (1, BN), pad=float("-inf")).to(tw.float32)
        higher = tw.maximum(top, row)
        total = total * tw.exp2((top - higher) * LOG2_E) + tw.exp2((row - higher) * LOG2_E)
        top = higher
    highest = tw.max(top, axis=1)[:, None]
    share = 1.0 / tw.sum(total * tw.exp2((top - highest) * LOG2_E), axis=1)[:, None]
    for j in tw.range(blocks):
        row = tw.load(x, (m, j), (1, BN)).to(tw.float32)
        tw.store(y, (m, j), (tw.exp2((row - highest) * LOG2_E) * share).to(y.dtype))


@tw.kernel
def softmax_backward_long(dy: tw.Tensor, y: tw.Tensor, dx: tw.Tensor, *, BN: tw.constexpr = LONG_COLUMNS) -> None:
    """`softmax_backward` of rows of any length, BN elements at a time. Grid: (M,). Reads each element twice."""
    m = tw.program_id(0)
    blocks = tw.cdiv(y.shape[1], BN)
    products = tw.zeros((1, BN), tw.float32)
    for j in tw.range(blocks):
        products = products + tw.load(y, (m, j), (1, BN)).to(tw.float32) * tw.load(dy, (m, j), (1, BN)).to(tw.float32)
    along = tw.sum(products, axis=1)[:, None]
    for j in tw.range(blocks):
        row, gradient = tw.load(y, (m, j), (1, BN)).to(tw.float32), tw.load(dy, (m, j), (1, BN)).to(tw.float32)
        tw.store(dx, (m, j), (row * (gradient - along)).to(dx.dtype))


def softmax_rows(x: Any, y: Any) -> None:
    """`softmax` of rows of any length. Arrays of NumPy or torch."""
    if x.shape[1] > WIDEST:
        softmax_long[(x.shape[0],)](x, y, num_warps=LONG_WARPS)
        return
    meta = softmax_tiles(*x.shape)
    softmax[(tw.cdiv(x.shape[0], meta["BM"]),)](x, y, **meta)


def softmax_rows_backward(dy: Any, y: Any, dx: Any) -> None:
    """`softmax_backward` of rows of any length. Arrays of NumPy or torch."""
    if y.shape[1] > WIDEST:
        softmax_backward_long[(y.shape[0],)](dy, y, dx, **LONG_TILES)
        return
    meta = softmax_tiles(*y.shape)
    softmax_backward[(tw.cdiv(y.shape[0], meta["BM"]),)](dy, y, dx, **meta)


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
