"""The library's kernels on the emulated MI300 and MI350: right, without races, under several interleavings.

The counterpart of `test_ptx_kernels`: shapes are small and ragged, outputs poisoned.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from language_programs import CASES, Case

import tilewright as tw
from tilewright.kernels import attention as attention_module
from tilewright.kernels import column_sum as columns_module
from tilewright.kernels import gemm_batched, gemm_epilogue, gemm_grouped, gemm_scaled
from tilewright.kernels import mlp as mlp_module
from tilewright.kernels import rmsnorm as rmsnorm_module
from tilewright.kernels import softmax as softmax_module
from tilewright.kernels import transpose as transpose_module
from tilewright.kernels.attention import attention
from tilewright.kernels.column_sum import column_sum
from tilewright.kernels.gemm import gemm
from tilewright.kernels.mlp import mlp
from tilewright.kernels.rmsnorm import rmsnorm
from tilewright.kernels.softmax import softmax
from tilewright.kernels.transpose import transpose

BF16 = ml_dtypes.bfloat16
DEVICES = [f"emulate:{target},races{seed}" for target in ("gfx942", "gfx950") for seed in ("", ",seed=1")]

pytestmark = pytest.mark.parametrize("device", DEVICES)


def normal(*shape: int, dtype: Any = BF16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def poisoned(*shape: int, dtype: Any = BF16) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def relative(actual: np.ndarray, exact: np.ndarray) -> float:
    assert not np.isnan(actual.astype(np.float64)).any()
    return float(np.linalg.norm(actual.astype(np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("layout", ["NN", "TT"])
@pytest.mark.parametrize("shape", [(128, 64, 192), (67, 65, 71)])
def test_gemm(shape: tuple[int, int, int], layout: str, device: str) -> None:
    m, n, k = shape
    a = normal(k, m).T if layout[0] == "T" else normal(m, k)
    b = normal(n, k, seed=1).T if layout[1] == "T" else normal(k, n, seed=1)
    c = poisoned(m, n)
    tw.device(device).launch(gemm, (tw.cdiv(m, 64), tw.cdiv(n, 64)), a, b, c, BM=64, BN=64, BK=32)
    assert relative(c, a.astype(np.float64) @ b.astype(np.float64)) < 4e-3


def test_products_of_the_library(device: str) -> None:
    """Batched, grouped, with an epilogue, gated, with scales."""
    run, tiles = tw.device(device), {"BM": 32, "BN": 64, "BK": 32}
    a, b = normal(2, 40, 72), normal(2, 72, 70, seed=1)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    c = poisoned(2, 40, 70)
    run.launch(gemm_batched.gemm_batched, (2, 2, 2), a[None], b[None], c[None], **tiles)
    assert relative(c, exact) < 4e-3
    offsets, c = np.array([0, 10, 40], np.int32), poisoned(40, 70)
    most = gemm_grouped.most_tiles(40, 2, 32)
    table = np.zeros((most, 4), np.int32)
    run.launch(gemm_grouped.list_tiles, (1,), offsets, table, BM=32, GROUPS=2, TILES=4)
    run.launch(gemm_grouped.gemm_grouped, (most * 2,), a[0], b, table, c, **tiles)
    assert relative(c, gemm_grouped.reference(a[0], b, offsets)) < 4e-3
    bias = normal(70, seed=2)
    steps = {"STEPS": (gemm_epilogue.add_bias, gemm_epilogue.relu), **tiles}
    run.launch(gemm_epilogue.gemm_epilogue, (2, 2), a[0], b[0], c, bias, None, 1.0, **steps)
    assert relative(c, np.maximum(exact[0] + bias.astype(np.float64), 0)) < 4e-3
    run.launch(gemm_epilogue.gate_up, (2, 2), a[0], b[0], b[1], c, **tiles)
    left, right = exact[0], a[0].astype(np.float64) @ b[1].astype(np.float64)
    assert relative(c, left / (1 + np.exp(-left)) * right) < 4e-3
    small = [x.astype(ml_dtypes.float8_e4m3fn) for x in (a[0], b[0])]
    scales, c = [np.full(1, x, np.float32) for x in (0.5, 3.0)], poisoned(40, 70, dtype=np.float32)
    run.launch(gemm_scaled.gemm_scaled, (2, 2), *small, *scales, c, None, **tiles)
    assert relative(c, 1.5 * (small[0].astype(np.float64) @ small[1].astype(np.float64))) < 1e-3


def test_chained_products(device: str) -> None:
    x, w1, w2, y = normal(40, 72), normal(72, 64, seed=1), normal(64, 70, seed=2), poisoned(40, 70)
    tw.device(device).launch(mlp, (1,), x, w1, w2, y, BM=64, BH=64, BN=64, BK=32)
    assert relative(y, mlp_module.reference(x, w1, w2)) < 4e-3


@pytest.mark.parametrize(("depth", "causal"), [(64, False), (128, True)])
def test_attention(depth: int, causal: bool, device: str) -> None:
    """Tiles that fit the 64 KB of LDS of the MI300."""
    q, o = normal(1, 2, 100, depth), poisoned(1, 2, 100, depth)
    k, v = normal(1, 1, 140, depth, seed=1), normal(1, 1, 140, depth, seed=2)
    scale = depth**-0.5 * math.log2(math.e)
    tw.device(device).launch(attention, (2, 2, 1), q, k, v, o, scale, D=depth, CAUSAL=causal, BM=64, BN=64)
    assert relative(o, attention_module.reference(q, k, v, causal)[0]) < 4e-3


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_kernels_of_rows(dtype: Any, device: str) -> None:
    x, weight = normal(9, 200, dtype=dtype), normal(200, dtype=dtype, seed=1)
    run = tw.device(device)
    y = poisoned(9, 200, dtype=dtype)
    run.launch(softmax, (3,), x, y, BM=4, BN=256)
    assert relative(y, softmax_module.reference(x)) < 4e-3
    run.launch(rmsnorm, (3,), x, weight, y, 1e-3, BM=4, BN=256)
    assert relative(y, rmsnorm_module.reference(x, weight, 1e-3)) < 4e-3
    turned = poisoned(200, 9, dtype=dtype)
    run.launch(transpose, (1, 4), x, turned, BM=64, BN=64)
    np.testing.assert_array_equal(turned, transpose_module.reference(x))


def test_workgroups_that_add_up_what_others_stored(device: str) -> None:
    """The last workgroup to arrive at a counter reads what the others released with it."""
    x, sums = normal(200, 100, dtype=np.float32), poisoned(1, 100, dtype=np.float32)
    partial, arrived = poisoned(3, 100, dtype=np.float32), np.zeros(2, np.int32)
    tw.device(device).launch(column_sum, (2, 3), x, partial, arrived, sums, BM=32, BN=64)
    assert relative(sums, columns_module.reference(x)) < 1e-5
    assert not arrived.any()


@pytest.mark.parametrize("case", CASES[::19], ids=lambda case: case.name)
def test_programs_of_the_language(case: Case, device: str) -> None:
    """A sample: all of them run on the emulated MI300 in tests/backends."""
    arrays = case.arrays()
    tw.device(device).launch(case.kernel, case.grid, *arrays, **case.meta)
    case.check(arrays)
