"""Softmax of the rows of a matrix, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import (
    LEAST,
    LOG2_E,
    LONG_COLUMNS,
    WIDEST,
    is_spread,
    long_tiles,
    softmax_gradient_tiles,
    softmax_tiles,
    spread_tiles,
)


@tw.kernel
def softmax(
    x: tw.Tensor, y: tw.Tensor, *, BM: tw.constexpr = 1, BN: tw.constexpr = 4096, READ: tw.constexpr = None
) -> None:
    """``y = softmax(x)`` along rows of up to BN elements; x and y (M, N). Grid: (cdiv(M, BM),).

    Computes in float32 and reads and writes each element once. READ: a hint to the cache for x.
    """
    m = tw.program_id(0)
    row = tw.load(x, (m, 0), (BM, BN), pad=float("-inf"), eviction_policy=READ).to(tw.float32)
    e = tw.exp2((row - tw.max(row, axis=1)[:, None]) * LOG2_E)
    tw.store(y, (m, 0), (e * (1.0 / tw.sum(e, axis=1))[:, None]).to(y.dtype))


@tw.kernel
def softmax_backward(
    dy: tw.Tensor,
    y: tw.Tensor,
    dx: tw.Tensor,
    *,
    BM: tw.constexpr = 1,
    BN: tw.constexpr = 4096,
    READ: tw.constexpr = None,
    AGAIN: tw.constexpr = False,
) -> None:
    """``dx = y * (dy - sum(y * dy))`` along rows of up to BN elements, y = softmax(x); all (M, N).

    Grid: (cdiv(M, BM),). Computes in float32 and reads and writes each element once. READ: a hint to the cache.
    AGAIN: rows do not wait in registers for their sum but are read twice, from shared memory where copies can bring
    them (`tilewright.passes.waiting_rows`).
    """
    m = tw.program_id(0)
    row = tw.load(y, (m, 0), (BM, BN), eviction_policy=READ).to(tw.float32)
    gradient = tw.load(dy, (m, 0), (BM, BN), eviction_policy=READ).to(tw.float32)
    along = tw.sum(row * gradient, axis=1)
    if AGAIN:
        row = tw.load(y, (m, 0), (BM, BN), eviction_policy=READ).to(tw.float32)
        gradient = tw.load(dy, (m, 0), (BM, BN), eviction_policy=READ).to(tw.float32)
    tw.store(dx, (m, 0), (row * (gradient - along[:, None])).to(dx.dtype))


@tw.kernel
def softmax_long(x: tw.Tensor, y: tw.Tensor, *, BN: tw.constexpr = LONG_COLUMNS) -> None:
    """`softmax` of rows of any length, BN elements at a time. Grid: (M,).

    Each of BN columns keeps a maximum and a sum of its own, so that no block waits for an exchange between threads.
    Then reads the row again from its beginning.
    """
    m = tw.program_id(0)
    blocks = tw.cdiv(x.shape[1], BN)
    top, total = tw.full((1, BN), LEAST, tw.float32), tw.zeros((1, BN), tw.float32)
    for j in tw.range(blocks):
        part = tw.load(x, (m, j), (1, BN), pad=float("-inf"), eviction_policy="evict_last").to(tw.float32)
        higher = tw.maximum(top, part)
        total = total * tw.exp2((top - higher) * LOG2_E) + tw.exp2((part - higher) * LOG2_E)
        top = higher
    highest = tw.max(top, axis=1)[:, None]
    share = 1.0 / tw.sum(total * tw.exp2((top - highest) * LOG2_E), axis=1)[:, None]
    for j in tw.range(blocks):
        part = tw.load(x, (m, j), (1, BN), eviction_policy="evict_first").to(tw.float32)
        tw.store(y, (m, j), (tw.exp2((part - highest) * LOG2_E) * share).to(y.dtype))


@tw.kernel
def softmax_backward_long(dy: tw.Tensor, y: tw.Tensor, dx: tw.Tensor, *, BN: tw.constexpr = LONG_COLUMNS) -> None:
    """`softmax_backward` of rows of any length, BN elements at a time. Grid: (M,).

    The last block waits in registers; the others are read again, the latest first: those are in the cache still.
    """
    m = tw.program_id(0)
    last = tw.cdiv(y.shape[1], BN) - 1
    products = tw.zeros((1, BN), tw.float32)
    for j in tw.range(last):
        part = tw.load(y, (m, j), (1, BN), eviction_policy="evict_last").to(tw.float32)
        products = products + part * tw.load(dy, (m, j), (1, BN), eviction_policy="evict_last").to(tw.float32)
    row = tw.load(y, (m, last), (1, BN), eviction_policy="evict_first").to(tw.float32)
    gradient = tw.load(dy, (m, last), (1, BN), eviction_policy="evict_first").to(tw.float32)
    products = products + row * gradient
    along = tw.sum(products, axis=1)[:, None]
    tw.store(dx, (m, last), (row * (gradient - along)).to(dx.dtype))
    for k in tw.range(last):
        j = last - 1 - k
        part = tw.load(y, (m, j), (1, BN), eviction_policy="evict_first").to(tw.float32)
        above = tw.load(dy, (m, j), (1, BN), eviction_policy="evict_first").to(tw.float32)
        tw.store(dx, (m, j), (part * (above - along)).to(dx.dtype))


def softmax_rows(x: Any, y: Any) -> None:
    """`softmax` of rows of any length. Arrays of NumPy or torch."""
    if is_spread(x):
        softmax[(x.shape[0],)](x, y, **spread_tiles(x.shape[1]))
        return
    if x.shape[1] > WIDEST:
        softmax_long[(x.shape[0],)](x, y, **long_tiles("softmax", x.shape[1]))
        return
    meta = softmax_tiles(*x.shape)
    softmax[(tw.cdiv(x.shape[0], meta["BM"]),)](x, y, **meta)


def softmax_rows_backward(dy: Any, y: Any, dx: Any) -> None:
    """`softmax_backward` of rows of any length. Arrays of NumPy or torch."""
    rows, columns = y.shape
    if is_spread(y):
        softmax_backward[(rows,)](dy, y, dx, **spread_tiles(columns), AGAIN=True)
    elif columns > WIDEST:
        softmax_backward_long[(rows,)](dy, y, dx, **long_tiles("softmax backward", columns))
    else:
        meta = softmax_gradient_tiles(rows, columns)
        softmax_backward[(tw.cdiv(rows, meta["BM"]),)](dy, y, dx, **meta)


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
