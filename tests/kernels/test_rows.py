"""Row and column kernels: in the interpreter against float64, on the emulated GPUs in small, and their PTX."""

from __future__ import annotations

import re

import amd_programs as amd
import ml_dtypes
import numpy as np
import pytest
from kernel_checks import DEVICES, launch

import tilewright as tw
from tilewright.backends.nvidia.compile import compile_function
from tilewright.ir.scratch import scratch_bytes
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import Convert, For, Reduce
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels import column_sum as columns_module
from tilewright.kernels import rmsnorm as rmsnorm_module
from tilewright.kernels import softmax as softmax_module
from tilewright.kernels import transpose as transpose_module
from tilewright.kernels.column_sum import column_sum, column_sums, plan, workspace_shapes
from tilewright.kernels.layernorm import layernorm
from tilewright.kernels.rmsnorm import rmsnorm
from tilewright.kernels.rows import (
    LONG_TILES,
    MIDDLE,
    WIDEST,
    layer_tiles,
    long_tiles,
    norm_tiles,
    pair_tiles,
    read_once,
    row_tiles,
    softmax_gradient_tiles,
    softmax_tiles,
)
from tilewright.kernels.softmax import (
    softmax,
    softmax_backward,
    softmax_backward_long,
    softmax_long,
    softmax_rows,
    softmax_rows_backward,
)
from tilewright.kernels.transpose import tiles, transpose

DTYPE = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
TOLERANCE = {"bf16": 2**-8, "f16": 2**-10, "f32": 2e-6}


def normal(*shape: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPE[dtype])


def poisoned(*shape: int, dtype: str) -> np.ndarray:
    return np.full(shape, np.nan, DTYPE[dtype])


def assert_close(actual: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(actual.astype(np.float64), exact, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", sorted(DTYPE))
@pytest.mark.parametrize("shape", [(3, 1024), (9, 1000), (5, 17)])
def test_rmsnorm(shape, dtype):
    x, weight, y = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype, seed=1), poisoned(*shape, dtype=dtype)
    meta = {**row_tiles(*shape), "BM": 2}
    rmsnorm[(tw.cdiv(shape[0], 2),)](x, weight, y, 1e-3, **meta)
    assert_close(y, rmsnorm_module.reference(x, weight, 1e-3), dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPE))
@pytest.mark.parametrize("shape", [(2, 16384), (3, 10000)])
def test_softmax_of_wide_rows(shape, dtype):
    x, y = normal(*shape, dtype=dtype), poisoned(*shape, dtype=dtype)
    softmax[(shape[0],)](x, y, **row_tiles(*shape))
    assert_close(y, softmax_module.reference(x), dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPE))
@pytest.mark.parametrize("shape", [(128, 256), (130, 65), (1, 300)])
def test_transpose(shape, dtype):
    m, n = shape
    x, y, meta = normal(m, n, dtype=dtype), poisoned(n, m, dtype=dtype), tiles(np.dtype(DTYPE[dtype]).itemsize)
    transpose[(tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"]))](x, y, **meta)
    np.testing.assert_array_equal(y, transpose_module.reference(x))


@pytest.mark.parametrize("dtype", sorted(DTYPE))
@pytest.mark.parametrize("shape", [(3000, 300), (1000, 300), (256, 512), (1, 1)])
def test_column_sum(shape, dtype):
    """Up to `FEW_ROWS` rows in one step, more through the workspace."""
    x = normal(*shape, dtype=dtype)
    partial, arrived = workspace_shapes(*shape, x.itemsize)
    workspace = poisoned(*partial, dtype="f32"), np.zeros(arrived, np.int32)
    out, again = poisoned(1, shape[1], dtype="f32"), poisoned(1, shape[1], dtype="f32")
    column_sums(x, out, *workspace)
    np.testing.assert_allclose(out, columns_module.reference(x), rtol=1e-5, atol=1e-4)
    column_sums(x, again, *workspace)
    assert out.tobytes() == again.tobytes()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_softmax_of_long_rows(device, dtype):
    """Blocks of 64 columns, the last one in part; a row that starts with nothing but minus infinity."""
    x, dy, y, dx = (normal(3, 200, dtype=dtype, seed=s) for s in range(4))
    x[1, :70] = -np.inf
    launch(device, softmax_long, (3,), x, y, BN=64)
    assert_close(y, softmax_module.reference(x), dtype)
    dx[...] = np.nan
    launch(device, softmax_backward_long, (3,), dy, y, dx, BN=64)
    assert_close(dx, softmax_module.reference_backward(dy, y), dtype)


@pytest.mark.parametrize("columns", [200, 1024, 3000, 16384, 20000, 70000])
def test_softmax_functions_take_rows_of_any_length(columns):
    x, dy = (normal(2, columns, dtype="f32", seed=s) for s in range(2))
    y, dx = (poisoned(2, columns, dtype="f32") for _ in range(2))
    softmax_rows(x, y)
    assert_close(y, softmax_module.reference(x), "f32")
    softmax_rows_backward(dy, y, dx)
    assert_close(dx, softmax_module.reference_backward(dy, y), "f32")


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at most 16384"):
        row_tiles(1, 16385)


# --- compiled -------------------------------------------------------------------------------------


def vector(dtype: str) -> ViewType:
    return ViewType((None,), DTYPES[dtype], (1,), 16)


def hot_path(kernel, **args) -> str:
    """PTX of the whole kernel for the H100."""
    function = amd.scheduled(amd.module_of(kernel, **args), "sm_90a")
    return compile_function(function, get_target("sm_90a")).asm["ptx"]


def test_what_is_read_once_leaves_the_cache_first_where_that_holds_much_of_the_matrix():
    x = amd.matrix("bf16")
    assert "L2::evict_first" in hot_path(softmax, x=x, y=x, BN=1024, **read_once(16384, 1024))
    assert "L2::evict" not in hot_path(softmax, x=x, y=x, BN=8192, **read_once(8192, 8192))


def test_long_rows_stay_in_the_cache_until_they_are_read_again():
    matrix = amd.matrix("bf16")
    for kernel, args in ((softmax_long, {"x": matrix}), (softmax_backward_long, {"dy": matrix, "dx": matrix})):
        ptx = hot_path(kernel, y=matrix, BN=2048, **args)
        assert "L2::evict_last" in ptx and "L2::evict_first" in ptx


def test_short_rows_have_a_warp_of_their_own():
    assert softmax_tiles(16384, 1024).items() >= {"BM": 1, "BN": 1024, "num_warps": 1}.items()
    assert softmax_tiles(16384, 200).items() >= {"BM": 4, "BN": 256, "num_warps": 1}.items()


def test_threads_hold_as_much_as_their_registers():
    """What the limits on registers are for leaves nothing in memory, in whatever type of elements."""
    for dtype, bytes_each in (("bf16", 2), ("f32", 4)):
        matrix, weight = amd.matrix(dtype), vector(dtype)
        others = {"mean": vector("f32"), "inverse": vector("f32"), "eps": DTYPES["f32"]}
        for columns in (256, 1024):
            args = {"x": matrix, "y": matrix, "weight": weight, "bias": weight, **others}
            compiled = within_limits(layernorm, args, layer_tiles(16384, columns, bytes_each))
            assert bytes_each == 4 or compiled.registers <= 48
        for columns in (2048, 4096, 8192, 16384):
            args = {"dy": matrix, "y": matrix, "dx": matrix}
            assert within_limits(softmax_backward, args, softmax_gradient_tiles(8192, columns)).registers <= 96


def within_limits(kernel, args, meta):
    options = {name: meta.pop(name) for name in ("num_warps", "maxnreg") if name in meta}
    function = amd.scheduled(amd.module_of(kernel, **args, **meta), "sm_90a", **options)
    resources = compile_function(function, get_target("sm_90a")).resources
    assert resources.spill_stores == 0
    return resources


@pytest.mark.parametrize(("columns", "meta"), [
    (200, {"BM": 4, "BN": 256, "num_warps": 2}), (1024, {"BM": 1, "BN": 1024, "num_warps": 2}),
    (4096, {"BM": 1, "BN": 4096, "num_warps": 8}), (16384, {"BM": 1, "BN": 16384, "num_warps": 16}),
])  # fmt: skip
def test_threads_hold_sixteen_elements_of_each_of_two_matrices(columns, meta):
    assert pair_tiles(16384, columns) == meta
    assert norm_tiles(64, columns, residual=True) == pair_tiles(64, columns)


def test_rows_are_read_again_where_the_cache_has_them_but_not_the_matrix():
    again = {"AGAIN": True, "READ": "evict_last", "num_warps": 4}.items()
    for residual in (False, True):
        assert norm_tiles(16384, 4096, residual).items() >= again
        for rows, columns in ((16384, 1024), (4096, 4096), (8192, 8192)):
            assert "AGAIN" not in norm_tiles(rows, columns, residual)
    matrix, tensors = amd.matrix("bf16"), {"weight": vector("bf16"), "eps": DTYPES["f32"]}
    tensors |= {"x": matrix, "residual": matrix, "total": matrix, "y": matrix, "BN": 4096, "AGAIN": True}
    ptx = hot_path(rmsnorm, READ="evict_last", **tensors)
    assert "L2::evict_last" in ptx and "L2::evict_first" in ptx
    assert "cp.async" not in ptx and "cp.async" in hot_path(rmsnorm, **tensors)


def test_long_rows_have_tiles_of_their_length():
    for kernel in LONG_TILES:
        for columns in (WIDEST + 1, MIDDLE, MIDDLE + 1):
            meta = long_tiles(kernel, columns)
            assert meta["BN"] <= WIDEST and meta["num_warps"] * 64 <= 1024  # the wider warps are AMD's
    assert long_tiles("softmax", MIDDLE) != long_tiles("softmax", MIDDLE + 1)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_transposed_tiles_go_in_whole_vectors_and_through_no_bank_twice(dtype):
    """Threads hold blocks that are 16 bytes long both ways: turning them takes no shared memory."""
    meta = tiles(DTYPES[dtype].bytes)
    ptx = hot_path(transpose, x=amd.matrix(dtype), y=amd.matrix(dtype), **meta)
    elements = meta["BM"] * meta["BN"] // (32 * (8 if dtype == "bf16" else 4))
    vectors = elements * DTYPES[dtype].bytes // 16
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == vectors
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == vectors
    assert "shared" not in ptx.replace(".shared .align", "")


@pytest.mark.parametrize("columns", [1024, 4096, 16384])
def test_rows_are_read_and_written_once_in_vectors(columns):
    meta = row_tiles(65536, columns)
    ptx = hot_path(
        rmsnorm, x=amd.matrix("bf16"), weight=vector("bf16"), y=amd.matrix("bf16"), eps=DTYPES["f32"], **meta
    )
    warps = 16 if columns == 16384 else 4
    vectors = meta["BM"] * meta["BN"] // (8 * 32 * warps)
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == vectors
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == vectors + columns // (8 * 32 * warps)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("device", DEVICES)
def test_on_devices(device: str, dtype: str) -> None:
    x = normal(40, 200, dtype=dtype)
    turned, y = poisoned(200, 40, dtype=dtype), poisoned(40, 200, dtype=dtype)
    launch(device, transpose, (1, 4), x, turned, BM=64, BN=64)
    np.testing.assert_array_equal(turned, x.T)
    launch(device, softmax, (10,), x, y, BM=4, BN=256)
    assert_close(y, softmax_module.reference(x), dtype)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("device", DEVICES)
def test_column_sum_on_devices(device: str, dtype: str) -> None:
    """Three programs share the rows; whichever comes last leaves the counters as they were."""
    x, sums = normal(140, 200, dtype=dtype), poisoned(1, 200, dtype="f32")
    partial, arrived = poisoned(3, 200, dtype="f32"), np.zeros(4, np.int32)
    for _ in range(2):
        sums[...] = np.nan
        launch(device, column_sum, (4, 3), x, partial, arrived, sums, BM=16, BN=64, BP=2, num_warps=4)
        np.testing.assert_allclose(sums, columns_module.reference(x), rtol=1e-5, atol=1e-4)
        assert (arrived == 0).all()


def test_columns_are_added_up_without_an_exchange_between_threads_until_the_end():
    """The hot loop has loads of 16 bytes and no shared memory; one barrier pair reduces what the threads hold."""
    meta, _ = plan(16384, 4096, 2)
    warps = meta.pop("num_warps")
    built = amd.module_of(
        column_sum,
        x=amd.matrix("bf16"),
        partial=amd.matrix("f32"),
        arrived=vector("i32"),
        sums=amd.matrix("f32"),
        **meta,
    )
    function = amd.scheduled(built, "sm_90a", num_warps=warps)
    loop = next(op for op in function.walk() if isinstance(op, For))
    (reduction,) = [op for op in loop.walk() if isinstance(op, Reduce)]
    assert scratch_bytes(reduction) == 0 and not any(isinstance(op, Convert) for op in loop.walk())
    ptx = compile_function(function, get_target("sm_90a")).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= meta["BM"] * meta["BN"] // (8 * 32 * warps)
