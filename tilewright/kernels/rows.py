"""Tile sizes for kernels over rows, and the order in which programs go through a matrix."""

from __future__ import annotations

import tilewright as tw

#: elements that one program should move at least, and the widest row
ELEMENTS, WIDEST = 4096, 16384
#: columns that kernels for longer rows work on at a time
LONG_COLUMNS = 4096
#: elements that a thread of `layernorm` holds at most, and how many long rows a program has: two reductions follow each
#: other, and another row hides their exchanges between threads
LAYER_ELEMENTS, LAYER_ROWS = 64, 2
#: elements that a thread of `norm_backward` holds, several values for each, and that a program has at least
GRADIENT_ELEMENTS, GRADIENT_LEAST = 8, 2048
#: below every finite number that matters in a softmax, yet finite: differences from it are never NaN
LEAST = -1e30
#: programs that share the rows of a gradient: two for each SM of an H100
GRADIENT_PROGRAMS = 264


def row_tiles(rows: int, columns: int, elements: int | None = None, least: int = ELEMENTS) -> dict[str, int]:
    """``BM`` and ``BN`` for kernels that hold whole rows of (rows, columns), several where they are short.

    With ``elements`` also ``num_warps``, so that a thread holds about that many; else the compiler chooses. Short rows
    make up ``least`` elements, where there are enough for all SMs.
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
    meta = {"BM": height, "BN": width}
    return meta if elements is None else {**meta, "num_warps": _warps(meta, elements)}


def _warps(meta: dict[str, int], elements: int) -> int:
    return max(4, min(32, meta["BM"] * meta["BN"] // (32 * elements)))


def layer_tiles(rows: int, columns: int) -> dict[str, int]:
    """Tile sizes and warps of `layernorm`."""
    meta = row_tiles(rows, columns)
    if meta["BN"] >= ELEMENTS and rows > 2048:
        meta["BM"] = LAYER_ROWS
    return {**meta, "num_warps": _warps(meta, LAYER_ELEMENTS)}


def gradient_tiles(rows: int, columns: int) -> tuple[dict[str, int], int]:
    """Tile sizes and number of programs of `norm_backward`."""
    meta = row_tiles(rows, columns, GRADIENT_ELEMENTS, GRADIENT_LEAST)
    programs = GRADIENT_PROGRAMS if meta["num_warps"] <= 8 else GRADIENT_PROGRAMS // 2
    return meta, min(programs, tw.cdiv(rows, meta["BM"]))


@tw.function
def row_major(columns, BN):
    """The tile (m, n) of this program where programs go along rows first: who runs together reads together."""
    across = tw.cdiv(columns, BN)
    return tw.program_id(0) // across, tw.program_id(0) % across


def block_tiles(columns: int, elements: int = 4096) -> dict[str, int]:
    """``BM`` and ``BN`` of kernels that call `row_major`: about ``elements`` that lie together in memory."""
    width = 1
    while width < min(columns, elements):
        width *= 2
    return {"BM": max(1, elements // width), "BN": width}


def row_major_grid(rows: int, columns: int, BM: int, BN: int) -> tuple[int]:
    """The grid of kernels that call `row_major`: a program for each tile (BM, BN)."""
    return (tw.cdiv(rows, BM) * tw.cdiv(columns, BN),)


@tw.function
def sum_of(x, residual, m, j, BM, BN):
    """The tile (m, j) of ``x + residual`` in float32; ``residual`` may be None."""
    row = tw.load(x, (m, j), (BM, BN)).to(tw.float32)
    if residual is not None:
        row = row + tw.load(residual, (m, j), (BM, BN)).to(tw.float32)
    return row


@tw.function
def store_weighted(y, m, j, row, weight, bias, BN):
    """``y = row * weight + bias`` of the tile (m, j).

    Weight and bias are read here, not with the row: cached rows that need not wait in registers.
    """
    out = row * tw.load(weight, j, BN).to(tw.float32)
    if bias is not None:
        out = out + tw.load(bias, j, BN).to(tw.float32)
    tw.store(y, (m, j), out.to(y.dtype))
