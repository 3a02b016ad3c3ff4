"""Attention of one new query per sequence and head: keys are split over programs, partial results merged after.

Bound by reading keys and values once. The query heads that share a key head fill the rows of one tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention import LN2, LOG2E
from tilewright.kernels.attention import reference as forward_reference

#: rows of the tile of queries: as many heads may share a key head
ROWS = 16


@tw.kernel
def attention_decode(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    parts: tw.Tensor,
    logarithms: tw.Tensor,
    lengths: tw.Tensor,
    scale: tw.float32,
    pages: tw.Tensor = None,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BN: tw.constexpr = 64,
    ROWS: tw.constexpr = ROWS,
) -> None:
    """A share of the keys of every sequence. Grid: (splits, G, B).

    q (B, H, D) with H / G at most ROWS, k (B, G, N, D), v (B, G, N, DV), lengths (B,) int32: keys that exist. With
    ``pages`` (B, P) int32 the keys of a sequence lie in pages of BN, k (pages, G, BN, D), v (pages, G, BN, DV), in the
    order of its row. parts (B, H, splits, DV) float32 gets each share's result, logarithms (B, H, splits) its weight:
    the logarithm to base 2 of the sum of exponentials, -inf without keys. ``scale`` includes log2(e).
    """
    part, g, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    heads = q.shape[1] // k.shape[1]
    length = tw.load(lengths, b)
    share = tw.cdiv(tw.cdiv(length, BN), tw.num_programs(0))
    queries = tw.load(q[b].offset(g * heads, 0), (0, 0), (ROWS, D))
    top = tw.full((ROWS,), -1e30, tw.float32)
    total = tw.zeros((ROWS,), tw.float32)
    out = tw.zeros((ROWS, DV), tw.float32)
    for j in tw.range(part * share, tw.minimum((part + 1) * share, tw.cdiv(length, BN))):
        if pages is None:
            keys, values = tw.load(k[b, g], (j, 0), (BN, D)), tw.load(v[b, g], (j, 0), (BN, DV))
        else:
            page = tw.load(pages[b], j)
            keys, values = tw.load(k[page, g], (0, 0), (BN, D)), tw.load(v[page, g], (0, 0), (BN, DV))
        s = tw.dot(queries, keys.T)
        s = tw.where((j * BN + tw.arange(0, BN) < length)[None, :], s, float("-inf"))
        new_top = tw.maximum(top, tw.max(s, axis=1))
        p = tw.exp2(s * scale - (new_top * scale)[:, None])
        shrink = tw.exp2((top - new_top) * scale)
        total = total * shrink + tw.sum(p, axis=1)
        out = tw.dot(p.to(v.dtype), values, out * shrink[:, None])
        top = new_top
    rows = tw.arange(0, ROWS)
    places = tw.where(rows < heads, g * heads + rows, -1)
    tw.scatter(parts[b].permute(1, 0, 2)[part], places, out * (1.0 / tw.maximum(total, 1e-30))[:, None], 0)
    tw.scatter(logarithms[b].permute(1, 0)[part], places, top * scale + tw.log2(total), 0)


@tw.kernel
def attention_merge(
    parts: tw.Tensor,
    logarithms: tw.Tensor,
    o: tw.Tensor,
    lse: tw.Tensor = None,
    *,
    SPLITS: tw.constexpr = 16,
    DV: tw.constexpr = 128,
) -> None:
    """``o[b, h] = sum(w * parts) / sum(w)`` over up to SPLITS shares, w = 2^logarithms. Grid: (H, B)."""
    h, b = tw.program_id(0), tw.program_id(1)
    weight = tw.load(logarithms[b, h], 0, (SPLITS,), pad=float("-inf"))
    top = tw.maximum(tw.max(weight, axis=0), -1e30)
    weight = tw.exp2(weight - top)
    total = tw.sum(weight, axis=0)
    out = tw.sum(tw.load(parts[b, h], (0, 0), (SPLITS, DV)) * weight[:, None], axis=0)
    tw.store(o[b, h], 0, (out / tw.maximum(total, 1e-30)).to(o.dtype))
    if lse is not None:
        tw.store(lse[b], h, (top + tw.log2(total)) * LN2)


def splits(batch: int, groups: int, keys: int, units: int = 132) -> int:
    """Shares of a sequence's keys so that every SM has work, none shorter than 256 keys; a power of two."""
    wanted = min(tw.cdiv(units, max(batch * groups, 1)), keys // 256, 64)
    return 1 << max(wanted, 1).bit_length() - 1


def decode(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lengths: Any,
    parts: Any,
    logarithms: Any,
    pages: Any = None,
    *,
    scale: float | None = None,
    lse: Any = None,
) -> None:
    """``o`` (B, H, DV) for one query per sequence; arrays of NumPy or torch, see `attention_decode`.

    The workspaces parts (B, H, S, DV) and logarithms (B, H, S), float32, say into how many shares: S from `splits`.
    """
    batch, heads, depth = q.shape
    groups, width, count = k.shape[1], v.shape[3], parts.shape[2]
    factor = (depth**-0.5 if scale is None else scale) * LOG2E
    block = 64 if pages is None else k.shape[2]
    grid = (count, groups, batch)
    attention_decode[grid](q, k, v, parts, logarithms, lengths, factor, pages, D=depth, DV=width, BN=block)
    attention_merge[heads, batch](parts, logarithms, o, lse, SPLITS=max(count, 16), DV=width)


def reference(
    q: np.ndarray[Any, Any], k: np.ndarray[Any, Any], v: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """In float64, keys not in pages."""
    return forward_reference(q[:, :, None], k, v, lengths=lengths)[0][:, :, 0]
