"""A mixture of experts divided among ranks: tokens go to their experts, are multiplied there and come back weighted.

Ranks exchange which experts their tokens want (`collectives.gather`), and each works out for itself which of all tokens
its experts get, in which order (`moe_route`). Meanwhile the copy engines bring the tokens, each once
however many experts of the rank it goes to; `moe_rows` puts copies of its row where its experts' rows are
multiplied (`gemm_grouped`), and `moe_combine` adds up what the rank's experts say about a token, sends it to the
token's rank, and adds what has come from others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.gemm_grouped import LISTED, gemm_grouped, list_tiles, most_tiles
from tilewright.kernels.multi_gpu.collectives import gather, reshaped
from tilewright.kernels.multi_gpu.workspace import flags, own, symmetric

#: choices that `moe_route` looks at in one step
CHOICES = 4096
#: tokens and columns that a program of `moe_rows` copies, and of `moe_combine` adds up, with their warps
ROWS, COMBINED = {"BT": 8, "BN": 1024, "num_warps": 8}, {"BT": 2, "BN": 1024, "num_warps": 8}
#: programs of `moe_combine`: as many as run at the same time
BLOCKS = 264


@tw.kernel
def moe_route(experts: tw.Tensor, rows_of: tw.Tensor, offsets: tw.Tensor, first: tw.int32, *, BN: tw.constexpr) -> None:
    """The row of each choice for one of the rank's experts, from ``first`` on, sorted by expert. Grid: (E / world,).

    experts (choices of all ranks,): the experts, in the order of ranks and tokens. ``rows_of`` like experts gets the
    rows, -1 for choices of other ranks' experts; ``offsets[i]`` the first row of the rank's expert i, (E / world + 1,).
    All int32.
    """
    i, each, steps = tw.program_id(0), tw.num_programs(0), tw.cdiv(experts.shape[0], BN)
    before = tw.zeros((BN,), tw.int32)
    for j in tw.range(steps):
        e = tw.load(experts, j, BN, pad=-1) - first
        before = before + ((e >= 0) & (e < i)).to(tw.int32)
        if j % each == i:
            choice = j * BN + tw.arange(0, BN)
            tw.scatter(rows_of, tw.where((e < 0) | (e >= each), choice, -1), tw.full((BN,), -1, tw.int32), 0)
    row = tw.sum(before, axis=0)
    tw.store(offsets, i, row)
    for j in tw.range(steps):
        choice = j * BN + tw.arange(0, BN)
        chosen = tw.load(experts, j, BN, pad=-1) - first == i
        places = tw.cumsum(chosen.to(tw.int32), axis=0) - 1
        tw.scatter(rows_of, tw.where(chosen, choice, -1), row + places, 0)
        row = row + tw.sum(chosen.to(tw.int32), axis=0)
    if i == each - 1:
        tw.store(offsets, each, row)


@tw.kernel
def moe_rows(
    x: tw.Tensor,
    rows_of: tw.Tensor,
    rows: tw.Tensor,
    source: tw.int32,
    *,
    K: tw.constexpr,
    BT: tw.constexpr,
    BN: tw.constexpr,
) -> None:
    """Copy the tokens of the rank ``source`` to the rows of this rank's experts.

    x (world, T, H), ``rows_of`` (world * T * K,), rows (R, H). Grid: (cdiv(H, BN), cdiv(T, BT)).
    """
    n, t, tokens = tw.program_id(0), tw.program_id(1), x.shape[1]
    value = tw.load(x[source], (t, n), (BT, BN))
    token = t * BT + tw.arange(0, BT)
    for k in tw.static_range(K):
        choice = tw.where(token < tokens, (source * tokens + token) * K + k, -1)
        tw.scatter(rows, tw.gather(rows_of, choice, pad=-1), value, 0, tile=(0, n))


@tw.function
def weighted(
    rows_of: Any, weights: Any, y: Any, tokens: Any, first: Any, t: Any, n: Any,
    K: tw.constexpr, BT: tw.constexpr, BN: tw.constexpr,
) -> Any:  # fmt: skip
    """What the rank's experts say about the tokens of tile t, of ``tokens`` whose choices begin at ``first``."""
    token = t * BT + tw.arange(0, BT)
    total = tw.zeros((BT, BN), tw.float32)
    for k in tw.static_range(K):
        choice = tw.where(token < tokens, first + token * K + k, -1)
        part = tw.gather(y, tw.gather(rows_of, choice, pad=-1), 0, tile=(0, n), shape=(BT, BN))
        total = total + part.to(tw.float32) * tw.gather(weights, choice)[:, None]
    return total


@tw.kernel
def moe_combine(
    rows_of: tw.Tensor,
    weights: tw.Tensor,
    y: tw.Tensor,
    parts: tw.Symmetric,
    arrived: tw.Symmetric,
    out: tw.Tensor,
    *,
    K: tw.constexpr,
    BT: tw.constexpr,
    BN: tw.constexpr,
) -> None:
    """``out[t]``: the sum over its K choices of weight times result. Grid: any number.

    ``rows_of``, weights (float32), (world * T * K,), of all ranks' tokens; y (R, N) has the results of this rank's
    experts; out (T, N). ``parts`` (world, T, N) gets what each rank has for this one's tokens, ``arrived`` flags
    (programs, world). Adds in float32, in the order of ranks and of choices; what is sent is rounded.
    """
    me, world, tokens, columns = tw.rank(), tw.world_size(), out.shape[0], tw.cdiv(out.shape[1], BN)
    program, tiles = tw.program_id(0), tw.cdiv(tokens, BT) * columns
    for hop in tw.range(1, world):
        peer = (me + hop) % world
        for tile in tw.range(program, tiles, tw.num_programs(0)):
            t, n = tile // columns, tile % columns
            total = weighted(rows_of, weights, y, tokens, peer * tokens * K, t, n, K, BT, BN)
            sent = tw.put(parts.peer(peer)[me], (t, n), total.to(parts.dtype))
    for peer in tw.range(world):
        tw.signal(arrived[program, me], peer, after=sent)
    here = tw.wait(arrived[program])
    for tile in tw.range(program, tiles, tw.num_programs(0)):
        t, n = tile // columns, tile % columns
        total = weighted(rows_of, weights, y, tokens, me * tokens * K, t, n, K, BT, BN)
        whole = tw.zeros((BT, BN), tw.float32)
        for source in tw.range(world):
            theirs = tw.load(parts[source], (t, n), (BT, BN), after=here).to(tw.float32)
            whole = whole + tw.where(source == me, total, theirs)
        tw.store(out, (t, n), whole.to(out.dtype))


def moe(world: Any, x: Any, experts: Any, weights: Any, w: Any, out: Any, **meta: int) -> None:
    """``out[t] = sum over k of weights[t, k] * (x[rank][t] @ w[experts[t, k]])`` for each rank's tokens t.

    x (world, T, H) is symmetric, and the rank has written its tokens, ``x[rank]``; afterwards it has all of them.
    experts (T, K) int32, the K different experts of each token, weights (T, K) float32, w (E / world, H, N) the rank's
    experts, out (T, N). Workspaces are as large as the case that one rank has all tokens' experts. Equal inputs give
    equal bits. ``meta``: tile sizes of `gemm_grouped`.
    """
    size, (_, tokens, depth) = world.size, x.shape
    (each, _, width), choices, dtype = own(w).shape, own(experts).shape[1], own(w).dtype
    meta = {"BM": 64, "BN": 256, "BK": 64, "WINDOW": 16, **meta}
    most = size * tokens * min(choices, each)
    tiles = most_tiles(most, each, meta["BM"])
    everybody = symmetric(world, "moe_experts", (size * tokens * choices,), "int32")
    all_weights = symmetric(world, "moe_weights", (size * tokens * choices,), "f32")
    rows_of = symmetric(world, "moe_rows_of", (size * tokens * choices,), "int32")
    offsets = symmetric(world, "moe_offsets", (each + 1,), "int32")
    table = symmetric(world, "moe_table", (tiles, 4), "int32")
    rows = symmetric(world, "moe_rows", (most, depth), dtype)
    results = symmetric(world, "moe_results", (most, width), dtype)
    parts = symmetric(world, "moe_parts", (size, tokens, width), own(out).dtype)
    gather(world, reshaped(experts, tokens * choices), everybody)
    # all ranks have begun, so that their tokens are there
    copies = world.pull(lambda rank: [(x, (rank + hop) % size, ((rank + hop) % size,)) for hop in range(1, size)])
    gather(world, reshaped(weights, tokens * choices), all_weights)
    world.launch(
        moe_route, (each,), everybody, rows_of, offsets, [rank * each for rank in world.ranks], BN=CHOICES, num_warps=8
    )
    groups = 1 << (each - 1).bit_length()
    world.launch(list_tiles, (tw.cdiv(tiles, LISTED),), offsets, table, BM=meta["BM"], GROUPS=groups, TILES=LISTED)
    grid = tw.cdiv(depth, ROWS["BN"]), tw.cdiv(tokens, ROWS["BT"])
    for hop in range(size):
        if hop:
            copies.join(hop)
        sources = [(rank + hop) % size for rank in world.ranks]
        world.launch(moe_rows, grid, x, rows_of, rows, sources, K=choices, **ROWS)
    world.launch(gemm_grouped, (tiles * tw.cdiv(width, meta["BN"]),), rows, w, table, results, **meta)
    programs = min(BLOCKS, tw.cdiv(tokens, COMBINED["BT"]) * tw.cdiv(width, COMBINED["BN"]))
    combined = rows_of, all_weights, results, parts, flags(world, "moe", (programs, size)), out
    world.launch(moe_combine, (programs,), *combined, K=choices, **COMBINED)


def reference(
    x: list[np.ndarray[Any, Any]],
    experts: list[np.ndarray[Any, Any]],
    weights: list[np.ndarray[Any, Any]],
    w: list[np.ndarray[Any, Any]],
) -> list[np.ndarray[Any, Any]]:
    """Each rank's out in float64, from each rank's tokens."""
    matrices = np.concatenate(w).astype(np.float64)
    return [
        np.einsum(
            "tk,tkn->tn", share.astype(np.float64), np.einsum("th,tkhn->tkn", rows.astype(np.float64), matrices[e])
        )
        for rows, e, share in zip(x, experts, weights, strict=True)
    ]
