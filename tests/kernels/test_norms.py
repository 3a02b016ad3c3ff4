"""RMS and layer norm, forward and backward, on the interpreter and the emulated GPUs against float64."""

from __future__ import annotations

from typing import Any

import amd_programs as amd
import numpy as np
import pytest
from kernel_checks import DEVICES, check, launch, normal, poisoned, strided

import tilewright as tw
from tilewright.backends.lower.occupancy import waiting_words
from tilewright.backends.nvidia.compile import compile_function
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels import layernorm as layer_module
from tilewright.kernels import rmsnorm as rms_module
from tilewright.kernels.layernorm import layer_rows, layernorm, layernorm_long
from tilewright.kernels.norm_backward import (
    gradient_programs,
    norm_backward,
    norm_backward_sums,
    norm_gradients,
)
from tilewright.kernels.rmsnorm import rms_rows, rmsnorm, rmsnorm_long
from tilewright.kernels.rows import WIDEST, gradient_tiles

M, N, EPS = 5, 200, 1e-3
TILES = {"BM": 2, "BN": 256}
GRID = (tw.cdiv(M, 2),)


def inputs(dtype: str) -> tuple[Any, ...]:
    """x, residual, dy (M, N); weight, bias (N,)."""
    rows = strided(M, N, dtype=dtype), normal(M, N, dtype=dtype, seed=1), strided(M, N, dtype=dtype, seed=2)
    return *rows, normal(N, dtype=dtype, seed=3), normal(N, dtype=dtype, seed=4)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_rmsnorm_with_residual_and_bias(device: str, dtype: str, again: bool) -> None:
    x, residual, _, weight, bias = inputs(dtype)
    y, total, inverse = poisoned(M, N, dtype=dtype), poisoned(M, N, dtype=dtype), poisoned(M)
    tiles = {**TILES, "AGAIN": again}
    launch(device, rmsnorm, GRID, x, weight, y, EPS, residual, total, bias, inverse, **tiles)
    exact = x.astype(np.float64) + residual.astype(np.float64)
    check(y, rms_module.reference(x, weight, EPS, residual, bias), dtype)
    check(total, exact, dtype)
    check(inverse, 1 / np.sqrt((exact**2).mean(1) + EPS))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_layernorm_with_residual_and_bias(device: str, dtype: str, early: bool) -> None:
    x, residual, _, weight, bias = inputs(dtype)
    y, total, mean, inverse = poisoned(M, N, dtype=dtype), poisoned(M, N, dtype=dtype), poisoned(M), poisoned(M)
    tiles = {**TILES, "EARLY": early}
    launch(device, layernorm, GRID, x, weight, y, EPS, residual, total, bias, mean, inverse, **tiles)
    exact = x.astype(np.float64) + residual.astype(np.float64)
    check(y, layer_module.reference(x, weight, EPS, residual, bias), dtype)
    check(total, exact, dtype)
    check(mean, exact.mean(1))
    check(inverse, 1 / np.sqrt(exact.var(1) + EPS))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_rmsnorm_backward(device: str, dtype: str) -> None:
    x, other, dy, weight, _ = inputs(dtype)
    inverse = (1 / np.sqrt((x.astype(np.float64) ** 2).mean(1) + EPS)).astype(np.float32)
    dx, partial = poisoned(M, N, dtype=dtype), poisoned(2, 2, N)
    launch(device, norm_backward, (2,), dy, x, weight, inverse, dx, partial, other, BIAS=True, **TILES)
    exact, dweight, dbias = rms_module.reference_backward(dy, x, weight, EPS)
    check(dx, exact + other.astype(np.float64), dtype)
    check(partial[:, 0].sum(0), dweight)
    check(partial[:, 1].sum(0), dbias)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_layernorm_backward(device: str, dtype: str) -> None:
    x, other, dy, weight, _ = inputs(dtype)
    exact_x = x.astype(np.float64)
    mean = exact_x.mean(1).astype(np.float32)
    inverse = (1 / np.sqrt(exact_x.var(1) + EPS)).astype(np.float32)
    dx, partial = poisoned(M, N, dtype=dtype), poisoned(2, 2, N)
    launch(device, norm_backward, (2,), dy, x, weight, inverse, dx, partial, other, mean, BIAS=True, **TILES)
    exact, dweight, dbias = layer_module.reference_backward(dy, x, weight, EPS)
    check(dx, exact + other.astype(np.float64), dtype)
    check(partial[:, 0].sum(0), dweight)
    check(partial[:, 1].sum(0), dbias)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_many_rows_a_program(device: str, dtype: str, again: bool) -> None:
    """Rows that begin at multiples of 16 bytes: on Hopper their copies go round a ring of four, read once or twice."""
    rows, columns, tiles = 13, 512, {"BM": 1, "BN": 512, "AGAIN": again}
    dy, x, weight = normal(rows, columns, dtype=dtype), normal(rows, columns, dtype=dtype, seed=1), normal(columns)
    exact_x = x.astype(np.float64)
    mean, inverse = exact_x.mean(1).astype(np.float32), (1 / np.sqrt(exact_x.var(1) + EPS)).astype(np.float32)
    dx, partial = poisoned(rows, columns, dtype=dtype), poisoned(2, 2, columns)
    launch(device, norm_backward, (2,), dy, x, weight, inverse, dx, partial, None, mean, BIAS=True, **tiles)
    exact, dweight, dbias = layer_module.reference_backward(dy, x, weight, EPS)
    check(dx, exact, dtype)
    check(partial[:, 0].sum(0), dweight)
    check(partial[:, 1].sum(0), dbias)


@pytest.mark.parametrize("tiles", [
    {"BM": 2, "BN": 1024, "num_warps": 4, "READ": "evict_first"}, {"BM": 1, "BN": 1024, "num_warps": 4, "AGAIN": True},
    {"BM": 1, "BN": 1024, "num_warps": 2, "num_stages": 2},
])  # fmt: skip
def test_gradients_whose_threads_meet_once_a_row_have_no_races(tiles: dict[str, Any]) -> None:
    rows, columns = 15, 1024
    dy, x, weight = normal(rows, columns, dtype="bf16"), normal(rows, columns, dtype="bf16", seed=1), normal(columns)
    exact_x = x.astype(np.float64)
    mean, inverse = exact_x.mean(1).astype(np.float32), (1 / np.sqrt(exact_x.var(1) + EPS)).astype(np.float32)
    dx, partial = poisoned(rows, columns, dtype="bf16"), poisoned(2, 2, columns)
    gpu = tw.emulate("sm_90a", races=True, seed=1)
    gpu.launch(norm_backward, (2,), dy, x, weight, inverse, dx, partial, None, mean, BIAS=True, **tiles)
    exact, dweight, _ = layer_module.reference_backward(dy, x, weight, EPS)
    check(dx, exact, "bf16")
    check(partial[:, 0].sum(0), dweight)


# --- rows longer than a program's tiles ---------------------------------------------------------------

#: three blocks of 64 columns and a part of one
BLOCK = 64


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_norms_of_long_rows(device: str, dtype: str) -> None:
    x, residual, _, weight, bias = inputs(dtype)
    exact = x.astype(np.float64) + residual.astype(np.float64)
    y, total, mean, inverse = poisoned(M, N, dtype=dtype), poisoned(M, N, dtype=dtype), poisoned(M), poisoned(M)
    launch(device, rmsnorm_long, (M,), x, weight, y, EPS, residual, total, bias, inverse, BN=BLOCK)
    check(y, rms_module.reference(x, weight, EPS, residual, bias), dtype)
    check(total, exact, dtype)
    check(inverse, 1 / np.sqrt((exact**2).mean(1) + EPS))
    y, total = poisoned(M, N, dtype=dtype), poisoned(M, N, dtype=dtype)
    launch(device, layernorm_long, (M,), x, weight, y, EPS, residual, total, bias, mean, inverse, BN=BLOCK)
    check(y, layer_module.reference(x, weight, EPS, residual, bias), dtype)
    check(total, exact, dtype)
    check(mean, exact.mean(1))
    check(inverse, 1 / np.sqrt(exact.var(1) + EPS))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_long_rows(device: str, centred: bool) -> None:
    x, other, dy, weight, _ = inputs("f32")
    exact_x, module = x.astype(np.float64), layer_module if centred else rms_module
    mean = exact_x.mean(1).astype(np.float32) if centred else None
    spread = exact_x.var(1) if centred else (exact_x**2).mean(1)
    inverse = (1 / np.sqrt(spread + EPS)).astype(np.float32)
    sums, dx, partial = poisoned(2, M), poisoned(M, N), poisoned(2, 2, N)
    launch(device, norm_backward_sums, (M,), dy, x, weight, inverse, sums, mean, BN=BLOCK)
    grid = 2, tw.cdiv(N, BLOCK)
    arguments = dy, x, weight, inverse, dx, partial, other, mean, sums
    launch(device, norm_backward, grid, *arguments, BIAS=True, BM=2, BN=BLOCK)
    exact, dweight, dbias = module.reference_backward(dy, x, weight, EPS)
    check(dx, exact + other.astype(np.float64))
    check(partial[:, 0].sum(0), dweight)
    check(partial[:, 1].sum(0), dbias)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_long_rows_of_many_blocks(device: str, dtype: str) -> None:
    """Rows that begin at multiples of 16 bytes: on Hopper the blocks of layer norm go round a ring of four."""
    columns, tiles = 4000, {"BN": 512, "num_warps": 4}
    x, dy = normal(2, columns, dtype=dtype), normal(2, columns, dtype=dtype, seed=1)
    weight, y, mean, inverse = normal(columns, seed=2), poisoned(2, columns, dtype=dtype), poisoned(2), poisoned(2)
    launch(device, rmsnorm_long, (2,), x, weight, y, EPS, **tiles)
    check(y, rms_module.reference(x, weight, EPS), dtype)
    y, sums = poisoned(2, columns, dtype=dtype), poisoned(2, 2)
    launch(device, layernorm_long, (2,), x, weight, y, EPS, mean=mean, inverse=inverse, **tiles)
    check(y, layer_module.reference(x, weight, EPS), dtype)
    launch(device, norm_backward_sums, (2,), dy, x, weight, inverse, sums, mean, **tiles)
    normal_rows = (x.astype(np.float64) - mean[:, None]) * inverse[:, None]
    gradient = dy.astype(np.float64) * weight
    np.testing.assert_allclose(sums, [(gradient * normal_rows).mean(1), gradient.mean(1)], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [WIDEST, WIDEST + 77])
def test_functions_take_rows_of_any_length(columns: int) -> None:
    x, dy, weight = normal(2, columns), normal(2, columns, seed=1), normal(columns, seed=2)
    y, inverse, mean = poisoned(2, columns), poisoned(2), poisoned(2)
    rms_rows(x, weight, y, EPS, inverse=inverse)
    check(y, rms_module.reference(x, weight, EPS))
    for module, centre in ((rms_module, None), (layer_module, mean)):
        if centre is not None:
            layer_rows(x, weight, y, EPS, mean=mean, inverse=inverse)
            check(y, layer_module.reference(x, weight, EPS))
        dx, partial = poisoned(2, columns), poisoned(gradient_programs(2, columns), 1, columns)
        norm_gradients(dy, x, weight, inverse, dx, partial, mean=centre)
        exact, dweight, _ = module.reference_backward(dy, x, weight, EPS)
        check(dx, exact)
        check(partial[:, 0].sum(0), dweight)


def test_long_rows_far_from_zero_keep_their_variance() -> None:
    x, weight, y = normal(M, N) + np.float32(1000), np.ones(N, np.float32), poisoned(M, N)
    layernorm_long[(M,)](x, weight, y, EPS, BN=BLOCK)
    assert np.abs(y - layer_module.reference(x, weight, EPS)).max() < 1e-3


def test_without_what_may_be_absent() -> None:
    x, _, dy, weight, _ = inputs("f32")
    y, inverse = poisoned(M, N), poisoned(M)
    rmsnorm[GRID](x, weight, y, EPS, inverse=inverse, **TILES)
    check(y, rms_module.reference(x, weight, EPS))
    dx, partial = poisoned(M, N), poisoned(3, 1, N)
    norm_backward[(3,)](dy, x, weight, inverse, dx, partial, **TILES)
    exact, dweight, _ = rms_module.reference_backward(dy, x, weight, EPS)
    check(dx, exact)
    check(partial[:, 0].sum(0), dweight)
    layernorm[GRID](x, weight, y, EPS, **TILES)
    check(y, layer_module.reference(x, weight, EPS))


def test_rows_far_from_zero_keep_their_variance() -> None:
    """The variance of the centred row: its mean square minus the mean's would be lost in rounding."""
    x, weight, y = normal(M, N) + np.float32(1000), np.ones(N, np.float32), poisoned(M, N)
    layernorm[GRID](x, weight, y, EPS, **TILES)
    assert np.abs(y - layer_module.reference(x, weight, EPS)).max() < 1e-3


def test_not_a_number_stays_in_its_row() -> None:
    x, weight, y = normal(M, N), normal(N, seed=1), poisoned(M, N)
    x[1, 7] = np.nan
    rmsnorm[GRID](x, weight, y, EPS, **TILES)
    assert np.isnan(y[1]).all() and not np.isnan(y[[0, 2, 3, 4]]).any()


def test_tiles_of_gradients() -> None:
    for rows, columns in ((16384, 1024), (16384, 4096), (8192, 8192), (3, 17), (8192, 16384), (1, 300)):
        meta, programs = gradient_tiles(rows, columns)
        assert meta["BN"] >= columns
        assert (programs - 1) * meta["BM"] < rows
        assert meta["num_warps"] == 1 or meta["num_warps"] * 32 * 8 <= meta["BN"]  # no two warps add up one column
        assert programs * meta["num_warps"] <= 132 * max(16, meta["num_warps"])


@pytest.mark.parametrize(("rows", "columns"), [(16384, 4096), (8192, 8192)])
def test_gradients_fit_the_registers(rows: int, columns: int) -> None:
    """What waits at the reductions decides: five values for each of 16 elements."""
    matrix, partial = amd.matrix("bf16"), ViewType((None, None, None), DTYPES["f32"], (None, None, 1), 16)
    vectors = {name: ViewType((None,), DTYPES["f32"], (1,), 16) for name in ("weight", "mean", "inverse")}
    args = {"dy": matrix, "x": matrix, "dx": matrix, "partial": partial, **vectors}
    meta, _ = gradient_tiles(rows, columns, centred=True)
    warps = meta.pop("num_warps")
    function = amd.scheduled(amd.module_of(norm_backward, **args, **meta, BIAS=True), "sm_90a", num_warps=warps)
    assert 64 <= waiting_words(function) <= 120
    result = compile_function(function, get_target("sm_90a"))
    assert result.resources.registers <= 128 and result.resources.spill_stores == 0  # of 512 threads on an SM
