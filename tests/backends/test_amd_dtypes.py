"""Dots of every element type on CDNA: the right instruction, and the right numbers in the emulator."""

from __future__ import annotations

import numpy as np
import pytest
from amd_programs import COLUMN_MAJOR, NUMPY, ROW_MAJOR, compiled, emulate, matrix, module_of, scheduled

import tilewright as tw
from tilewright.ir.interpreter import run
from tilewright.ir.scratch import scratch_bytes
from tilewright.ir.tile_ops import Convert, Dot

TARGETS = ["gfx942", "gfx950"]
#: what accumulates, the error of a sum of K products relative to the sum of their magnitudes
RESULT = {"f32": "f32", "f64": "f64", "i8": "i32", "f8e4m3": "f32", "f8e5m2": "f32"}
RELATIVE = {"f32": 2e-6, "f64": 1e-14, "i8": 0.0, "f8e4m3": 2e-6, "f8e5m2": 2e-6}
#: the instruction of a tile of 64 x 64 x 64
INSTRUCTION = {
    ("gfx942", "f32"): "v_mfma_f32_32x32x2_f32",
    ("gfx950", "f32"): "v_mfma_f32_32x32x2_f32",
    ("gfx942", "f64"): "v_mfma_f64_16x16x4_f64",
    ("gfx950", "f64"): "v_mfma_f64_16x16x4_f64",
    ("gfx942", "i8"): "v_mfma_i32_32x32x16_i8",
    ("gfx950", "i8"): "v_mfma_i32_32x32x32_i8",
    ("gfx942", "f8e4m3"): "v_mfma_f32_32x32x8_f16",
    ("gfx942", "f8e5m2"): "v_mfma_f32_32x32x8_f16",
    ("gfx950", "f8e4m3"): "v_mfma_f32_16x16x32_fp8_fp8",
    ("gfx950", "f8e5m2"): "v_mfma_f32_16x16x32_bf8_bf8",
}


@tw.kernel
def product(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    *,
    DTYPE: tw.constexpr,
    BM: tw.constexpr,
    BN: tw.constexpr,
    BK: tw.constexpr,
    PRECISION: tw.constexpr = "default",
):
    """c = a @ b, in the dtype of accumulators."""
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), DTYPE)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc, precision=PRECISION)
    tw.store(c, (m, n), acc)


LONG = {"f32": tw.float32, "f64": tw.float64, "i32": tw.int32}


def operands(dtype: str, m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(m + n + k)
    if dtype == "i8":
        return tuple(rng.integers(-128, 128, shape).astype(np.int8) for shape in ((m, k), (k, n)))
    return tuple(rng.standard_normal(shape).astype(NUMPY[dtype]) for shape in ((m, k), (k, n)))


def check_product(target: str, dtype: str, a: np.ndarray, b: np.ndarray, tile: tuple[int, int, int], **options) -> str:
    """Compile, emulate, compare with float64; the assembly."""
    result, strides = RESULT[dtype], [ROW_MAJOR if x.flags.c_contiguous else COLUMN_MAJOR for x in (a, b)]
    views = {name: matrix(dtype, s, 1) for name, s in zip("ab", strides, strict=True)}
    bm, bn, bk = tile
    module = module_of(product, **views, c=matrix(result, align=4), DTYPE=LONG[result], BM=bm, BN=bn, BK=bk, **options)
    function = scheduled(module, target)
    binary = compiled(function, target)
    assert binary.resources.spills == 0
    grid = (-(-a.shape[0] // bm), -(-b.shape[1] // bn))
    c = np.zeros((a.shape[0], b.shape[1]), NUMPY[result])
    emulate(binary, target, [a, b, c], grid)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    assert np.abs(c.astype(np.float64)).max() > 0
    bound = RELATIVE[dtype] * (np.abs(wide_a) @ np.abs(wide_b)) if "PRECISION" not in options else 2**-9 * a.shape[1]
    assert (np.abs(c - wide_a @ wide_b) <= bound).all()
    interpreted = np.zeros_like(c)
    run(function, [a, b, interpreted], grid)
    assert (np.abs(c.astype(np.float64) - interpreted) <= 2 * bound).all()
    return binary.asm["amdgcn"]


@pytest.mark.parametrize("letters", ["nn", "nt", "tn"])
@pytest.mark.parametrize("dtype", list(RESULT))
@pytest.mark.parametrize("target", TARGETS)
def test_products_of_every_dtype(target: str, dtype: str, letters: str):
    a, b = operands(dtype, 100, 71, 83)
    a, b = (x if letter == "n" else np.asfortranarray(x) for x, letter in zip((a, b), letters, strict=True))
    asm = check_product(target, dtype, a, b, (64, 64, 64))
    assert INSTRUCTION[target, dtype] in asm


@pytest.mark.parametrize("tile", [(16, 16, 32), (48, 32, 32), (32, 32, 96), (128, 128, 32), (16, 64, 64)])
@pytest.mark.parametrize("dtype", list(RESULT))
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_of_every_dtype(target: str, dtype: str, tile: tuple[int, int, int]):
    a, b = operands(dtype, tile[0] + 5, tile[1] + 3, tile[2] + 9)
    check_product(target, dtype, a, b, tile)


@pytest.mark.parametrize("dtype", ["f8e4m3", "f8e5m2"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_number_of_8_bits_is_ocp(target: str, dtype: str):
    """All 256 codes times one: CDNA3's own formats have other biases, no negative zero and another NaN."""
    codes = np.zeros((256, 32), np.uint8)
    codes[:, 0] = np.arange(256)
    a = codes.view(NUMPY[dtype])
    b = np.zeros((32, 16), NUMPY[dtype])
    b[0] = 1
    module = module_of(
        product, a=matrix(dtype), b=matrix(dtype), c=matrix("f32"), DTYPE=tw.float32, BM=64, BN=16, BK=32
    )
    c = np.zeros((256, 16), np.float32)
    emulate(compiled(scheduled(module, target), target), target, [a, b, c], (4, 1))
    np.testing.assert_array_equal(c, np.repeat(a[:, :1].astype(np.float32), 16, axis=1))
    assert np.isnan(c).any() and (dtype == "f8e4m3" or np.isinf(c).any())


@pytest.mark.parametrize("target", TARGETS)
def test_int8_sums_are_exact(target: str):
    a, b = np.full((64, 512), -128, np.int8), np.full((512, 64), -128, np.int8)
    check_product(target, "i8", a, b, (64, 64, 64))


@pytest.mark.parametrize(("target", "instruction"), [("gfx942", "32x32x4_xf32"), ("gfx950", "32x32x2_f32")])
def test_tf32_is_a_licence_to_round(target: str, instruction: str):
    a, b = operands("f32", 64, 64, 64)
    assert f"v_mfma_f32_{instruction}" in check_product(target, "f32", a, b, (64, 64, 64), PRECISION="tf32")


@tw.kernel
def chained(x: tw.Tensor, y: tw.Tensor, z: tw.Tensor, o: tw.Tensor, *, DTYPE: tw.constexpr):
    """o = cast(x @ y) @ z: the left operand of the second dot comes from the first."""
    inner = tw.dot(tw.load(x, (0, 0), (64, 64)), tw.load(y, (0, 0), (64, 64)), tw.zeros((64, 64), DTYPE))
    outer = tw.dot(inner.to(x.dtype), tw.load(z, (0, 0), (64, 64)), tw.zeros((64, 64), DTYPE))
    tw.store(o, (0, 0), outer)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "f64", "f8e4m3"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_result_is_the_next_left_operand_as_it_stands(target: str, dtype: str):
    result = RESULT.get(dtype, "f32")
    x, y, z = (np.random.default_rng(n).standard_normal((64, 64)).astype(NUMPY[dtype]) for n in range(3))
    x, y = ((v.astype(np.float64) / 8).astype(NUMPY[dtype]) for v in (x, y))
    views = {name: matrix(dtype) for name in "xyz"}
    module = module_of(chained, **views, o=matrix(result), DTYPE=LONG[result])
    function = scheduled(module, target)
    dots = [op for op in function.walk() if isinstance(op, Dot)]
    moves = dots[1].a.op
    assert not isinstance(moves, Convert) or scratch_bytes(moves) == 0
    o = np.zeros((64, 64), NUMPY[result])
    emulate(compiled(function, target), target, [x, y, z, o], (1,))
    inner = (x.astype(np.float64) @ y.astype(np.float64)).astype(NUMPY[dtype]).astype(np.float64)
    error = {"f64": 1e-13, "f32": 1e-5, "f8e4m3": 0.5}.get(dtype, 0.05)
    np.testing.assert_allclose(o, inner @ z.astype(np.float64), 0, error)


def test_dots_that_do_not_exist_say_so():
    message = r"accumulates in f32, not in f64"
    module = module_of(product, a=matrix(), b=matrix(), c=matrix("f64"), DTYPE=tw.float64, BM=32, BN=32, BK=32)
    with pytest.raises(Exception, match=message):
        scheduled(module, "gfx942")
