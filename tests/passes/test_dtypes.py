"""Dots of every dtype and precision through the pipelines of every target that has them, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.compiler.driver import schedule
from tilewright.compiler.options import CompileOptions
from tilewright.frontend.build import build_module
from tilewright.ir.async_ops import AsyncDot, Copy
from tilewright.ir.core import Module
from tilewright.ir.interpreter import run
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import Constant
from tilewright.ir.types import DTYPES, ViewType
from tilewright.passes.manager import PassError
from tilewright.passes.split_products import HALF, KEPT

ROW_MAJOR, COLUMN_MAJOR = (None, 1), (1, None)
NUMPY: dict[str, Any] = {
    "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64, "i8": np.int8, "i32": np.int32,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


@tw.kernel
def product(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, *, BM: tw.constexpr = 64, precision: tw.constexpr = "default"):
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, 64), c.dtype)
    for k in tw.range(tw.cdiv(a.shape[1], 32)):
        acc = tw.dot(tw.load(a, (m, k), (BM, 32)), tw.load(b, (k, n), (32, 64)), acc, precision=precision)
    tw.store(c, (m, n), acc)


@tw.kernel
def twice(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, *, precision: tw.constexpr = "default"):
    """Two dots in a loop, one with an operand computed in registers, and none that only accumulates."""
    acc = tw.zeros((64, 64), c.dtype)
    for k in tw.range(tw.cdiv(a.shape[1], 64)):
        left, right = tw.load(a, (0, k), (64, 64)), tw.load(b, (k, 0), (64, 64))
        once = tw.dot(left, right, precision=precision)
        acc = tw.dot(once * 0.125, right, acc, precision=precision) + once
    tw.store(c, (0, 0), acc)


def scheduled(kernel: Any, target: str, types: list[tuple[str, Any]], align: int, meta: dict[str, Any]) -> Module:
    views = {
        name: ViewType((None, None), DTYPES[dtype], strides, max(align, DTYPES[dtype].bytes))
        for name, (dtype, strides) in zip("abc", types, strict=True)
    }
    options = {k: meta.pop(k) for k in list(meta) if k in CompileOptions.names()}
    module = build_module(kernel.definition, {**views, **meta})
    return schedule(module, get_target(target), CompileOptions(**options))


def matrix(shape: tuple[int, int], dtype: str, strides: Any, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.integers(-128, 128, shape) if dtype == "i8" else rng.standard_normal(shape)
    array = values.astype(NUMPY[dtype])
    return np.asfortranarray(array) if strides == COLUMN_MAJOR else array


def error(module: Module, shape: tuple[int, int, int], types: list[tuple[str, Any]], wanted: Any) -> float:
    """Relative to the wanted matrix of float64, of the norms."""
    m, n, k = shape
    a, b = matrix((m, k), *types[0], 1), matrix((k, n), *types[1], 2)
    c = np.full((m, n), 77, NUMPY[types[2][0]])
    blocks = {"blocks": 2} if module.functions[0].attributes.get("persistent") else {}
    run(module.functions[0], {"a": a, "b": b, "c": c}, grid=(-(-m // 64), -(-n // 64), 1), **blocks)
    exact = wanted(a.astype(np.float64), b.astype(np.float64))
    return float(np.linalg.norm(c.astype(np.float64) - exact) / np.linalg.norm(exact))


DOTS = [
    ("bf16", "f32", "default", 1e-6), ("f32", "f32", "default", 1e-6), ("f32", "f32", "tf32", 1e-6),
    ("f32", "f32", "3xtf32", 1e-6), ("f64", "f64", "default", 1e-14), ("i8", "i32", "default", 0.0),
    ("f8e4m3", "f32", "default", 1e-6),
]  # fmt: skip


@pytest.mark.parametrize("align", [16, 1])
@pytest.mark.parametrize(("a", "b"), [(ROW_MAJOR, ROW_MAJOR), (ROW_MAJOR, COLUMN_MAJOR), (COLUMN_MAJOR, ROW_MAJOR)])
@pytest.mark.parametrize("target", ["sm_89", "sm_90a"])
@pytest.mark.parametrize(("dtype", "acc", "precision", "allowed"), DOTS)
def test_products(dtype, acc, precision, allowed, target, a, b, align):
    types = [(dtype, a), (dtype, b), (acc, ROW_MAJOR)]
    module = scheduled(product, target, types, align, {"precision": precision})
    assert error(module, (100, 70, 130), types, lambda x, y: x @ y) <= allowed


@pytest.mark.parametrize("options", [{"schedule": "prefetch"}, {"num_stages": 1}, {"num_stages": 2}, {"num_warps": 8}])
@pytest.mark.parametrize(("dtype", "acc", "precision", "allowed"), DOTS)
def test_options(dtype, acc, precision, allowed, options):
    types = [(dtype, ROW_MAJOR), (dtype, ROW_MAJOR), (acc, ROW_MAJOR)]
    module = scheduled(product, "sm_90a", types, 16, {"precision": precision, "BM": 128, **options})
    assert error(module, (256, 64, 130), types, lambda x, y: x @ y) <= allowed


@pytest.mark.parametrize("options", [{}, {"schedule": "prefetch"}])
@pytest.mark.parametrize("precision", ["default", "tf32", "3xtf32"])
def test_products_that_do_more_than_accumulate(precision, options):
    types = [("f32", ROW_MAJOR), ("f32", ROW_MAJOR), ("f32", ROW_MAJOR)]
    module = scheduled(twice, "sm_90a", types, 16, {"precision": precision, **options})

    def wanted(x, y):
        parts = [(x[:, k : k + 64], y[k : k + 64]) for k in (0, 64)]
        return sum((p @ q * 0.125) @ q + p @ q for p, q in parts)

    assert error(module, (64, 64, 128), types, wanted) <= 1e-6


@pytest.mark.parametrize("b", [ROW_MAJOR, COLUMN_MAJOR])
def test_three_products_on_hopper_run_beside_the_next_split(b):
    types = [("f32", ROW_MAJOR), ("f32", b), ("f32", ROW_MAJOR)]
    function = scheduled(product, "sm_90a", types, 16, {"precision": "3xtf32", "BM": 128}).functions[0]
    assert function.attributes["schedule"] == "roles"
    dots = [op for op in function.walk() if isinstance(op, AsyncDot)]
    assert len(dots) == 9  # an even step, an odd one, and the one that may be left
    started = [position for position, dot in enumerate(dots) if isinstance(dot.acc.op, Constant)]
    assert started == [0, 6]  # the odd step's product adds to that of the even one, which still runs
    large = scheduled(product, "sm_90a", types, 16, {"precision": "3xtf32", "BM": 512}).functions[0]
    assert large.attributes["schedule"] == "prefetch"  # twice the accumulators do not fit


@pytest.mark.parametrize("depth", [1, 32, 33, 64, 96, 128, 160])
def test_three_products_of_any_number_of_steps(depth):
    types = [("f32", ROW_MAJOR)] * 3
    module = scheduled(product, "sm_90a", types, 16, {"precision": "3xtf32", "BM": 128})
    assert error(module, (128, 64, depth), types, lambda x, y: x @ y) <= 1e-6


REGISTER_DOTS = [("f32", 1e-6), ("f64", 1e-14)]


@pytest.mark.parametrize("align", [16, 1])
@pytest.mark.parametrize(("a", "b"), [(ROW_MAJOR, ROW_MAJOR), (ROW_MAJOR, COLUMN_MAJOR), (COLUMN_MAJOR, COLUMN_MAJOR)])
@pytest.mark.parametrize(("dtype", "allowed"), REGISTER_DOTS)
def test_roles_compute_from_registers(dtype, allowed, a, b, align):
    types = [(dtype, a), (dtype, b), (dtype, ROW_MAJOR)]
    module = scheduled(product, "sm_90a", types, align, {"BM": 256, "schedule": "roles"})
    function = module.functions[0]
    assert function.attributes["schedule"] == "roles" and function.attributes["num_warps"] == 8
    engines = {op.result.type.kind for op in function.walk() if isinstance(op, Copy)}
    assert engines == {"tma" if align == 16 else "threads"}
    assert error(module, (300, 70, 130), types, lambda x, y: x @ y) <= allowed


@pytest.mark.parametrize("options", [{}, {"schedule": "roles"}, {"schedule": "prefetch"}])
@pytest.mark.parametrize(("dtype", "allowed"), REGISTER_DOTS)
def test_roles_compute_chains_from_registers(dtype, allowed, options):
    types = [(dtype, ROW_MAJOR)] * 3
    module = scheduled(twice, "sm_90a", types, 16, dict(options))

    def wanted(x, y):
        parts = [(x[:, k : k + 64], y[k : k + 64]) for k in (0, 64)]
        return sum((p @ q * 0.125) @ q + p @ q for p, q in parts)

    assert error(module, (64, 64, 128), types, wanted) <= allowed


def test_a_block_that_leaves_room_for_others_needs_no_roles():
    def chosen(dtype, **meta):
        return scheduled(product, "sm_90a", [(dtype, ROW_MAJOR)] * 3, 16, meta).functions[0].attributes["schedule"]

    assert [chosen("f64", BM=size) for size in (64, 128, 256)] == ["prefetch", "roles", "roles"]
    assert [chosen("f32", BM=size) for size in (64, 128, 256)] == ["prefetch", "prefetch", "roles"]
    assert chosen("f64", BM=128, num_warps=2) == "prefetch"
    # no swizzle of the copy engine's suits a float32 operand b that runs along K
    types = [("f32", ROW_MAJOR), ("f32", COLUMN_MAJOR), ("f32", ROW_MAJOR)]
    turned = scheduled(product, "sm_90a", types, 16, {"BM": 256}).functions[0]
    assert turned.attributes["schedule"] == "prefetch"
    with pytest.raises(PassError, match="warpgroups of four warps, not with 2"):
        chosen("f64", BM=128, num_warps=2, schedule="roles")


def test_tf32_takes_the_asynchronous_unit_where_both_operands_run_along_k():
    for b, wanted in ((COLUMN_MAJOR, "roles"), (ROW_MAJOR, "prefetch")):
        types = [("f32", ROW_MAJOR), ("f32", b), ("f32", ROW_MAJOR)]
        function = scheduled(product, "sm_90a", types, 16, {"precision": "tf32"}).functions[0]
        assert function.attributes["schedule"] == wanted


def test_the_parts_of_a_float32_make_it_up_again():
    scales = (2.0 ** np.arange(-50, 50).repeat(100)).astype(np.float32)
    x = np.random.default_rng(0).standard_normal(10000).astype(np.float32) * scales

    def rounded(value: np.ndarray) -> np.ndarray:
        return ((value.view(np.int32) + HALF) & KEPT).view(np.float32)

    big = rounded(x)
    small = x - big
    assert not (big.view(np.uint32) & 0x1FFF).any()
    assert (x.astype(np.float64) == big.astype(np.float64) + small).all()
    ignored = small - (small.view(np.int32) & KEPT).view(np.float32)  # by the unit
    assert (np.abs(ignored) <= 2.0**-21 * np.abs(x)).all()
    assert abs((ignored / x).mean()) <= 2.0**-26  # and without bias
