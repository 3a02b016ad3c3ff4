"""Grouped matrix product: rows sorted by group, each group times its own matrix (a mixture of experts)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def count_tiles(offsets: tw.Tensor, starts: tw.Tensor, *, BM: tw.constexpr = 128, GROUPS: tw.constexpr = 64) -> None:
    """``starts[g]``: how many tiles of BM rows the groups before g have; both (G + 1,) int32. Grid: (1,).

    GROUPS is a power of two that is not less than G + 1.
    """
    g = tw.arange(0, GROUPS)
    first, last = tw.load(offsets, 0, GROUPS), tw.load(offsets.offset(1), 0, GROUPS)
    tiles = tw.where(g < offsets.shape[0] - 1, tw.cdiv(last - first, BM), 0)
    tw.store(starts, 0, tw.cumsum(tiles, axis=0) - tiles)


@tw.function
def group_of(tile, starts):
    """The last group whose tiles start at or before ``tile``."""
    low, high = 0, starts.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        before = tw.load(starts, middle) <= tile
        low, high = tw.where(before, middle, low), tw.where(before, high, middle)
    return low


@tw.kernel
def gemm_grouped(
    a: tw.Tensor,
    b: tw.Tensor,
    offsets: tw.Tensor,
    starts: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
    WINDOW: tw.constexpr = 8,
) -> None:
    """``c[r] = a[r] @ b[g]`` for the rows r of group g: from ``offsets[g]`` up to ``offsets[g + 1]``.

    a (T, K), b (G, K, N), c (T, N), offsets (G + 1,) int32, ascending, ``starts`` from `count_tiles`; groups may be
    empty, rows outside all groups are not written. Grid: (most_tiles(T, G, BM) * cdiv(N, BN),). Sizes of groups are
    read on the device: one binary and one grid serve all of them; programs beyond the last tile end at once.
    Accumulates in float32. Programs walk windows of WINDOW tiles of rows, column by column.
    """
    columns, rows = tw.cdiv(b.shape[2], BN), tw.load(starts, starts.shape[0] - 1)
    if tw.program_id(0) < rows * columns:
        first = tw.program_id(0) // (WINDOW * columns) * WINDOW
        place = tw.program_id(0) % (WINDOW * columns)
        height = tw.minimum(rows - first, WINDOW)
        tile, n = first + place % height, place // height
        g = group_of(tile, starts)
        row, end = tw.load(offsets, g) + (tile - tw.load(starts, g)) * BM, tw.load(offsets, g + 1)
        acc = tw.zeros((BM, BN), tw.float32)
        for k in tw.range(tw.cdiv(a.shape[1], BK)):
            acc = tw.dot(tw.load(a.offset(row, 0), (0, k), (BM, BK)), tw.load(b[g], (k, n), (BK, BN)), acc)
        if row + BM <= end:
            tw.store(c.offset(row, 0), (0, n), acc.to(c.dtype))
        else:  # the next group's rows are not ours
            numbers = row + tw.arange(0, BM)
            tw.scatter(c, tw.where(numbers < end, numbers, -1), acc.to(c.dtype), 0, tile=(0, n))


def most_tiles(rows: int, groups: int, bm: int) -> int:
    """How many tiles of ``bm`` rows the groups can have at most, however the rows are divided."""
    return rows // bm + groups


def grouped(a: Any, b: Any, offsets: Any, starts: Any, c: Any, **meta: int) -> None:
    """``c[r] = a[r] @ b[group of r]``; ``starts`` (G + 1,) int32 is scratch. Arrays of NumPy or torch."""
    groups, bm, bn = b.shape[0], meta.get("BM", 128), meta.get("BN", 256)
    count_tiles[1,](offsets, starts, BM=bm, GROUPS=1 << groups.bit_length())
    gemm_grouped[(most_tiles(a.shape[0], groups, bm) * tw.cdiv(b.shape[2], bn),)](a, b, offsets, starts, c, **meta)


def reference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64; rows outside all groups are NaN."""
    c = np.full((a.shape[0], b.shape[2]), np.nan)
    for g, (start, end) in enumerate(pairwise(offsets)):
        c[start:end] = a[start:end].astype(np.float64) @ b[g].astype(np.float64)
    return c
