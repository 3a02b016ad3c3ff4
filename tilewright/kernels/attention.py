"""Attention forward: ``softmax(q @ k.T * scale) @ v`` for each batch and head, without storing the weights."""

from __future__ import annotations

from math import e, log2
from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def attention(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    o: tw.Tensor,
    scale: tw.float32,
    *,
    D: tw.constexpr = 128,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
) -> None:
    """q, o (B, H, M, D), k, v (B, G, N, D), H a multiple of G. Grid: (cdiv(M, BM), H, B).

    ``scale`` includes log2(e): weights are powers of two. CAUSAL aligns the last query with the last key.
    """
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    g = h // (q.shape[1] // k.shape[1])
    shift = k.shape[2] - q.shape[2]
    rows = m * BM + shift + tw.arange(0, BM)
    end = tw.cdiv(k.shape[2], BN)
    if CAUSAL:
        end = tw.minimum(end, tw.cdiv(tw.maximum((m + 1) * BM + shift, 0), BN))
    queries = tw.load(q[b, h], (m, 0), (BM, D))
    top = tw.full((BM,), -1e30, tw.float32)
    total = tw.zeros((BM,), tw.float32)
    out = tw.zeros((BM, D), tw.float32)
    for j in tw.range(end):
        s = tw.dot(queries, tw.load(k[b, g], (j, 0), (BN, D)).T)
        columns = j * BN + tw.arange(0, BN)
        s = tw.where((columns < k.shape[2])[None, :], s, float("-inf"))
        if CAUSAL:
            s = tw.where(columns[None, :] <= rows[:, None], s, float("-inf"))
        new_top = tw.maximum(top, tw.max(s, axis=1))
        p = tw.exp2(s * scale - (new_top * scale)[:, None])
        shrink = tw.exp2((top - new_top) * scale)
        total = total * shrink + tw.sum(p, axis=1)
        out = tw.dot(p.to(v.dtype), tw.load(v[b, g], (j, 0), (BN, D)), out * shrink[:, None])
        top = new_top
    tw.store(o[b, h], (m, 0), (out * (1.0 / tw.maximum(total, 1e-30))[:, None]).to(o.dtype))


def configuration(rows: int, depth: int) -> dict[str, int]:
    """Tile sizes and warps for ``rows`` queries of head dimension ``depth``, measured on an H100 (docs/performance.md).

    With a short head dimension exponentials take as long as products; four warpgroups, whose accumulators then fit,
    keep both units busy.
    """
    if depth <= 64 and rows > 128:
        return {"BM": 256, "BN": 64, "num_warps": 16}
    return {"BM": 128, "BN": 128}


def sdpa(q: Any, k: Any, v: Any, o: Any, causal: bool = False) -> None:
    """``o = scaled_dot_product_attention(q, k, v)`` with the default scale 1 / sqrt(D); arrays of NumPy or torch."""
    batch, heads, rows, depth = q.shape
    meta = configuration(rows, depth)
    grid = (tw.cdiv(rows, meta["BM"]), heads, batch)
    attention[grid](q, k, v, o, depth**-0.5 * log2(e), D=depth, CAUSAL=causal, **meta)


def reference(
    q: np.ndarray[Any, Any], k: np.ndarray[Any, Any], v: np.ndarray[Any, Any], causal: bool = False
) -> np.ndarray[Any, Any]:
    """In float64; rows that see no key are 0."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), groups, axis=1) for x in (k, v))
    scores = np.einsum("bhmd,bhnd->bhmn", q.astype(np.float64), keys) * q.shape[-1] ** -0.5
    if causal:
        m, n = scores.shape[-2:]
        scores = np.where(np.arange(n) <= np.arange(m)[:, None] + n - m, scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = np.nan_to_num(weights)
    out: np.ndarray[Any, Any] = weights @ values / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return out
