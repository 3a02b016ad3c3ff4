"""Kernels that communicate, small enough to read, for tests on interpreted and emulated ranks."""

from __future__ import annotations

import tilewright as tw


@tw.kernel
def all_reduce(x: tw.Tensor, y: tw.Tensor, slots: tw.Symmetric, flags: tw.Symmetric, *, N: tw.constexpr):
    """One shot: y = the sum of x (M, n) over ranks; slots (world, M, n), flags (world, programs)."""
    me, world, i = tw.rank(), tw.world_size(), tw.program_id(0)
    tile = tw.load(x, (i, 0), (1, N))
    for peer in range(world):
        token = tw.put(slots.peer(peer)[me], (i, 0), tile)
        tw.signal(flags[me, i], peer, after=token)
    total = tw.zeros((1, N), tw.float32)
    for source in range(world):
        arrived = tw.wait(flags[source, i])
        total += tw.load(slots[source], (i, 0), (1, N), after=arrived).to(tw.float32)
    tw.store(y, (i, 0), total.to(y.dtype))


@tw.kernel
def gemm_reduce_scatter(
    a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, parts: tw.Symmetric, flags: tw.Symmetric,
    *, BM: tw.constexpr, BN: tw.constexpr, BK: tw.constexpr,
):  # fmt: skip
    """c (M / world, N) = this rank's rows of the sum of a (M, K / world) @ b (K / world, N) over ranks.

    Grid (N / BN, M / world / BM, world); parts (world, M / world, N), flags (world, M / world / BM, N / BN).
    """
    me, world = tw.rank(), tw.world_size()
    n, m, turn = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    owner = (me + 1 + turn) % world
    rows = owner * tw.num_programs(1) + m
    acc = tw.zeros((BM, BN), tw.float32)
    for k in range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (rows, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    if owner != me:
        token = tw.put(parts.peer(owner)[me], (m, n), acc.to(parts.dtype))
        tw.signal(flags[me, m, n], owner, after=token)
    else:
        for step in range(1, world):
            source = (me + step) % world
            arrived = tw.wait(flags[source, m, n])
            acc += tw.load(parts[source], (m, n), (BM, BN), after=arrived).to(tw.float32)
        tw.store(c, (m, n), acc.to(c.dtype))


@tw.kernel
def gather_gemm_pull(
    a: tw.Symmetric, b: tw.Tensor, c: tw.Tensor, *, BM: tw.constexpr, BN: tw.constexpr, BK: tw.constexpr
):
    """c (world * M, N) = all ranks' a (M, K), one below the other, times b (K, N). Grid (N / BN, M / BM, world)."""
    n, m, turn = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    source = (tw.rank() + turn) % tw.world_size()
    acc = tw.zeros((BM, BN), tw.float32)
    for k in range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.get(a.peer(source), (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(c, (source * tw.num_programs(1) + m, n), acc.to(c.dtype))


@tw.kernel
def gather_gemm_push(
    a: tw.Symmetric, b: tw.Tensor, c: tw.Tensor, whole: tw.Symmetric, flags: tw.Symmetric,
    *, BM: tw.constexpr, BN: tw.constexpr, BK: tw.constexpr,
):  # fmt: skip
    """The same with M = BM: the first program of each rank sends its rows to all others' ``whole`` (world, M, K)."""
    me, world = tw.rank(), tw.world_size()
    n, turn = tw.program_id(0), tw.program_id(2)
    if n == 0 and turn == 0:
        for step in range(world):
            peer = (me + step) % world
            for k in range(tw.cdiv(a.shape[1], BK)):
                token = tw.put(whole.peer(peer)[me], (0, k), tw.load(a, (0, k), (BM, BK)))
            tw.signal(flags[me], peer, after=token)
    source = (me + turn) % world
    arrived = tw.wait(flags[source])
    acc = tw.zeros((BM, BN), tw.float32)
    for k in range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(whole[source], (0, k), (BM, BK), after=arrived), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(c, (source, n), acc.to(c.dtype))


@tw.kernel
def add_to_first(
    x: tw.Tensor, y: tw.Tensor, total: tw.Symmetric, flags: tw.Symmetric, *, M: tw.constexpr, N: tw.constexpr
):
    """Everybody adds x to rank 0's total, which rank 0 copies to y."""
    token = tw.reduce_put(total.peer(0), (0, 0), tw.load(x, (0, 0), (M, N)))
    tw.signal(flags[tw.rank()], 0, after=token)
    if tw.rank() == 0:
        arrived = tw.wait(flags)
        tw.store(y, (0, 0), tw.load(total, (0, 0), (M, N), after=arrived))


@tw.kernel
def meet(y: tw.Tensor, places: tw.Symmetric, flags: tw.Symmetric):
    """y (world, programs): everybody reads everybody's element of places (programs), after a barrier."""
    i = tw.program_id(0)
    token = tw.put(places, i, tw.full((1,), tw.rank() + 1, tw.int32))
    together = tw.barrier(flags[i], after=token)
    for peer in range(tw.world_size()):
        tw.store(y[peer], i, tw.get(places.peer(peer), i, (1,), after=together))


@tw.kernel
def wait_in_vain(flags: tw.Symmetric):
    tw.wait(flags[3])


@tw.kernel
def collectives(
    x: tw.Tensor, parts: tw.Tensor, summed: tw.Tensor, shifted: tw.Tensor, gathered: tw.Tensor, scattered: tw.Tensor,
    exchanged: tw.Tensor, buffers: tw.Symmetric, flags: tw.Symmetric, *, N: tw.constexpr,
):  # fmt: skip
    """All collectives on tiles: x (programs, N), parts (world, programs, N); buffers (5, programs, world, 1, N)."""
    i, origin, shape = tw.program_id(0), (tw.program_id(0), 0), (1, N)
    tile = tw.load(x, origin, shape)
    tw.store(summed, origin, tw.all_reduce(tile, buffers[0, i], flags[0, i]))
    tw.store(shifted, origin, tw.ring_shift(tile, buffers[1, i], flags[1, i]))
    arrived = tw.all_gather(tile, buffers[2, i], flags[2, i])
    for rank in range(tw.world_size()):
        tw.store(gathered[rank], origin, tw.load(buffers[2, i, rank], (0, 0), shape, after=arrived))
    tw.store(scattered, origin, tw.reduce_scatter(parts, origin, shape, buffers[3, i], flags[3, i]))
    arrived = tw.all_to_all(parts, origin, shape, buffers[4, i], flags[4, i])
    for rank in range(tw.world_size()):
        tw.store(exchanged[rank], origin, tw.load(buffers[4, i, rank], (0, 0), shape, after=arrived))
