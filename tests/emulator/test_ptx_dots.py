"""Dots with operands in registers (mma.sync, cp.async) on emulated NVIDIA GPUs: every dtype, ragged, all layouts."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from products import product

import tilewright as tw
from tilewright.kernels.transpose import tiles, transpose

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def matrix(m: int, n: int, dtype: Any, seed: int, transposed: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (n, m) if transposed else (m, n)
    value = (
        rng.integers(-128, 128, shape).astype(dtype) if dtype is np.int8 else rng.standard_normal(shape).astype(dtype)
    )
    return value.T if transposed else value


#: target, operands, accumulator, precision, allowed relative error (norms)
# the warpgroup unit keeps 13 binary digits of sums of 8-bit floats
DOTS = [
    ("sm_80", BF16, np.float32, "default", 1e-6),
    ("sm_80", np.float16, np.float32, "default", 1e-6),
    ("sm_80", np.float32, np.float32, "default", 1e-6),
    ("sm_80", np.float32, np.float32, "3xtf32", 1e-6),
    ("sm_80", np.float32, np.float32, "tf32", 1e-3),
    ("sm_80", np.float64, np.float64, "default", 1e-14),
    ("sm_80", np.int8, np.int32, "default", 0.0),
    ("sm_90a", np.float32, np.float32, "tf32", 1e-3),
    ("sm_90a", np.float64, np.float64, "default", 1e-14),
    ("sm_90a", np.int8, np.int32, "default", 0.0),
    ("sm_90a", E4M3, np.float32, "default", 4e-4),
    ("sm_90a", E5M2, np.float32, "default", 4e-4),
    ("sm_120a", BF16, np.float32, "default", 1e-6),
]


@pytest.mark.parametrize(("shape", "layout"), [((64, 64, 32), "NN"), ((72, 80, 104), "TN"), ((65, 40, 77), "NT")])
@pytest.mark.parametrize(("target", "dtype", "acc", "precision", "allowed"), DOTS)
def test_products(
    target: str, dtype: Any, acc: Any, precision: str, allowed: float, shape: tuple[int, int, int], layout: str
) -> None:
    m, n, k = shape
    a, b = matrix(m, k, dtype, 0, layout[0] == "T"), matrix(k, n, dtype, 1, layout[1] == "T")
    c = np.full((m, n), 77, acc)
    grid = (tw.cdiv(m, 64), tw.cdiv(n, 64))
    tw.device(f"emulate:{target},races").launch(product, grid, a, b, c, precision=precision)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.linalg.norm(c.astype(np.float64) - exact) <= allowed * np.linalg.norm(exact)


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize(
    ("dtype", "precision", "meta", "allowed"),
    [
        (np.float64, "default", {"BM": 128, "BN": 64, "BK": 16}, 1e-14),
        (np.float64, "default", {"BM": 64, "BN": 128, "BK": 8}, 1e-14),
        (np.float32, "default", {"BM": 128, "BN": 64, "BK": 16, "schedule": "roles"}, 1e-6),
        (np.float32, "3xtf32", {"BM": 128, "BN": 128, "BK": 32}, 1e-6),
    ],
)
def test_roles(dtype: Any, precision: str, meta: dict[str, Any], allowed: float, layout: str) -> None:
    """Copies by the engine, warpgroups that compute from registers; more than one round of the ring."""
    m, n, k = meta["BM"] + 8, meta["BN"] + 8, 5 * meta["BK"] + 8
    a, b = matrix(m, k, dtype, 0, layout[0] == "T"), matrix(k, n, dtype, 1, layout[1] == "T")
    c = np.full((m, n), np.nan, dtype)
    grid = (tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"]))
    tw.device("emulate:sm_90a").launch(product, grid, a, b, c, precision=precision, num_stages=3, **meta)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.linalg.norm(c - exact) <= allowed * np.linalg.norm(exact)


@tw.kernel
def product_and_sums(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, s: tw.Tensor, *, BM: tw.constexpr, BN: tw.constexpr):
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], 32)):
        acc = tw.dot(tw.load(a, (m, k), (BM, 32)), tw.load(b, (k, n), (32, BN)), acc)
    tw.store(c, (m, n), acc.to(c.dtype))
    tw.store(s, (m, n), tw.sum(acc, axis=0)[None, :])


def test_a_row_leaves_through_slots_beside_its_tile() -> None:
    """Slots of one line start where the swizzle's pattern does; both warpgroups hold all of the line."""
    a, b = matrix(264, 64, BF16, 0, False), matrix(64, 128, BF16, 1, False)
    c, sums = np.full((264, 128), np.nan, BF16), np.full((2, 128), np.nan, np.float32)
    device = tw.device("emulate:sm_90a,races")
    device.launch(product_and_sums, (2, 1), a, b, c, sums, BM=256, BN=128, num_warps=8)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(c.astype(np.float64), exact, rtol=2**-7, atol=1e-2)
    np.testing.assert_allclose(sums, [exact[:256].sum(0), exact[256:].sum(0)], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_transpose(target: str) -> None:
    x = np.random.default_rng(0).standard_normal((130, 65)).astype(BF16)
    y = np.full((65, 130), np.nan, BF16)
    meta = tiles(2)
    grid = (tw.cdiv(130, meta["BM"]), tw.cdiv(65, meta["BN"]))
    tw.device(f"emulate:{target},races").launch(transpose, grid, x, y, **meta)
    np.testing.assert_array_equal(y.view(np.uint16), x.T.view(np.uint16))
