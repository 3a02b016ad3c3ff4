"""Transposition of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def transpose(x: tw.Tensor, y: tw.Tensor, *, BM: tw.constexpr = 64, BN: tw.constexpr = 64) -> None:
    """``y = x.T`` with x (M, N) and y (N, M), any strides. Grid: (cdiv(M, BM), cdiv(N, BN))."""
    m, n = tw.program_id(0), tw.program_id(1)
    tw.store(y, (n, m), tw.load(x, (m, n), (BM, BN)).T)


def reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The transposed matrix."""
    return np.ascontiguousarray(x.T)
