"""Matrix products of float32 and float64 matrices, of their own accuracy: ``c = a @ b``."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def precise_gemm(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 32,
    PRECISION: tw.constexpr = "default",
) -> None:
    """``c = a @ b`` with a (M, K), b (K, N), c (M, N) of one dtype, any strides. Grid: (cdiv(M, BM), cdiv(N, BN)).

    Accumulates in c's dtype. ``PRECISION`` as of `tw.dot`, for float32.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), c.dtype)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc, precision=PRECISION)
    tw.store(c, (m, n), acc)


Tiles = tuple[tuple[tuple[int, int, int], float], ...]
#: by dtype and precision: tiles (BM, BN, BK) and their speed relative to the first, as measured on an H100 at 4096^3
TILES: dict[tuple[str, str], Tiles] = {
    ("float64", "default"): (((128, 128, 32), 1.0), ((128, 64, 32), 1.0), ((64, 64, 16), 0.82)),
    ("float32", "default"): (((256, 128, 16), 1.0), ((128, 128, 16), 0.94)),
    ("float32", "3xtf32"): (((128, 128, 32), 1.0), ((128, 64, 32), 0.84)),
}


def configuration(m: int, n: int, dtype: str, precision: str = "default", units: int = 132) -> dict[str, Any]:
    """Tile sizes for a product of that size on a GPU of ``units`` SMs, without tuning; the rest as of `precise_matmul`.

    Picks the tiles whose waves over the SMs take least time, each wave costing its area over its speed.
    """
    if (dtype, precision) not in TILES:
        known = ", ".join(f"{d} {p}" for d, p in TILES)
        raise ValueError(f"no tiles for {dtype} with {precision!r} precision; known: {known}")

    def cost(entry: tuple[tuple[int, int, int], float]) -> float:
        (bm, bn, _), speed = entry
        return -(-(-(-m // bm) * -(-n // bn)) // units) * bm * bn / speed

    bm, bn, bk = min(TILES[dtype, precision], key=cost)[0]
    return {"BM": bm, "BN": bn, "BK": bk, "PRECISION": precision}


def precise_matmul(a: Any, b: Any, c: Any, precision: str = "default") -> None:
    """``c = a @ b`` with tiles chosen by `configuration`. Arrays of NumPy or torch of one dtype, on one device.

    ``precision`` "default": float64 or float32 arithmetic; "3xtf32", for float32: three products of the matrix unit,
    about as accurate and faster. ValueError for other dtypes and precisions.
    """
    (m, n), dtype = c.shape, str(c.dtype).removeprefix("torch.")
    meta = configuration(m, n, dtype, precision)
    precise_gemm[(tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"]))](a, b, c, **meta)


def reference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The product in extended precision where the platform has it, else in float64."""
    product: np.ndarray[Any, Any] = a.astype(np.longdouble) @ b.astype(np.longdouble)
    return product
