# ruff: noqa: B018, F841
"""Errors of tiles: shapes, dtypes, axes and operators."""

from __future__ import annotations

import pytest
from error_cases import Cases, check

import tilewright.frontend.language as tw

case = Cases()


@case("'+' on tiles of shapes (4,) and (8,), which do not broadcast", "a + tw.load(x, 0, 8)", "x[:, None]")
def shape_mismatch(x, y, n):
    a = tw.load(x, 0, 4)
    b = a + tw.load(x, 0, 8)


@case("tw.dot: shapes (8, 4) and (8, 4) do not agree: K is 4 and 8", "tw.dot(a, a)", "use b.T")
def dot_shapes(x, y, n):
    a = tw.zeros((8, 4))
    tw.dot(a, a)


@case("tw.dot: operands of different dtypes, f16 and f32", "b", "b.to(tw.float16)")
def dot_dtypes(x, y, n):
    a, b = tw.zeros((4, 4), tw.float16), tw.zeros((4, 4))
    tw.dot(a, b)


@case(
    "tw.dot: the accumulator has shape (4, 8), the product (4, 4)", "tw.zeros((4, 8))", "tw.zeros((4, 4), tw.float32)"
)
def dot_accumulator(x, y, n):
    a = tw.zeros((4, 4), tw.float16)
    tw.dot(a, a, acc=tw.zeros((4, 8)))


@case("tile shapes are compile-time constants: dimension 0 is a run-time value", "(n,)", "tw.constexpr")
def runtime_shape(x, y, n):
    tw.zeros((n,))


@case("tile shapes are compile-time constants: dimension 1 is the compile-time float 2.0", "(4, 8 / 4)", "'//'")
def float_shape(x, y, n):
    tw.zeros((4, 8 / 4))


@case("tile shapes are compile-time constants: dimension 0 is a run-time value", "x.shape", "tw.constexpr")
def dynamic_tensor_shape(x, y, n):
    tw.zeros(x.shape)


@case("axis 2 is out of range for a tile of rank 2", "2", "-2..1")
def axis_range(x, y, n):
    tw.sum(tw.zeros((4, 4)), axis=2)


@case("the axis must be a compile-time integer, got tile<4xf32>", "b", "tw.maximum")
def max_of_two(x, y, n):
    a, b = tw.zeros((4,)), tw.zeros((4,))
    tw.max(a, b)


@case("the axis must be a compile-time integer, got i32 scalar", "n")
def runtime_axis(x, y, n):
    tw.sum(tw.zeros((4, 4)), n)


@case("'&' needs integers, got tw.float32", "tw.load(x, 0, 4) & 1")
def bitwise_float(x, y, n):
    tw.load(x, 0, 4) & 1


@case("300 does not fit tw.int8", "tile + 300", "wider dtype")
def literal_range(x, y, n):
    tile = tw.zeros((4,), tw.int8)
    tile + 300


@case("tw.float8_e4m3 has no arithmetic", "tile * 2", "x.to(tw.float32)")
def float8_arithmetic(x, y, n):
    tile = tw.zeros((4,), tw.float8_e4m3)
    tile * 2


@case("'//' divides by zero at compile time", "1 // 0")
def division_by_zero(x, y, n):
    1 // 0


@case("cannot reshape (4,) (4 elements) to (3, 2) (6 elements)", "tw.zeros((4,)).reshape(3, 2)", "-1")
def reshape_size(x, y, n):
    tw.zeros((4,)).reshape(3, 2)


@case("slice 2:9 is empty or leaves an axis of size 4", "tile[2:9]")
def slice_range(x, y, n):
    tile = tw.zeros((4,))
    tile[2:9]


@case("the index of a tile must be a compile-time integer, got i32 scalar", "tile[n]")
def runtime_tile_index(x, y, n):
    tile = tw.zeros((4,))
    tile[n]


@case("grid axis 3 is out of range", "3", "0, 1 and 2")
def grid_axis(x, y, n):
    tw.program_id(3)


@case("tw.arange(4, 4) is empty", "tw.arange(4, 4)")
def empty_arange(x, y, n):
    tw.arange(4, 4)


@case("tw.bitcast: f32 has 32 bits, f16 has 16", "tw.float16", "same width")
def bitcast_width(x, y, n):
    tw.bitcast(tw.zeros((4,)), tw.float16)


@case("the condition of tw.where must be bool, got tile<4xf32>", "a", "x != 0")
def where_condition(x, y, n):
    a = tw.zeros((4,))
    tw.where(a, 1.0, 2.0)


@case("unknown precision 'fast'", "'fast'", "'ieee'")
def precision(x, y, n):
    tw.dot(tw.zeros((4, 4)), tw.zeros((4, 4)), precision='fast')  # fmt: skip


@case("axis 1 is out of range for a tile of rank 1", "1", "-1..0")
def cumsum_axis(x, y, n):
    tw.cumsum(tw.zeros((4,)), 1)


@case("tw.argmax takes one axis or None", "(0, 1)")
def argmax_axes(x, y, n):
    tw.argmax(tw.zeros((4, 4)), (0, 1))


@case("tw.cat takes a tuple or list of tiles, got tile<4xf32>", "tw.zeros((4,))", "tw.cat([a, b], axis=0)")
def cat_of_a_tile(x, y, n):
    tw.cat(tw.zeros((4,)))


@case("tw.cat: shapes (4, 4) and (4, 8) differ along an axis other than 0", "[a, b]")
def cat_shapes(x, y, n):
    a, b = tw.zeros((4, 4)), tw.zeros((4, 8))
    tw.cat([a, b], axis=0)


@case("tw.cat: tiles of different dtypes, f32 and i32", "[tw.zeros((4,)), tw.arange(4)]", ".to(tw.float32)")
def cat_dtypes(x, y, n):
    tw.cat([tw.zeros((4,)), tw.arange(4)])


@case("'**' needs a compile-time exponent", "2.0 ** n", "tw.exp2")
def general_power(x, y, n):
    2.0 ** n  # fmt: skip


@pytest.mark.parametrize(("kernel", "message", "underlined", "hint"), case.all)
def test_error(kernel, message, underlined, hint, fail, view):
    check(kernel, message, underlined, hint, fail, view)
