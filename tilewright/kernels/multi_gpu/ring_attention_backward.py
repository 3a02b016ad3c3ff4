"""Attention backward over keys and values that are divided among ranks by sequence, as in `ring_attention`.

Forward has left all keys and values that a rank's queries see on the rank. Each rank computes what its queries give to
gradients, as `tilewright.kernels.attention_backward` does on one GPU; gradients of keys and values are sums over ranks,
which the owner of a chunk reads from all of them and adds in their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.attention_backward import (
    ROWS,
    TILE,
    attention_dq,
    attention_gradients,
    attention_rows,
    attention_sum_heads,
    configuration,
)
from tilewright.kernels.attention_backward import reference as whole_reference
from tilewright.kernels.attention_exact import attention_bound, attention_largest
from tilewright.kernels.multi_gpu.ring_attention import divided, joined, own_chunk
from tilewright.kernels.multi_gpu.workspace import own, symmetric


@tw.kernel
def ring_attention_sum(
    parts: tw.Symmetric, total: tw.Tensor, *, D: tw.constexpr, BN: tw.constexpr, CAUSAL: tw.constexpr = False
) -> None:
    """Sums of what all ranks' queries give to the gradients of the own chunks: total (C, B, G, S, D).

    parts (C, B, G, C * world, S, D): of each rank what its chunks of queries give to chunks of keys, in the order of
    the sequence; with CAUSAL only to those that they see. Grid: (cdiv(S, BN), B * G, C).
    """
    CHUNKS = 2 if CAUSAL else 1
    n, b, g = tw.program_id(0), tw.program_id(1) // total.shape[2], tw.program_id(1) % total.shape[2]
    which, world = tw.program_id(2), tw.world_size()
    c = own_chunk(which, CHUNKS)
    added = tw.zeros((BN, D), tw.float32)
    for source in tw.range(world):
        for queries in tw.static_range(CHUNKS):
            place = source if queries == 0 else CHUNKS * world - 1 - source
            for _ in tw.range(tw.where(place >= c, 1, 0) if CAUSAL else 1):
                added = added + tw.get(parts.peer(source)[queries, b, g, c], (n, 0), (BN, D)).to(tw.float32)
    tw.store(total[which, b, g], (n, 0), added.to(total.dtype))


def ring_sdpa_backward(
    world: Any,
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
    deterministic: bool = True,
    **meta: int,
) -> None:
    """Gradients of `tilewright.kernels.multi_gpu.ring_attention.ring_sdpa`, which gave ``o``, ``lse`` and whole k, v.

    Arrays of each rank as there, of NumPy or torch; dq, dk, dv are those of its own chunks. Equal inputs give equal
    bits, unless ``deterministic`` is False: see `tilewright.kernels.attention_backward.sdpa_backward`. ``meta``: tile
    sizes of `attention_gradients`.
    """
    chunks, batch, heads, length, depth = own(q).shape
    groups, width, size, dtype = k.shape[1], v.shape[4], world.size, own(q).dtype
    factor = depth**-0.5 if scale is None else scale
    meta = {**configuration(depth, width), **meta}
    sizes, tiles = {"D": meta["D"], "DV": meta["DV"]}, tw.cdiv(length, TILE)
    everything = chunks * size * length
    # programs of several heads walk one after the other: where keys see few queries each head has its own
    shared = heads if causal else groups

    def workspace(name: str, shape: tuple[int, ...], kind: Any) -> Any:
        return symmetric(world, f"ring_attention_{name}", shape, kind)

    rows = workspace("rows", (chunks, ROWS, batch, heads, tiles * TILE), "f32")
    sums = workspace("sums", (chunks, batch, heads, length, depth), "int32" if deterministic else "f32")
    largest = workspace("largest", (2, batch, groups, tw.cdiv(everything, TILE)), "f32")
    bound = workspace("bound", (batch, groups), "f32") if deterministic else None
    named = ("dk", depth), ("dv", width)
    shape = chunks, batch, groups, chunks * size, length
    parts = by_head = [workspace(name, (*shape, n), dtype) for name, n in named]
    if shared != groups:
        by_head = [workspace(f"{name}_heads", (batch, heads, everything, n), dtype) for name, n in named]

    for chunk in range(chunks):
        counts = [_seen(rank, chunk, size, causal) * length for rank in world.ranks]
        most = max(counts)

        def of(x: Any, chunk: int = chunk) -> list[Any]:
            return [part[chunk] for part in _listed(world, x)]

        def seen(x: Any, counts: list[int] = counts) -> list[Any]:
            """The keys that queries of the chunk see, of (B, heads, all keys, ...)."""
            shaped = [part.reshape(batch, -1, everything, part.shape[-1]) for part in _listed(world, x)]
            return [part[:, :, :count] for part, count in zip(shaped, counts, strict=True)]

        keys, values, line, added = seen(k), seen(v), of(rows), of(sums)
        results = [seen(x) if by_head is not parts else seen(of(x)) for x in by_head]
        tiles_seen = tw.cdiv(most, TILE), groups, batch
        if deterministic:
            widths = [tw.cdiv(count, TILE) for count in counts]
            maxima = [part[..., :n] for part, n in zip(_listed(world, largest), widths, strict=True)]
            world.launch(attention_largest, tiles_seen, keys, values, maxima, **sizes)
            world.launch(attention_bound, (groups, batch), maxima, bound)
        world.launch(attention_rows, (tiles, heads, batch), of(o), of(do), of(lse), line, added, bound, **sizes)
        grid = tw.cdiv(most, meta["BN"]), shared, batch
        inputs = of(q), keys, values, of(do), line, added
        world.launch(attention_gradients, grid, *inputs, *results, factor, CAUSAL=causal, EXACT=deterministic, **meta)
        world.launch(attention_dq, (tiles, heads, batch), added, line, of(dq), factor, D=meta["D"])
        if by_head is not parts:
            for part, total, wide in zip(results, parts, sizes.values(), strict=True):
                world.launch(attention_sum_heads, tiles_seen, part, seen(of(total)), D=wide)
    grid = tw.cdiv(length, TILE), batch * groups, chunks
    for part, total, wide in zip(parts, (dk, dv), (depth, width), strict=True):
        wide = 1 << (wide - 1).bit_length()
        world.launch(ring_attention_sum, grid, part, total, D=wide, BN=TILE, CAUSAL=causal)


def _listed(world: Any, x: Any) -> list[Any]:
    """The arrays of this process's ranks: of a list, of a symmetric tensor, or the only one."""
    if isinstance(x, list | tuple):
        return list(x)
    return [x[rank] for rank in world.ranks] if hasattr(x, "addresses") else [x]


def _seen(rank: int, chunk: int, size: int, causal: bool) -> int:
    """How many chunks of keys the queries of a rank's chunk see."""
    if not causal:
        return size
    return rank + 1 if chunk == 0 else 2 * size - rank


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
