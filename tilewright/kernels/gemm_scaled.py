"""Products of 8-bit operands with scales: fp8 (e4m3, e5m2, either for each operand) and int8.

Scales are float32 and multiply what the bytes say: per tensor, per row of a and column of b, or per block of 128 along
K (1 x 128 of a, 128 x 128 of b, the recipe of the DeepSeek-V3 technical report, section 3.3).
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw

#: K (and, of b, N) that shares a scale in `gemm_block_scaled`
BLOCK = 128


@tw.function
def scale_and_store(c, m, n, acc, scale_a, scale_b, bias, per_row):
    """Store the tile (m, n) of sums with the scales of rows and columns, or of the tensors."""
    out = acc.to(tw.float32)
    if per_row:
        rows, columns = tw.load(scale_a, m, acc.shape[0]), tw.load(scale_b, n, acc.shape[1])
        out = out * rows[:, None] * columns[None, :]
    else:
        out = out * (tw.load(scale_a, 0) * tw.load(scale_b, 0))
    if bias is not None:
        out += tw.load(bias, n, acc.shape[1]).to(tw.float32)[None, :]
    tw.store(c, (m, n), out.to(c.dtype))


@tw.kernel
def gemm_scaled(
    a: tw.Tensor,
    b: tw.Tensor,
    scale_a: tw.Tensor,
    scale_b: tw.Tensor,
    c: tw.Tensor,
    bias: tw.Tensor = None,
    *,
    PER_ROW: tw.constexpr = False,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 128,
) -> None:
    """``c = scale_a * scale_b * (a @ b) + bias``: a (M, K), b (K, N), c (M, N). Grid: (cdiv(M, BM), cdiv(N, BN)).

    ``scale_a`` and ``scale_b`` are (1,); with PER_ROW (M,) and (N,). ``bias`` is (N,) or None. int8 accumulates in
    int32, fp8 in float32 as far as the hardware does: Hopper's unit keeps about 14 bits (docs/passes.md), which is
    what libraries call fast accumulation. Fast on Hopper where a and b are contiguous along K.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), tw.int32 if a.dtype == tw.int8 else tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    scale_and_store(c, m, n, acc, scale_a, scale_b, bias, PER_ROW)


@tw.kernel
def gemm_promoted(
    a: tw.Tensor,
    b: tw.Tensor,
    scale_a: tw.Tensor,
    scale_b: tw.Tensor,
    c: tw.Tensor,
    bias: tw.Tensor = None,
    *,
    PER_ROW: tw.constexpr = False,
    PARTS: tw.constexpr = 1,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 256,
) -> None:
    """As `gemm_scaled`, but every BK of K are added to the sum in float32. Grid: (cdiv(M, BM), cdiv(N, BN * PARTS)).

    A program has PARTS (1 or 2) tiles side by side, one after the other: they share a's tile, and the registers of what
    is added.
    """
    m, n = tw.program_id(0), tw.program_id(1) * PARTS
    first, second = tw.zeros((BM, BN), tw.float32), tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        rows = tw.load(a, (m, k), (BM, BK))
        first += tw.dot(rows, tw.load(b, (k, n), (BK, BN))).to(tw.float32)
        if PARTS == 2:
            second += tw.dot(rows, tw.load(b, (k, n + 1), (BK, BN))).to(tw.float32)
    scale_and_store(c, m, n, first, scale_a, scale_b, bias, PER_ROW)
    if PARTS == 2:
        scale_and_store(c, m, n + 1, second, scale_a, scale_b, bias, PER_ROW)


@tw.kernel
def gemm_block_scaled(
    a: tw.Tensor,
    b: tw.Tensor,
    scale_a: tw.Tensor,
    scale_b: tw.Tensor,
    c: tw.Tensor,
    *,
    PARTS: tw.constexpr = 1,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
) -> None:
    """Sums over blocks k of ``scale_a[:, k] * scale_b[k, n // 128] * (a_k @ b_k)``.

    a (M, K), b (K, N), c (M, N), scale_a (M, cdiv(K, 128)), scale_b (cdiv(K, 128), cdiv(N, 128)), any strides; BN
    divides 128. Grid and PARTS as in `gemm_promoted`. Blocks are added up in float32 (those of int8 are exact in
    int32). Fast on Hopper where a and b are contiguous along K, scale_a along M and scale_b along N, with strides of
    multiples of 16 bytes: then the scales travel with the operands.
    """
    tw.static_assert(BLOCK % BN == 0, "a tile of b has one scale: BN divides 128")
    m, n = tw.program_id(0), tw.program_id(1) * PARTS
    first, second = tw.zeros((BM, BN), tw.float32), tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BLOCK)):
        scales, one = tw.load(scale_a.T[k], m, BM), tw.load(scale_b[k], n * BN // BLOCK)
        other = tw.load(scale_b[k], (n + 1) * BN // BLOCK) if PARTS == 2 else one
        rows = tw.load(a, (m, k), (BM, BLOCK))
        product = tw.dot(rows, tw.load(b, (k, n), (BLOCK, BN)))
        first += product.to(tw.float32) * (scales * one)[:, None]
        if PARTS == 2:
            product = tw.dot(rows, tw.load(b, (k, n + 1), (BLOCK, BN)))
            second += product.to(tw.float32) * (scales * other)[:, None]
    tw.store(c, (m, n), first.to(c.dtype))
    if PARTS == 2:
        tw.store(c, (m, n + 1), second.to(c.dtype))


# --- launches -------------------------------------------------------------------------------------

#: tiles (BM, BN) and their speed relative to the first, as in `tilewright.kernels.gemm.TILES`
TILES: tuple[tuple[tuple[int, int], float], ...] = (
    ((128, 256), 1.0),
    ((64, 256), 0.9),
    ((128, 128), 0.88),
    ((64, 128), 0.75),
    ((64, 64), 0.4),
)


#: the same where partial sums are added up, which takes registers: a program of 256 columns has two parts
PROMOTED_TILES = (((128, 256), 1.0), ((128, 128), 0.94), ((64, 128), 0.75), ((64, 64), 0.4))


def configuration(
    m: int, n: int, units: int = 132, tiles: tuple[tuple[tuple[int, int], float], ...] = TILES
) -> dict[str, int]:
    """Tile sizes: those whose waves over ``units`` SMs take least time, each wave costing its area over its speed."""

    def cost(entry: tuple[tuple[int, int], float]) -> float:
        (bm, bn), speed = entry
        return -(-(-(-m // bm) * -(-n // bn)) // units) * bm * bn / speed

    bm, bn = min(tiles, key=cost)[0]
    return {"BM": bm, "BN": bn}


def promoted_configuration(m: int, n: int, units: int = 132) -> dict[str, int]:
    """Tile sizes and PARTS of `gemm_promoted` and `gemm_block_scaled`."""
    meta = configuration(m, n, units, PROMOTED_TILES)
    parts = tw.cdiv(meta["BN"], BLOCK)
    return {"BM": meta["BM"], "BN": meta["BN"] // parts, "PARTS": parts}


def scaled(a: Any, b: Any, scale_a: Any, scale_b: Any, c: Any, bias: Any = None, *, promote: bool = False) -> None:
    """``c = scale_a * scale_b * (a @ b) + bias``; scales of one element, or of M and N. Arrays of NumPy or torch.

    ``promote``: `gemm_promoted` instead of `gemm_scaled`.
    """
    m, n = c.shape
    per_row = (scale_a.shape[0], scale_b.shape[0]) != (1, 1)
    kernel, meta = gemm_scaled, configuration(m, n)
    if promote:
        kernel, meta = gemm_promoted, promoted_configuration(m, n)
    grid = tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"] * meta.get("PARTS", 1))
    kernel[grid](a, b, scale_a, scale_b, c, bias, PER_ROW=per_row, **meta)


def block_scaled(a: Any, b: Any, scale_a: Any, scale_b: Any, c: Any) -> None:
    """See `gemm_block_scaled`."""
    m, n = c.shape
    meta = promoted_configuration(m, n)
    grid = tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"] * meta["PARTS"])
    gemm_block_scaled[grid](a, b, scale_a, scale_b, c, **meta)


# --- references -----------------------------------------------------------------------------------


def reference(
    a: np.ndarray[Any, Any],
    b: np.ndarray[Any, Any],
    scale_a: np.ndarray[Any, Any],
    scale_b: np.ndarray[Any, Any],
    bias: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """`gemm_scaled` in float64."""
    product = a.astype(np.float64) @ b.astype(np.float64)
    product = product * scale_a.astype(np.float64)[:, None] * scale_b.astype(np.float64)[None, :]
    result: np.ndarray[Any, Any] = product if bias is None else product + bias.astype(np.float64)
    return result


def block_reference(
    a: np.ndarray[Any, Any],
    b: np.ndarray[Any, Any],
    scale_a: np.ndarray[Any, Any],
    scale_b: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """`gemm_block_scaled` in float64."""
    (_, k), n = a.shape, b.shape[1]
    rows = np.repeat(scale_a.astype(np.float64), BLOCK, axis=1)[:, :k]
    blocks = np.repeat(np.repeat(scale_b.astype(np.float64), BLOCK, axis=0), BLOCK, axis=1)[:k, :n]
    product: np.ndarray[Any, Any] = (a.astype(np.float64) * rows) @ (b.astype(np.float64) * blocks)
    return product
