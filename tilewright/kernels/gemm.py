"""Matrix product: ``c = a @ b``."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.workspace import Workspace


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
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 128,
    RUNS: tw.constexpr = 2,
    BW: tw.constexpr = 32,
) -> None:
    """`gemm` with K in runs, for products of few tiles. Grid: (cdiv(M, BM), cdiv(N, BN), RUNS).

    ``partials`` is float32 (tiles, RUNS, BM, BN) with tiles = grid[0] * grid[1]; ``arrivals`` int32, a zero for each
    tile, which is zero again afterwards. Whoever comes last to a tile adds its partial sums, BW columns at a time and
    always in the same order, so that equal inputs give equal bits.
    """
    m, n, run = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    tile = m * tw.num_programs(1) + n
    steps = tw.cdiv(a.shape[1], BK)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(run * steps // RUNS, (run + 1) * steps // RUNS):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    sums = partials[tile]
    tw.store(sums, (run, 0, 0), acc[None, :, :])
    if tw.atomic_add(arrivals, tile, 1, order="acq_rel") == RUNS - 1:
        for j in tw.static_range(BN // BW):
            total = tw.sum(tw.load(sums, (0, 0, j), (RUNS, BM, BW)), axis=0)
            tw.store(c, (m, n * (BN // BW) + j), total.to(c.dtype))
        tw.atomic_exchange(arrivals, tile, 0)


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
#: in how many runs K may be split, and the least steps of BK in each
RUNS, LEAST_STEPS = (1, 2, 4, 8), 8
#: products of one element's multiply and add that an SM of an H100 does in a microsecond with the first tile
SPEED = 2.9e6
#: elements of the operands (bf16) that memory gives in a microsecond
STREAMED = 1.5e6
#: microseconds that handing over partial sums takes, and elements that the last program adds up in one
HANDOVER, ADDED = 4.0, 25e3
#: elements of the partial sums of a tile that the last program holds at once
HELD = 8192

_workspace = Workspace()


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


def split_configuration(m: int, n: int, k: int, units: int = 132) -> tuple[dict[str, int], int]:
    """Tile sizes as `configuration` gives them, and in how many runs to split K: 1 where the tiles fill the GPU.

    By a formula again: waves of programs, which cost their products over the tile's speed but not less than reading
    the operands; and where K is split, handing the partial sums over and adding them up. Of equals, that which keeps
    most SMs busy.
    """
    reading = (m + n) * k / STREAMED

    def cost(choice: tuple[tuple[tuple[int, int, int], float], int]) -> tuple[float, int]:
        ((bm, bn, bk), speed), runs = choice
        programs = tw.cdiv(m, bm) * tw.cdiv(n, bn) * runs
        waves = tw.cdiv(programs, units)
        steps = tw.cdiv(tw.cdiv(k, bk), runs)
        adding = HANDOVER + runs * bm * bn / ADDED if runs > 1 else 0.0
        return max(waves * bm * bn * steps * bk / (SPEED * speed), reading) + waves * adding, -min(programs, units)

    choices = [(tile, runs) for tile in TILES for runs in RUNS if runs == 1 or k >= runs * LEAST_STEPS * tile[0][2]]
    ((bm, bn, bk), _), runs = min(choices, key=cost)
    return {"BM": bm, "BN": bn, "BK": bk}, runs


def matmul(a: Any, b: Any, c: Any) -> None:
    """``c = a @ b`` with tiles chosen by `split_configuration`. Arrays of NumPy or torch, on one device.

    Equal inputs give equal bits. Where K is split, partial sums go through memory kept for the device and stream.
    """
    m, n = c.shape
    meta, runs = split_configuration(m, n, a.shape[1])
    bm, bn = meta["BM"], meta["BN"]
    grid = tw.cdiv(m, bm), tw.cdiv(n, bn)
    if runs == 1:
        gemm[grid](a, b, c, **meta)
        return
    tiles = grid[0] * grid[1]
    partials, arrivals = _workspace.take(c, (tiles, runs, bm, bn), tiles)
    width = min(bn, max(16, HELD // (runs * bm)))
    gemm_split[(*grid, runs)](a, b, c, partials, arrivals, **meta, RUNS=runs, BW=width)


def reference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The product in float64."""
    product: np.ndarray[Any, Any] = a.astype(np.float64) @ b.astype(np.float64)
    return product
