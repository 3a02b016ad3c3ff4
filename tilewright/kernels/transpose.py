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


def tiles(element_bytes: int) -> dict[str, int]:
    """``BM`` and ``BN``: threads then hold squares of elements that are 16 bytes long both ways."""
    return {"BM": 128, "BN": 128} if element_bytes <= 2 else {"BM": 64, "BN": 64}


def reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The transposed matrix."""
    return np.ascontiguousarray(x.T)
