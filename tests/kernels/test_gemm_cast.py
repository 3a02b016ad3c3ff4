"""Products that cast their left operand on its way: interpreter, emulated GPUs, and how the schedule brings it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from kernel_checks import DEVICES, check, launch, normal, poisoned, strided

import tilewright as tw
from tilewright.kernels.gemm_cast import cast_configuration, cast_matmul, gemm_cast, reference

TYPES = {"f32": np.float32, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def operand(kind: str, m: int, k: int, turned: bool) -> np.ndarray:
    values = normal(k, m).T if turned else normal(m, k)
    return values.astype(TYPES[kind], order="K")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "turned"), [("f32", False), ("f32", True), ("e4m3", False), ("e5m2", True)])
def test_product(device: str, kind: str, turned: bool) -> None:
    m, n, k = 144, 72, 208
    a, b, c = operand(kind, m, k, turned), normal(n, k, dtype="bf16", seed=1).T, poisoned(m, n, dtype="bf16")
    scales = np.random.default_rng(3).random(m).astype(np.float32) + 0.5
    row_bias, column_bias = normal(m, seed=4), normal(n, dtype="bf16", seed=5)
    tiles = {"BM": 64, "BN": 64, "BK": 32 if "gfx" in device else 64}
    grid = tw.cdiv(m, tiles["BM"]), tw.cdiv(n, tiles["BN"])
    launch(device, gemm_cast, grid, a, b, c, scales, row_bias, column_bias, **tiles)
    check(c, reference(a, b, scales, row_bias, column_bias), "bf16")


def test_rows_that_the_engine_does_not_copy() -> None:
    a, b, c = strided(100, 75), strided(75, 70, dtype="bf16", seed=1), poisoned(100, 70, dtype="bf16")
    launch("emulate:sm_90a,races", gemm_cast, (2, 2), a, b, c, BM=64, BN=64)
    check(c, reference(a, b), "bf16")


@pytest.mark.parametrize("n", [1, 40, 300])
def test_arrays(n: int) -> None:
    a, b, c = operand("f32", 150, 96, False), normal(96, n, dtype="bf16", seed=1), poisoned(150, n, dtype="bf16")
    cast_matmul(a, b, c)
    check(c, reference(a, b), "bf16")


@pytest.mark.parametrize("order", ["K", "M"])
def test_the_engine_brings_the_operand_as_it_is(order: str) -> None:
    """It lies in the ring in its own dtype, and threads read it there in the layout of the matrix unit."""
    strides = {"K": ("K", 1), "M": (1, "M")}[order]
    arguments = {
        "a": tw.spec("f32", ("M", "K"), strides, align=16),
        "b": tw.spec("bf16", ("K", "N"), align=16),
        "c": tw.spec("bf16", ("M", "N"), align=16),
    }
    ir = tw.compile(gemm_cast, target="sm_90a", args={**arguments, **cast_configuration(4096, 4096)}).ir["layouts"]
    loop = ir[ir.rindex("async.await") :]
    loop = loop[: loop.index("tile.yield")]
    assert "async.local_load" in loop and "tile.cast" in loop
    assert "tile.convert" not in loop and "tile.load" not in loop
