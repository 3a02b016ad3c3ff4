"""Operators, promotion, broadcasting, indexing and builtins, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

import tilewright.frontend.language as tw
from tilewright.frontend.errors import ArgumentError
from tilewright.frontend.promotion import promote_dtypes


def test_promotion_table():
    cases = [
        (tw.float16, tw.float32, tw.float32),
        (tw.bfloat16, tw.float32, tw.float32),
        (tw.float16, tw.bfloat16, tw.float32),
        (tw.float64, tw.bfloat16, tw.float64),
        (tw.int32, tw.int64, tw.int64),
        (tw.int8, tw.float16, tw.float16),
        (tw.bool, tw.int8, tw.int8),
        (tw.bool, tw.float32, tw.float32),
    ]
    for a, b, expected in cases:
        assert promote_dtypes(a, b) == promote_dtypes(b, a) == expected


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("f16", "f16"), ("bf16", "bf16"), ("f64", "f64"), ("i32", "f32"), ("i8", "f32")],
)
def test_float_literals_are_weak(build, view, dtype, expected):
    def kernel(x, y):
        tw.store(y, 0, tw.load(x, 0, 4) * 2.5)

    build(kernel, x=view(dtype, None), y=view(expected, None))


def test_int_literals_and_division(build, view):
    def kernel(x, y, z):
        tile = tw.load(x, 0, 4)
        tw.store(y, 0, (tile + 3) // 2 % 5)
        tw.store(z, 0, tile / 2)

    build(kernel, x=view("i16", None), y=view("i16", None), z=view("f32", None))


def test_broadcasting_is_explicit(body, view):
    def kernel(x, y, z):
        rows = tw.load(x, 0, 4)
        columns = tw.load(y, 0, 8)
        tw.store(z, (0, 0), rows[:, None] * columns + 1.0)

    assert body(kernel, x=view("f32", None), y=view("f32", None), z=view("f32", None, None))[4:10] == [
        "%2 = tile.expand_dims %rows {axis = 1} : tile<4x1xf32>",
        "%3 = tile.broadcast %2 : tile<4x8xf32>",
        "%4 = tile.expand_dims %columns {axis = 0} : tile<1x8xf32>",
        "%5 = tile.broadcast %4 : tile<4x8xf32>",
        "%6 = tile.mul %3, %5 : tile<4x8xf32>",
        "%7 = tile.constant {value = 1.0} : tile<4x8xf32>",
    ]


def test_integer_operators(execute):
    def kernel(x, y, z):
        a, b = tw.load(x, 0, 8), tw.load(y, 0, 8)
        tw.store(z, (0, 0), (a // b)[None])
        tw.store(z, (1, 0), (a % b)[None])
        tw.store(z, (2, 0), ((a & 6) | (b ^ 1))[None])
        tw.store(z, (3, 0), ((a << 2) >> 1)[None])
        tw.store(z, (4, 0), (~a + -b)[None])
        tw.store(z, (5, 0), tw.where((a > 0) & ~(b == 3), a**3, abs(b))[None])
        tw.store(z, (6, 0), tw.maximum(tw.minimum(a, 3), b)[None])
        tw.store(z, (7, 0), ((a < b) + (a >= b) * 10)[None])

    a = np.array([7, -7, 5, -5, 1, 0, 2, -9], "int32")
    b = np.array([2, 2, -3, -3, 3, 5, 3, 4], "int32")
    z = np.zeros((8, 8), "int32")
    execute(kernel, a, b, z)
    expected = [
        a // b, a % b, (a & 6) | (b ^ 1), (a << 2) >> 1, ~a + -b, np.where((a > 0) & (b != 3), a**3, abs(b)),
        np.maximum(np.minimum(a, 3), b), np.where(a < b, 1, 10),
    ]  # fmt: skip
    np.testing.assert_array_equal(z, expected)


def test_math_functions(execute):
    def kernel(x, y):
        v = tw.load(x, 0, 8)
        results = (
            tw.exp(v), tw.exp2(v), tw.log(v), tw.log2(v), tw.sqrt(v), tw.rsqrt(v), tw.sin(v), tw.cos(v), tw.tanh(v),
            tw.sigmoid(v), tw.erf(v), tw.floor(v), tw.ceil(v), v**2, v**-1, v**0.5, 2.0 - v, -v,
        )  # fmt: skip
        for i in tw.static_range(len(results)):
            tw.store(y, (i, 0), results[i][None, :])

    x = np.linspace(0.2, 3, 8)
    y = np.zeros((18, 8))
    execute(kernel, x, y)
    expected = [
        np.exp(x), np.exp2(x), np.log(x), np.log2(x), np.sqrt(x), 1 / np.sqrt(x), np.sin(x), np.cos(x), np.tanh(x),
        1 / (1 + np.exp(-x)), [math.erf(v) for v in x], np.floor(x), np.ceil(x), x**2, 1 / x, np.sqrt(x), 2 - x, -x,
    ]  # fmt: skip
    np.testing.assert_allclose(y, expected, rtol=1e-12)


def test_compile_time_folding(body, view):
    def kernel(y, N: tw.constexpr):
        value = tw.cdiv(N, 3) + max(N, 4) - min((1, 2)) + int(tw.exp2(3.0)) + len((1, 2)) + math.floor(math.log2(N))
        tw.store(y, 0, value if not N > 100 and 0 < N < 50 else -1)

    assert f"%1 = tile.constant {{value = {4 + 10 - 1 + 8 + 2 + 3}}} : tile<1xi32>" in body(
        kernel, y=view("i32", None), N=10
    )


def test_reductions(execute):
    def kernel(x, y, rows, columns):
        tile = tw.load(x, (0, 0), (4, 6))
        tw.store(y, 0, tw.sum(tile))
        tw.store(y, 1, tw.max(tile, (0, 1)))
        tw.store(y, 2, tw.min(tile))
        tw.store(rows, (0, 0), tw.sum(tile, -1, keepdims=True))
        tw.store(rows, (0, 1), tw.sum(tile, keepdims=True) + tw.zeros((4, 1), tw.float64))
        tw.store(columns, 0, tw.prod(tile, axis=0))

    x = np.random.default_rng(0).standard_normal((4, 6))
    y, rows, columns = np.zeros(3), np.zeros((4, 2)), np.zeros(6)
    execute(kernel, x, y, rows, columns)
    np.testing.assert_allclose(y, [x.sum(), x.max(), x.min()])
    np.testing.assert_allclose(rows, np.stack([x.sum(1), np.full(4, x.sum())], 1))
    np.testing.assert_allclose(columns, x.prod(0))


def test_half_sums_accumulate_in_float32(body, view):
    def kernel(x, y):
        tw.store(y, 0, tw.sum(tw.load(x, 0, 4096)))

    lines = body(kernel, x=view("bf16", None), y=view("bf16", None))
    assert any("tile.reduce.sum" in line and line.endswith(": f32") for line in lines)
    assert any("tile.cast" in line and line.endswith(": bf16") for line in lines)


def test_small_integer_sums_are_int32(build, view):
    def kernel(x, y):
        tile = tw.load(x, 0, 64)
        tw.store(y, 0, tw.sum(tile) + tw.sum(tile > 3))

    build(kernel, x=view("i8", None), y=view("i32", None))


def test_slices_and_shapes(execute):
    def kernel(x, y):
        tile = tw.load(x, (0, 0), (4, 6))
        tw.store(y, (0, 0), tile[1:3, :-2])
        tw.store(y, (1, 0), tile[2:, 2:][..., None].reshape((2, -1)))
        tw.store(y, (2, 0), tile.T[1:5].permute(1, 0)[:2])
        tw.store(y, (3, 0), tile[0][None, 1:5] + tile[:2, 3][:, None])
        tw.store(y, (4, 0), tw.broadcast_to(tile[0, 1], (2, 4)))
        tw.store(y, (5, 0), tile.reshape(3, 2, 4)[1])

    x = np.arange(24, dtype="float32").reshape(4, 6)
    y = np.zeros((12, 4), "float32")
    execute(kernel, x, y)
    np.testing.assert_array_equal(y[0:2], x[1:3, :-2])
    np.testing.assert_array_equal(y[2:4], x[2:, 2:])
    np.testing.assert_array_equal(y[4:6], x.T[1:5].T[:2])
    np.testing.assert_array_equal(y[6:8], x[0][None, 1:5] + x[:2, 3][:, None])
    np.testing.assert_array_equal(y[8:10], np.full((2, 4), 1))
    np.testing.assert_array_equal(y[10:12], x.reshape(3, 2, 4)[1])


def test_casts(execute):
    def kernel(x, y, bits):
        tile = tw.load(x, 0, 4)
        tw.store(y, 0, tile.to(tw.int32))
        tw.store(y, 1, tile.to("bool").to(tw.int32))
        tw.store(y, 2, tw.cast(tile > 1, tw.int32) + tw.int32(2.9))
        tw.store(bits, 0, tw.bitcast(tile, tw.int32))

    x = np.array([0, 1.9, -1.9, 3], "float32")
    y, bits = np.zeros(12, "int32"), np.zeros(4, "int32")
    execute(kernel, x, y, bits)
    assert y.tolist() == [0, 1, -1, 3, 0, 1, 1, 1, 2, 3, 2, 3]
    np.testing.assert_array_equal(bits, x.view("int32"))


def test_views(execute):
    def kernel(x, y):
        b, rows = tw.program_id(0), x.shape[1]
        plane = x[b]
        tw.store(y[b], (0, 0), tw.load(plane.T, (0, 0), (4, 4)))
        shifted = plane.offset(1, 2)
        tw.store(y[b], (1, 0), tw.load(shifted, (0, 0), (4, 4)))
        swapped = x.permute(2, 0, 1)
        tw.store(y[b, :, :], (2, 0), tw.load(swapped, (0, b, 0), (4, 1, 4)).reshape(4, 4) + rows)

    x = np.arange(2 * 3 * 4, dtype="float32").reshape(2, 3, 4) + 1
    y = np.zeros((2, 12, 4), "float32")
    execute(kernel, x, y, grid=(2,))
    for b in range(2):
        padded = np.zeros((8, 8), "float32")
        padded[:3, :4] = x[b]
        np.testing.assert_array_equal(y[b, :4], padded[:4, :4].T)
        np.testing.assert_array_equal(y[b, 4:8], padded[1:5, 2:6])
        np.testing.assert_array_equal(y[b, 8:], padded[:4, :4].T + 3)


def test_subview_keeps_only_the_alignment_it_can(build, view):
    from tilewright.ir.types import ViewType, bf16

    def kernel(x, y):
        tw.store(y, 0, tw.load(x[1], 0, 8))

    odd = ViewType((None, 12), bf16, (12, 1), 16)
    module = build(kernel, x=odd, y=view("bf16", None))
    (sub,) = [op for op in module.walk() if op.name == "tile.subview"]
    assert sub.result.type.align == 8


def test_pad(execute):
    def kernel(x, y):
        tw.store(y, 0, tw.load(x, 0, 4, pad=7) + tw.load(x, 0, 4))

    x, y = np.array([1, 2], "int32"), np.zeros(4, "int32")
    execute(kernel, x, y)
    assert y.tolist() == [2, 4, 7, 7]


def test_dot_accumulators(build, view):
    def kernel(a, b, c, OUT: tw.constexpr):
        x, y = tw.load(a, (0, 0), (16, 16)), tw.load(b, (0, 0), (16, 16))
        tw.static_assert((x @ y).dtype == OUT)
        tw.store(c, (0, 0), tw.dot(x, y, precision="ieee").to(c.dtype))

    for dtype, out in (("f16", tw.float32), ("f64", tw.float64), ("i8", tw.int32), ("f8e4m3", tw.float32)):
        build(kernel, a=view(dtype, None, None), b=view(dtype, None, None), c=view("f32", None, None), OUT=out)


def test_any_alias_works(build, view):
    from tilewright.frontend.language import arange as counting
    from tilewright.frontend.language import store as put

    def kernel(y):
        put(y, 0, counting(8))

    build(kernel, y=view("i32", None))


def test_where_of_literals(execute):
    def kernel(x, y, flag: tw.bool):
        tile = tw.load(x, 0, 4)
        tw.store(y, 0, tw.where(tile > 1, 1, 2.5) + tw.where(flag, 10, 20))

    y = np.zeros(4, "float32")
    execute(kernel, np.arange(4, dtype="float32"), y, False)
    assert y.tolist() == [22.5, 22.5, 21, 21]


def test_builtins_refuse_to_run_on_the_host():
    with pytest.raises(RuntimeError, match=r"tw\.load only works inside a @tw\.kernel function"):
        tw.load(None, 0, 1)
    assert tw.cdiv(7, 2) == 4


def test_spec():
    spec = tw.spec("bf16", ("M", 64, "K"), align=32)
    assert str(spec.view_type()) == "view<?x64x?xbf16, strides=[?, ?, 1], align=32>"
    assert tw.spec(tw.float32, (4, 8)).strides == (8, 1)
    wrong = [
        (("float33", (4,)), {}, "unknown dtype"),
        (("f32", (4,)), {"strides": (1, 2)}, "strides"),
        (("f32", "M"), {}, "no tuple"),
        (("f32", (-4,)), {}, "-4 is no size"),
        (("f32", (2.0,)), {}, "2.0 is no size"),
        (("f32", ("M",)), {"align": 3}, "power of two"),
    ]
    for args, options, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            tw.spec(*args, **options)
