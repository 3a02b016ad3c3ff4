"""Tile sizes for kernels over rows, and the order in which programs go through a matrix."""

from __future__ import annotations

import math
from typing import Any

import tilewright as tw

#: elements that one program should move at least, and the widest row
ELEMENTS, WIDEST = 4096, 16384
#: columns that kernels for longer rows work on at a time, and the warps of those for gradients
LONG_COLUMNS, LONG_WARPS = 4096, 8
#: columns at a time and warps of kernels for longer rows: for up to `MIDDLE` columns, and for more
MIDDLE = 65536
LONG_TILES = {
    "rmsnorm": ((8192, 16), (8192, 16)), "rmsnorm with a residual": ((8192, 16), (4096, 16)),
    "layernorm": ((8192, 8), (8192, 8)),
    "softmax": ((2048, 8), (8192, 16)), "softmax backward": ((4096, 16), (8192, 16)),
}  # fmt: skip
#: blocks of a cluster that long rows are spread over, the elements of a row that a warp of theirs has, and the widest
#: rows for which they do better than kernels for long rows
BLOCKS, SPREAD_ELEMENTS, WIDEST_SPREAD = 8, 1024, 131072
#: registers of a thread of such programs where rows wait in shared memory
SPREAD_REGISTERS = 64
#: elements of a matrix of which the cache holds much: there what is read once makes room for what is written
CACHED = 2**24
#: the widest rows of which a warp of `softmax` and `layernorm` takes whole ones; narrower ones are taken together
SHORT = 1024
#: warps of programs of `rmsnorm` that read their row twice
AGAIN_WARPS = 4
#: elements that a thread holds of the rows of each of two matrices, and the most warps for that
PAIR_ELEMENTS, PAIR_WARPS = 16, 16
#: the same of `softmax_backward` with rows that are not short, and the registers of a thread that leave room for others
SOFTMAX_ELEMENTS, SOFTMAX_REGISTERS = 32, 80
#: warps and registers of `layernorm` for short rows
LAYER_WARPS, LAYER_REGISTERS = 2, 48
#: elements that a thread of `layernorm` holds of one row, and how many long rows a program has
LAYER_ELEMENTS, LAYER_ROWS = 32, 2
#: warps of a program of 1024 threads, which have 64 registers each
MOST_WARPS = 32
#: columns that a thread of `norm_backward` adds up: few of rows that share a program with another, else more
GRADIENT_COLUMNS, WIDE_GRADIENT_COLUMNS, GRADIENT_ROWS = 8, 16, 2
#: below every finite number that matters in a softmax, yet finite: differences from it are never NaN
LEAST = -1e30
#: for powers of two, which GPUs have an instruction for
LOG2_E = math.log2(math.e)
#: threads of the programs that share the rows of a gradient, on each SM of an H100
GRADIENT_THREADS, SMS = 512, 132
#: programs that share the rows of a gradient in each block of columns, or with a cluster each
LONG_GRADIENT_PROGRAMS = 33
#: the most columns for which the rows of rmsnorm's gradients are spread
WIDEST_GRADIENTS = 2 * WIDEST
#: bytes that rows have to be multiples of, for copies and vectors to take whole ones
ALIGNED = 16


def row_tiles(rows: int, columns: int, least: int = ELEMENTS) -> dict[str, int]:
    """``BM`` and ``BN`` for kernels that hold whole rows of (rows, columns), several where they are short.

    Short rows make up ``least`` elements, where there are enough for all SMs.
    """
    if columns > WIDEST:
        hint = "use the kernels for long rows, or the functions that choose"
        raise ValueError(f"rows of {columns} elements: at most {WIDEST} fit into one program; {hint}")
    width = 1
    while width < columns:
        width *= 2
    height = 1
    while height * width < least and tw.cdiv(rows, height) > 2048:
        height *= 2
    return {"BM": height, "BN": width}


def read_once(rows: int, columns: int) -> dict[str, str | None]:
    """``READ``: the hint to the cache for elements of (rows, columns) that a kernel reads, and nobody soon after it."""
    return {"READ": "evict_first" if rows * columns <= CACHED else None}


def activation_tiles(rows: int, columns: int) -> dict[str, Any]:
    """Tile sizes of `activation`."""
    return {**block_tiles(columns, 2048), **read_once(rows, columns)}


def norm_tiles(rows: int, columns: int, residual: bool = False) -> dict[str, Any]:
    """Tile sizes of `rmsnorm`: a program for each row that is not narrow.

    Rows of middle length of matrices that the cache does not hold are read twice, by programs so small that the second
    time finds them in the cache.
    """
    meta: dict[str, Any] = row_tiles(rows, columns, SHORT)
    if rows * columns > CACHED and SHORT < columns <= ELEMENTS:
        return {**meta, "num_warps": AGAIN_WARPS, "AGAIN": True, "READ": "evict_last"}
    return pair_tiles(rows, columns) if residual else {**meta, **read_once(rows, columns)}


def pair_tiles(rows: int, columns: int) -> dict[str, int]:
    """Tile sizes and warps of kernels that hold rows of two matrices: fewer elements a thread than of one."""
    meta = row_tiles(rows, columns, SHORT)
    warps = meta["BM"] * meta["BN"] // (32 * PAIR_ELEMENTS)
    return {**meta, "num_warps": max(1, min(PAIR_WARPS, warps))}


def long_tiles(kernel: str, columns: int) -> dict[str, int]:
    """``BN`` and warps of a kernel of `LONG_TILES` for rows that are wider than `WIDEST`."""
    width, warps = LONG_TILES[kernel][columns > MIDDLE]
    return {"BN": width, "num_warps": warps}


def is_spread(x: Any) -> bool:
    """Whether kernels that hold whole rows take those of ``x``, too wide for one block, with the blocks of clusters.

    Not where a block would have no columns, or threads have to copy single elements: there rows are faster read twice.
    """
    columns = x.shape[1]
    if not WIDEST < columns <= WIDEST_SPREAD or columns * x.itemsize % ALIGNED:
        return False
    width = _spread_width(columns)
    return columns > width - width // BLOCKS and bool(tw.supports(x, "clusters"))


def _spread_width(columns: int) -> int:
    width = 2 * WIDEST
    while width < columns:
        width *= 2
    return width


def spread_tiles(columns: int) -> dict[str, Any]:
    """Tile sizes, warps and blocks of kernels over rows that are wider than `WIDEST`, where `is_spread` says so."""
    width = _spread_width(columns)
    return {"BM": 1, "BN": width, "num_ctas": BLOCKS, "num_warps": width // (BLOCKS * SPREAD_ELEMENTS)}


def spread_norm_tiles(columns: int, residual: bool) -> dict[str, Any]:
    """The same of `rmsnorm`: rows of two matrices, and of one with many threads, do not wait in registers."""
    meta = spread_tiles(columns)
    if residual or meta["BN"] > MIDDLE:
        meta["AGAIN"] = True
        if meta["BN"] >= MIDDLE:
            meta["maxnreg"] = SPREAD_REGISTERS
    return meta


def layer_tiles(rows: int, columns: int, bytes_each: int = 2) -> dict[str, Any]:
    """Tile sizes and warps of `layernorm`: two warps have short rows, a program two long ones.

    There a thread has twice the elements. With short rows, of elements of ``bytes_each``, weights are read early, and
    threads keep to few registers where that is enough for both.
    """
    if columns <= SHORT:
        short = {**row_tiles(rows, columns, SHORT), "num_warps": LAYER_WARPS, "EARLY": True, **read_once(rows, columns)}
        return {**short, "maxnreg": LAYER_REGISTERS} if bytes_each <= 2 else short
    meta, elements = row_tiles(rows, columns), LAYER_ELEMENTS
    if meta["BN"] >= ELEMENTS and rows > 2048:
        meta["BM"], elements = LAYER_ROWS, 2 * LAYER_ELEMENTS
    warps = max(4, min(16, meta["BM"] * meta["BN"] // (32 * elements)))
    return {**meta, "num_warps": warps, **read_once(rows, columns)}


def softmax_gradient_tiles(rows: int, columns: int) -> dict[str, Any]:
    """Tile sizes, warps and registers of `softmax_backward`, which holds rows of two matrices."""
    if columns <= SHORT:
        return {**pair_tiles(rows, columns), **read_once(rows, columns)}
    meta = row_tiles(rows, columns, SHORT)
    warps = max(4, meta["BN"] // (32 * SOFTMAX_ELEMENTS))
    return {**meta, "num_warps": warps, "maxnreg": SOFTMAX_REGISTERS}


def softmax_tiles(rows: int, columns: int) -> dict[str, Any]:
    """Tile sizes of `softmax`: a warp alone where it can hold whole rows."""
    meta = {**row_tiles(rows, columns, SHORT), "num_warps": 1} if columns <= SHORT else row_tiles(rows, columns)
    return {**meta, **read_once(rows, columns)}


def gradient_tiles(rows: int, columns: int, centred: bool = False) -> tuple[dict[str, Any], int]:
    """Tile sizes and number of programs of `norm_backward`; no two warps have the same columns.

    ``centred``: of `layernorm`, whose widest rows have no registers left to wait in and are read again.
    """
    width = row_tiles(rows, columns)["BN"]
    each = GRADIENT_COLUMNS if width <= SHORT else WIDE_GRADIENT_COLUMNS
    warps = max(1, min(MOST_WARPS, width // (32 * each)))
    height = GRADIENT_ROWS if width <= SHORT and rows > GRADIENT_ROWS else 1
    programs = SMS * max(1, GRADIENT_THREADS // (32 * warps))
    meta = {"BM": height, "BN": width, "num_warps": warps, **read_once(rows, columns)}
    if centred and warps == MOST_WARPS:
        meta |= {"AGAIN": True, "READ": "evict_first"}
    return meta, min(programs, tw.cdiv(rows, height))


def long_gradient_tiles(rows: int) -> tuple[dict[str, int], int]:
    """The same for blocks of `LONG_COLUMNS` columns, each with programs of its own."""
    return {"BM": 1, "BN": LONG_COLUMNS, "num_warps": 2 * LONG_WARPS}, min(LONG_GRADIENT_PROGRAMS, rows)


def spread_gradient_tiles(rows: int, columns: int) -> tuple[dict[str, Any], int]:
    """The same of rmsnorm's for up to `WIDEST_GRADIENTS` columns: clusters that walk over rows, two blocks on an SM."""
    return {**spread_tiles(columns), "num_warps": LONG_WARPS, "AGAIN": True}, long_gradient_tiles(rows)[1]


@tw.function
def row_major(columns, BN):
    """The tile (m, n) of this program where programs go along rows first: who runs together reads together."""
    across = tw.cdiv(columns, BN)
    return tw.program_id(0) // across, tw.program_id(0) % across


def block_tiles(columns: int, elements: int = 4096) -> dict[str, int]:
    """``BM`` and ``BN`` of kernels that call `row_major`: about ``elements`` that lie together in memory.

    1024 suit the backward pass of `activation`, 4096 what computes more (`dropout`).
    """
    width = 1
    while width < min(columns, elements):
        width *= 2
    return {"BM": max(1, elements // width), "BN": width}


def row_major_grid(rows: int, columns: int, BM: int, BN: int) -> tuple[int]:
    """The grid of kernels that call `row_major`: a program for each tile (BM, BN)."""
    return (tw.cdiv(rows, BM) * tw.cdiv(columns, BN),)


@tw.function
def sum_of(x, residual, m, j, BM, BN, hint):
    """The tile (m, j) of ``x + residual`` in float32; ``residual`` may be None. ``hint``: to the cache."""
    row = tw.load(x, (m, j), (BM, BN), eviction_policy=hint).to(tw.float32)
    if residual is not None:
        row = row + tw.load(residual, (m, j), (BM, BN), eviction_policy=hint).to(tw.float32)
    return row


@tw.function
def weights(weight, bias, j, BN):
    """Block j of the weight and of the bias, which may be None, in float32.

    Most kernels read them when they need them: cached rows that need not wait in registers.
    """
    factors = tw.load(weight, j, BN).to(tw.float32)
    if bias is None:
        return factors, None
    return factors, tw.load(bias, j, BN).to(tw.float32)


@tw.function
def store_weighted(y, m, j, row, factors, offsets):
    """``y = row * factors + offsets`` of the tile (m, j); ``offsets`` may be None."""
    out = row * factors
    if offsets is not None:
        out = out + offsets
    tw.store(y, (m, j), out.to(y.dtype))
