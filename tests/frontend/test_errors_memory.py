"""Errors of loads, stores, gathers, scatters and atomic updates."""

from __future__ import annotations

import pytest
from error_cases import Cases, check

import tilewright.frontend.language as tw

case = Cases()


@case("cannot store a f32 tile to a tensor of f16", "tile", ".to(c.dtype)")
def store_dtype(half):
    tile = tw.zeros((4,))
    tw.store(half, 0, tile)


@case("tw.store: a tile of shape (4, 4) to a tensor of rank 1", "tw.zeros((4, 4))", "reshape")
def store_rank(x, y, n):
    tw.store(y, 0, tw.zeros((4, 4)))


@case("tw.load: 2 indices for a tensor of rank 1", "(0, 0)", "one tile index per dimension")
def load_rank(x, y, n):
    tw.load(x, (0, 0), (4, 4))


@case("tw.load needs a tensor, got tile<4xf32>", "tile")
def load_of_a_tile(x, y, n):
    tile = tw.zeros((4,))
    tw.load(tile, 0, 4)


@case("a tile index must be an integer scalar, got the compile-time float 0.5", "0.5", "'//'")
def float_index(x, y, n):
    tw.load(x, 0.5, 4)


@case("a tile index must be an int32 scalar, got i64 scalar", "n.to(tw.int64)", "tw.int32")
def wide_index(x, y, n):
    tw.load(x, n.to(tw.int64), 4)


@case("1 indices leave nothing of a tensor of rank 1", "x[0]", "tw.load")
def tensor_element(x, y, n):
    x[0]


@case("'+' does not apply to view<?xf32", "x + 1", "tw.load")
def tensor_arithmetic(x, y, n):
    x + 1


@case("tw.gather needs an integer tile, got the compile-time int 0", "0", "tw.load")
def gather_of_a_number(x, y, n):
    tw.gather(x, 0)


@case("an index must be a tile of integers, got tile<4xf32>", "tile", ".to(tw.int32)")
def gather_by_floats(x, y, n):
    tile = tw.load(x, 0, 4)
    tw.gather(x, tile)


@case("axis 1 is out of range for a tensor of rank 1", "1", "-1..0")
def gather_axis(x, y, n):
    tw.gather(x, tw.arange(4), axis=1)


@case("tw.gather: the size of axis 1 is known at run time only", "tw.arange(4)", "shape=(n, 64)")
def gather_without_shape(m):
    tw.gather(m, tw.arange(4), axis=0)


@case("tw.gather: an index of shape (4, 1) does not broadcast to (8, 16)", "(8, 16)", "sizes are equal")
def gather_shape(m):
    tw.gather(m, tw.arange(4), axis=0, shape=(8, 16))


@case("tw.gather: the tile index along axis 0 must be 0", "(1, 0)", "add to the index")
def gather_tile(m):
    tw.gather(m, tw.arange(4), axis=0, tile=(1, 0), shape=(4, 16))


@case("1 index tiles for the axes (0, 1)", "(0, 1)", "one integer tile for each axis")
def gather_axes(m):
    tw.gather(m, tw.arange(4), axis=(0, 1))


@case("cannot store a i32 tile to a tensor of f32", "tw.arange(4)", ".to(tw.float32)")
def scatter_dtype(x, y, n):
    tw.scatter(y, tw.arange(4), tw.arange(4))


@case(
    "'tw.scatter' on tiles of shapes (4,) and (8,), which do not broadcast",
    "tw.scatter(y, tw.arange(4), tw.zeros((8,)))",
)
def scatter_shape(x, y, n):
    tw.scatter(y, tw.arange(4), tw.zeros((8,)))


@case("tw.atomic_xor does not exist for tw.float32", "y", "tw.int32, tw.int64")
def atomic_dtype(x, y, n):
    tw.atomic_xor(y, 0, 1)


@case("tw.atomic_max does not exist for tw.float16", "half", "tw.float32")
def atomic_half(half):
    tw.atomic_max(half, 0, 1.0)


@case("an atomic update of a tensor of f32 takes f32, got i32 scalar", "n", ".to(tw.float32)")
def atomic_value(x, y, n):
    tw.atomic_add(y, 0, n)


@case("unknown order 'seq_cst'", '"seq_cst"', "'relaxed', 'acq_rel'")
def atomic_order(x, y, n):
    tw.atomic_add(y, 0, 1.0, order="seq_cst")


@case("axis= goes with integer tiles, not with a tile index", "0")
def atomic_axis(x, y, n):
    tw.atomic_add(y, n, 1.0, axis=0)


@pytest.mark.parametrize(("kernel", "message", "underlined", "hint"), case.all)
def test_error(kernel, message, underlined, hint, fail, view):
    check(kernel, message, underlined, hint, fail, view)
