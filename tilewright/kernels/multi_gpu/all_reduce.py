"""Sums over ranks that everybody gets: ``y = sum over p of x_p``, in one hop or in two."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.multi_gpu.workspace import flags, share

#: elements of a tile, and the blocks of a launch at most: all of them run at the same time
ELEMENTS, BLOCKS = 4096, 264
#: with more than two ranks and from so many elements on each rank sums up a share: fewer bytes move, in more hops
TWO_SHOT = 1 << 17


@tw.function
def sum_of_ranks(x: Any, tile: Any, BN: tw.constexpr) -> Any:
    """A tile of the sum, in float32 and in the order of ranks: equal bits on every rank."""
    total = tw.zeros((BN,), tw.float32)
    for source in tw.range(tw.world_size()):
        total = total + tw.get(x.peer(source), tile, BN).to(tw.float32)
    return total


@tw.kernel
def all_reduce_one_shot(x: tw.Symmetric, y: tw.Tensor, *, BN: tw.constexpr = ELEMENTS) -> None:
    """``y``: the sum of the ranks' x; both (N,). Grid: any number of programs that run at the same time.

    Every rank reads all of the peers' x. There are no flags: x is there when a peer has begun the launch.
    """
    for tile in tw.range(tw.program_id(0), tw.cdiv(x.shape[0], BN), tw.num_programs(0)):
        tw.store(y, tile, sum_of_ranks(x, tile, BN).to(y.dtype))


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


def all_reduce(world: Any, x: Any, y: Any, *, two_shot: bool | None = None, **meta: int) -> None:
    """``y = sum over ranks of x``: symmetric tensors (N,). In one shot, y may be an array of each rank."""
    elements, size = meta.get("BN", ELEMENTS), world.size
    if two_shot is None:
        two_shot = size > 2 and x.shape[0] >= TWO_SHOT
    tiles = tw.cdiv(x.shape[0], elements)
    if not two_shot:
        world.launch(all_reduce_one_shot, (min(tiles, BLOCKS),), x, y, **meta)
        return
    each = share(tiles, size)
    done = flags(world, "all_reduce", (each, size))
    world.launch(all_reduce_two_shot, (min(each, BLOCKS),), x, y, done, **meta)


def reference(x: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The sum in float64."""
    return np.sum([part.astype(np.float64) for part in x], axis=0)
