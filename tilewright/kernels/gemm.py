"""Matrix product: ``c = a @ b``."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.workspace import Workspace


@tw.function
def product(
    a: Any, b: Any, m: Any, n: Any, BM: tw.constexpr, BN: tw.constexpr, BK: tw.constexpr, after: Any = None
) -> Any:
    """The tile (m, n) of ``a @ b`` in float32, (BM, BN). ``after``: what loads of a wait for."""
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK), after=after), tw.load(b, (k, n), (BK, BN)), acc)
    return acc


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
    tw.store(c, (m, n), product(a, b, m, n, BM, BN, BK).to(c.dtype))


@tw.kernel
def gemm_partial(
    a: tw.Tensor,
    b: tw.Tensor,
    partials: tw.Tensor,
    *,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 128,
) -> None:
    """``partials[run]``: the product over one run of K. Grid: (cdiv(M, BM), cdiv(N, BN), runs).

    ``partials`` is float32 (runs, M, N). `add_partials` behind it makes the product.
    """
    m, n, run = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    steps, runs = tw.cdiv(a.shape[1], BK), tw.num_programs(2)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(run * steps // runs, (run + 1) * steps // runs):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(partials[run], (m, n), acc)


@tw.kernel
def add_partials(
    partials: tw.Tensor, c: tw.Tensor, *, RUNS: tw.constexpr = 2, BM: tw.constexpr = 8, BN: tw.constexpr = 128
) -> None:
    """``c = partials.sum(0)`` in one order: partials (RUNS, M, N), c (M, N). Grid: (cdiv(M, BM), cdiv(N, BN))."""
    m, n = tw.program_id(0), tw.program_id(1)
    total = tw.sum(tw.load(partials, (0, m, n), (RUNS, BM, BN)), axis=0)
    tw.store(c, (m, n), total.to(c.dtype))


#: tiles (BM, BN, BK) and their speed relative to the first, rounded from a sweep on an H100 (docs/performance.md).
#: The last is that of operands that lie in L2; in larger products, which have better choices, it is 0.41
TILES: tuple[tuple[tuple[int, int, int], float], ...] = (
    ((128, 256, 64), 1.0),
    ((64, 256, 64), 0.93),
    ((256, 128, 64), 0.91),
    ((128, 128, 64), 0.86),
    ((64, 128, 128), 0.80),
    ((128, 64, 128), 0.51),
    ((64, 64, 128), 0.62),
)
#: (speed, exposed) of tiles whose sums are only rounded and stored: some consumers then alternate (docs/passes.md).
#: ``exposed``: what of a tile's beginning and end runs beside no other products, as so many products of K
PLAIN: dict[tuple[int, int], tuple[float, int]] = {
    (128, 256): (1.0, 100),
    (64, 256): (0.93, 45),
    (256, 128): (0.93, 70),
    (128, 128): (0.91, 0),
    (64, 128): (0.80, 80),
}
#: the same where K is split: about one program for each SM, with operands from L2
SPLIT_TILES: tuple[tuple[tuple[int, int, int], float], ...] = (
    ((64, 128, 128), 0.87),
    ((64, 256, 64), 0.84),
    ((128, 128, 64), 0.83),
    ((64, 64, 128), 0.65),
)
#: in how many runs K may be split, and the least steps of BK in each
RUNS, LEAST_STEPS = (2, 4, 8), 8
#: products of one element's multiply and add that an SM of an H100 does in a microsecond with the first tile
SPEED = 2.9e6
#: elements of the operands (bf16) that memory gives in a microsecond
STREAMED = 1.5e6
#: microseconds that another launch takes, and partial sums (float32) that it adds up in one
LAUNCH, ADDED = 2.0, 0.62e6
#: tile of `add_partials`
ADD_ROWS, ADD_COLUMNS = 8, 128

_workspace = Workspace()


def configuration(m: int, n: int, units: int = 132) -> dict[str, int]:
    """Tile sizes for a product of that size, with any epilogue, on a GPU of ``units`` SMs, without tuning.

    Picks the tiles whose waves over the SMs take least time, each wave costing its area over its speed.
    """

    def cost(entry: tuple[tuple[int, int, int], float]) -> float:
        (bm, bn, _), speed = entry
        waves = -(-(-(-m // bm) * -(-n // bn)) // units)
        return waves * bm * bn / speed

    bm, bn, bk = min(TILES, key=cost)[0]
    return {"BM": bm, "BN": bn, "BK": bk}


def split_configuration(m: int, n: int, k: int, units: int = 132) -> tuple[dict[str, int], int]:
    """Tile sizes for a product that is only stored, and in how many runs to split K: 1 where the tiles fill the GPU.

    By a formula again: waves of programs, which cost their products over the tile's speed but not less than reading
    the operands; and where K is split, another launch that adds the partial sums up. Of equals, that which keeps most
    SMs busy.
    """
    reading = (m + n) * k / STREAMED

    def cost(choice: tuple[tuple[tuple[int, int, int], float], int]) -> tuple[float, int, int]:
        ((bm, bn, bk), speed), runs = choice
        exposed = 0
        if runs == 1:
            speed, exposed = PLAIN.get((bm, bn), (speed, 0))
        programs = tw.cdiv(m, bm) * tw.cdiv(n, bn) * runs
        waves = tw.cdiv(programs, units)
        steps = tw.cdiv(tw.cdiv(k, bk), runs)
        adding = LAUNCH + runs * m * n / ADDED if runs > 1 else 0.0
        multiplying = max(waves * bm * bn * (steps * bk / speed + exposed) / SPEED, reading)
        return multiplying + adding, waves, -min(programs, units)

    whole = [(tile, 1) for tile in TILES]
    split = [(tile, runs) for tile in SPLIT_TILES for runs in RUNS if k >= runs * LEAST_STEPS * tile[0][2]]
    ((bm, bn, bk), _), runs = min(whole + split, key=cost)
    return {"BM": bm, "BN": bn, "BK": bk}, runs


def matmul(a: Any, b: Any, c: Any) -> None:
    """``c = a @ b`` with tiles chosen by `split_configuration`. Arrays of NumPy or torch, on one device.

    Equal inputs give equal bits. Where K is split, partial sums go through memory that is kept (`Workspace`).
    """
    m, n = c.shape
    meta, runs = split_configuration(m, n, a.shape[1])
    grid = tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"])
    if runs == 1:
        gemm[grid](a, b, c, **meta)
        return
    partials = _workspace.take(c, (runs, m, n))
    gemm_partial[(*grid, runs)](a, b, partials, **meta)
    rows, columns = ADD_ROWS, ADD_COLUMNS
    add_partials[(tw.cdiv(m, rows), tw.cdiv(n, columns))](partials, c, RUNS=runs, BM=rows, BN=columns)


def reference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The product in float64."""
    product: np.ndarray[Any, Any] = a.astype(np.float64) @ b.astype(np.float64)
    return product
