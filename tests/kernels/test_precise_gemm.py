"""Products of float32 and float64 matrices, on the interpreter and an emulated Hopper GPU, against more precision."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright as tw
from tilewright.kernels.precise_gemm import TILES, configuration, precise_gemm, precise_matmul, reference


def matrix(rows: int, columns: int, dtype: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)


def error(c: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm((c - exact).astype(np.float64)) / np.linalg.norm(exact.astype(np.float64)))


@pytest.mark.parametrize(("dtype", "precision"), sorted(TILES))
def test_products(dtype: str, precision: str) -> None:
    m, n, k = 130, 70, 75
    a, b, c = matrix(m, k, dtype, 0), matrix(k, n, dtype, 1), np.full((m, n), np.nan, dtype)
    precise_matmul(a, b, c, precision)
    assert error(c, reference(a, b)) <= 4 * np.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "precision", "tile"), [(*kind, tile) for kind, tiles in TILES.items() for tile, _ in tiles]
)
def test_products_on_hopper(dtype: str, precision: str, tile: tuple[int, int, int]) -> None:
    m, n, k = 260, 130, 75
    a, b, c = matrix(m, k, dtype, 0), matrix(k, n, dtype, 1).T.copy().T, np.full((m, n), np.nan, dtype)
    meta = dict(zip(("BM", "BN", "BK"), tile, strict=True), PRECISION=precision)
    grid = tw.cdiv(m, tile[0]), tw.cdiv(n, tile[1])
    tw.device("emulate:sm_90a").launch(precise_gemm, grid, a, b, c, **meta)
    assert error(c, reference(a, b)) <= 4 * np.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "precision"), sorted(TILES))
@pytest.mark.parametrize("device", ["emulate:gfx942", "emulate:gfx950"])
def test_products_on_amd(device: str, dtype: str, precision: str) -> None:
    m, n, k = 70, 65, 75
    a, b, c = matrix(m, k, dtype, 0), matrix(k, n, dtype, 1), np.full((m, n), np.nan, dtype)
    tw.device(device).launch(precise_gemm, (2, 2), a, b, c, BM=64, BN=64, BK=16, PRECISION=precision)
    assert error(c, reference(a, b)) <= 4 * np.finfo(dtype).eps


def test_tiles_follow_the_grid() -> None:
    assert configuration(4096, 4096, "float64")["BM"] == 128
    assert configuration(512, 512, "float64")["BM"] == 64  # else most SMs would have nothing to do
    with pytest.raises(ValueError, match="no tiles for float16"):
        configuration(64, 64, "float16")
