"""Attention backward: gradients of q, k and v, without storing the weights, in one order of sums (deterministic).

With P = exp(S - lse), dP = do v^T and delta the row sums of do * o: dv = P^T do, dS = P * (dP - delta), dq = dS k and
dk = dS^T q, times the scale (FlashAttention, algorithm 4). One kernel walks over queries for a tile of keys, another
over keys for a tile of queries, so that nothing is added up by atomic updates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention import LOG2E, visible_scores


@tw.kernel
def attention_delta(o: tw.Tensor, do: tw.Tensor, delta: tw.Tensor, *, DV: tw.constexpr, BM: tw.constexpr = 64) -> None:
    """``delta[b, h, i] = sum(o * do)``: o, do (B, H, M, DV), delta (B, H, M) float32. Grid: (cdiv(M, BM), H, B)."""
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    product = tw.load(o[b, h], (m, 0), (BM, DV)).to(tw.float32) * tw.load(do[b, h], (m, 0), (BM, DV)).to(tw.float32)
    tw.store(delta[b, h], m, tw.sum(product, axis=1))


@tw.kernel
def attention_dkdv(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    do: tw.Tensor,
    lse: tw.Tensor,
    delta: tw.Tensor,
    dk: tw.Tensor,
    dv: tw.Tensor,
    scale: tw.float32,
    left: tw.int32 = None,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
) -> None:
    """Gradients of a tile of keys and values, from all queries of the heads that share them.

    Shapes as in `attention`; lse and delta (B, H, M) float32, ``scale`` without log2(e). Grid: (cdiv(N, BN), G, B).
    """
    n, g, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    shared = q.shape[1] // k.shape[1]
    shift = k.shape[2] - q.shape[2]
    keys = tw.load(k[b, g], (n, 0), (BN, D))
    values = tw.load(v[b, g], (n, 0), (BN, DV))
    columns = n * BN + tw.arange(0, BN)
    begin, end = 0, tw.cdiv(q.shape[2], BM)
    if CAUSAL:
        begin = tw.maximum(n * BN - shift, 0) // BM
    if left is not None:
        end = tw.minimum(end, tw.cdiv(tw.maximum((n + 1) * BN + left - shift, 0), BM))
    dkeys = tw.zeros((BN, D), tw.float32)
    dvalues = tw.zeros((BN, DV), tw.float32)
    for step in tw.range(tw.maximum(end - begin, 0) * shared):
        h, m = g * shared + step // (end - begin), begin + step % (end - begin)
        queries = tw.load(q[b, h], (m, 0), (BM, D))
        gradients = tw.load(do[b, h], (m, 0), (BM, DV))
        rows = m * BM + tw.arange(0, BM)
        # beyond the last query lse reads as +inf: those weights are 0
        logarithm = tw.load(lse[b, h], m, (BM,), pad=float("inf"))
        s = tw.dot(keys, queries.T)
        p = tw.exp2(s * (scale * LOG2E) - (logarithm * LOG2E)[None, :])
        p = tw.where((logarithm == float("-inf"))[None, :], 0.0, p)
        if CAUSAL:
            p = tw.where(columns[:, None] <= (rows + shift)[None, :], p, 0.0)
        if left is not None:
            p = tw.where(columns[:, None] >= (rows + shift - left)[None, :], p, 0.0)
        dvalues = tw.dot(p.to(do.dtype), gradients, dvalues)
        dp = tw.dot(values, gradients.T)
        ds = p * (dp - tw.load(delta[b, h], m, (BM,))[None, :])
        dkeys = tw.dot(ds.to(q.dtype), queries, dkeys)
    tw.store(dk[b, g], (n, 0), (dkeys * scale).to(dk.dtype))
    tw.store(dv[b, g], (n, 0), dvalues.to(dv.dtype))


@tw.kernel
def attention_dq(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    do: tw.Tensor,
    lse: tw.Tensor,
    delta: tw.Tensor,
    dq: tw.Tensor,
    scale: tw.float32,
    left: tw.int32 = None,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 64,
    CAUSAL: tw.constexpr = False,
) -> None:
    """Gradients of a tile of queries. Grid: (cdiv(M, BM), H, B); the rest as in `attention_dkdv`."""
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    g = h // (q.shape[1] // k.shape[1])
    shift = k.shape[2] - q.shape[2]
    queries = tw.load(q[b, h], (m, 0), (BM, D))
    gradients = tw.load(do[b, h], (m, 0), (BM, DV))
    logarithm = tw.load(lse[b, h], m, (BM,), pad=float("inf"))
    row_delta = tw.load(delta[b, h], m, (BM,))
    rows = m * BM + shift + tw.arange(0, BM)
    begin, end = 0, tw.cdiv(k.shape[2], BN)
    if CAUSAL:
        end = tw.minimum(end, tw.cdiv(tw.maximum((m + 1) * BM + shift, 0), BN))
    if left is not None:
        begin = tw.maximum(m * BM + shift - left, 0) // BN
    dqueries = tw.zeros((BM, D), tw.float32)
    for j in tw.range(begin, end):
        keys = tw.load(k[b, g], (j, 0), (BN, D))
        columns = j * BN + tw.arange(0, BN)
        s = tw.dot(queries, keys.T)
        p = tw.exp2(s * (scale * LOG2E) - (logarithm * LOG2E)[:, None])
        p = tw.where((columns < k.shape[2])[None, :], p, 0.0)
        p = tw.where((logarithm == float("-inf"))[:, None], 0.0, p)
        if CAUSAL:
            p = tw.where(columns[None, :] <= rows[:, None], p, 0.0)
        if left is not None:
            p = tw.where(columns[None, :] >= (rows - left)[:, None], p, 0.0)
        dp = tw.dot(gradients, tw.load(v[b, g], (j, 0), (BN, DV)).T)
        ds = p * (dp - row_delta[:, None])
        dqueries = tw.dot(ds.to(k.dtype), keys, dqueries)
    tw.store(dq[b, h], (m, 0), (dqueries * scale).to(dq.dtype))


def sdpa_backward(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    do: Any,
    lse: Any,
    delta: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    causal: bool = False,
    *,
    scale: float | None = None,
    left: int | None = None,
) -> None:
    """Gradients of `tilewright.kernels.attention.sdpa`, which gave ``o`` and ``lse``. Arrays of NumPy or torch.

    ``delta`` is a float32 workspace with the shape of ``lse`` (B, H, M).
    """
    batch, heads, rows, depth = q.shape
    factor = depth**-0.5 if scale is None else scale
    width, groups, keys = v.shape[3], k.shape[1], k.shape[2]
    attention_delta[tw.cdiv(rows, 64), heads, batch](o, do, delta, DV=width)
    sizes = {"D": depth, "DV": width, "CAUSAL": causal}
    inputs = (q, k, v, do, lse, delta)
    attention_dkdv[tw.cdiv(keys, 128), groups, batch](*inputs, dk, dv, factor, left, **sizes)
    attention_dq[tw.cdiv(rows, 128), heads, batch](*inputs, dq, factor, left, **sizes)


def reference(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    do: np.ndarray[Any, Any],
    causal: bool = False,
    *,
    left: int | None = None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """dq, dk, dv in float64."""
    shared, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    scores = visible_scores(q, k, causal, None, None, None, left, None)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    total = weights.sum(-1, keepdims=True)
    weights /= np.where(total == 0, 1, total)
    queries, gradients = q.astype(np.float64), do.astype(np.float64)
    keys, values = (np.repeat(x.astype(np.float64), shared, axis=1) for x in (k, v))
    out = weights @ values
    dp = gradients @ values.transpose(0, 1, 3, 2)
    ds = weights * (dp - (gradients * out).sum(-1, keepdims=True)) * scale
    dq = ds @ keys
    by_group = (k.shape[0], k.shape[1], shared)
    dk = (ds.transpose(0, 1, 3, 2) @ queries).reshape(*by_group, *k.shape[2:]).sum(2)
    dv = (weights.transpose(0, 1, 3, 2) @ gradients).reshape(*by_group, *v.shape[2:]).sum(2)
    return dq, dk, dv
