"""Matrix product: ``c = a @ b``."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def gemm(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
) -> None:
    """``c = a @ b`` with a (M, K), b (K, N), c (M, N), any strides. Grid: (cdiv(M, BM), cdiv(N, BN)).

    Accumulates in float32. A transposed operand is passed as a transposed view.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(c, (m, n), acc.to(c.dtype))


@tw.kernel
def gemm_split(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    partials: tw.Tensor,
    arrivals: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 64,
) -> None:
    """`gemm` with K in several runs, for products of few tiles. Grid: (cdiv(M, BM), cdiv(N, BN), runs).

    ``partials`` is float32 (runs * grid[0] * BM, grid[1] * BN); ``arrivals`` int32, grid[0] * grid[1] zeros, which are
    zeros again afterwards. Whoever comes last to a tile adds its partial sums, always in the order of K.
    """
    m, n, run = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    rows, tile, runs = tw.num_programs(0), m * tw.num_programs(1) + n, tw.num_programs(2)
    steps = tw.cdiv(a.shape[1], BK)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(run * steps // runs, (run + 1) * steps // runs):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(partials, (run * rows + m, n), acc)
    if tw.atomic_add(arrivals, tile, 1) == runs - 1:
        total = tw.load(partials, (m, n), (BM, BN))
        for other in tw.range(1, runs):
            total = total + tw.load(partials, (other * rows + m, n), (BM, BN))
        tw.store(c, (m, n), total.to(c.dtype))
        tw.atomic_exchange(arrivals, tile, 0, sem="relaxed")


#: tiles (BM, BN, BK) and their speed relative to the first, rounded from a sweep on an H100 (docs/performance.md)
TILES: tuple[tuple[tuple[int, int, int], float], ...] = (
    ((128, 256, 64), 1.0),
    ((64, 256, 64), 0.93),
    ((256, 128, 64), 0.91),
    ((128, 128, 64), 0.86),
    ((64, 128, 128), 0.80),
    ((128, 64, 128), 0.51),
    ((64, 64, 128), 0.41),
)


def configuration(m: int, n: int, units: int = 132) -> dict[str, int]:
    """Tile sizes for a product of that size on a GPU of ``units`` SMs, without tuning.

    Picks the tiles whose waves over the SMs take least time, each wave costing its area over its speed.
    """

    def cost(entry: tuple[tuple[int, int, int], float]) -> float:
        (bm, bn, _), speed = entry
        waves = -(-(-(-m // bm) * -(-n // bn)) // units)
        return waves * bm * bn / speed

    bm, bn, bk = min(TILES, key=cost)[0]
    return {"BM": bm, "BN": bn, "BK": bk}


def matmul(a: Any, b: Any, c: Any) -> None:
    """``c = a @ b`` with tiles chosen by `configuration`. Arrays of NumPy or torch, on one device."""
    (m, n), meta = c.shape, configuration(*c.shape)
    gemm[(tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"]))](a, b, c, **meta)


def reference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The product in float64."""
    product: np.ndarray[Any, Any] = a.astype(np.float64) @ b.astype(np.float64)
    return product
