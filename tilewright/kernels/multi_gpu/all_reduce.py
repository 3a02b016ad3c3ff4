"""Sums over ranks that everybody gets: ``y = sum over p of x_p``, in one hop or in two."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.multi_gpu.workspace import flags, own, share, symmetric

#: elements of a tile or a part of one, parts, and the blocks of a launch at most: all of them run at the same time
ELEMENTS, MOST_PARTS, BLOCKS = 4096, 4, 264
#: with more than two ranks and from so many elements on each rank sums up a share: fewer bytes move, in more hops
TWO_SHOT = 1 << 17
#: from so many elements on reading the peers' x is faster than being sent it (docs/performance.md)
PULLED = 1 << 21


@tw.function
def sum_of_ranks(x: Any, tile: Any, BN: tw.constexpr) -> Any:
    """A tile of the sum, in float32 and in the order of ranks: equal bits on every rank."""
    total = tw.zeros((BN,), tw.float32)
    for source in tw.range(tw.world_size()):
        total = total + tw.get(x.peer(source), tile, BN).to(tw.float32)
    return total


@tw.kernel
def all_reduce_pull(x: tw.Symmetric, y: tw.Tensor, *, BN: tw.constexpr = ELEMENTS) -> None:
    """``y``: the sum of the ranks' x; both (N,). Grid: any number of programs that run at the same time.

    Every rank reads all of the peers' x. There are no flags: x is there when a peer has begun the launch.
    """
    for tile in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BN), tw.num_programs(0)):
        tw.store(y, tile, sum_of_ranks(x, tile, BN).to(y.dtype))


@tw.kernel
def all_reduce_push(
    x: tw.Tensor,
    y: tw.Tensor,
    slots: tw.Symmetric,
    sent: tw.Symmetric,
    *,
    BN: tw.constexpr = ELEMENTS,
    PARTS: tw.constexpr = 1,
) -> None:
    """The same, where every rank puts its x into the peers' ``slots`` (world, N).

    ``sent``: flags (cdiv(N, BN), world). A tile is on its way in PARTS parts before it is signalled. Grid as of
    `all_reduce_pull`.
    """
    me, world = tw.rank(), tw.world_size()
    for hop in tw.range(1, world):
        peer = (me + hop) % world
        for tile in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BN), tw.num_programs(0)):
            parts: Any = ()
            for part in tw.static_range(PARTS):
                parts = (*parts, tw.load(x, tile * PARTS + part, BN // PARTS))
            tokens: Any = ()
            for part in tw.static_range(PARTS):
                tokens = (*tokens, tw.put(slots.peer(peer)[me], tile * PARTS + part, parts[part]))
            tw.signal(sent[tile, me], peer, after=tokens)
    for tile in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BN), tw.num_programs(0)):
        for part in tw.range(tile * PARTS, (tile + 1) * PARTS):
            total = tw.zeros((BN // PARTS,), tw.float32)
            for source in tw.range(world):
                if source == me:
                    total = total + tw.load(x, part, BN // PARTS).to(tw.float32)
                else:
                    arrived = tw.wait(sent[tile, source])
                    total = total + tw.load(slots[source], part, BN // PARTS, after=arrived).to(tw.float32)
            tw.store(y, part, total.to(y.dtype))


@tw.kernel
def all_reduce_two_shot(x: tw.Symmetric, y: tw.Symmetric, done: tw.Symmetric, *, BN: tw.constexpr = ELEMENTS) -> None:
    """The same, where each rank sums up a share and puts it into everybody's y.

    Rank r's share are the tiles from r * S on, S = cdiv(cdiv(N, BN), world); ``done`` flags (S, world).
    """
    me, world = tw.rank(), tw.world_size()
    each = tw.cdiv(tw.cdiv(x.shape[0], BN), world)
    for i in tw.range(tw.program_id(0), each, tw.num_programs(0)):
        total = sum_of_ranks(x, me * each + i, BN).to(y.dtype)
        for distance in tw.range(world):
            peer = (me + distance) % world
            token = tw.put(y.peer(peer), me * each + i, total)
            tw.signal(done[i, me], peer, after=token)
    for i in tw.range(tw.program_id(0), each, tw.num_programs(0)):
        tw.wait(done[i])


def tile_of(count: int, in_parts: bool) -> dict[str, int]:
    """A tile for each block, of `ELEMENTS` at most, or of up to `MOST_PARTS` parts of that; and warps that hold it."""
    size = 1 << max(10, ((count - 1) // BLOCKS).bit_length())
    parts = min(max(1, size // ELEMENTS), MOST_PARTS if in_parts else 1)
    part = min(size, ELEMENTS)
    meta = {"BN": parts * part, "num_warps": 4 if part <= 1024 else 8}
    return {**meta, "PARTS": parts} if in_parts else meta


def all_reduce(world: Any, x: Any, y: Any, *, algorithm: str | None = None, **meta: int) -> None:
    """``y = sum over ranks of x``: both (N,). Equal bits on every rank.

    ``algorithm``: "push" takes any arrays, "pull" a symmetric x, "two-shot" a symmetric x and y. None: of those that
    are possible "two-shot" where it moves less, "pull" for many elements, else "push".
    """
    size, count = world.size, own(x).shape[0]
    if algorithm is None:
        symmetric_x, symmetric_y = (isinstance(array, tw.SymmetricTensor) for array in (x, y))
        algorithm = "pull" if symmetric_x and count >= PULLED else "push"
        if symmetric_x and symmetric_y and size > 2 and count >= TWO_SHOT:
            algorithm = "two-shot"
    meta = {**tile_of(count, algorithm == "push"), **meta}
    tiles = tw.cdiv(count, meta["BN"])
    grid = (min(tiles, BLOCKS),)
    if algorithm == "pull":
        world.launch(all_reduce_pull, grid, x, y, **meta)
    elif algorithm == "push":
        slots = symmetric(world, "all_reduce", (size, count), own(x).dtype)
        world.launch(all_reduce_push, grid, x, y, slots, flags(world, "all_reduce_push", (tiles, size)), **meta)
    elif algorithm == "two-shot":
        each = share(tiles, size)
        done = flags(world, "all_reduce_two_shot", (each, size))
        world.launch(all_reduce_two_shot, (min(each, BLOCKS),), x, y, done, **meta)
    else:
        raise ValueError(f"algorithm={algorithm!r} is none of push, pull and two-shot")


def reference(x: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The sum in float64."""
    return np.sum([part.astype(np.float64) for part in x], axis=0)
