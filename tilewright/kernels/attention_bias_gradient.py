"""Gradient of the bias that attention adds to its scores: dS, summed over what shares an element of the bias.

dS = P * (dP - delta), as of `tilewright.kernels.attention_backward`, which has what each query needs. A bias may be the
same for all batches, heads or queries. A program makes one tile of its gradient and goes through all that share it:
sums are in float32 and in one order, and no dS is stored.
"""

from __future__ import annotations

from typing import Any

import tilewright as tw
from tilewright.kernels.attention import LOG2E, biased

#: queries, and keys, that the kernels around the walk take at a time
TILE = 64


@tw.kernel
def attention_bias_gradient(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    do: tw.Tensor,
    rows: tw.Tensor,
    bias: tw.Tensor,
    dbias: tw.Tensor,
    scale: tw.float32,
    left: tw.int32 = None,
    lengths: tw.Tensor = None,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 64,
    CAUSAL: tw.constexpr = False,
    CAP: tw.constexpr = None,
) -> None:
    """``dbias`` (B, H, M, N), of which B, H and M may be 1: the sum over those of the bias (B, H, M, N).

    Other arguments as of `tilewright.kernels.attention_backward.attention_gradients`.
    Grid: (cdiv(N, BN), cdiv(M, BM), B * H), in sizes of dbias.
    """
    n, block, entry = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    first, last = entry // dbias.shape[1], entry % dbias.shape[1]
    batches, heads = q.shape[0] // dbias.shape[0], q.shape[1] // dbias.shape[1]
    blocks = tw.cdiv(q.shape[2], BM) // tw.cdiv(dbias.shape[2], BM)
    shared, shift = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    columns = n * BN + tw.arange(0, BN)
    total = tw.zeros((BM, BN), tw.float32)
    for b in tw.range(first * batches, (first + 1) * batches):
        for h in tw.range(last * heads, (last + 1) * heads):
            for m in tw.range(block * blocks, (block + 1) * blocks):
                g = h // shared
                logarithm = tw.load(rows[0, b, h], m, (BM,), pad=float("inf"))
                delta = tw.load(rows[1, b, h], m, (BM,))
                s = tw.dot(tw.load(q[b, h], (m, 0), (BM, D)), tw.load(k[b, g], (n, 0), (BN, D)).T)
                dp = tw.dot(tw.load(do[b, h], (m, 0), (BM, DV)), tw.load(v[b, g], (n, 0), (BN, DV)).T)
                s = s * (scale * LOG2E)
                if CAP is not None:
                    s = (CAP * LOG2E) * tw.tanh(s * (1.0 / (CAP * LOG2E)))
                p = tw.exp2(biased(s, tw.load(bias[b, h], (m, n), (BM, BN))) - logarithm[:, None])
                places = m * BM + shift + tw.arange(0, BM)
                if lengths is not None:
                    p = tw.where((columns < tw.load(lengths, b))[None, :], p, 0.0)
                if CAUSAL:
                    p = tw.where(columns[None, :] <= places[:, None], p, 0.0)
                if left is not None:
                    p = tw.where(columns[None, :] >= (places - left)[:, None], p, 0.0)
                total += p * (dp - delta[:, None])
    result = dbias[first, last]
    if dbias.shape[2] == q.shape[2]:
        tw.store(result, (block, n), total.to(dbias.dtype))
    else:
        tw.store(result[0], n, tw.sum(total, axis=0).to(dbias.dtype))


def bias_gradient(
    q: Any,
    k: Any,
    v: Any,
    do: Any,
    rows: Any,
    dbias: Any,
    scale: float,
    options: dict[str, Any],
    meta: dict[str, Any],
) -> None:
    """Launch `attention_bias_gradient`: ``options`` and ``meta`` are those of `attention_gradients`."""
    batch, heads, length, keys = dbias.shape
    tile = {"BM": 128, "BN": 64} if max(meta["D"], meta["DV"]) <= 128 else {"BM": 64, "BN": 32}
    bias, left, lengths = (options.get(name) for name in ("bias", "left", "lengths"))
    grid = tw.cdiv(keys, tile["BN"]), tw.cdiv(length, tile["BM"]), batch * heads
    constants = {name: meta[name] for name in ("D", "DV", "CAUSAL", "CAP")}
    attention_bias_gradient[grid](q, k, v, do, rows, bias, dbias, scale, left, lengths, **constants, **tile)


__all__ = ["attention_bias_gradient", "bias_gradient"]
