"""Row and column kernels: in the interpreter against float64, on the emulated MI300 in small, and their PTX."""

from __future__ import annotations

import re

import amd_programs as amd
import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.backends.nvidia.compile import compile_function
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels import column_sum as columns_module
from tilewright.kernels import rmsnorm as rmsnorm_module
from tilewright.kernels import softmax as softmax_module
from tilewright.kernels import transpose as transpose_module
from tilewright.kernels.column_sum import column_sum, column_sums, workspace_shapes
from tilewright.kernels.rmsnorm import rmsnorm
from tilewright.kernels.rows import row_tiles
from tilewright.kernels.softmax import softmax
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
@pytest.mark.parametrize("shape", [(1000, 300), (256, 512), (1, 1)])
def test_column_sum(shape, dtype):
    x = normal(*shape, dtype=dtype)
    partial, arrived = workspace_shapes(*shape, x.itemsize)
    workspace = poisoned(*partial, dtype="f32"), np.zeros(arrived, np.int32)
    out, again = poisoned(1, shape[1], dtype="f32"), poisoned(1, shape[1], dtype="f32")
    column_sums(x, out, *workspace)
    np.testing.assert_allclose(out, columns_module.reference(x), rtol=1e-5, atol=1e-4)
    column_sums(x, again, *workspace)
    assert out.tobytes() == again.tobytes()


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
    warps = 8 if columns == 16384 else 4
    vectors = meta["BM"] * meta["BN"] // (8 * 32 * warps)
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == vectors
    assert (".minnctapersm 2" in ptx) == (columns == 16384)  # the widest rows leave room for a second block
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == vectors + columns // (8 * 32 * warps)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_on_the_emulated_mi300(dtype):
    x = amd.normal(40, 200, dtype=dtype)
    turned, sums = poisoned(200, 40, dtype=dtype), poisoned(1, 200, dtype="f32")
    run(transpose, {"x": x, "y": turned}, (1, 4), BM=64, BN=64)
    np.testing.assert_array_equal(turned, x.T)
    partial, arrived = poisoned(2, 200, dtype="f32"), np.zeros(4, np.int32)
    run(column_sum, {"x": x, "partial": partial, "arrived": arrived, "sums": sums}, (4, 2), BM=16, BN=64)
    np.testing.assert_allclose(sums, columns_module.reference(x), rtol=1e-5, atol=1e-4)
    y = poisoned(40, 200, dtype=dtype)
    run(softmax, {"x": x, "y": y}, (10,), BM=4, BN=256)
    assert_close(y, softmax_module.reference(x), dtype)


def run(kernel, arrays: dict[str, np.ndarray], grid: tuple[int, ...], **meta: int) -> None:
    names = {DTYPE[n]: n for n in DTYPE}
    types = {k: amd.matrix(names[v.dtype.type]) for k, v in arrays.items()}
    function = amd.scheduled(amd.module_of(kernel, **types, **meta), "gfx942")
    amd.emulate(amd.compiled(function, "gfx942"), "gfx942", list(arrays.values()), grid)
