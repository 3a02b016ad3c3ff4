"""What tiles of queries and keys give each other in attention backward: two walks, for ranks that hold parts of both.

With P = exp(S - lse), dP = do v^T and delta the row sums of do * o: dv = P^T do, dS = P * (dP - delta), dq = dS k and
dk = dS^T q, times the scale (FlashAttention, algorithm 4). One walk is over queries for a tile of keys, another over
keys for a tile of queries, so that nothing is added up by atomic updates.
"""

from __future__ import annotations

from typing import Any

import tilewright as tw
from tilewright.kernels.attention import LOG2E


@tw.kernel
def attention_delta(o: tw.Tensor, do: tw.Tensor, delta: tw.Tensor, *, DV: tw.constexpr, BM: tw.constexpr = 64) -> None:
    """``delta[b, h, i] = sum(o * do)``: o, do (B, H, M, DV), delta (B, H, M) float32. Grid: (cdiv(M, BM), H, B)."""
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    product = tw.load(o[b, h], (m, 0), (BM, DV)).to(tw.float32) * tw.load(do[b, h], (m, 0), (BM, DV)).to(tw.float32)
    tw.store(delta[b, h], m, tw.sum(product, axis=1))


@tw.function
def key_gradients(
    keys: Any,
    values: Any,
    q: Any,
    do: Any,
    lse: Any,
    delta: Any,
    head: Any,
    heads: Any,
    key: Any,
    shift: Any,
    left: Any,
    scale: Any,
    dkeys: Any,
    dvalues: Any,
    BM: tw.constexpr,
    CAUSAL: tw.constexpr,
) -> Any:
    """Add to dkeys (BN, D) and dvalues (BN, DV) what ``heads`` heads from ``head`` on of queries q (H, M, D) give.

    keys (BN, D) and values (BN, DV) start at ``key``, query i stands at key i + ``shift``; do (H, M, DV), lse and delta
    (H, M). ``dkeys`` lacks the factor ``scale``.
    """
    BN = keys.shape[0]
    columns = key + tw.arange(0, BN)
    begin, end = 0, tw.cdiv(q.shape[1], BM)
    if CAUSAL:
        begin = tw.maximum(key - shift, 0) // BM
    if left is not None:
        end = tw.minimum(end, tw.cdiv(tw.maximum(key + BN + left - shift, 0), BM))
    for step in tw.range(tw.maximum(end - begin, 0) * heads):
        h, m = head + step // (end - begin), begin + step % (end - begin)
        queries = tw.load(q[h], (m, 0), (BM, keys.shape[1]))
        gradients = tw.load(do[h], (m, 0), (BM, values.shape[1]))
        rows = m * BM + tw.arange(0, BM)
        # beyond the last query lse reads as +inf: those weights are 0
        logarithm = tw.load(lse[h], m, (BM,), pad=float("inf"))
        s = tw.dot(keys, queries.T)
        p = tw.exp2(s * (scale * LOG2E) - (logarithm * LOG2E)[None, :])
        p = tw.where((logarithm == float("-inf"))[None, :], 0.0, p)
        if CAUSAL:
            p = tw.where(columns[:, None] <= (rows + shift)[None, :], p, 0.0)
        if left is not None:
            p = tw.where(columns[:, None] >= (rows + shift - left)[None, :], p, 0.0)
        dvalues = tw.dot(p.to(do.dtype), gradients, dvalues)
        dp = tw.dot(values, gradients.T)
        ds = p * (dp - tw.load(delta[h], m, (BM,))[None, :])
        dkeys = tw.dot(ds.to(q.dtype), queries, dkeys)
    return dkeys, dvalues


@tw.function
def query_gradients(
    queries: Any,
    gradients: Any,
    logarithm: Any,
    row_delta: Any,
    k: Any,
    v: Any,
    row: Any,
    shift: Any,
    left: Any,
    scale: Any,
    dqueries: Any,
    BN: tw.constexpr,
    CAUSAL: tw.constexpr,
) -> Any:
    """Add to dqueries (BM, D) what keys k (N, D) and values v (N, DV) give, without the factor ``scale``.

    queries (BM, D), their gradients of the output (BM, DV), lse and delta (BM,) start at ``row``; query i stands at
    key i + ``shift``.
    """
    BM = queries.shape[0]
    rows = row + shift + tw.arange(0, BM)
    begin, end = 0, tw.cdiv(k.shape[0], BN)
    if CAUSAL:
        end = tw.minimum(end, tw.cdiv(tw.maximum(row + BM + shift, 0), BN))
    if left is not None:
        begin = tw.maximum(row + shift - left, 0) // BN
    for j in tw.range(begin, end):
        keys = tw.load(k, (j, 0), (BN, queries.shape[1]))
        columns = j * BN + tw.arange(0, BN)
        s = tw.dot(queries, keys.T)
        p = tw.exp2(s * (scale * LOG2E) - (logarithm * LOG2E)[:, None])
        p = tw.where((columns < k.shape[0])[None, :], p, 0.0)
        p = tw.where((logarithm == float("-inf"))[:, None], 0.0, p)
        if CAUSAL:
            p = tw.where(columns[None, :] <= rows[:, None], p, 0.0)
        if left is not None:
            p = tw.where(columns[None, :] >= (rows - left)[:, None], p, 0.0)
        dp = tw.dot(gradients, tw.load(v, (j, 0), (BN, gradients.shape[1])).T)
        ds = p * (dp - row_delta[:, None])
        dqueries = tw.dot(ds.to(k.dtype), keys, dqueries)
    return dqueries
