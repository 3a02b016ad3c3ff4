"""Attention over keys and values that are divided among ranks by sequence, forward.

Each rank has the queries, keys and values of its chunks of the sequence and pushes keys and values to all peers, while
its queries already attend to the own ones; what arrives is added as it comes. Without CAUSAL a rank has one chunk.
With it the sequence is cut into 2 * world chunks, of which rank r has r and 2 * world - 1 - r: all ranks have the same
work ("zigzag").
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention import LN2, LOG2E, weigh
from tilewright.kernels.attention import reference as whole_reference
from tilewright.kernels.multi_gpu.pushing import load_parts, put_parts
from tilewright.kernels.multi_gpu.workspace import flags, own

#: blocks that push at the same time
COMMUNICATORS = 24
#: keys that a pushing program moves at a time, and in how many parts
ROWS, PARTS = 128, 2


@tw.function
def own_chunk(which: Any, CHUNKS: tw.constexpr) -> Any:
    """The place in the sequence of this rank's chunk number ``which``."""
    return tw.where(which == 0, tw.rank(), CHUNKS * tw.world_size() - 1 - tw.rank())


@tw.function
def visible_chunk(i: Any, place: Any, which: Any) -> Any:
    """The ``i``-th chunk that the rank's chunk number ``which``, at ``place``, sees: own ones first."""
    me, earlier = tw.rank(), place + 1 - i
    of_second = tw.where(i == 1, me, earlier - (earlier <= me).to(tw.int32))
    return tw.where((which == 0) | (i == 0), place - i, of_second)


@tw.kernel
def ring_attention(
    q: tw.Tensor,
    k: tw.Symmetric,
    v: tw.Symmetric,
    o: tw.Tensor,
    lse: tw.Tensor,
    arrived: tw.Symmetric,
    scale: tw.float32,
    communicators: tw.int32,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    ROWS: tw.constexpr = ROWS,
    PARTS: tw.constexpr = PARTS,
    CAUSAL: tw.constexpr = False,
) -> None:
    """q (C, B, H, S, D), o (C, B, H, S, DV), lse (C, B, H, S): the rank's chunks of S places, 2 with CAUSAL, else 1.

    k (C * world, B, G, S, D) and v (C * world, B, G, S, DV), in the order of the sequence: the own chunks are there
    before the launch, what the own queries see of the others arrives. ``arrived`` flags (C * world, B * G,
    cdiv(S, ROWS)). ``scale`` includes log2(e). The first ``communicators`` programs push, a block each, which then
    computes as the others do. Grid: (communicators + C * B * H * cdiv(S, BM),).
    """
    CHUNKS = 2 if CAUSAL else 1
    me, world, batch, heads, groups = tw.rank(), tw.world_size(), q.shape[1], q.shape[2], k.shape[2]
    number, length = tw.program_id(0), k.shape[3]
    if number < communicators:
        tiles = tw.cdiv(length, ROWS)
        for unit in tw.range(number, CHUNKS * batch * groups * tiles, communicators):
            row, bg, c = unit % tiles, unit // (tiles * CHUNKS), own_chunk(unit // tiles % CHUNKS, CHUNKS)
            b, g = bg // groups, bg % groups
            here = tw.wait(arrived[c, bg, row], when=False)
            keys = load_parts(k[c, b, g], row, 0, ROWS, D, PARTS, here)
            values = load_parts(v[c, b, g], row, 0, ROWS, DV, PARTS, here)
            for hop in tw.range(1, world):
                peer = (me + hop) % world
                if not CAUSAL or c < 2 * world - peer:  # some query there sees it
                    sent = put_parts(k.peer(peer)[c, b, g], row, 0, keys, PARTS)
                    sent_too = put_parts(v.peer(peer)[c, b, g], row, 0, values, PARTS)
                    tw.signal(arrived[c, bg, row], peer, after=(*sent, *sent_too))
    else:
        program, rows = number - communicators, tw.cdiv(length, BM)
        m, h, b = program % rows, program // rows % heads, program // (rows * heads) % batch
        # the later chunk sees more keys: it comes first
        which = CHUNKS - 1 - program // (rows * heads * batch)
        place, g = own_chunk(which, CHUNKS), h // (heads // groups)
        queries = tw.load(q[which, b, h], (m, 0), (BM, D))
        top, total = tw.full((BM,), -1e30, tw.float32), tw.zeros((BM,), tw.float32)
        out = tw.zeros((BM, DV), tw.float32)
        for i in tw.range(place + 1 if CAUSAL else world):
            if CAUSAL:
                c = visible_chunk(i, place, which)
                theirs = (c != me) & (c != 2 * world - 1 - me)
            else:
                c = (me + world - i) % world
                theirs = i > 0
            here = tw.wait(arrived[c, b * groups + g], when=theirs)
            shift = (place - c) * length
            top, total, out = weigh(
                queries, k[c, b, g], v[c, b, g], None, scale, m * BM, length, shift, None, top, total, out,
                BN, CAUSAL, None, here,
            )  # fmt: skip
        tw.store(o[which, b, h], (m, 0), (out * (1.0 / tw.maximum(total, 1e-30))[:, None]).to(o.dtype))
        tw.store(lse[which, b, h], m, (top * scale + tw.log2(total)) * LN2)


def ring_sdpa(
    world: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    causal: bool = False,
    *,
    scale: float | None = None,
    communicators: int = COMMUNICATORS,
    **meta: int,
) -> None:
    """Attention of the ranks' queries to all ranks' keys; shapes as in `ring_attention`.

    k and v are symmetric, and each rank has written its own chunks. Afterwards a rank has all that its queries see, as
    `tilewright.kernels.multi_gpu.ring_attention_backward` wants it. ``scale`` is 1 / sqrt(D) by default.
    """
    chunks, batch, heads, length, depth = own(q).shape
    groups, width = k.shape[2], v.shape[4]
    if (chunks, k.shape[0]) != ((2 if causal else 1), chunks * world.size):
        wanted = "2 chunks of queries and 2 of keys for each rank" if causal else "a chunk for each rank"
        raise ValueError(f"q {own(q).shape} and k {k.shape}: {'causal' if causal else 'full'} attention takes {wanted}")
    meta = {"BM": 128, "BN": 128 if max(depth, width) <= 128 else 64, "ROWS": ROWS, **meta}
    factor = (depth**-0.5 if scale is None else scale) * LOG2E
    tiles, rows = tw.cdiv(length, meta["ROWS"]), tw.cdiv(length, meta["BM"])
    arrived = flags(world, "ring_attention", (k.shape[0], batch * groups, tiles))
    communicators = min(communicators, chunks * batch * groups * tiles)
    grid = (communicators + chunks * batch * heads * rows,)
    sizes = {"D": depth, "DV": width, "CAUSAL": causal, **meta}
    world.launch(ring_attention, grid, q, k, v, o, lse, arrived, factor, communicators, **sizes)


def reference(
    q: list[np.ndarray[Any, Any]], k: list[np.ndarray[Any, Any]], v: list[np.ndarray[Any, Any]], causal: bool = False
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """o and lse of each rank in float64, from each rank's chunks (C, B, H, S, D) and (C, B, G, S, D)."""
    ranks = len(q)
    o, lse = whole_reference(joined(q), joined(k), joined(v), causal)
    return divided(o, ranks, causal), divided(lse, ranks, causal)


def joined(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The whole sequence (B, H, C * world * S, ...) of each rank's chunks (C, B, H, S, ...)."""
    chunks = [part[0] for part in parts]
    if len(parts[0]) == 2:
        chunks += [part[1] for part in reversed(parts)]
    return np.concatenate(chunks, 2)


def divided(whole: np.ndarray[Any, Any], ranks: int, causal: bool) -> list[np.ndarray[Any, Any]]:
    """The chunks of each rank, as `joined` takes them."""
    chunks = np.split(whole, ranks * (2 if causal else 1), 2)
    if not causal:
        return [np.stack([chunk]) for chunk in chunks]
    return [np.stack([chunks[rank], chunks[2 * ranks - 1 - rank]]) for rank in range(ranks)]
