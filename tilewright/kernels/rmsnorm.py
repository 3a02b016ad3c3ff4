"""Root-mean-square normalisation of the rows of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def rmsnorm(
    x: tw.Tensor, weight: tw.Tensor, y: tw.Tensor, eps: tw.float32, *, BM: tw.constexpr = 1, BN: tw.constexpr = 4096
) -> None:
    """``y = x / sqrt(mean(x ** 2) + eps) * weight`` along rows of up to BN elements. Grid: (cdiv(M, BM),).

    x and y (M, N), weight (N,), each of any float dtype. Computes in float32, reads and writes each element once.
    """
    m = tw.program_id(0)
    row = tw.load(x, (m, 0), (BM, BN)).to(tw.float32)
    inverse = tw.rsqrt(tw.sum(row * row, axis=1) / x.shape[1] + eps)
    scale = tw.load(weight, (0,), (BN,)).to(tw.float32)  # here: a cached row that need not wait in registers
    tw.store(y, (m, 0), (row * inverse[:, None] * scale).to(y.dtype))


def reference(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], eps: float) -> np.ndarray[Any, Any]:
    """In float64."""
    exact = x.astype(np.float64)
    rows: np.ndarray[Any, Any] = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + eps)
    return rows * weight.astype(np.float64)
