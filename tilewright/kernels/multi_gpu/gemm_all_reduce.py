"""Matrix product whose sum over ranks everybody gets: ``c = sum over p of a_p @ b_p`` on each rank."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.gemm import configuration, product
from tilewright.kernels.multi_gpu import copy_engine
from tilewright.kernels.multi_gpu.gemm_reduce_scatter import multiple, send_or_add
from tilewright.kernels.multi_gpu.workspace import flags, own, share, symmetric

#: up to so many elements of c each rank sends its whole product to every other one, which takes one hop instead of two
ONE_SHOT = 1 << 20


@tw.kernel
def gemm_all_reduce(
    a: tw.Tensor,
    b: tw.Tensor,
    parts: tw.Symmetric,
    sent: tw.Symmetric,
    c: tw.Symmetric,
    done: tw.Symmetric,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
    MULTIPLE: tw.constexpr = 1,
) -> None:
    """``c``: the sum over ranks of ``a @ b``, rows summed by their owner. Grid: (cdiv(R, BM), cdiv(N, BN), world + 1).

    As `gemm_reduce_scatter`, but c (world, R, N) is symmetric, and the owner of a tile puts the sum into everybody's;
    ``done``, flags like ``sent``, say so. The first programs of rows of tiles wait for that in the last step. Row i of
    the product is ``c[i // R, i % R]``: of c as one matrix the rows from M on are not the product's.
    """
    m, n, step = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    me, world = tw.rank(), tw.world_size()
    owner = (me + 1 + step) % world
    tw.assume(parts.shape[1] % MULTIPLE == 0)
    if step < world:
        acc = product(a.offset(owner * parts.shape[1], 0), b, m, n, BM, BN, BK)
        total = send_or_add(acc, parts, sent, m, n, owner).to(c.dtype)
        if owner == me:
            for distance in tw.range(world):
                tokens = tw.put(c.peer((me + distance) % world)[me], (m, n), total)
            for distance in tw.range(world):
                tw.signal(done[m, n, me], (me + distance) % world, after=tokens)
    elif n == 0:
        tw.wait(done[m])


@tw.kernel
def gemm_all_reduce_one_shot(
    a: tw.Tensor,
    b: tw.Tensor,
    parts: tw.Symmetric,
    sent: tw.Symmetric,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 128,
) -> None:
    """``c``: the sum over ranks of ``a @ b``, summed by every rank. Grid: (cdiv(M, BM), cdiv(N, BN)).

    a (M, K) and b (K, N) with the rank's part of K, c (M, N), parts (world, M, N), ``sent`` flags (row tiles, column
    tiles, world). Each rank adds the same rounded numbers in the same order: all get equal bits.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    me, world = tw.rank(), tw.world_size()
    part = product(a, b, m, n, BM, BN, BK).to(parts.dtype)
    for distance in tw.range(world):
        peer = (me + 1 + distance) % world
        token = tw.put(parts.peer(peer)[me], (m, n), part)
        tw.signal(sent[m, n, me], peer, after=token)
    arrived = tw.wait(sent[m, n])
    total = tw.zeros((BM, BN), tw.float32)
    for source in tw.range(world):
        total = total + tw.load(parts[source], (m, n), (BM, BN), after=arrived).to(tw.float32)
    tw.store(c, (m, n), total.to(c.dtype))


def gemm_ar(
    world: Any, a: Any, b: Any, c: Any, *, one_shot: bool | None = None, copies: bool | None = None, **meta: int
) -> None:
    """``c``: the sum of the ranks' ``a @ b`` on each rank. a (M, K), b (K, N) with the rank's part of K.

    ``c`` is a symmetric tensor (world, cdiv(M, world), N), that is a matrix of at least M rows. ``one_shot``: every
    rank sums up everything, which takes M to be a multiple of the number of ranks; None: where c is small.
    ``copies``: the copy engines send parts and sums (`copy_engine.gemm_all_reduce`); None: where that pays and nothing
    else is asked for.
    """
    (rows, columns), size, each = (own(a).shape[0], own(b).shape[1]), world.size, c.shape[1]
    if c.shape != (size, share(rows, size), columns):
        raise ValueError(f"c is {c.shape}, not {(size, share(rows, size), columns)}: a part of the rows for each rank")
    if copies or (copies is None and one_shot is None and not meta and copy_engine.pays(rows, columns, size)):
        copy_engine.gemm_all_reduce(world, a, b, c, **meta)
        return
    meta = {**configuration(rows, columns), **meta}
    if one_shot is None:
        one_shot = rows * columns <= ONE_SHOT and rows == size * each
    if one_shot:
        tiles = tw.cdiv(rows, meta["BM"]), tw.cdiv(columns, meta["BN"])
        parts = symmetric(world, "gemm_ar_one_shot", (size, rows, columns), c.dtype)
        sent = flags(world, "gemm_ar_one_shot", (*tiles, size))
        world.launch(gemm_all_reduce_one_shot, tiles, a, b, parts, sent, c.reshape(rows, columns), **meta)
        return
    tiles = tw.cdiv(each, meta["BM"]), tw.cdiv(columns, meta["BN"])
    parts = symmetric(world, "gemm_rs", (size, each, columns), c.dtype)
    sent, done = flags(world, "gemm_rs", (size, *tiles)), flags(world, "gemm_ar", (*tiles, size))
    meta = {"MULTIPLE": multiple(each), **meta}
    world.launch(gemm_all_reduce, (*tiles, size + 1), a, b, parts, sent, c, done, **meta)


def reference(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The sum in float64."""
    products = [x.astype(np.float64) @ y.astype(np.float64) for x, y in zip(a, b, strict=True)]
    total: np.ndarray[Any, Any] = np.sum(products, axis=0)
    return total
