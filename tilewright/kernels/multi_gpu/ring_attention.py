"""Attention over keys and values that are divided among ranks by sequence, forward.

Each rank has the queries, keys and values of its chunks of the sequence. Either it pushes keys and values to all peers,
while its queries already attend to the own ones, and adds what arrives as it comes (`ring_attention`); or the copy
engines bring those of one group of heads after the other, while heads whose keys are there attend to all of them
(`chunk_attention`). Without CAUSAL a rank has one chunk. With it the sequence is cut into 2 * world chunks, of which
rank r has r and 2 * world - 1 - r: all ranks have the same work ("zigzag").
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention import LN2, LOG2E, attend, configuration, weigh
from tilewright.kernels.attention import reference as whole_reference
from tilewright.kernels.multi_gpu.copy_engine import let_meet
from tilewright.kernels.multi_gpu.pushing import load_parts, put_parts
from tilewright.kernels.multi_gpu.workspace import flags, own

#: blocks that push at the same time
COMMUNICATORS = 32
#: keys that a pushing program moves at a time, and in how many parts; flags of a head's keys in a chunk, which programs
#: that need them look at one after the other
ROWS, PARTS, FLAGS = 128, 2, 4


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
    FLAGS: tw.constexpr = FLAGS,
    CAUSAL: tw.constexpr = False,
) -> None:
    """q (C, B, H, S, D), o (C, B, H, S, DV), lse (C, B, H, S): the rank's chunks of S places, 2 with CAUSAL, else 1.

    k (B, G, C * world, S, D) and v (B, G, C * world, S, DV), in the order of the sequence: the own chunks are there
    before the launch, what the own queries see of the others arrives. ``arrived`` flags (C * world, B * G, FLAGS).
    ``scale`` includes log2(e). The first ``communicators`` programs push, a block each, which then computes as the
    others do. Grid: (communicators + C * B * H * cdiv(S, BM),).
    """
    CHUNKS = 2 if CAUSAL else 1
    me, world, batch, heads, groups = tw.rank(), tw.world_size(), q.shape[1], q.shape[2], k.shape[1]
    number, length = tw.program_id(0), k.shape[3]
    if number < communicators:
        tiles = tw.cdiv(length, ROWS)
        each = tw.cdiv(tiles, FLAGS)
        for unit in tw.range(number, CHUNKS * batch * groups * FLAGS, communicators):
            part, bg, c = unit % FLAGS, unit // (FLAGS * CHUNKS), own_chunk(unit // FLAGS % CHUNKS, CHUNKS)
            b, g = bg // groups, bg % groups
            here = tw.wait(arrived[c, bg, part], when=False)
            for hop in tw.range(1, world):
                peer = (me + hop) % world
                if not CAUSAL or c < 2 * world - peer:  # some query there sees it
                    for row in tw.range(part * each, tw.minimum((part + 1) * each, tiles)):
                        keys = load_parts(k[b, g, c], row, 0, ROWS, D, PARTS, here)
                        values = load_parts(v[b, g, c], row, 0, ROWS, DV, PARTS, here)
                        sent = put_parts(k.peer(peer)[b, g, c], row, 0, keys, PARTS)
                        sent_too = put_parts(v.peer(peer)[b, g, c], row, 0, values, PARTS)
                    tw.signal(arrived[c, bg, part], peer, after=(sent, sent_too))
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
                queries, k[b, g, c], v[b, g, c], None, scale, m * BM, length, shift, None, top, total, out,
                BN, CAUSAL, None, here,
            )  # fmt: skip
        tw.store(o[which, b, h], (m, 0), (out * (1.0 / tw.maximum(total, 1e-30))[:, None]).to(o.dtype))
        tw.store(lse[which, b, h], m, (top * scale + tw.log2(total)) * LN2)


@tw.kernel
def chunk_attention(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    o: tw.Tensor,
    lse: tw.Tensor,
    scale: tw.float32,
    head: tw.int32,
    early: tw.int32,
    late: tw.int32,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    CAUSAL: tw.constexpr = False,
) -> None:
    """Attention of some heads, from ``head`` on, where all keys are there; k (B, G, N, D), v (B, G, N, DV).

    q, o, lse and ``scale`` as in `ring_attention`; the chunks of queries are those ``early`` and ``late`` in the
    sequence. Grid: (cdiv(S, BM), heads, C * B). No rank is waited for: launches may run beside each other.
    """
    m, h, b = tw.program_id(0), head + tw.program_id(1), tw.program_id(2) % q.shape[1]
    # the later chunk sees more keys: it comes first
    which = q.shape[0] - 1 - tw.program_id(2) // q.shape[1]
    g, place = h // (q.shape[2] // k.shape[1]), tw.where(which == 0, early, late)
    length = (place + 1) * q.shape[3] if CAUSAL else k.shape[2]
    queries = tw.load(q[which, b, h], (m, 0), (BM, D))
    out, total, logarithm = attend(
        queries, k[b, g], v[b, g], None, scale, m * BM, length, place * q.shape[3], None, DV, BN, CAUSAL, None
    )
    tw.store(o[which, b, h], (m, 0), (out * (1.0 / tw.maximum(total, 1e-30))[:, None]).to(o.dtype))
    tw.store(lse[which, b, h], m, logarithm * LN2)


# --- launches -------------------------------------------------------------------------------------


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
    communicators: int | None = None,
    **meta: int,
) -> None:
    """Attention of the ranks' queries to all ranks' keys; shapes as in `ring_attention`.

    k and v are symmetric, and each rank has written its own chunks. Afterwards a rank has all that its queries see, as
    `tilewright.kernels.multi_gpu.ring_attention_backward` wants it. ``scale`` is 1 / sqrt(D) by default.
    ``communicators`` blocks of the kernel push keys and values, or with 0 the copy engines bring them. The default is
    what was faster on two H200.
    """
    chunks, batch, heads, length, depth = own(q).shape
    groups, width = k.shape[1], v.shape[4]
    if (chunks, k.shape[2]) != ((2 if causal else 1), chunks * world.size):
        wanted = "2 chunks of queries and 2 of keys for each rank" if causal else "a chunk for each rank"
        raise ValueError(f"q {own(q).shape} and k {k.shape}: {'causal' if causal else 'full'} attention takes {wanted}")
    factor = (depth**-0.5 if scale is None else scale) * LOG2E
    sizes = {"D": depth, "DV": width, "CAUSAL": causal}
    if communicators is None:
        communicators = COMMUNICATORS if causal else 0
    if communicators == 0:
        meta = {**configuration(length, max(depth, width)), **meta}
        _by_copies(world, q, k, v, o, lse, factor, **sizes, **meta)
        return
    meta = {"BM": 128, "BN": 128 if max(depth, width) <= 128 else 64, "ROWS": ROWS, **meta}
    rows = tw.cdiv(length, meta["BM"])
    arrived = flags(world, "ring_attention", (chunks * world.size, batch * groups, FLAGS))
    communicators = min(communicators, chunks * batch * groups * FLAGS)
    grid = (communicators + chunks * batch * heads * rows,)
    world.launch(ring_attention, grid, q, k, v, o, lse, arrived, factor, communicators, **sizes, **meta)


def _by_copies(world: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, factor: float, **meta: Any) -> None:
    """The copy engines bring one group of keys after the other; with the first one attention begins.

    What needs the other groups is launched behind all copies, beside what needs the first one.
    """
    chunks, batch, heads, length, _ = own(q).shape
    groups, size = k.shape[1], world.size
    rows, shared = tw.cdiv(length, meta["BM"]), heads // groups
    keys, values = (x.reshape(batch, groups, chunks * size * length, x.shape[4]) for x in (k, v))
    whole = chunks == 1 or length % meta["BN"] != 0  # a tile at the end of a chunk holds rows of the next one

    def parts(rank: int, begin: int, end: int) -> list[Any]:
        peers = [(rank + hop) % size for hop in range(1, size)]
        seen = [(p, c) for p in peers for c in (p, 2 * size - 1 - p)[:chunks] if whole or c < 2 * size - rank]
        return [(x, p, (b, g, c)) for g in range(begin, end) for b in range(batch) for p, c in seen for x in (k, v)]

    def attend_heads(begin: int, end: int, stream: Any) -> None:
        grid = rows, (end - begin) * shared, chunks * batch
        places = list(world.ranks), [chunks * size - 1 - rank for rank in world.ranks]
        head = begin * shared
        world.launch(chunk_attention, grid, q, keys, values, o, lse, factor, head, *places, stream=stream, **meta)

    let_meet(world)
    world.pull(lambda rank: parts(rank, 0, 1), ordered=False).join()
    others = world.pull(lambda rank: parts(rank, 1, groups))
    attend_heads(0, 1, None)
    if groups > 1:
        attend_heads(1, groups, others.streams)
    others.rejoin()
    let_meet(world)  # nobody overwrites what others still copy


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
