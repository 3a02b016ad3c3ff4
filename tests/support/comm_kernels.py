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
