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


@tw.kernel
def gemm_grouped_weights(
    a: tw.Tensor,
    dy: tw.Tensor,
    offsets: tw.Tensor,
    db: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 64,
) -> None:
    """``db[g] = a[rows of g].T @ dy[rows of g]``: the gradient of `gemm_grouped`'s matrices from that of its result.

    a (T, K), dy (T, N), offsets as there, db (G, K, N), 0 for groups without rows. Grid: (cdiv(K, BM), cdiv(N, BN), G).
    """
    m, n, g = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    start, end = tw.load(offsets, g), tw.load(offsets, g + 1)
    whole = (end - start) // BK
    left, right = a.offset(start, 0).T, dy.offset(start, 0)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(whole):
        acc = tw.dot(tw.load(left, (m, k), (BM, BK)), tw.load(right, (k, n), (BK, BN)), acc)
    if start + whole * BK < end:  # the next group's rows count for nothing, whatever they hold
        inside = start + whole * BK + tw.arange(0, BK) < end
        some = tw.where(inside[None, :], tw.load(left, (m, whole), (BM, BK)), 0.0)
        others = tw.where(inside[:, None], tw.load(right, (whole, n), (BK, BN)), 0.0)
        acc = tw.dot(some, others, acc)
    tw.store(db[g], (m, n), acc.to(db.dtype))


def most_tiles(rows: int, groups: int, bm: int) -> int:
    """How many tiles of ``bm`` rows the groups can have at most, however the rows are divided."""
    return rows // bm + groups


def grouped(a: Any, b: Any, offsets: Any, starts: Any, c: Any, **meta: int) -> None:
    """``c[r] = a[r] @ b[group of r]``; ``starts`` (G + 1,) int32 is scratch. Arrays of NumPy or torch."""
    groups, bm, bn = b.shape[0], meta.get("BM", 128), meta.get("BN", 256)
    count_tiles[1,](offsets, starts, BM=bm, GROUPS=1 << groups.bit_length())
    gemm_grouped[(most_tiles(a.shape[0], groups, bm) * tw.cdiv(b.shape[2], bn),)](a, b, offsets, starts, c, **meta)


def grouped_weights(a: Any, dy: Any, offsets: Any, db: Any, **meta: int) -> None:
    """``db[g] = a[rows of g].T @ dy[rows of g]``, see `gemm_grouped_weights`. Arrays of NumPy or torch."""
    groups, k, n = db.shape
    grid = tw.cdiv(k, meta.get("BM", 128)), tw.cdiv(n, meta.get("BN", 128)), groups
    gemm_grouped_weights[grid](a, dy, offsets, db, **meta)


def reference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64; rows outside all groups are NaN."""
    c = np.full((a.shape[0], b.shape[2]), np.nan)
    for g, (start, end) in enumerate(pairwise(offsets)):
        c[start:end] = a[start:end].astype(np.float64) @ b[g].astype(np.float64)
    return c


def reference_weights(
    a: np.ndarray[Any, Any], dy: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """`gemm_grouped_weights` in float64."""
    left, right = a.astype(np.float64), dy.astype(np.float64)
    return np.stack([left[start:end].T @ right[start:end] for start, end in pairwise(offsets)])
