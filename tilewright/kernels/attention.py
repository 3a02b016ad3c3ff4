"""Attention forward: ``softmax(q @ k.T * scale) @ v`` for each batch and head, without storing the weights."""

from __future__ import annotations

from math import e, log, log2
from typing import Any

import numpy as np

import tilewright as tw

LOG2E, LN2 = log2(e), log(2)


@tw.function
def biased(scores: Any, pairs: Any) -> Any:
    """Scores times log2(e) with a tile of the bias; where that is of truth values, -inf where they are False."""
    if pairs.dtype == tw.bool:
        return tw.where(pairs, scores, float("-inf"))
    return scores + pairs.to(tw.float32) * LOG2E


@tw.function
def weigh(
    queries: Any,
    keys: Any,
    values: Any,
    bias: Any,
    scale: Any,
    row: Any,
    length: Any,
    shift: Any,
    left: Any,
    top: Any,
    total: Any,
    out: Any,
    BN: tw.constexpr,
    CAUSAL: tw.constexpr,
    CAP: tw.constexpr,
    after: Any = None,
) -> Any:
    """Add keys and values to what queries have seen: arguments as of `attend`, and the running results.

    These are the largest score ``top`` (BM,) (times 1 / scale, unless there is a bias or CAP), the sum of weights
    ``total`` (BM,) and the weighted values ``out`` (BM, DV), both relative to it. ``after``: what loads wait for.
    """
    BM = queries.shape[0]
    rows = row + shift + tw.arange(0, BM)
    begin, end = 0, tw.cdiv(length, BN)
    if CAUSAL:
        end = tw.minimum(end, tw.cdiv(tw.maximum(row + BM + shift, 0), BN))
    if left is not None:
        begin = tw.maximum(row + shift - left, 0) // BN
    for j in tw.range(begin, end):
        s = tw.dot(queries, tw.load(keys, (j, 0), (BN, queries.shape[1]), after=after).T)
        # plain scores are scaled inside of the exponential, where it costs nothing
        factor = scale
        if CAP is not None:
            s = (CAP * LOG2E) * tw.tanh(s * (scale / (CAP * LOG2E)))
        if bias is not None:
            if CAP is None:
                s = s * scale
            s = biased(s, tw.load(bias, (row // BM, j), (BM, BN)))
        if CAP is not None or bias is not None:
            factor = 1.0
        columns = j * BN + tw.arange(0, BN)
        s = tw.where((columns < length)[None, :], s, float("-inf"))
        if CAUSAL:
            s = tw.where(columns[None, :] <= rows[:, None], s, float("-inf"))
        if left is not None:
            s = tw.where(columns[None, :] >= (rows - left)[:, None], s, float("-inf"))
        new_top = tw.maximum(top, tw.max(s, axis=1))
        p = tw.exp2(s * factor - (new_top * factor)[:, None])
        shrink = tw.exp2((top - new_top) * factor)
        total = total * shrink + tw.sum(p, axis=1)
        out = tw.dot(
            p.to(values.dtype), tw.load(values, (j, 0), (BN, out.shape[1]), after=after), out * shrink[:, None]
        )
        top = new_top
    return top, total, out


@tw.function
def attend(
    queries: Any,
    keys: Any,
    values: Any,
    bias: Any,
    scale: Any,
    row: Any,
    length: Any,
    shift: Any,
    left: Any,
    DV: tw.constexpr,
    BN: tw.constexpr,
    CAUSAL: tw.constexpr,
    CAP: tw.constexpr,
) -> Any:
    """Of a tile of queries (BM, D) that starts at ``row``: weighted values, their weights' sum and logarithm of it.

    keys (N, D), values (N, DV) and bias (M, N) or None are views; keys from ``length`` on do not exist. Query i stands
    at key i + ``shift``; with CAUSAL it sees no later key, with ``left`` none more than ``left`` before. ``scale``
    includes log2(e), and the logarithm is to base 2.
    """
    top = tw.full((queries.shape[0],), -1e30, tw.float32)
    total = tw.zeros((queries.shape[0],), tw.float32)
    out = tw.zeros((queries.shape[0], DV), tw.float32)
    top, total, out = weigh(
        queries, keys, values, bias, scale, row, length, shift, left, top, total, out, BN, CAUSAL, CAP
    )
    if CAP is None and bias is None:
        top = top * scale
    return out, total, top + tw.log2(total)


@tw.kernel
def attention(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    o: tw.Tensor,
    scale: tw.float32,
    lse: tw.Tensor = None,
    bias: tw.Tensor = None,
    lengths: tw.Tensor = None,
    left: tw.int32 = None,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = None,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
    CAP: tw.constexpr = None,
) -> None:
    """q (B, H, M, D), k (B, G, N, D), v (B, G, N, DV), o (B, H, M, DV), H a multiple of G. Grid: (cdiv(M, BM), H, B).

    ``scale``, above 0, includes log2(e): weights are powers of two. The last query is aligned with the last key:
    CAUSAL hides the keys after a query's own place, ``left`` those more than ``left`` before it. Optional: ``lse``
    (B, H, M) float32 gets the logarithm of the sum of the exponentials, ``bias`` (B, H, M, N) is added to the scaled
    scores, or hides those where it is False (any stride may be 0), ``lengths`` (B,) int32 says how many keys of a batch
    exist, CAP bounds scores: cap * tanh(s / cap).
    A query that sees no key gets 0, its ``lse`` -inf. DV is D unless given.
    """
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    g = h // (q.shape[1] // k.shape[1])
    width = D if DV is None else DV
    length = k.shape[2]
    if lengths is not None:
        length = tw.minimum(length, tw.load(lengths, b))
    pairs = None
    if bias is not None:
        pairs = bias[b, h]
    queries = tw.load(q[b, h], (m, 0), (BM, D))
    out, total, logarithm = attend(
        queries, k[b, g], v[b, g], pairs, scale, m * BM, length, k.shape[2] - q.shape[2], left, width, BN, CAUSAL, CAP
    )
    tw.store(o[b, h], (m, 0), (out * (1.0 / tw.maximum(total, 1e-30))[:, None]).to(o.dtype))
    if lse is not None:
        tw.store(lse[b, h], m, logarithm * LN2)


def configuration(rows: int, depth: int) -> dict[str, int]:
    """Tile sizes and warps for ``rows`` queries of head dimension ``depth``, measured on an H100 (docs/performance.md).

    With a short head dimension exponentials take as long as products; four warpgroups, whose accumulators then fit,
    keep both units busy. They have no registers for more work on the scores: ``rows`` is 0 where there is some.
    """
    if depth <= 64 and rows > 128:
        return {"BM": 256, "BN": 64, "num_warps": 16}
    return {"BM": 128, "BN": 128 if depth <= 128 else 64}


@tw.kernel
def attention_varlen(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    o: tw.Tensor,
    q_starts: tw.Tensor,
    k_starts: tw.Tensor,
    scale: tw.float32,
    lse: tw.Tensor = None,
    left: tw.int32 = None,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = None,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
    CAP: tw.constexpr = None,
) -> None:
    """`attention` of sequences that lie one after the other. Grid: (cdiv(longest sequence of queries, BM), H, B).

    q (T, H, D), k (S, G, D), v (S, G, DV), o (T, H, DV), lse (H, T). Sequence b has the queries from ``q_starts[b]`` to
    ``q_starts[b + 1]`` and the keys from ``k_starts[b]``; both (B + 1,) int32. Finite values are assumed in the rows of
    v that follow a sequence.
    """
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    g = h // (q.shape[1] // k.shape[1])
    width = D if DV is None else DV
    first, end = tw.load(q_starts, b), tw.load(q_starts, b + 1)
    start = tw.load(k_starts, b)
    length = tw.load(k_starts, b + 1) - start
    if m * BM < end - first:
        queries = tw.load(q.permute(1, 0, 2)[h].offset(first, 0), (m, 0), (BM, D))
        keys, values = (k.permute(1, 0, 2)[g].offset(start, 0), v.permute(1, 0, 2)[g].offset(start, 0))
        out, total, logarithm = attend(
            queries, keys, values, None, scale, m * BM, length, length - (end - first), left, width, BN, CAUSAL, CAP
        )
        places = first + m * BM + tw.arange(0, BM)
        places = tw.where(places < end, places, -1)
        result = (out * (1.0 / tw.maximum(total, 1e-30))[:, None]).to(o.dtype)
        tw.scatter(o.permute(1, 0, 2)[h], places, result, 0)
        if lse is not None:
            tw.scatter(lse[h], places, logarithm * LN2, 0)


def sdpa(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    causal: bool = False,
    *,
    scale: float | None = None,
    lse: Any = None,
    bias: Any = None,
    lengths: Any = None,
    left: int | None = None,
    cap: float | None = None,
) -> None:
    """``o = scaled_dot_product_attention(q, k, v)``; arrays of NumPy or torch, see `attention`.

    ``scale``, above 0, is 1 / sqrt(D) by default.
    """
    batch, heads, rows, depth = q.shape
    factor = (depth**-0.5 if scale is None else scale) * LOG2E
    plain = bias is None and cap is None and left is None
    meta = configuration(rows if plain else 0, max(depth, v.shape[3]))
    attention[tw.cdiv(rows, meta["BM"]), heads, batch](
        q, k, v, o, factor, lse, bias, lengths, left, D=depth, DV=v.shape[3], CAUSAL=causal, CAP=cap, **meta
    )


def reference(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    causal: bool = False,
    *,
    scale: float | None = None,
    bias: np.ndarray[Any, Any] | None = None,
    lengths: np.ndarray[Any, Any] | None = None,
    left: int | None = None,
    cap: float | None = None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """o and lse in float64; queries that see no key get 0 and -inf."""
    scores = visible_scores(q, k, causal, scale, bias, lengths, left, cap)
    values = np.repeat(v.astype(np.float64), q.shape[1] // k.shape[1], axis=1)
    top = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    out: np.ndarray[Any, Any] = weights @ values / np.where(total == 0, 1, total)
    return out, lse


def visible_scores(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    causal: bool,
    scale: float | None,
    bias: np.ndarray[Any, Any] | None,
    lengths: np.ndarray[Any, Any] | None,
    left: int | None,
    cap: float | None,
) -> np.ndarray[Any, Any]:
    """Scores (B, H, M, N) in float64, -inf where a query does not see a key."""
    keys = np.repeat(k.astype(np.float64), q.shape[1] // k.shape[1], axis=1)
    scores = np.einsum("bhmd,bhnd->bhmn", q.astype(np.float64), keys)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    if bias is not None:
        scores = np.where(bias, scores, -np.inf) if bias.dtype == bool else scores + bias.astype(np.float64)
    m, n = scores.shape[-2:]
    rows, columns = np.arange(m)[:, None] + n - m, np.arange(n)
    seen = np.ones((m, n), bool)
    if causal:
        seen &= columns <= rows
    if left is not None:
        seen &= columns >= rows - left
    seen_keys = columns < (np.full(len(q), n) if lengths is None else lengths)[:, None]
    visible: np.ndarray[Any, Any] = np.where(seen & seen_keys[:, None, None, :], scores, -np.inf)
    return visible
