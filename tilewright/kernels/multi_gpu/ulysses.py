"""Attention over a sequence divided among ranks, which exchange it for a division by heads (Ulysses).

Before: each rank has a part of the sequence and all heads. An all-to-all gives it the whole sequence of some heads; the
attention kernel puts each tile of its result back to the rank that has those places of the sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention import LN2, LOG2E, attend, configuration
from tilewright.kernels.attention import reference as whole_reference
from tilewright.kernels.multi_gpu.collectives import exchange
from tilewright.kernels.multi_gpu.workspace import flags, own, symmetric


@tw.kernel
def ulysses_attention(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    o: tw.Symmetric,
    lse: tw.Tensor,
    done: tw.Symmetric,
    scale: tw.float32,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
) -> None:
    """Attention of this rank's heads to the whole sequence; o (B, S, H, DV) gets all heads of the own places.

    q (B, world, S, H / world, D), k (B, world * S, G / world, D), v (B, world * S, G / world, DV), lse (B, H / world,
    world, S); ``done`` flags (cdiv(S, BM), H, B). ``scale`` includes log2(e).
    Grid: (world * cdiv(S, BM), H / world, B + 1), with CAUSAL the first two the other way round: late places, which see
    many keys, come first, those of all heads. The last programs wait for what others put.
    """
    me, length, heads, b = tw.rank(), q.shape[2], q.shape[3], tw.program_id(2)
    place, h, tiles = tw.program_id(0), tw.program_id(1), tw.cdiv(length, BM)
    if CAUSAL:
        place, h = tw.num_programs(1) - 1 - tw.program_id(1), tw.program_id(0)
    owner, m = place // tiles, place % tiles
    if b < q.shape[0]:
        queries = tw.load(q.permute(0, 1, 3, 2, 4)[b, owner, h], (m, 0), (BM, D))
        g = h // (heads // k.shape[2])
        keys, values = k.permute(0, 2, 1, 3)[b, g], v.permute(0, 2, 1, 3)[b, g]
        row = owner * length + m * BM
        out, total, logarithm = attend(
            queries, keys, values, None, scale, row, keys.shape[0], 0, None, DV, BN, CAUSAL, None
        )
        tw.store(lse[b, h, owner], m, logarithm * LN2)
        result = (out * (1.0 / tw.maximum(total, 1e-30))[:, None]).to(o.dtype)
        token = tw.put(o.peer(owner).permute(0, 2, 1, 3)[b, me * heads + h], (m, 0), result)
        tw.signal(done[m, me * heads + h, b], owner, after=token)
    elif place < tiles:
        for source in tw.range(tw.world_size()):
            tw.wait(done[place, source * heads + h])


def ulysses_sdpa(
    world: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    causal: bool = False,
    *,
    scale: float | None = None,
    **meta: int,
) -> None:
    """Attention of q (B, S, H, D), k (B, S, G, D), v (B, S, G, DV), the rank's part of the sequence, to the whole one.

    o (B, S, H, DV) is symmetric; H and G are multiples of the number of ranks. lse (B, H / world, world, S) float32 is
    that of the rank's heads. ``scale`` is 1 / sqrt(D) by default.
    """
    size, (batch, length, heads, depth), dtype = world.size, own(q).shape, own(q).dtype
    width = own(v).shape[3]
    whole = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        _, _, count, last = own(x).shape
        if count % size:
            raise ValueError(f"{count} heads of {name} do not divide among {size} ranks")
        whole.append(symmetric(world, f"ulysses_{name}", (batch, size * length, count // size, last), dtype))
        exchange(world, x, whole[-1], 2, 1)
    each = heads // size
    sizes = meta if meta else configuration(length, max(depth, width))
    tiles = tw.cdiv(length, sizes["BM"])
    done = flags(world, "ulysses", (tiles, heads, batch))
    factor = (depth**-0.5 if scale is None else scale) * LOG2E
    queries = whole[0].reshape(batch, size, length, each, depth)
    grid = (each, size * tiles, batch + 1) if causal else (size * tiles, each, batch + 1)
    world.launch(
        ulysses_attention, grid, queries, *whole[1:], o, lse, done, factor, D=depth, DV=width, CAUSAL=causal, **sizes
    )


def reference(
    q: list[np.ndarray[Any, Any]], k: list[np.ndarray[Any, Any]], v: list[np.ndarray[Any, Any]], causal: bool = False
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """o and lse of each rank in float64."""
    size = len(q)
    queries, keys, values = (np.concatenate(x, 1).transpose(0, 2, 1, 3) for x in (q, k, v))
    o, lse = whole_reference(queries, keys, values, causal)
    batch, heads, length = lse.shape
    logarithms = lse.reshape(batch, size, heads // size, size, length // size)
    return np.split(o.transpose(0, 2, 1, 3), size, 1), [logarithms[:, rank] for rank in range(size)]
