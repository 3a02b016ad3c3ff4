"""Grouped matrix product: rows sorted by group, each group times its own matrix (a mixture of experts)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

import tilewright as tw


@tw.function
def group_of(slot, offsets, BM):
    """The last group that starts at or before ``slot``.

    Group g gets the slots from ``offsets[g] // BM + g`` on. That grows with g and leaves it at least as many slots as
    it has tiles of BM rows (at most one more), so slots are dealt without adding up the groups before.
    """
    low, high = 0, offsets.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        before = tw.load(offsets, middle) // BM + middle <= slot
        low, high = tw.where(before, middle, low), tw.where(before, high, middle)
    return low


@tw.kernel
def gemm_grouped(
    a: tw.Tensor,
    b: tw.Tensor,
    offsets: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
    WINDOW: tw.constexpr = 8,
) -> None:
    """``c[r] = a[r] @ b[g]`` for the rows r of group g: from ``offsets[g]`` up to ``offsets[g + 1]``.

    a (T, K), b (G, K, N), c (T, N), offsets (G + 1,) int32, ascending; groups may be empty, rows outside all groups
    are not written. Grid: (slots(T, G, BM) * cdiv(N, BN),). Sizes of groups are read on the device: one binary and one
    grid serve all of them. Accumulates in float32. Programs walk windows of WINDOW slots, column by column.
    """
    columns = tw.cdiv(b.shape[2], BN)
    rows = tw.num_programs(0) // columns
    first = tw.program_id(0) // (WINDOW * columns) * WINDOW
    place = tw.program_id(0) % (WINDOW * columns)
    height = tw.minimum(rows - first, WINDOW)
    slot, n = first + place % height, place // height
    g = group_of(slot, offsets, BM)
    start, end = tw.load(offsets, g), tw.load(offsets, g + 1)
    row = start + (slot - start // BM - g) * BM
    if row < end:
        acc = tw.zeros((BM, BN), tw.float32)
        for k in tw.range(tw.cdiv(a.shape[1], BK)):
            acc = tw.dot(tw.load(a.offset(row, 0), (0, k), (BM, BK)), tw.load(b[g], (k, n), (BK, BN)), acc)
        if row + BM <= end:
            tw.store(c.offset(row, 0), (0, n), acc.to(c.dtype))
        else:  # the next group's rows are not ours
            numbers = row + tw.arange(0, BM)
            tw.scatter(c, tw.where(numbers < end, numbers, -1), acc.to(c.dtype), 0, tile=(0, n))


def slots(rows: int, groups: int, bm: int) -> int:
    """How many tiles of ``bm`` rows the groups can have at most, however the rows are divided."""
    return rows // bm + groups


#: rows of a tile, and the speed of whole tiles relative to the first (`tilewright.kernels.gemm.TILES`)
HEIGHTS: tuple[tuple[int, float], ...] = ((128, 1.0), (64, 0.93))


def configuration(rows: int, groups: int) -> dict[str, int]:
    """The height of tiles: every group fills half of its last tile on average."""

    def cost(entry: tuple[int, float]) -> float:
        height, speed = entry
        return (rows + groups * height / 2) / speed

    return {"BM": min(HEIGHTS, key=cost)[0], "BN": 256}


def grouped(a: Any, b: Any, offsets: Any, c: Any) -> None:
    """``c[r] = a[r] @ b[group of r]``. Arrays of NumPy or torch, on one device."""
    meta = configuration(a.shape[0], b.shape[0])
    grid = (slots(a.shape[0], b.shape[0], meta["BM"]) * tw.cdiv(b.shape[2], meta["BN"]),)
    gemm_grouped[grid](a, b, offsets, c, **meta)


def reference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In float64; rows outside all groups are NaN."""
    c = np.full((a.shape[0], b.shape[2]), np.nan)
    for g, (start, end) in enumerate(pairwise(offsets)):
        c[start:end] = a[start:end].astype(np.float64) @ b[g].astype(np.float64)
    return c
