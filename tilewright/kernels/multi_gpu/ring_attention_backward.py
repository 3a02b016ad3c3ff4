"""Attention backward over keys and values that are divided among ranks by sequence, as in `ring_attention`.

Gradients of queries need all keys and values, which forward has left on every rank. Gradients of keys and values are
sums over ranks: each rank computes what its queries give to a peer's keys and sends it to the owner, peers first; the
owner computes its own part last and adds what has arrived, in the order of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention import LOG2E
from tilewright.kernels.attention_backward import reference as whole_reference
from tilewright.kernels.multi_gpu.ring_attention import divided, joined, own_chunk
from tilewright.kernels.multi_gpu.workspace import flags, own, symmetric


@tw.kernel
def ring_attention_delta(
    o: tw.Tensor, do: tw.Tensor, delta: tw.Tensor, *, DV: tw.constexpr, BM: tw.constexpr = 64
) -> None:
    """``delta = sum(o * do)`` of each row: o, do (C, B, H, S, DV), delta float32. Grid: (cdiv(S, BM), H, C * B)."""
    m, h, which, b = tw.program_id(0), tw.program_id(1), tw.program_id(2) // o.shape[1], tw.program_id(2) % o.shape[1]
    out, gradients = tw.load(o[which, b, h], (m, 0), (BM, DV)), tw.load(do[which, b, h], (m, 0), (BM, DV))
    tw.store(delta[which, b, h], m, tw.sum(out.to(tw.float32) * gradients.to(tw.float32), axis=1))


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
    end = tw.cdiv(k.shape[0], BN)
    if CAUSAL:
        end = tw.minimum(end, tw.cdiv(tw.maximum(row + BM + shift, 0), BN))
    for j in tw.range(end):
        keys = tw.load(k, (j, 0), (BN, queries.shape[1]))
        columns = j * BN + tw.arange(0, BN)
        s = tw.dot(queries, keys.T)
        p = tw.exp2(s * (scale * LOG2E) - (logarithm * LOG2E)[:, None])
        p = tw.where((columns < k.shape[0])[None, :], p, 0.0)
        p = tw.where((logarithm == float("-inf"))[:, None], 0.0, p)
        if CAUSAL:
            p = tw.where(columns[None, :] <= rows[:, None], p, 0.0)
        dp = tw.dot(gradients, tw.load(v, (j, 0), (BN, gradients.shape[1])).T)
        ds = p * (dp - row_delta[:, None])
        dqueries = tw.dot(ds.to(k.dtype), keys, dqueries)
    return dqueries


@tw.function
def add_parts(total: Any, parts: Any, sent: Any, which: Any, place: Any, bg: Any, n: Any) -> Any:
    """Add what peers have sent for a tile of keys or values, in the order of ranks."""
    for source in tw.range(tw.world_size()):
        if source != tw.rank():
            here = tw.wait(sent[source, place, bg])
            part = parts[source, which, bg // parts.shape[3], bg % parts.shape[3]]
            total = total + tw.load(part, (n, 0), total.shape, after=here).to(tw.float32)
    return total


@tw.kernel
def ring_attention_dkdv(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    do: tw.Tensor,
    lse: tw.Tensor,
    delta: tw.Tensor,
    dk: tw.Tensor,
    dv: tw.Tensor,
    dk_parts: tw.Symmetric,
    dv_parts: tw.Symmetric,
    sent: tw.Symmetric,
    scale: tw.float32,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
) -> None:
    """Gradients of the own chunks of keys and values: dk (C, B, G, S, D), dv (C, B, G, S, DV).

    q, do, lse as in `ring_attention`, delta like lse; k (C * world, B, G, S, D) and v (C * world, B, G, S, DV) whole.
    ``dk_parts``, ``dv_parts`` (world, C, B, G, S, D or DV) get what peers send, in their dtype, ``sent`` flags
    (world, C * cdiv(S, BN), B * G). ``scale`` without log2(e). Grid: (C * cdiv(S, BN), B * G, world).
    """
    CHUNKS = 2 if CAUSAL else 1
    me, world, length = tw.rank(), tw.world_size(), k.shape[3]
    groups, tiles = k.shape[2], tw.cdiv(length, BN)
    place, bg, owner = tw.program_id(0), tw.program_id(1), (me + 1 + tw.program_id(2)) % world
    which, n, b, g = place // tiles, place % tiles, bg // groups, bg % groups
    c = tw.where(which == 0, owner, CHUNKS * world - 1 - owner)
    keys, values = tw.load(k[c, b, g], (n, 0), (BN, D)), tw.load(v[c, b, g], (n, 0), (BN, DV))
    dkeys, dvalues = tw.zeros((BN, D), tw.float32), tw.zeros((BN, DV), tw.float32)
    shared = q.shape[2] // groups
    seen = not CAUSAL or c < 2 * world - me
    for i in tw.range(CHUNKS if seen else 0):
        shift = (own_chunk(i, CHUNKS) - c) * length
        dkeys, dvalues = key_gradients(
            keys, values, q[i, b], do[i, b], lse[i, b], delta[i, b], g * shared, shared, n * BN, shift, scale,
            dkeys, dvalues, BM, CAUSAL,
        )  # fmt: skip
    if owner != me:
        first = tw.put(dk_parts.peer(owner)[me, which, b, g], (n, 0), dkeys.to(dk_parts.dtype))
        second = tw.put(dv_parts.peer(owner)[me, which, b, g], (n, 0), dvalues.to(dv_parts.dtype))
        tw.signal(sent[me, place, bg], owner, after=(first, second))
    else:
        # one after the other: registers do not hold more
        dkeys = add_parts(dkeys, dk_parts, sent, which, place, bg, n)
        tw.store(dk[which, b, g], (n, 0), (dkeys * scale).to(dk.dtype))
        dvalues = add_parts(dvalues, dv_parts, sent, which, place, bg, n)
        tw.store(dv[which, b, g], (n, 0), dvalues.to(dv.dtype))


@tw.kernel
def ring_attention_dq(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    do: tw.Tensor,
    lse: tw.Tensor,
    delta: tw.Tensor,
    dq: tw.Tensor,
    scale: tw.float32,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 64,
    CAUSAL: tw.constexpr = False,
) -> None:
    """Gradients of the own chunks of queries, dq (C, B, H, S, D). Grid: (cdiv(S, BM), H, C * B). Sends nothing."""
    CHUNKS = 2 if CAUSAL else 1
    m, h, which, b = tw.program_id(0), tw.program_id(1), tw.program_id(2) // q.shape[1], tw.program_id(2) % q.shape[1]
    g, length, place = h // (q.shape[2] // k.shape[2]), k.shape[3], own_chunk(which, CHUNKS)
    queries = tw.load(q[which, b, h], (m, 0), (BM, D))
    gradients = tw.load(do[which, b, h], (m, 0), (BM, DV))
    logarithm = tw.load(lse[which, b, h], m, (BM,), pad=float("inf"))
    row_delta = tw.load(delta[which, b, h], m, (BM,))
    dqueries = tw.zeros((BM, D), tw.float32)
    for c in tw.range(place + 1 if CAUSAL else tw.world_size()):
        dqueries = query_gradients(
            queries, gradients, logarithm, row_delta, k[c, b, g], v[c, b, g], m * BM, (place - c) * length,
            scale, dqueries, BN, CAUSAL,
        )  # fmt: skip
    tw.store(dq[which, b, h], (m, 0), (dqueries * scale).to(dq.dtype))


def ring_sdpa_backward(
    world: Any,
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
    **meta: int,
) -> None:
    """Gradients of `tilewright.kernels.multi_gpu.ring_attention.ring_sdpa`, which gave ``o``, ``lse`` and whole k, v.

    Arrays of each rank as there; dq, dk, dv are those of its own chunks, ``delta`` a float32 workspace like ``lse``.
    """
    chunks, batch, heads, length, depth = own(q).shape
    groups, width = k.shape[2], v.shape[4]
    factor = depth**-0.5 if scale is None else scale
    sizes = {"D": depth, "DV": width, "CAUSAL": causal}
    rows = meta.get("BM", 64)
    grid = tw.cdiv(length, rows), heads, chunks * batch
    world.launch(ring_attention_delta, grid, o, do, delta, DV=width, BM=rows)
    inputs = q, k, v, do, lse, delta
    tiles = chunks * tw.cdiv(length, meta.get("BN", 128))
    parts = [
        symmetric(world, f"ring_attention_{name}", (world.size, chunks, batch, groups, length, size), own(dk).dtype)
        for name, size in (("dk", depth), ("dv", width))
    ]
    sent = flags(world, "ring_attention_backward", (world.size, tiles, batch * groups))
    grid = tiles, batch * groups, world.size
    world.launch(ring_attention_dkdv, grid, *inputs, dk, dv, *parts, sent, factor, **sizes, **meta)
    rows = meta.get("BN", 128)
    meta = {"BM": meta["BN"], "BN": meta["BM"]} if meta else {}
    world.launch(
        ring_attention_dq, (tw.cdiv(length, rows), heads, chunks * batch), *inputs, dq, factor, **sizes, **meta
    )


def reference(
    q: list[np.ndarray[Any, Any]],
    k: list[np.ndarray[Any, Any]],
    v: list[np.ndarray[Any, Any]],
    do: list[np.ndarray[Any, Any]],
    causal: bool = False,
) -> tuple[list[np.ndarray[Any, Any]], ...]:
    """dq, dk, dv of each rank's chunks in float64, from each rank's chunks."""
    gradients = whole_reference(joined(q), joined(k), joined(v), joined(do), causal)
    return tuple(divided(x, len(q), causal) for x in gradients)
