"""Attention backward: gradients of q, k and v, without storing the weights.

With P = exp(S - lse), dP = do v^T and delta the row sums of do * o: dv = P^T do, dS = P * (dP - delta), dq = dS k and
dk = dS^T q, times the scale (FlashAttention, algorithm 4). A program walks over the queries for a tile of keys; what
programs contribute to dq is added up by atomic updates.

Sums of integers have one value in any order. So the contributions are rounded to multiples of a step, one for each
query, that is 2^-29 of a bound of what can come together: |dq| <= 2 |do| max|v| max|k|, since the weights add up to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention import LOG2E, visible_scores
from tilewright.kernels.workspace import temporary

#: queries, and keys, that the kernels around the walk take at a time
TILE = 64
#: what a walk needs of each query: the logarithm to base 2, delta, steps in 1, 1 in steps
ROWS = 4


@tw.kernel
def attention_largest(k: tw.Tensor, v: tw.Tensor, largest: tw.Tensor, *, D: tw.constexpr, DV: tw.constexpr) -> None:
    """Of each tile of keys the largest element of k and the largest square of a row of v.

    k (B, G, N, D), v (B, G, N, DV), largest (2, B, G, cdiv(N, TILE)) float32. Grid: (cdiv(N, TILE), G, B).
    """
    n, g, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    keys = tw.load(k[b, g], (n, 0), (TILE, D)).to(tw.float32)
    values = tw.load(v[b, g], (n, 0), (TILE, DV)).to(tw.float32)
    tw.store(largest[0, b, g], n, tw.max(tw.max(tw.abs(keys), axis=1)[None, :], axis=1))
    tw.store(largest[1, b, g], n, tw.max(tw.sum(values * values, axis=1)[None, :], axis=1))


@tw.kernel
def attention_bound(largest: tw.Tensor, bound: tw.Tensor) -> None:
    """max|v| max|k| of a group of heads. largest as in `attention_largest`, bound (B, G) float32. Grid: (G, B)."""
    g, b = tw.program_id(0), tw.program_id(1)
    key, value = tw.zeros((1, 128), tw.float32), tw.zeros((1, 128), tw.float32)
    for j in tw.range(tw.cdiv(largest.shape[3], 128)):
        key = tw.maximum(key, tw.load(largest[0, b, g], j, (128,))[None, :])
        value = tw.maximum(value, tw.load(largest[1, b, g], j, (128,))[None, :])
    tw.store(bound[b], g, tw.max(key, axis=1) * tw.sqrt(tw.max(value, axis=1)))


@tw.kernel
def attention_rows(
    o: tw.Tensor,
    do: tw.Tensor,
    lse: tw.Tensor,
    rows: tw.Tensor,
    sums: tw.Tensor,
    bound: tw.Tensor = None,
    *,
    D: tw.constexpr,
    DV: tw.constexpr,
) -> None:
    """What a walk needs of each query, and zeros to add to.

    o, do (B, H, M, DV), lse (B, H, M), rows (ROWS, B, H, M rounded up to TILE) float32, sums (B, H, M, D); with
    ``bound`` of `attention_bound` sums are int32, else float32. Grid: (cdiv(M, TILE), H, B).
    """
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    gradients = tw.load(do[b, h], (m, 0), (TILE, DV)).to(tw.float32)
    delta = tw.sum(tw.load(o[b, h], (m, 0), (TILE, DV)).to(tw.float32) * gradients, axis=1)
    logarithm = tw.load(lse[b, h], m, (TILE,), pad=float("inf"))
    # a query that sees no key, as one beyond the last, has weights of 0
    tw.store(rows[0, b, h], m, tw.where(logarithm == float("-inf"), float("inf"), logarithm * LOG2E))
    tw.store(rows[1, b, h], m, delta)
    tw.store(sums[b, h], (m, 0), tw.zeros((TILE, D), sums.dtype))
    if bound is not None:
        most = tw.sqrt(tw.sum(gradients * gradients, axis=1)) * tw.load(bound[b], h // (lse.shape[1] // bound.shape[1]))
        # integers have no NaN: what is not finite in the other sums of a query makes its step NaN
        spoiled = (delta + tw.where(logarithm == float("-inf"), 0.0, logarithm)) * 0.0
        tw.store(rows[2, b, h], m, 2.0**29 / most)
        tw.store(rows[3, b, h], m, most * 2.0**-29 + spoiled)


@tw.kernel
def attention_gradients(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    do: tw.Tensor,
    rows: tw.Tensor,
    sums: tw.Tensor,
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
    EXACT: tw.constexpr = True,
) -> None:
    """Gradients of a tile of keys and values, and what it adds to ``sums``, the gradients of q without the scale.

    Shapes as in `attention` and `attention_rows`, but dk and dv (B, P, N, ...) with P a multiple of G: each for
    H / P heads. EXACT: sums are int32, in steps. ``scale`` without log2(e). Grid: (cdiv(N, BN), P, B).
    """
    n, part, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    g = part // (dk.shape[1] // k.shape[1])
    shared = q.shape[1] // dk.shape[1]
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
    for h in tw.range(part * shared, (part + 1) * shared):
        for m in tw.range(begin, end):
            logarithm = tw.load(rows[0, b, h], m, (BM,))
            delta = tw.load(rows[1, b, h], m, (BM,))
            steps = tw.load(rows[2, b, h], m, (BM,))
            queries = tw.load(q[b, h], (m, 0), (BM, D))
            gradients = tw.load(do[b, h], (m, 0), (BM, DV))
            s = tw.dot(keys, queries.T)
            dp = tw.dot(values, gradients.T)
            p = tw.exp2(s * (scale * LOG2E) - logarithm[None, :])
            places = m * BM + shift + tw.arange(0, BM)
            if CAUSAL:
                p = tw.where(columns[:, None] <= places[None, :], p, 0.0)
            if left is not None:
                p = tw.where(columns[:, None] >= (places - left)[None, :], p, 0.0)
            dvalues = tw.dot(p.to(do.dtype), gradients, dvalues)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dqueries = tw.dot(keys.T, ds)
            dkeys = tw.dot(ds, queries, dkeys)
            if EXACT:
                dqueries = (dqueries * steps[None, :]).to(tw.int32)
            tw.atomic_add(sums[b, h], (m, 0), dqueries.T)
    tw.store(dk[b, part], (n, 0), (dkeys * scale).to(dk.dtype))
    tw.store(dv[b, part], (n, 0), dvalues.to(dv.dtype))


@tw.kernel
def attention_dq(sums: tw.Tensor, rows: tw.Tensor, dq: tw.Tensor, scale: tw.float32, *, D: tw.constexpr) -> None:
    """``dq = sums * scale``, times the step where sums are integers. dq (B, H, M, D). Grid: (cdiv(M, TILE), H, B)."""
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    total = tw.load(sums[b, h], (m, 0), (TILE, D)).to(tw.float32) * scale
    if sums.dtype == tw.int32:
        total = total * tw.load(rows[3, b, h], m, (TILE,))[:, None]
    tw.store(dq[b, h], (m, 0), total.to(dq.dtype))


@tw.kernel
def attention_sum_heads(parts: tw.Tensor, total: tw.Tensor, *, D: tw.constexpr) -> None:
    """``total[b, g]`` = the sum of the parts of group g. parts (B, P, N, D), total (B, G, N, D).

    Grid: (cdiv(N, TILE), G, B).
    """
    n, g, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    count = parts.shape[1] // total.shape[1]
    added = tw.zeros((TILE, D), tw.float32)
    for part in tw.range(g * count, (g + 1) * count):
        added += tw.load(parts[b, part], (n, 0), (TILE, D)).to(tw.float32)
    tw.store(total[b, g], (n, 0), added.to(total.dtype))


def configuration(depth: int, width: int, aligned: bool = True) -> dict[str, int]:
    """Compile-time values of `attention_gradients` for head dimensions of q and k, and of v.

    Tiles are wider than rows of other lengths than 64, 128 and 256: what they read beyond is 0. Not ``aligned``: where
    the rows of some array do not start at multiples of 16 bytes threads copy them, and need registers.
    """
    sizes = {"D": 64 << (depth > 64) << (depth > 128), "DV": 64 << (width > 64) << (width > 128)}
    if max(depth, width) > 128:
        return {**sizes, "BM": 32, "BN": 64}
    return {**sizes, "BM": 64, "BN": 128 if aligned or max(depth, width) <= 64 else 64}


def _aligned(array: Any) -> bool:
    """Whether the rows of an array of NumPy or torch start at multiples of 16 bytes."""
    if isinstance(array, np.ndarray):
        return not any(place % 16 for place in (array.ctypes.data, *array.strides[:-1]))
    size = array.element_size()
    return not any(place % 16 for place in (array.data_ptr(), *(size * step for step in array.stride()[:-1])))


def sdpa_backward(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    do: Any,
    lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    causal: bool = False,
    *,
    scale: float | None = None,
    left: int | None = None,
    deterministic: bool = True,
) -> None:
    """Gradients of `tilewright.kernels.attention.sdpa`, which gave ``o`` and ``lse``. Arrays of NumPy or torch.

    Bitwise equal from run to run, unless ``deterministic`` is False: then dq is added up in float32, in any order.
    With CAUSAL grouped heads get gradients of keys and values for each query head first, in the dtype of q: programs
    of a head run side by side and share what they read, which programs that walk several heads lose.
    """
    batch, heads, length, depth = q.shape
    width, groups, keys = v.shape[3], k.shape[1], k.shape[2]
    factor = depth**-0.5 if scale is None else scale
    tiles, meta = tw.cdiv(length, TILE), configuration(depth, width, all(map(_aligned, (q, k, v, do))))
    sizes = {"D": meta["D"], "DV": meta["DV"]}
    rows = temporary(q, (ROWS, batch, heads, tiles * TILE))
    sums = temporary(q, q.shape, "int32" if deterministic else "float32")
    bound = None
    if deterministic:
        largest = temporary(q, (2, batch, groups, tw.cdiv(keys, TILE)))
        bound = temporary(q, (batch, groups))
        attention_largest[tw.cdiv(keys, TILE), groups, batch](k, v, largest, **sizes)
        attention_bound[groups, batch](largest, bound)
    attention_rows[tiles, heads, batch](o, do, lse, rows, sums, bound, **sizes)
    parts = [dk, dv]
    if causal and groups != heads:
        parts = [temporary(q, (batch, heads, keys, x.shape[3]), q.dtype) for x in (k, v)]
    attention_gradients[tw.cdiv(keys, meta["BN"]), parts[0].shape[1], batch](
        q, k, v, do, rows, sums, *parts, factor, left, CAUSAL=causal, EXACT=deterministic, **meta
    )
    attention_dq[tiles, heads, batch](sums, rows, dq, factor, D=meta["D"])
    for part, total, wide in zip(parts, (dk, dv), (meta["D"], meta["DV"]), strict=True):
        if part is not total:
            attention_sum_heads[tw.cdiv(keys, TILE), groups, batch](part, total, D=wide)


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
