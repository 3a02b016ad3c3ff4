"""A mixture of experts divided among ranks: tokens go to their experts, are multiplied there and come back weighted.

Nobody counts in another rank's memory. Each rank lists for every expert the tokens that it has for it (`moe_route`);
from the counts of all ranks everybody computes where each token's row lies at its expert (`moe_plan`). Programs of the
product's launch then fetch the rows of one tile after the other, other programs multiply them (`moe_gemm`), and each
rank reads the results of its tokens and adds them up in one order (`moe_combine`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.gemm import product
from tilewright.kernels.gemm_grouped import most_tiles
from tilewright.kernels.multi_gpu.collectives import reshaped
from tilewright.kernels.multi_gpu.pushing import UNITS
from tilewright.kernels.multi_gpu.workspace import flags, own, symmetric

#: columns of tokens that a program fetches at a time, and how many times in a row
WIDTH, PARTS = 128, 8


@tw.function
def group_of(tile, starts):
    """The last group whose tiles start at or before ``tile``."""
    low, high = 0, starts.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        before = tw.load(starts, middle) <= tile
        low, high = tw.where(before, middle, low), tw.where(before, high, middle)
    return low


@tw.kernel
def moe_route(
    experts: tw.Tensor, lists: tw.Tensor, counts: tw.Tensor, places: tw.Tensor, *, K: tw.constexpr, BN: tw.constexpr
) -> None:
    """Which of the own tokens go to an expert. Grid: (E,).

    experts (T * K,) int32: the K different experts of each token. ``lists[e]`` gets the tokens of expert e in their
    order, ``counts[e]`` their number, ``places[i]`` the place of choice i in its expert's list. lists (E, T), counts
    (E,), places (T * K,), all int32.
    """
    e = tw.program_id(0)
    count = 0
    for j in tw.range(tw.cdiv(experts.shape[0], BN)):
        choice = j * BN + tw.arange(0, BN)
        chosen = tw.load(experts, j, BN, pad=-1) == e
        place = count + tw.cumsum(chosen.to(tw.int32), axis=0) - 1
        tw.scatter(lists[e], tw.where(chosen, place, -1), choice // K, 0)
        tw.scatter(places, tw.where(chosen, choice, -1), place, 0)
        count = count + tw.sum(chosen.to(tw.int32), axis=0)
    tw.store(counts, e, count)


@tw.kernel
def moe_plan(
    counts: tw.Symmetric,
    before: tw.Tensor,
    starts: tw.Tensor,
    rows: tw.Tensor,
    *,
    BM: tw.constexpr,
    EXPERTS: tw.constexpr,
) -> None:
    """Where the rows of experts lie: those of each in tiles of BM rows, in the order of ranks. Grid: (1,).

    ``before[p, e]``: how many rows of expert e the ranks before p have, (world + 1, E); ``starts[i]``: the first tile
    of this rank's expert i, (E / world + 1,); ``rows[e]``: the first row of this rank's tokens at the rank of expert
    e, (E,). All int32. EXPERTS is a power of two that is not less than E.
    """
    me, world, each = tw.rank(), tw.world_size(), starts.shape[0] - 1
    e = tw.arange(0, EXPERTS)
    total, mine = tw.zeros((EXPERTS,), tw.int32), tw.zeros((EXPERTS,), tw.int32)
    for source in tw.range(world):
        tw.store(before[source], 0, total)
        mine = tw.where(source == me, total, mine)
        total = total + tw.get(counts.peer(source), 0, EXPERTS)
    tw.store(before[world], 0, total)
    tiles = tw.cdiv(total, BM)
    first = tw.cumsum(tiles, axis=0) - tiles
    for owner in tw.range(world):
        theirs = e // each == owner
        first = tw.where(theirs, first - tw.sum(tw.where(e < owner * each, tiles, 0), axis=0), first)
    tw.store(rows, 0, first * BM + mine)
    here = e // each == me
    tw.scatter(starts, tw.where(here, e - me * each, -1), first, 0)
    tw.store(starts, each, tw.sum(tw.where(here, tiles, 0), axis=0))


@tw.function
def expert_of(tile: Any, starts: Any) -> Any:
    """The last of the rank's experts whose tiles start at or before ``tile``."""
    low, high = 0, starts.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        before = tw.load(starts, middle) <= tile
        low, high = tw.where(before, middle, low), tw.where(before, high, middle)
    return low


@tw.function
def find(lists: Any, before: Any, e: Any, row: Any, BM: tw.constexpr) -> Any:
    """Of expert e's rows from ``row`` on: whose token each one is, and which; -1 for rows of no token."""
    place = row + tw.arange(0, BM)
    owner, token = tw.full((BM,), -1, tw.int32), tw.full((BM,), -1, tw.int32)
    for source in tw.range(tw.world_size()):
        first, last = tw.load(before[source], e), tw.load(before[source + 1], e)
        index = tw.where((place >= first) & (place < last), place - first, -1)
        owner = tw.where(index >= 0, source, owner)
        token = tw.maximum(token, tw.gather(lists.peer(source)[e], index, pad=-1))
    return owner, token


@tw.function
def fetch(x: Any, owner: Any, token: Any, column: Any, WIDTH: tw.constexpr) -> Any:
    """The tile (BM, WIDTH) of columns of the tokens that `find` gave; rows of no token are 0."""
    tile = tw.zeros((token.shape[0], WIDTH), x.dtype)
    for source in tw.range(tw.world_size()):  # of each row one rank has the token: the others add 0
        mine = tw.where(owner == source, token, -1)
        tile = tile + tw.gather(x.peer(source), mine, 0, tile=(0, column), shape=(token.shape[0], WIDTH))
    return tile


@tw.kernel
def moe_gemm(
    x: tw.Symmetric,
    lists: tw.Symmetric,
    before: tw.Tensor,
    starts: tw.Tensor,
    w: tw.Tensor,
    gathered: tw.Symmetric,
    fetched: tw.Symmetric,
    y: tw.Tensor,
    communicators: tw.int32,
    period: tw.int32,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
    WIDTH: tw.constexpr = WIDTH,
    PARTS: tw.constexpr = PARTS,
    WINDOW: tw.constexpr = 8,
) -> None:
    """``y``: rows of this rank's experts, x (T, H) of all ranks times w (E / world, H, N).

    ``gathered`` (tiles, BM, H) gets the rows, y (tiles, BM, N); lists, before, starts as `moe_plan` says; ``fetched``
    flags (tiles, cdiv(H, PARTS * WIDTH)). Of each ``period`` programs the first ``communicators`` fetch what those of
    the next period multiply, and in the first also what those of this one do. Grid: programs for the most tiles there
    can be.
    """
    me, columns, tiles = tw.rank(), tw.cdiv(w.shape[2], BN), tw.load(starts, starts.shape[0] - 1)
    round_, slot, each = tw.program_id(0) // period, tw.program_id(0) % period, period - communicators
    window = WINDOW * columns
    if slot < communicators:
        begin = tw.where(round_ == 0, 0, tw.minimum(tw.cdiv((round_ + 1) * each, window) * WINDOW, tiles))
        end = tw.minimum(tw.cdiv((round_ + 2) * each, window) * WINDOW, tiles)
        slices = tw.cdiv(x.shape[1], PARTS * WIDTH)
        for unit in tw.range(begin * slices + slot, end * slices, communicators):
            tile, part = unit // slices, unit % slices
            i = expert_of(tile, starts)
            row = (tile - tw.load(starts, i)) * BM
            owner, token = find(lists, before, me * w.shape[0] + i, row, BM)
            puts: Any = ()
            for column in tw.static_range(PARTS):
                value = fetch(x, owner, token, part * PARTS + column, WIDTH)
                puts = (*puts, tw.put(gathered.peer(me)[tile], (0, part * PARTS + column), value))
            tw.signal(fetched[tile, part], me, after=puts)
    else:
        number = round_ * each + slot - communicators
        if number < tiles * columns:
            first, place = number // window * WINDOW, number % window
            height = tw.minimum(tiles - first, WINDOW)
            tile, n = first + place % height, place // height
            here = tw.wait(fetched[tile])
            acc = product(gathered[tile], w[expert_of(tile, starts)], 0, n, BM, BN, BK, here)
            tw.store(y[tile], (0, n), acc.to(y.dtype))


@tw.kernel
def moe_combine(
    experts: tw.Tensor,
    weights: tw.Tensor,
    places: tw.Tensor,
    rows: tw.Tensor,
    y: tw.Symmetric,
    out: tw.Tensor,
    each: tw.int32,
    *,
    K: tw.constexpr,
    BT: tw.constexpr = 4,
    BN: tw.constexpr = 512,
) -> None:
    """``out[t]``: the sum over its K choices of weight times result. Grid: any number that runs at the same time.

    experts, weights (float32), places (T, K); y (rows of all tiles, N) of every rank, whose experts are ``each`` in
    number; out (T, N). Adds in float32, in the order of
    ranks and of choices.
    """
    columns = tw.cdiv(out.shape[1], BN)
    for program in tw.range(tw.program_id(0), tw.cdiv(out.shape[0], BT) * columns, tw.num_programs(0)):
        t, n = program // columns, program % columns
        token = t * BT + tw.arange(0, BT)
        token = tw.where(token < out.shape[0], token, -1)
        chosen: Any = ()
        for choice in tw.static_range(K):
            e = tw.gather(experts.permute(1, 0)[choice], token, pad=-1)
            row = tw.gather(rows, e) + tw.gather(places.permute(1, 0)[choice], token)
            chosen = (*chosen, (e // each, row, tw.gather(weights.permute(1, 0)[choice], token)))
        total = tw.zeros((BT, BN), tw.float32)
        for owner in tw.range(tw.world_size()):
            for choice in tw.static_range(K):
                theirs = tw.where(chosen[choice][0] == owner, chosen[choice][1], -1)
                part = tw.gather(y.peer(owner), theirs, 0, tile=(0, n), shape=(BT, BN))
                total = total + part.to(tw.float32) * chosen[choice][2][:, None]
        tw.store(out, (t, n), total.to(out.dtype))


#: blocks that fetch rows while the others multiply, and those of `moe_combine`
COMMUNICATORS, BLOCKS = 48, 528
#: choices that `moe_route` looks at in one step
CHOICES = 4096


def moe(
    world: Any,
    x: Any,
    experts: Any,
    weights: Any,
    w: Any,
    out: Any,
    *,
    communicators: int = COMMUNICATORS,
    units: int = UNITS,
    **meta: int,
) -> None:
    """``out[t] = sum over k of weights[t, k] * (x[t] @ w[experts[t, k]])`` for each rank's tokens t.

    x (T, H) is symmetric; experts (T, K) int32, the K different experts of each token, weights (T, K) float32, w
    (E / world, H, N) the rank's experts, out (T, N). Workspaces are as large as the case that one rank has all tokens'
    experts. Equal inputs give equal bits.
    """
    size, (tokens, depth) = world.size, x.shape
    (each, _, width), choices = own(w).shape, own(experts).shape[1]
    count, dtype = each * size, own(w).dtype
    meta = {"BM": 128, "BN": 256, "BK": 64, **meta}
    columns, tiles = tw.cdiv(width, meta["BN"]), most_tiles(size * tokens * min(choices, each), each, meta["BM"])
    lists = symmetric(world, "moe_lists", (count, tokens), "int32")
    counts = symmetric(world, "moe_counts", (count,), "int32")
    places = symmetric(world, "moe_places", (tokens, choices), "int32")
    before = symmetric(world, "moe_before", (size + 1, count), "int32")
    starts = symmetric(world, "moe_starts", (each + 1,), "int32")
    rows = symmetric(world, "moe_rows", (count,), "int32")
    gathered = symmetric(world, "moe_gathered", (tiles, meta["BM"], depth), dtype)
    results = symmetric(world, "moe_results", (tiles, meta["BM"], width), own(out).dtype)
    fetched = flags(world, "moe", (tiles, tw.cdiv(depth, meta.get("WIDTH", WIDTH) * meta.get("PARTS", PARTS))))
    flat = reshaped(experts, tokens * choices)
    world.launch(
        moe_route, (count,), flat, lists, counts, places.reshape(tokens * choices), K=choices, BN=CHOICES, num_warps=8
    )
    world.launch(moe_plan, (1,), counts, before, starts, rows, BM=meta["BM"], EXPERTS=1 << (count - 1).bit_length())
    rounds = tw.cdiv(tiles * columns, units - communicators)
    world.launch(
        moe_gemm, (rounds * units,), x, lists, before, starts, w, gathered, fetched, results, communicators, units,
        **meta,
    )  # fmt: skip
    whole = results.reshape(tiles * meta["BM"], width)
    world.launch(moe_combine, (BLOCKS,), experts, weights, places, rows, whole, out, each, K=choices)


def reference(
    x: list[np.ndarray[Any, Any]],
    experts: list[np.ndarray[Any, Any]],
    weights: list[np.ndarray[Any, Any]],
    w: list[np.ndarray[Any, Any]],
) -> list[np.ndarray[Any, Any]]:
    """Each rank's out in float64."""
    matrices = np.concatenate(w).astype(np.float64)
    return [
        np.einsum(
            "tk,tkn->tn", share.astype(np.float64), np.einsum("th,tkhn->tkn", rows.astype(np.float64), matrices[e])
        )
        for rows, e, share in zip(x, experts, weights, strict=True)
    ]
