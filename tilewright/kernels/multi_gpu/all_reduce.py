"""Sums over ranks that everybody gets: ``y = sum over p of x_p``, in one hop or in two."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.multi_gpu.workspace import flags, own, packets, share, symmetric

#: elements of a tile or a part of one, and the blocks of a launch at most: all of them run at the same time
ELEMENTS, BLOCKS = 4096, 264
#: signalled tiles: about so many, of at most so many parts
SIGNALS, MOST_PARTS = 128, 8
#: with more than two ranks and from so many elements on each rank sums up a share: fewer bytes move, in more hops
TWO_SHOT = 1 << 17
#: up to so many bytes the way over the link counts, not what goes over it, and from so many on reading the peers' x is
#: faster than being sent it (docs/performance.md)
PACKETS, PULLED = 1 << 17, 1 << 23


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


@tw.function
def load_parts_of(x: Any, first: Any, BN: tw.constexpr, COUNT: tw.constexpr, after: Any = None) -> Any:
    """COUNT tiles of BN elements from the ``first`` on, all of them on their way at once."""
    parts: Any = ()
    for part in tw.static_range(COUNT):
        parts = (*parts, tw.load(x, first + part, BN, after=after))
    return parts


@tw.function
def put_parts_of(target: Any, first: Any, parts: Any, COUNT: tw.constexpr) -> Any:
    """Put COUNT tiles to the places from the ``first`` on; gives the tokens."""
    tokens: Any = ()
    for part in tw.static_range(COUNT):
        tokens = (*tokens, tw.put(target, first + part, parts[part]))
    return tokens


@tw.function
def zeros_of(BN: tw.constexpr, COUNT: tw.constexpr) -> Any:
    parts: Any = ()
    for _ in tw.static_range(COUNT):
        parts = (*parts, tw.zeros((BN,), tw.float32))
    return parts


@tw.function
def add_parts(totals: Any, parts: Any, COUNT: tw.constexpr) -> Any:
    sums: Any = ()
    for part in tw.static_range(COUNT):
        sums = (*sums, totals[part] + parts[part].to(tw.float32))
    return sums


@tw.kernel
def all_reduce_push(
    x: tw.Tensor,
    y: tw.Tensor,
    slots: tw.Symmetric,
    sent: tw.Symmetric,
    *,
    BN: tw.constexpr = ELEMENTS,
    PARTS: tw.constexpr = 1,
    AHEAD: tw.constexpr = 1,
) -> None:
    """The same, where every rank puts its x into the peers' ``slots`` (2, world, N), launches in turn into each half.

    ``sent``: flags (2, cdiv(N, BN), world - 1). A tile goes in PARTS parts, which are signalled together; AHEAD of them
    are on their way from memory at once. Grid as of `all_reduce_pull`.
    """
    tw.static_assert(PARTS % AHEAD == 0, "AHEAD divides PARTS")
    me, world = tw.rank(), tw.world_size()
    places, flags = slots[tw.turn()], sent[tw.turn()]
    for tile in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BN), tw.num_programs(0)):
        for hop in tw.range(1, world):
            peer = (me + hop) % world
            for first in tw.range(tile * PARTS, (tile + 1) * PARTS, AHEAD):
                parts = load_parts_of(x, first, BN // PARTS, AHEAD)
                tokens = put_parts_of(places.peer(peer)[me], first, parts, AHEAD)
            tw.signal(flags[tile, hop - 1], peer, after=tokens)
    for tile in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BN), tw.num_programs(0)):
        arrived = tw.wait(flags[tile])
        for first in tw.range(tile * PARTS, (tile + 1) * PARTS, AHEAD):
            own = load_parts_of(x, first, BN // PARTS, AHEAD)
            totals = zeros_of(BN // PARTS, AHEAD)
            for source in tw.range(me):
                totals = add_parts(totals, load_parts_of(places[source], first, BN // PARTS, AHEAD, arrived), AHEAD)
            totals = add_parts(totals, own, AHEAD)
            for source in tw.range(me + 1, world):
                totals = add_parts(totals, load_parts_of(places[source], first, BN // PARTS, AHEAD, arrived), AHEAD)
            for part in tw.static_range(AHEAD):
                tw.store(y, first + part, totals[part].to(y.dtype))


@tw.kernel
def all_reduce_packets(x: tw.Tensor, y: tw.Tensor, packets: tw.Symmetric, *, BN: tw.constexpr = 1024) -> None:
    """The same, where every rank sends its x to the peers as packets, which needs one way over the link.

    ``packets``: int64 (2, world, cdiv(N, BN), BN * bytes of an element / 4). Grid as of `all_reduce_pull`.
    """
    me, world = tw.rank(), tw.world_size()
    places = packets[tw.turn()]
    for tile in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BN), tw.num_programs(0)):
        part = tw.load(x, tile, BN)
        for hop in tw.range(1, world):
            tw.send(places.peer((me + hop) % world)[me, tile], part)
    for tile in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BN), tw.num_programs(0)):
        own = tw.load(x, tile, BN)
        total = tw.zeros((BN,), tw.float32)
        for source in tw.range(me):
            total = total + tw.receive(places[source, tile], BN, x.dtype).to(tw.float32)
        total = total + own.to(tw.float32)
        for source in tw.range(me + 1, world):
            total = total + tw.receive(places[source, tile], BN, x.dtype).to(tw.float32)
        tw.store(y, tile, total.to(y.dtype))


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
    if in_parts:
        parts = min(max(1, 1 << ((count - 1) // (SIGNALS * ELEMENTS)).bit_length()), MOST_PARTS)
        alone = parts > 1 and count <= SIGNALS * parts * ELEMENTS  # a block on each SM, and no other to wait beside
        return {"BN": parts * ELEMENTS, "PARTS": parts, "AHEAD": 2 if alone else 1, "num_warps": 16}
    size = min(1 << max(10, ((count - 1) // BLOCKS).bit_length()), ELEMENTS)
    return {"BN": size, "num_warps": 4 if size <= 1024 else 8}


def all_reduce(world: Any, x: Any, y: Any, *, algorithm: str | None = None, **meta: int) -> None:
    """``y = sum over ranks of x``: both (N,). Equal bits on every rank.

    ``algorithm``: "packets" and "push" take any arrays, "pull" a symmetric x, "two-shot" a symmetric x and y. None:
    of those that are possible "two-shot" where it moves less, "packets" for few bytes, "pull" for many, else "push".
    """
    size, count = world.size, own(x).shape[0]
    if algorithm is None:
        symmetric_x, symmetric_y = (isinstance(array, tw.SymmetricTensor) for array in (x, y))
        algorithm = "packets" if own(x).nbytes <= PACKETS else "push"
        if symmetric_x and own(x).nbytes >= PULLED:
            algorithm = "pull"
        if symmetric_x and symmetric_y and size > 2 and count >= TWO_SHOT:
            algorithm = "two-shot"
    meta = {**tile_of(count, algorithm == "push"), **meta}
    tiles = tw.cdiv(count, meta["BN"])
    grid = (min(tiles, BLOCKS),)
    if algorithm == "pull":
        world.launch(all_reduce_pull, grid, x, y, **meta)
    elif algorithm == "push":
        slots = symmetric(world, "all_reduce_push", (2, size, count), own(x).dtype)
        world.launch(all_reduce_push, grid, x, y, slots, flags(world, "all_reduce_push", (2, tiles, size - 1)), **meta)
    elif algorithm == "packets":
        words = meta["BN"] * (own(x).nbytes // max(count, 1)) // 4
        world.launch(all_reduce_packets, grid, x, y, packets(world, "all_reduce", (2, size, tiles, words)), **meta)
    elif algorithm == "two-shot":
        each = share(tiles, size)
        done = flags(world, "all_reduce_two_shot", (each, size))
        world.launch(all_reduce_two_shot, (min(each, BLOCKS),), x, y, done, **meta)
    else:
        raise ValueError(f"algorithm={algorithm!r} is none of packets, push, pull and two-shot")


def reference(x: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The sum in float64."""
    return np.sum([part.astype(np.float64) for part in x], axis=0)
