"""Many products of one size: ``c[i] = a[i] @ b[i]``, for one or two axes of batches."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.gemm import TILES


@tw.kernel
def gemm_batched(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
) -> None:
    """a (Y, Z, M, K), b (Y, Z, K, N), c (Y, Z, M, N), any strides. Grid: (cdiv(M, BM), cdiv(N, BN), Y * Z).

    Accumulates in float32. An operand that products share is passed as a view with stride 0. Two axes, since those of
    batches and heads are often no single one without a copy.
    """
    m, n, product = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    y, z = product // c.shape[1], product % c.shape[1]
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[3], BK)):
        acc = tw.dot(tw.load(a[y, z], (m, k), (BM, BK)), tw.load(b[y, z], (k, n), (BK, BN)), acc)
    tw.store(c[y, z], (m, n), acc.to(c.dtype))


def batched_configuration(batch: int, m: int, n: int, units: int = 132) -> dict[str, int]:
    """As `tilewright.kernels.gemm.configuration`, with the waves of all products together."""

    def cost(entry: tuple[tuple[int, int, int], float]) -> float:
        (bm, bn, _), speed = entry
        waves = -(-(batch * -(-m // bm) * -(-n // bn)) // units)
        return waves * bm * bn / speed

    bm, bn, bk = min(TILES, key=cost)[0]
    return {"BM": bm, "BN": bn, "BK": bk}


def batched(a: Any, b: Any, c: Any) -> None:
    """``c[i] = a[i] @ b[i]`` for one axis of batches, or two. Arrays of NumPy or torch, on one device."""
    if len(c.shape) == 3:
        a, b, c = a[None], b[None], c[None]
    y, z, m, n = c.shape
    meta = batched_configuration(y * z, m, n)
    gemm_batched[tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"]), y * z](a, b, c, **meta)


def reference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The products in float64."""
    product: np.ndarray[Any, Any] = a.astype(np.float64) @ b.astype(np.float64)
    return product
