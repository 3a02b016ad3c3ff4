"""Two chained matrix products with an activation between them."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def mlp(
    x: tw.Tensor,
    w1: tw.Tensor,
    w2: tw.Tensor,
    y: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BH: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 64,
) -> None:
    """``y = relu(x @ w1) @ w2`` with x (M, K), w1 (K, H), w2 (H, N), H up to BH. Grid: (cdiv(M, BM),).

    The hidden tile stays in registers and feeds the second product from there.
    """
    m = tw.program_id(0)
    hidden = tw.zeros((BM, BH), tw.float32)
    for k in tw.range(tw.cdiv(x.shape[1], BK)):
        hidden = tw.dot(tw.load(x, (m, k), (BM, BK)), tw.load(w1, (k, 0), (BK, BH)), hidden)
    active = tw.maximum(hidden, 0.0).to(x.dtype)
    for n in tw.range(tw.cdiv(w2.shape[1], BN)):
        out = tw.dot(active, tw.load(w2, (0, n), (BH, BN)))
        tw.store(y, (m, n), out.to(y.dtype))


def reference(x: np.ndarray[Any, Any], w1: np.ndarray[Any, Any], w2: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64, with the hidden values rounded to x's dtype as the kernel does."""
    hidden = np.maximum(x.astype(np.float64) @ w1.astype(np.float64), 0).astype(x.dtype)
    product: np.ndarray[Any, Any] = hidden.astype(np.float64) @ w2.astype(np.float64)
    return product
