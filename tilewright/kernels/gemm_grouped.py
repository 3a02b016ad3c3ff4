"""Grouped matrix product: rows sorted by group, each group times its own matrix (a mixture of experts)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.workspace import Workspace

#: tiles that a program of `list_tiles` lists
LISTED = 64

_tables = Workspace("int32")


@tw.kernel
def list_tiles(
    offsets: tw.Tensor,
    table: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    GROUPS: tw.constexpr = 64,
    TILES: tw.constexpr = 64,
) -> None:
    """``table[tile] = (group, first row, end of the group, number of tiles)`` of the tiles of BM rows, in order.

    offsets (G + 1,) and table (`most_tiles`, 4) int32; behind the last tile the first three are 0. GROUPS is a power
    of two that is not less than G. Grid: (cdiv(most_tiles, TILES),).
    """
    p, g = tw.program_id(0), tw.arange(0, GROUPS)
    first, last = tw.load(offsets, 0, GROUPS), tw.load(offsets.offset(1), 0, GROUPS)
    tiles = tw.where(g < offsets.shape[0] - 1, tw.cdiv(last - first, BM), 0)
    ends = tw.cumsum(tiles, axis=0)
    place = (p * TILES + tw.arange(0, TILES))[:, None] - (ends - tiles)[None, :]  # among the tiles of each group
    ours = (place >= 0) & (place < tiles[None, :])
    group = tw.sum(tw.where(ours, g[None, :], 0), axis=1)
    row = tw.sum(tw.where(ours, first[None, :] + place * BM, 0), axis=1)
    end = tw.sum(tw.where(ours, last[None, :], 0), axis=1)
    every = tw.full((TILES, 1), 0, tw.int32) + tw.sum(tiles, axis=0)
    tw.store(table, (p, 0), tw.cat([group[:, None], row[:, None], end[:, None], every], axis=1))


@tw.kernel
def gemm_grouped(
    a: tw.Tensor,
    b: tw.Tensor,
    table: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
    WINDOW: tw.constexpr = 8,
) -> None:
    """``c[r] = a[r] @ b[g]`` for the rows r of group g.

    a (T, K), b (G, K, N), c (T, N), table from `list_tiles`; groups may be empty, rows outside all groups are not
    written. Grid: (most_tiles(T, G, BM) * cdiv(N, BN),). Sizes of groups are read on the device: one binary and one
    grid serve all of them; programs beyond the last tile end at once. Accumulates in float32. Programs walk windows of
    WINDOW tiles of rows, column by column.
    """
    columns, rows = tw.cdiv(b.shape[2], BN), tw.load(table, (0, 3))
    if tw.program_id(0) < rows * columns:
        first = tw.program_id(0) // (WINDOW * columns) * WINDOW
        place = tw.program_id(0) % (WINDOW * columns)
        height = tw.minimum(rows - first, WINDOW)
        tile, n = first + place % height, place // height
        g, row, end = tw.load(table, (tile, 0)), tw.load(table, (tile, 1)), tw.load(table, (tile, 2))
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


def grouped(a: Any, b: Any, offsets: Any, c: Any, **meta: int) -> None:
    """``c[r] = a[r] @ b[group of r]`` for the rows from ``offsets[g]`` up to ``offsets[g + 1]`` of each group g.

    ``offsets`` (G + 1,) int32, ascending. Arrays of NumPy or torch.
    """
    meta = {"BM": 64, "BN": 256, "WINDOW": 16, **meta}
    groups, bm, bn = b.shape[0], meta["BM"], meta["BN"]
    most = most_tiles(a.shape[0], groups, bm)
    table = _tables.take(c, (most, 4))
    list_tiles[(tw.cdiv(most, LISTED),)](offsets, table, BM=bm, GROUPS=1 << (groups - 1).bit_length(), TILES=LISTED)
    gemm_grouped[(most * tw.cdiv(b.shape[2], bn),)](a, b, table, c, **meta)


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
