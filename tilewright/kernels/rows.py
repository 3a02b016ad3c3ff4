"""Tile sizes for kernels that read whole rows."""

from __future__ import annotations

import tilewright as tw

#: elements that one program should move at least, and the widest row
ELEMENTS, WIDEST = 4096, 16384


def row_tiles(rows: int, columns: int) -> dict[str, int]:
    """``BM`` and ``BN`` for `rmsnorm` and `softmax` of (rows, columns): whole rows, several where they are short."""
    if columns > WIDEST:
        raise ValueError(f"rows of {columns} elements: at most {WIDEST} fit into one program")
    width = 1
    while width < columns:
        width *= 2
    height = 1
    while height * width < ELEMENTS and tw.cdiv(rows, height) > 2048:
        height *= 2
    return {"BM": height, "BN": width}


#: elements that a thread holds of each row while gradients add up, and programs that share the rows: two for each SM
GRADIENT_ELEMENTS, GRADIENT_PROGRAMS = 16, 264


def gradient_tiles(rows: int, columns: int) -> tuple[dict[str, int], int]:
    """Tile sizes and number of programs of `rmsnorm_backward` and `layernorm_backward`."""
    meta = row_tiles(rows, columns)
    size = meta["BM"] * meta["BN"]
    warps = max(4, min(32, size // (32 * GRADIENT_ELEMENTS)))
    programs = GRADIENT_PROGRAMS if warps <= 8 else GRADIENT_PROGRAMS // 2
    return {**meta, "num_warps": warps}, min(programs, tw.cdiv(rows, meta["BM"]))
