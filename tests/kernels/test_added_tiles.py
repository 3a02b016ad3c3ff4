"""Tiles that programs add to global memory: products split along K, in the interpreter and on the emulated GPUs."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import DEVICES, check, launch, normal

import tilewright as tw


@tw.kernel
def add_products(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 64,
    BK: tw.constexpr = 32,
    STEPS: tw.constexpr = 2,
    TURNED: tw.constexpr = False,
) -> None:
    """``c += a @ b``, each program over its part of K; integers count 2^-16. Grid: (M / BM, N / BN, parts of K).

    TURNED: by way of the transposed product, whose rows are columns of c.
    """
    m, n, k = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    total = tw.zeros((BN, BM) if TURNED else (BM, BN), tw.float32)
    for j in tw.range(STEPS):
        left, right = tw.load(a, (m, k * STEPS + j), (BM, BK)), tw.load(b, (k * STEPS + j, n), (BK, BN))
        total = tw.dot(right.T, left.T, total) if TURNED else tw.dot(left, right, total)
    if c.dtype == tw.int32:
        total = total * 2.0**16
    total = total.to(c.dtype)
    if TURNED:
        total = total.T
    tw.atomic_add(c, (m, n), total)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_products_add_up(device: str, dtype: type) -> None:
    a, b = normal(100, 200, dtype="bf16"), normal(200, 136, dtype="bf16", seed=1)
    c = np.full((100, 136), 3, dtype)
    launch(device, add_products, (2, 3, 4), a, b, c)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    check((c - dtype(3)).astype(np.float64) / (1 if dtype is np.float32 else 2**16), exact, "f32")


@pytest.mark.parametrize(("tile", "turned"), [((128, 128), False), ((64, 128), False), ((64, 128), True)])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_copy_engine_adds(tile: tuple[int, int], turned: bool, aligned: bool) -> None:
    """Chunks of rows, or a tile whose columns are spread over the warps; elements where the engine cannot address."""
    a, b = normal(tile[0] + 10, 64, dtype="bf16"), normal(64, 2 * tile[1] - 8, dtype="bf16", seed=1)
    c = np.zeros((a.shape[0], b.shape[1] + (0 if aligned else 1)), np.float32)[:, : b.shape[1]]
    device = tw.emulate("sm_90a", races=True)
    device.launch(add_products, (2, 2, 1), a, b, c, BM=tile[0], BN=tile[1], TURNED=turned)
    check(c, a.astype(np.float64) @ b.astype(np.float64), "f32")


def test_which_instruction_adds() -> None:
    def text(align: int, **meta: bool) -> str:
        specs = {"a": tw.spec("bf16", ("M", "K"), align=16), "b": tw.spec("bf16", ("K", "N"), align=16)}
        args = {**specs, "c": tw.spec("f32", ("M", "N"), align=align), **meta}
        return tw.compile(add_products, target="sm_90a", args=args).asm["ptx"]

    engine, threads = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group", "red.global"
    assert engine in text(16) and threads not in text(16)
    assert engine not in text(4) and ("atom.global" in text(4) or threads in text(4))
    assert engine in text(16, TURNED=True), "columns of the tile may be spread over the warps"
