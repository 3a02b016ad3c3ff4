"""Products whose left operand has another dtype in memory: it is cast on its way to the matrix unit, not before.

That saves the pass that would write it in the right one's dtype and read it again: of activations in float32, of
weights in float32 or in 8 bits with a scale for each row. A right operand of that kind is the left one of the
transposed product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.gemm import configuration


@tw.kernel
def gemm_cast(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    scales: tw.Tensor = None,
    row_bias: tw.Tensor = None,
    column_bias: tw.Tensor = None,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 64,
) -> None:
    """``c = scales * (a.to(b.dtype) @ b) + bias``: a (M, K) of any float dtype, b (K, N), c (M, N), any strides.

    Accumulates in float32. scales (M,) float32, row_bias (M,), column_bias (N,): each may be absent.
    Grid: (cdiv(M, BM), cdiv(N, BN)).
    """
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        left, right = tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN))
        acc = tw.dot(left.to(b.dtype), right, acc)
    if scales is not None:
        acc = acc * tw.load(scales, m, (BM,))[:, None]
    if row_bias is not None:
        acc = acc + tw.load(row_bias, m, (BM,)).to(tw.float32)[:, None]
    if column_bias is not None:
        acc = acc + tw.load(column_bias, n, (BN,)).to(tw.float32)[None, :]
    tw.store(c, (m, n), acc.to(c.dtype))


def cast_configuration(m: int, n: int) -> dict[str, int]:
    """Tile sizes: with few columns narrow ones, that all programs have rows of the left operand to bring."""
    if n <= 64:
        return {"BM": 64, "BN": max(16, 1 << (n - 1).bit_length()), "BK": 128}
    chosen = configuration(m, n)
    return {"BM": chosen["BM"] if chosen["BN"] < 256 else 128, "BN": min(chosen["BN"], 128), "BK": 64}


def cast_matmul(a: Any, b: Any, c: Any, *, scales: Any = None, row_bias: Any = None, column_bias: Any = None) -> None:
    """``c = scales * (a.to(b.dtype) @ b) + bias``, see `gemm_cast`. Arrays of NumPy or torch, on one device."""
    (m, n), meta = c.shape, cast_configuration(*c.shape)
    gemm_cast[tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"])](a, b, c, scales, row_bias, column_bias, **meta)


def reference(
    a: np.ndarray[Any, Any],
    b: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any] | None = None,
    row_bias: np.ndarray[Any, Any] | None = None,
    column_bias: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """In float64, from a rounded to b's dtype."""
    c: np.ndarray[Any, Any] = a.astype(b.dtype).astype(np.float64) @ b.astype(np.float64)
    c *= 1 if scales is None else scales.astype(np.float64)[:, None]
    c += 0 if row_bias is None else row_bias.astype(np.float64)[:, None]
    c += 0 if column_bias is None else column_bias.astype(np.float64)
    return c
