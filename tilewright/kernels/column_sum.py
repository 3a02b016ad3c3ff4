"""Sums of the columns of a matrix, in two passes and one order: the same input gives the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw

#: rows that one program of the first pass adds up, and columns of its tiles
ROWS, COLUMNS = 256, 256


@tw.kernel
def column_sum(
    x: tw.Tensor, sums: tw.Tensor, *, ROWS: tw.constexpr = ROWS, BM: tw.constexpr = 32, BN: tw.constexpr = COLUMNS
) -> None:
    """``sums[p, n]``: the sum in float32 of rows p * ROWS to (p + 1) * ROWS of column n, in sums' dtype.

    x (M, N), sums (cdiv(M, ROWS), N). Grid: (cdiv(M, ROWS), cdiv(N, BN)). With sums (1, N) and ROWS at least M this
    is the whole sum in one pass; else a second launch adds up the partial sums (`column_sums`).
    """
    p, n = tw.program_id(0), tw.program_id(1)
    total = tw.zeros((BM, BN), tw.float32)
    for i in tw.range(ROWS // BM):
        total = total + tw.load(x, (p * (ROWS // BM) + i, n), (BM, BN)).to(tw.float32)
    tw.store(sums, (p, n), tw.sum(total, axis=0)[None, :].to(sums.dtype))


def partial_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the float32 workspace of `column_sums`."""
    return tw.cdiv(rows, ROWS), columns


def column_sums(x: Any, partial: Any, out: Any) -> None:
    """``out[0] = x.sum(0)``: x (M, N), out (1, N), ``partial`` a float32 array of `partial_shape`.

    Arrays of NumPy or torch, on one device.
    """
    programs, columns = partial.shape
    column_sum[(programs, tw.cdiv(columns, COLUMNS))](x, partial)
    rows = 32
    while rows < programs:
        rows *= 2
    column_sum[(1, tw.cdiv(columns, 32))](partial, out, ROWS=rows, BM=min(rows, 128), BN=32)


def reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The sums in float64, (1, N)."""
    sums: np.ndarray[Any, Any] = x.astype(np.float64).sum(axis=0, keepdims=True)
    return sums
