"""Products of 8-bit operands on emulated GPUs: on Hopper wgmma where both operands run along K, else mma.sync."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
PTX = {E4M3: "e4m3", E5M2: "e5m2", np.int8: "s8"}
SPEC = {E4M3: "float8_e4m3", E5M2: "float8_e5m2", np.int8: "int8"}
#: error of sums of a few hundred products: the asynchronous unit keeps 13 bits behind the binary point of the largest
HOPPER_FP8 = 4e-4
PAIRS = [(E4M3, E4M3), (E5M2, E5M2), (E4M3, E5M2), (E5M2, E4M3), (np.int8, np.int8)]


@tw.kernel
def product(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 128,
):
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), c.dtype)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(c, (m, n), acc)


@tw.kernel
def in_blocks(a: tw.Tensor, b: tw.Tensor, scale: tw.Tensor, c: tw.Tensor):
    """Each step's product is scaled and added in float32."""
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((128, 64), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], 128)):
        part = tw.dot(tw.load(a, (m, k), (128, 128)), tw.load(b, (k, n), (128, 64)))
        acc += part.to(tw.float32) * tw.load(scale, (k, m), (1, 128)).reshape((128, 1))
    tw.store(c, (m, n), acc)


@tw.kernel
def computed(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor):
    """Operands that the threads make: a in registers, b through shared memory."""
    x, y = tw.load(a, (0, 0), (64, 64)), tw.load(b, (0, 0), (64, 64))
    once = tw.dot((x.to(tw.float32) * 0.5).to(a.dtype), y)
    tw.store(c, (0, 0), tw.dot(x, (once * 0.125).to(a.dtype)))


def matrix(m: int, n: int, dtype: Any, seed: int, transposed: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (n, m) if transposed else (m, n)
    integers = dtype is np.int8
    value = (rng.integers(-128, 128, shape) if integers else rng.standard_normal(shape)).astype(dtype)
    return value.T if transposed else value


def relative(actual: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(actual.astype(np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("shape", "meta"),
    [
        ((128, 128, 256), {}),
        ((100, 144, 400), {"BM": 64, "BN": 256}),
        ((65, 48, 77), {"BM": 64, "BN": 48, "BK": 64, "num_stages": 1}),
    ],
)
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_products_along_k(left: Any, right: Any, shape: tuple[int, int, int], meta: dict[str, int]) -> None:
    m, n, k = shape
    a, b = matrix(m, k, left, 0), matrix(k, n, right, 1, transposed=True)
    c = np.full((m, n), 77, np.int32 if left is np.int8 else np.float32)
    grid = (tw.cdiv(m, meta.get("BM", 128)), tw.cdiv(n, meta.get("BN", 128)))
    tw.device("emulate:sm_90a,races").launch(product, grid, a, b, c, **meta)
    assert relative(c, a.astype(np.float64) @ b.astype(np.float64)) <= (0 if left is np.int8 else HOPPER_FP8)


@pytest.mark.parametrize("device", ["cpu", "emulate:sm_89", "emulate:gfx942", "emulate:gfx950"])
@pytest.mark.parametrize(("left", "right"), [(E4M3, E5M2), (E5M2, E4M3)])
def test_both_formats_of_float8_elsewhere(device: str, left: Any, right: Any) -> None:
    a, b, c = matrix(100, 130, left, 0), matrix(130, 80, right, 1), np.full((100, 80), np.nan, np.float32)
    tw.device(device).launch(product, (1, 1), a, b, c)
    assert relative(c, a.astype(np.float64) @ b.astype(np.float64)) <= 1e-6


@pytest.mark.parametrize("dtype", [E4M3, np.int8])
def test_partial_sums(dtype: Any) -> None:
    m, n, k = 200, 80, 400
    a, b = matrix(m, k, dtype, 0), matrix(k, n, dtype, 1, transposed=True)
    scale = np.random.default_rng(2).uniform(0.5, 2, (4, m)).astype(np.float32)
    c = np.full((m, n), np.nan, np.float32)
    tw.device("emulate:sm_90a,races").launch(in_blocks, (2, 2), a, b, scale, c)
    steps = [slice(first, first + 128) for first in range(0, k, 128)]
    parts = [a[:, s].astype(np.float64) @ b[s].astype(np.float64) * scale[i][:, None] for i, s in enumerate(steps)]
    assert relative(c, sum(parts)) <= (1e-6 if dtype is np.int8 else HOPPER_FP8)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("transposed", [True, False])
def test_computed_operands(dtype: Any, transposed: bool) -> None:
    a, b = matrix(64, 64, dtype, 0), matrix(64, 64, dtype, 1, transposed)
    c = np.full((64, 64), np.nan, np.float32)
    tw.device("emulate:sm_90a,races").launch(computed, (1,), a, b, c)
    half = (a.astype(np.float32) * np.float32(0.5)).astype(dtype).astype(np.float64)
    once = (half @ b.astype(np.float64) * 0.125).astype(dtype).astype(np.float64)
    assert relative(c, a.astype(np.float64) @ once) <= 1e-2  # a product next to a rounding boundary


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_the_instruction(left: Any, right: Any) -> None:
    """Groups of four steps of 32 k on 64 x 128, and no mma.sync; across K mma.sync and no wgmma."""
    acc = "int32" if left is np.int8 else "float32"
    result = "s32" if left is np.int8 else "f32"

    def text(strides: tuple[Any, Any]) -> str:
        specs = {
            "a": tw.spec(SPEC[left], ("M", "K"), align=16),
            "b": tw.spec(SPEC[right], ("K", "N"), strides=strides, align=16),
            "c": tw.spec(acc, ("M", "N"), align=16),
        }
        return tw.compile(product, "sm_90a", specs).asm["ptx"]

    along, across = text((1, None)), text((None, 1))
    types = f"{result}.{PTX[left]}.{PTX[right]}"
    found = len(re.findall(rf"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.{types} ", along))
    assert found and found % 4 == 0
    assert "mma.sync" not in along and "wgmma" not in across
    assert re.search(rf"mma\.sync\.aligned\.m16n8k32\.row\.col\.{types}\.{result} ", across)
