"""Sums of the columns of a matrix, in one launch and one order: the same input gives the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw

#: columns of a tile, vectors of 16 bytes that a thread has in flight, threads of a program (docs/performance.md)
COLUMNS, VECTORS, THREADS = 64, 16, 128
#: rows that are too few to share out, and the same of what adds them up
FEW_ROWS, FEW_COLUMNS, FEW_VECTORS, FEW_THREADS = 1024, 32, 8, 256
#: programs that a GPU should have to run: two for each of an H100's SMs
PROGRAMS = 264


@tw.kernel
def column_sum(
    x: tw.Tensor,
    partial: tw.Tensor,
    arrived: tw.Tensor,
    sums: tw.Tensor,
    *,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 128,
    GROUP: tw.constexpr = 8,
    BP: tw.constexpr = 32,
) -> None:
    """``sums[0] = x.sum(0)``, added up in float32: x (M, N), sums (1, N). Grid: (cdiv(N, BN), P), any P.

    Program p of a column block adds up every P-th tile of rows and stores that to partial (P, N) float32. The last of
    them to arrive at the block's counter in arrived (cdiv(N, BN),) int32 adds up the partial sums, in the order of p,
    and clears the counter, which is 0 before the first launch. Rows apart by GROUP, a divisor of BM, lie in one
    thread when a row of threads spans BM / GROUP rows less: then only the last sums cross threads.
    """
    n, p = tw.program_id(0), tw.program_id(1)
    programs = tw.num_programs(1)
    total = tw.zeros((GROUP, BN), tw.float32)
    for m in tw.range(p, tw.cdiv(x.shape[0], BM), programs):
        rows = tw.load(x, (m, n), (BM, BN)).to(tw.float32)
        total = total + tw.sum(rows.reshape(BM // GROUP, GROUP, BN), axis=0)
    tw.store(partial, (p, n), tw.sum(total, axis=0)[None, :])
    if tw.atomic_add(arrived, n, 1, order="acq_rel") == programs - 1:
        whole = tw.zeros((BN,), tw.float32)
        for q in tw.range(tw.cdiv(programs, BP)):
            whole = whole + tw.sum(tw.load(partial, (q, n), (BP, BN)), axis=0)
        tw.store(sums, (0, n), whole[None, :].to(sums.dtype))
        tw.store(arrived, n, 0)


@tw.kernel
def column_sum_at_once(
    x: tw.Tensor, sums: tw.Tensor, *, BM: tw.constexpr = 256, BN: tw.constexpr = 32, GROUP: tw.constexpr = 32
) -> None:
    """`column_sum` of few rows: no program shares its columns with others. Grid: (cdiv(N, BN),)."""
    n = tw.program_id(0)
    total = tw.zeros((GROUP, BN), tw.float32)
    for m in tw.range(tw.cdiv(x.shape[0], BM)):
        rows = tw.load(x, (m, n), (BM, BN)).to(tw.float32)
        total = total + tw.sum(rows.reshape(BM // GROUP, GROUP, BN), axis=0)
    tw.store(sums, (0, n), tw.sum(total, axis=0)[None, :].to(sums.dtype))


def plan(rows: int, columns: int, element_bytes: int) -> tuple[dict[str, int], tuple[int, int]]:
    """The tile sizes and the grid of `column_sum` for a matrix of ``element_bytes`` an element."""
    group = THREADS * 16 // (COLUMNS * element_bytes)
    height, blocks = group * VECTORS, tw.cdiv(columns, COLUMNS)
    programs = min(tw.cdiv(rows, height), max(1, round(PROGRAMS / blocks)))
    return {"BM": height, "BN": COLUMNS, "GROUP": group, "num_warps": THREADS // 32}, (blocks, programs)


def workspace_shapes(rows: int, columns: int, element_bytes: int) -> tuple[tuple[int, int], tuple[int]]:
    """The shapes of ``partial`` (float32) and ``arrived`` (int32, zero at first) for `column_sums`."""
    blocks, programs = plan(rows, columns, element_bytes)[1]
    return (programs, columns), (blocks,)


def column_sums(x: Any, out: Any, partial: Any = None, arrived: Any = None) -> None:
    """``out[0] = x.sum(0)``: x (M, N), out (1, N), a workspace of `workspace_shapes`, which may be used again.

    Up to `FEW_ROWS` rows, partial sums of other kernels say, leave the workspace alone. Without one all
    rows of a column block are one program's, however many they are.

    Arrays of NumPy or torch, on one device. Launches on one workspace must follow each other.
    """
    rows, columns = x.shape
    if rows <= FEW_ROWS or partial is None:
        group = FEW_THREADS * 16 // (FEW_COLUMNS * x.itemsize)
        tiles = {"BM": group * FEW_VECTORS, "BN": FEW_COLUMNS, "GROUP": group}
        column_sum_at_once[(tw.cdiv(columns, FEW_COLUMNS),)](x, out, **tiles, num_warps=FEW_THREADS // 32)
        return
    meta, grid = plan(rows, columns, x.itemsize)
    column_sum[grid](x, partial, arrived, out, **meta)


def reference(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The sums in float64, (1, N)."""
    sums: np.ndarray[Any, Any] = x.astype(np.float64).sum(axis=0, keepdims=True)
    return sums
