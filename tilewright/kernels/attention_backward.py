"""Attention backward: gradients of q, k and v, without storing the weights.

With P = exp(S - lse), dP = do v^T and delta the row sums of do * o: dv = P^T do, dS = P * (dP - delta), dq = dS k and
dk = dS^T q, times the scale (FlashAttention, algorithm 4). A program walks over the queries for a tile of keys; what
programs contribute to dq is added up by atomic updates.

Sums of integers have one value in any order, so contributions are rounded to multiples of a step, one for each query:
`tilewright.kernels.attention_exact` has the two forms and shows why runs agree in every bit.

Packed sequences, behind one another along the rows of q, k, v and what belongs to them, are one entry of a batch here:
q (1, H, T, D), k (1, G, S, D). ``q_starts`` and ``k_starts`` (B + 1,) int32 say where they begin, and the last axis of
a grid counts them. Rows of workspaces begin at a multiple of TILE for each sequence, see `place`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention import LOG2E, biased, visible_scores
from tilewright.kernels.attention_bias_gradient import TILE, bias_gradient
from tilewright.kernels.attention_exact import (
    AGAIN,
    MOST_ADDED,
    SMALLEST,
    SPACING,
    any_bits,
    attention_bound,
    attention_dq_again,
    attention_guess,
    attention_largest,
    nearest_integer,
    note_beyond,
)
from tilewright.kernels.workspace import temporary

#: what a walk needs of each query: the logarithm to base 2, delta, steps in 1, 1 in steps
ROWS = 4


@tw.function
def place(q: Any, q_starts: Any, b: Any) -> Any:
    """Where queries of a batch's entry, or of a packed sequence, lie: entry of q, first row, rows, TILE of workspaces.

    Sequences that begin in the same TILE of q have different ones there, and none reaches into the next one's.
    """
    entry, first, count, tile = b, 0, q.shape[2], 0
    if q_starts is not None:
        first = tw.load(q_starts, b)
        entry, count, tile = 0, tw.load(q_starts, b + 1) - first, first // TILE + b
    return entry, first, count, tile


@tw.kernel
def attention_rows(
    o: tw.Tensor,
    do: tw.Tensor,
    lse: tw.Tensor,
    rows: tw.Tensor,
    sums: tw.Tensor,
    bound: tw.Tensor = None,
    q_starts: tw.Tensor = None,
    keys: tw.int32 = None,
    *,
    D: tw.constexpr,
    DV: tw.constexpr,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
) -> None:
    """What a walk needs of each query, and zeros to add to.

    o, do (B, H, M, DV), lse (B, H, M), rows (ROWS, B, H, M rounded up to TILE) float32, sums (B, H, M, D); with
    ``bound`` of `attention_bound` sums are int32, else float32. ``keys``, N, is given with a bound that is a guess: BM
    and BN are the tiles of the walk then, whose programs add to sums. Grid: (cdiv(M, TILE), H, B).
    Packed: as many TILEs of rows and sums as of `tiles`, and M of the grid is the longest sequence.
    """
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    entry, first, count, tile = place(o, q_starts, b)
    if m * TILE < count:
        gradients = tw.load(do[entry, h].offset(first, 0), (m, 0), (TILE, DV)).to(tw.float32)
        delta = tw.sum(tw.load(o[entry, h].offset(first, 0), (m, 0), (TILE, DV)).to(tw.float32) * gradients, axis=1)
        logarithm = tw.load(lse[entry, h].offset(first), m, (TILE,), pad=float("inf"))
        if q_starts is not None:
            exist = m * TILE + tw.arange(0, TILE) < count
            gradients, delta = tw.where(exist[:, None], gradients, 0.0), tw.where(exist, delta, 0.0)
            logarithm = tw.where(exist, logarithm, float("inf"))
        # a query that sees no key, as one beyond the last, has weights of 0
        hidden = tw.where(logarithm == float("-inf"), float("inf"), logarithm * LOG2E)
        tw.store(rows[0, entry, h], tile + m, hidden)
        tw.store(rows[1, entry, h], tile + m, delta)
        start = tw.zeros((TILE, D), sums.dtype)
        if keys is not None:
            programs = tw.full((TILE,), 0, tw.int32) + tw.cdiv(keys, BN)
            if CAUSAL:
                beyond = ((m * TILE + tw.arange(0, TILE)) // BM + 1) * BM + keys - count
                programs = tw.minimum(programs, tw.maximum(beyond + BN - 1, 0) // BN)
            start = start - (programs << 23)[:, None]
        tw.store(sums[entry, h], (tile + m, 0), start)
        if bound is not None:
            most = tw.load(bound[entry], h // (lse.shape[1] // bound.shape[1]))
            most = tw.sqrt(tw.sum(gradients * gradients, axis=1)) * most
            # integers have no NaN: what is not finite in the other sums of a query makes its step NaN
            spoiled = (delta + tw.where(logarithm == float("-inf"), 0.0, logarithm)) * 0.0
            if keys is None:
                tw.store(rows[2, entry, h], tile + m, 2.0**29 / most)
                tw.store(rows[3, entry, h], tile + m, most * 2.0**-29 + spoiled)
            else:
                steps = tw.bitcast(tw.minimum(2.0**25 / most, 2.0**96), tw.int32) & 0x7F800000
                steps = tw.maximum(tw.bitcast(steps, tw.float32), 1.0)  # powers of two: products with them are exact
                tw.store(rows[2, entry, h], tile + m, steps * SPACING)
                tw.store(rows[3, entry, h], tile + m, 1.0 / steps + spoiled)


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
    bias: tw.Tensor = None,
    lengths: tw.Tensor = None,
    q_starts: tw.Tensor = None,
    k_starts: tw.Tensor = None,
    flags: tw.Tensor = None,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
    CAP: tw.constexpr = None,
    RAGGED: tw.constexpr = True,
    EXACT: tw.constexpr = True,
) -> None:
    """Gradients of a tile of keys and values, and what it adds to ``sums``, the gradients of q without the scale.

    Shapes as in `attention` and `attention_rows`, but dk and dv (B, P, N, ...) with P a multiple of G: each for
    H / P heads. EXACT: sums are int32, in steps, with ``flags`` of `attention_guess` checked ones. ``scale`` without
    log2(e). Without RAGGED the last tile of keys is full. Grid: (cdiv(N, BN), P, B); packed, N is the longest sequence.
    """
    n, part, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    g = part // (dk.shape[1] // k.shape[1])
    shared = q.shape[1] // dk.shape[1]
    entry, first, count, tile = place(q, q_starts, b)
    start, length = 0, k.shape[2]
    if k_starts is not None:
        start = tw.load(k_starts, b)
        length = tw.load(k_starts, b + 1) - start
    shift = length - count
    if lengths is not None:
        length = tw.minimum(length, tw.load(lengths, b))
    keys = tw.load(k[entry, g].offset(start, 0), (n, 0), (BN, D))
    values = tw.load(v[entry, g].offset(start, 0), (n, 0), (BN, DV))
    columns = n * BN + tw.arange(0, BN)
    begin, end = 0, tw.cdiv(count, BM)
    if lengths is not None or k_starts is not None:
        end = tw.where(n * BN < length, end, 0)
    if CAUSAL:
        begin = tw.maximum(n * BN - shift, 0) // BM
    if left is not None:
        end = tw.minimum(end, tw.cdiv(tw.maximum((n + 1) * BN + left - shift, 0), BM))
    dkeys = tw.zeros((BN, D), tw.float32)
    dvalues = tw.zeros((BN, DV), tw.float32)
    worst = tw.zeros((D // 16, 8, 4), tw.int32)
    for h in tw.range(part * shared, (part + 1) * shared):
        for m in tw.range(begin, end):
            row = tile * (TILE // BM) + m
            logarithm = tw.load(rows[0, entry, h], row, (BM,))
            delta = tw.load(rows[1, entry, h], row, (BM,))
            steps = tw.load(rows[2, entry, h], row, (BM,))
            queries = tw.load(q[entry, h].offset(first, 0), (m, 0), (BM, D))
            gradients = tw.load(do[entry, h].offset(first, 0), (m, 0), (BM, DV))
            s = tw.dot(keys, queries.T)
            dp = tw.dot(values, gradients.T)
            s = s * (scale * LOG2E)
            if CAP is not None:
                bent = tw.tanh(s * (1.0 / (CAP * LOG2E)))
                s = (CAP * LOG2E) * bent
            if bias is not None:
                s = biased(s, tw.load(bias[entry, h].T, (n, m), (BN, BM)))
            p = tw.exp2(s - logarithm[None, :])
            places = m * BM + shift + tw.arange(0, BM)
            if RAGGED or lengths is not None or k_starts is not None:
                p = tw.where((columns < length)[:, None], p, 0.0)
            if CAUSAL:
                p = tw.where(columns[:, None] <= places[None, :], p, 0.0)
            if left is not None:
                p = tw.where(columns[:, None] >= (places - left)[None, :], p, 0.0)
            slope = p
            if CAP is not None:
                slope = p * (1.0 - bent * bent)
            dvalues = tw.dot(p.to(do.dtype), gradients, dvalues)
            ds = (slope * (dp - delta[None, :])).to(q.dtype)
            dqueries = tw.dot(keys.T, ds)
            dkeys = tw.dot(ds, queries, dkeys)
            if flags is not None:
                dqueries = tw.bitcast(dqueries * steps[None, :] + SMALLEST, tw.int32)
                worst = worst | any_bits(dqueries)
            elif EXACT:
                dqueries = nearest_integer(dqueries * steps[None, :])
            tw.atomic_add(sums[entry, h], (row, 0), dqueries.T)
    if flags is not None:
        note_beyond(flags, worst, b, g, q.shape[0])
    if k_starts is None:
        tw.store(dk[b, part], (n, 0), (dkeys * scale).to(dk.dtype))
        tw.store(dv[b, part], (n, 0), dvalues.to(dv.dtype))
    else:
        own = tw.where(columns < length, start + columns, -1)
        tw.scatter(dk[entry, part], own, (dkeys * scale).to(dk.dtype), 0)
        tw.scatter(dv[entry, part], own, dvalues.to(dv.dtype), 0)


@tw.kernel
def attention_dq(
    sums: tw.Tensor,
    rows: tw.Tensor,
    dq: tw.Tensor,
    scale: tw.float32,
    q_starts: tw.Tensor = None,
    *,
    D: tw.constexpr,
) -> None:
    """``dq = sums * scale``, times the step where sums are integers. dq (B, H, M, D). Grid: (cdiv(M, TILE), H, B)."""
    m, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    entry, first, count, tile = place(dq, q_starts, b)
    if m * TILE < count:
        total = tw.load(sums[entry, h], (tile + m, 0), (TILE, D)).to(tw.float32) * scale
        if sums.dtype == tw.int32:
            total = total * tw.load(rows[3, entry, h], tile + m, (TILE,))[:, None]
        if q_starts is None:
            tw.store(dq[entry, h], (m, 0), total.to(dq.dtype))
        else:
            places = m * TILE + tw.arange(0, TILE)
            tw.scatter(dq[entry, h], tw.where(places < count, first + places, -1), total.to(dq.dtype), 0)


@tw.kernel
def attention_sum_heads(parts: tw.Tensor, total: tw.Tensor, k_starts: tw.Tensor = None, *, D: tw.constexpr) -> None:
    """``total[b, g]`` = the sum of the parts of group g. parts (B, P, N, D), total (B, G, N, D).

    Rows that belong to none of the packed sequences are left. Grid: (cdiv(N, TILE), G, B).
    """
    n, g, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    count = parts.shape[1] // total.shape[1]
    added = tw.zeros((TILE, D), tw.float32)
    for part in tw.range(g * count, (g + 1) * count):
        added += tw.load(parts[b, part], (n, 0), (TILE, D)).to(tw.float32)
    if k_starts is None:
        tw.store(total[b, g], (n, 0), added.to(total.dtype))
    else:
        rows = n * TILE + tw.arange(0, TILE)
        exist = (rows >= tw.load(k_starts, 0)) & (rows < tw.load(k_starts, k_starts.shape[0] - 1))
        tw.scatter(total[b, g], tw.where(exist, rows, -1), added.to(total.dtype), 0)


def configuration(
    depth: int, width: int, aligned: bool = True, causal: bool = False, plain: bool = True
) -> dict[str, int]:
    """Compile-time values and options of `attention_gradients` for head dimensions of q and k, and of v.

    Tiles are wider than rows of other lengths than 64, 128 and 256: what they read beyond is 0. Not ``aligned``: where
    the rows of some array do not start at multiples of 16 bytes threads copy them, and need registers. Rows of 64 leave
    room for two blocks of one warpgroup; what is not ``plain`` (biases, lengths, caps, packed sequences) was not
    measured with them. CAUSAL programs, of different lengths, are handed out by the hardware where that was measured.
    """
    sizes = {"D": 64 << (depth > 64) << (depth > 128), "DV": 64 << (width > 64) << (width > 128)}
    handed_out = {"persistent": False} if causal else {}
    if max(depth, width) > 128:
        return {**sizes, "BM": 32, "BN": 64}
    if max(depth, width) <= 64:
        paired = {"BN": 64, "num_warps": 4, **handed_out} if aligned and plain else {"BN": 128}
        return {**sizes, "BM": 64, **paired}
    return {**sizes, "BM": 64, "BN": 128 if aligned else 64, **handed_out}


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
    bias: Any = None,
    lengths: Any = None,
    left: int | None = None,
    cap: float | None = None,
    dbias: Any = None,
    deterministic: bool = True,
) -> None:
    """Gradients of `tilewright.kernels.attention.sdpa`, which gave ``o`` and ``lse``. Arrays of NumPy or torch.

    ``dbias``, if given, gets the gradient of the bias: see `tilewright.kernels.attention_bias_gradient`. Keys from a
    batch's length on get 0, and need finite values.
    Bitwise equal from run to run, unless ``deterministic`` is False: then dq is added up in float32, in any order.
    Grouped heads get gradients of keys and values for each query head first, in the dtype of q: programs of a head run
    side by side and share what they read, which programs that walk several heads lose.
    """
    batch, _, length, _ = q.shape
    _backward(
        (q, k, v, o, do, lse),
        (dq, dk, dv, dbias),
        (batch, tw.cdiv(length, TILE), length, k.shape[2]),
        scale,
        deterministic,
        {"left": left, "bias": bias, "lengths": lengths},
        {"CAUSAL": causal, "CAP": cap},
    )


def varlen_backward(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    do: Any,
    lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    q_starts: Any,
    k_starts: Any,
    longest_q: int,
    longest_k: int,
    causal: bool = False,
    *,
    scale: float | None = None,
    left: int | None = None,
    cap: float | None = None,
    deterministic: bool = True,
) -> None:
    """`sdpa_backward` of `attention_varlen`: q, o, do, dq (T, H, D), k, v, dk, dv (S, G, D), lse (H, T).

    ``longest_q`` and ``longest_k`` are at least the longest sequences. Rows that belong to no sequence are not written.
    """
    batch = q_starts.shape[0] - 1
    _backward(
        (*map(_as_entry, (q, k, v, o, do)), lse[None]),
        (*map(_as_entry, (dq, dk, dv)), None),
        (batch, tiles(q.shape[0], batch), longest_q, longest_k),
        scale,
        deterministic,
        {"left": left, "q_starts": q_starts, "k_starts": k_starts},
        {"CAUSAL": causal, "CAP": cap},
    )


def tiles(rows: int, batch: int) -> int:
    """How many TILEs of workspaces are enough for ``batch`` packed sequences of ``rows`` in all."""
    return rows // TILE + batch


def _as_entry(packed: Any) -> Any:
    """(T, H, D) as (1, H, T, D), a view."""
    return (packed.transpose(1, 0, 2) if isinstance(packed, np.ndarray) else packed.transpose(0, 1))[None]


def _backward(
    arrays: tuple[Any, ...],
    results: tuple[Any, ...],
    sizes: tuple[int, int, int, int],
    scale: float | None,
    deterministic: bool,
    options: dict[str, Any],
    meta: dict[str, Any],
) -> None:
    """All launches. ``sizes``: sequences, TILEs of workspaces for each entry of q, longest queries and keys."""
    (q, k, v, o, do, lse), (dq, dk, dv, dbias) = arrays, results
    entries, heads, _, depth = q.shape
    groups, keys, width = k.shape[1], k.shape[2], v.shape[3]
    batch, blocks, longest_q, longest_k = sizes
    factor = depth**-0.5 if scale is None else scale
    aligned = all(map(_aligned, (q, k, v, do)))
    plain = meta["CAP"] is None and not any(value is not None for name, value in options.items() if name != "left")
    meta = {**meta, **configuration(depth, width, aligned, meta["CAUSAL"], plain)}
    wide, grid = {"D": meta["D"], "DV": meta["DV"]}, (tw.cdiv(longest_q, TILE), heads, batch)
    rows = temporary(q, (ROWS, entries, heads, blocks * TILE))
    sums = temporary(q, (entries, heads, blocks * TILE, depth), "int32" if deterministic else "float32")
    parts = [dk, dv]
    if groups != heads:
        parts = [temporary(q, (entries, heads, keys, x.shape[3]), q.dtype) for x in (k, v)]
    walked: dict[str, Any] = {}
    starts, bound, flags = options.get("q_starts"), None, None
    if deterministic:
        bound = temporary(q, (entries, groups))
    if deterministic and plain and options["left"] is None and keys <= MOST_ADDED * meta["BN"]:
        flags = temporary(q, (entries + 1, groups), "int32")
        attention_guess[groups, entries](k, v, bound, flags, **wide)
        walked = {"keys": keys, "BM": meta["BM"], "BN": meta["BN"], "CAUSAL": meta["CAUSAL"]}
    elif deterministic:
        largest = temporary(q, (2, entries, groups, tw.cdiv(keys, TILE)))
        exist = options.get("lengths"), options.get("k_starts")
        attention_largest[tw.cdiv(keys, TILE), groups, entries](k, v, largest, *exist, **wide)
        attention_bound[groups, entries](largest, bound)
    attention_rows[grid](o, do, lse, rows, sums, bound, starts, **walked, **wide)
    attention_gradients[tw.cdiv(longest_k, meta["BN"]), parts[0].shape[1], batch](
        *(q, k, v, do, rows, sums, *parts, factor),
        **options,
        flags=flags,
        RAGGED=keys % meta["BN"] != 0,
        EXACT=deterministic,
        **meta,
    )
    attention_dq[grid](sums, rows, dq, factor, starts, D=meta["D"])
    if flags is not None:
        again = {**wide, "BN": 64 if max(wide.values()) <= 128 else 32, "CAUSAL": meta["CAUSAL"]}
        count = min(AGAIN, grid[0] * heads * entries)
        attention_dq_again[count,](q, k, v, do, rows, flags, dq, factor, **again)
    if dbias is not None:
        bias_gradient(q, k, v, do, rows, dbias, factor, options, meta)
    for part, total, size in zip(parts, (dk, dv), (meta["D"], meta["DV"]), strict=True):
        if part is not total:
            attention_sum_heads[tw.cdiv(keys, TILE), groups, entries](part, total, options.get("k_starts"), D=size)


def reference(*arguments: Any, **options: Any) -> tuple[np.ndarray[Any, Any], ...]:
    """dq, dk, dv in float64, arguments as of `every_gradient`."""
    return every_gradient(*arguments, **options)[:3]


def every_gradient(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    do: np.ndarray[Any, Any],
    causal: bool = False,
    *,
    scale: float | None = None,
    bias: np.ndarray[Any, Any] | None = None,
    lengths: np.ndarray[Any, Any] | None = None,
    left: int | None = None,
    cap: float | None = None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """In float64 dq, dk, dv and the gradient of a bias (B, H, M, N)."""
    shared, factor = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    scores = visible_scores(q, k, causal, factor, bias, lengths, left, cap)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    total = weights.sum(-1, keepdims=True)
    weights /= np.where(total == 0, 1, total)
    queries, gradients = q.astype(np.float64), do.astype(np.float64)
    keys, values = (np.repeat(x.astype(np.float64), shared, axis=1) for x in (k, v))
    out = weights @ values
    dp = gradients @ values.transpose(0, 1, 3, 2)
    dbias = weights * (dp - (gradients * out).sum(-1, keepdims=True))
    ds = dbias * factor
    if cap is not None:
        ds = ds * (1 - np.tanh(queries @ keys.transpose(0, 1, 3, 2) * factor / cap) ** 2)
    dq = ds @ keys
    by_group = (k.shape[0], k.shape[1], shared)
    dk = (ds.transpose(0, 1, 3, 2) @ queries).reshape(*by_group, *k.shape[2:]).sum(2)
    dv = (weights.transpose(0, 1, 3, 2) @ gradients).reshape(*by_group, *v.shape[2:]).sum(2)
    return dq, dk, dv, dbias
