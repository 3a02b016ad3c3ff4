"""Rows of a table by number, and the gradient of the table."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import row_major


@tw.kernel
def embedding(
    table: tw.Tensor, tokens: tw.Tensor, y: tw.Tensor, *, BM: tw.constexpr = 4, BN: tw.constexpr = 1024
) -> None:
    """``y[i] = table[tokens[i]]``: table (V, N), tokens (M,) of integers, y (M, N). Grid: `row_major_grid`.

    Tokens out of range give rows of zeros.
    """
    m, n = row_major(y.shape[1], BN)
    rows = tw.load(tokens, m, BM, pad=-1)
    tw.store(y, (m, n), tw.gather(table, rows, 0, tile=(0, n), shape=(BM, BN)).to(y.dtype))


@tw.kernel
def embedding_backward(
    dy: tw.Tensor, tokens: tw.Tensor, order: tw.Tensor, dtable: tw.Tensor, *, BN: tw.constexpr = 1024
) -> None:
    """``dtable[v]``: the sum of dy's rows whose token is v, in float32, in their order: always the same bits.

    dy (M, N), dtable (V, N), zero or to be kept where no token points; ``order`` (M,) of integers sorts the tokens
    stably (`sorted_order`) and ``tokens`` (M,) are in that order. Of each run of equal tokens the program at its first
    place adds up the rows. Tokens out of range are dropped. Grid: `row_major_grid` with BM 1.
    """
    i, n = row_major(dy.shape[1], BN)
    token = tw.load(tokens, i)
    before = tw.load(tokens, tw.maximum(i - 1, 0))
    if i == 0 or token != before:
        total = tw.zeros((1, BN), tw.float32)
        place = i
        same = True
        while same:
            row = tw.load(order, place).to(tw.int32)
            total = total + tw.load(dy, (row, n), (1, BN)).to(tw.float32)
            place = place + 1
            same = place < dy.shape[0] and tw.load(tokens, place) == token
        tw.scatter(dtable, tw.full((1,), token), total.to(dtable.dtype), 0, tile=(0, n))


@tw.kernel
def embedding_backward_atomic(
    dy: tw.Tensor, tokens: tw.Tensor, dtable: tw.Tensor, *, BM: tw.constexpr = 4, BN: tw.constexpr = 1024
) -> None:
    """Adds dy's rows to the rows of ``dtable`` that their tokens name, in any order: the rounding may differ each time.

    dy (M, N), tokens (M,), dtable (V, N) of dy's dtype. Grid: `row_major_grid`.
    """
    m, n = row_major(dy.shape[1], BN)
    rows = tw.load(tokens, m, BM, pad=-1)
    tw.atomic_add(dtable, rows, tw.load(dy, (m, n), (BM, BN)), 0, tile=(0, n))


def sorted_order(tokens: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sorted tokens and their order, for `embedding_backward`; with torch: ``tokens.sort(stable=True)``."""
    order = np.argsort(tokens, kind="stable").astype(np.int32)
    return tokens[order], order


def reference(table: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows of the table."""
    rows: np.ndarray[Any, Any] = table[tokens]
    return rows


def reference_backward(dy: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any], vocabulary: int) -> np.ndarray[Any, Any]:
    """In float64."""
    out = np.zeros((vocabulary, dy.shape[1]))
    np.add.at(out, tokens, dy.astype(np.float64))
    return out
