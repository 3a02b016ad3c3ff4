"""Matrix product whose sum over ranks is divided among them: ``c_r = rows_r(sum over p of a_p @ b_p)``."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.gemm import configuration, product
from tilewright.kernels.multi_gpu import copy_engine
from tilewright.kernels.multi_gpu.workspace import flags, own, share, symmetric

#: elements of 16 bits that the copy engine's lines begin at a multiple of
LINE = 8


@tw.function
def send_or_add(acc: Any, parts: Any, sent: Any, m: Any, n: Any, owner: Any) -> Any:
    """A peer's tile goes to its owner; an own tile gets what the peers have sent, in the order of ranks.

    acc (BM, BN) float32; parts (world, R, N) symmetric, sent (world, row tiles, column tiles) flags. Gives the sum,
    of which only an own tile is complete.
    """
    me, world = tw.rank(), tw.world_size()
    total = acc
    if owner != me:
        token = tw.put(parts.peer(owner)[me], (m, n), acc.to(parts.dtype))
        tw.signal(sent[me, m, n], owner, after=token)
    else:
        for hop in tw.range(1, world):
            source = (me + hop) % world
            arrived = tw.wait(sent[source, m, n])
            total = total + tw.load(parts[source], (m, n), acc.shape, after=arrived).to(tw.float32)
    return total


@tw.kernel
def gemm_reduce_scatter(
    a: tw.Tensor,
    b: tw.Tensor,
    parts: tw.Symmetric,
    sent: tw.Symmetric,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
    MULTIPLE: tw.constexpr = 1,
) -> None:
    """``c``: this rank's rows of the sum over ranks of ``a @ b``. Grid: (cdiv(R, BM), cdiv(N, BN), world).

    a (M, K) and b (K, N) with the rank's part of K, R = cdiv(M, world), c (up to R, N): rows from rank * R on.
    ``parts`` (world, R, N) gets what the peers send, in its dtype; ``sent`` (world, cdiv(R, BM), cdiv(N, BN)) flags.
    Peers' rows come first, own rows last, when all has arrived. Sums in float32, in an order that does not change.
    R is a multiple of ``MULTIPLE``; the copy engine takes an ``a`` with contiguous columns where it is 8.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    owner = (tw.rank() + 1 + tw.program_id(2)) % tw.world_size()
    tw.assume(parts.shape[1] % MULTIPLE == 0)
    acc = product(a.offset(owner * parts.shape[1], 0), b, m, n, BM, BN, BK)
    total = send_or_add(acc, parts, sent, m, n, owner)
    if owner == tw.rank():
        tw.store(c, (m, n), total.to(c.dtype))


@tw.kernel
def gemm_reduce_scatter_any_order(
    a: tw.Tensor,
    b: tw.Tensor,
    sums: tw.Symmetric,
    sent: tw.Symmetric,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
    MULTIPLE: tw.constexpr = 1,
) -> None:
    """The same, where peers add to ``sums`` (R, N), which is zero before: less memory, but the rounding may differ.

    ``sent`` flags (cdiv(R, BM), cdiv(N, BN), world).
    """
    m, n = tw.program_id(0), tw.program_id(1)
    me = tw.rank()
    owner = (me + 1 + tw.program_id(2)) % tw.world_size()
    tw.assume(sums.shape[0] % MULTIPLE == 0)
    acc = product(a.offset(owner * sums.shape[0], 0), b, m, n, BM, BN, BK)
    if owner != me:
        token = tw.reduce_put(sums.peer(owner), (m, n), acc.to(sums.dtype))
        tw.signal(sent[m, n, me], owner, after=token)
    else:
        tw.signal(sent[m, n, me], me)
        arrived = tw.wait(sent[m, n])
        total = acc + tw.load(sums, (m, n), (BM, BN), after=arrived).to(tw.float32)
        tw.store(c, (m, n), total.to(c.dtype))


@tw.kernel
def clear(x: tw.Tensor, *, BM: tw.constexpr = 16, BN: tw.constexpr = 256) -> None:
    """``x = 0``: x (M, N). Grid: (cdiv(M, BM), cdiv(N, BN))."""
    tw.store(x, (tw.program_id(0), tw.program_id(1)), tw.zeros((BM, BN), x.dtype))


def gemm_rs(
    world: Any, a: Any, b: Any, c: Any, *, any_order: bool = False, copies: bool | None = None, **meta: int
) -> None:
    """``c`` of each rank: its rows of the sum of the ranks' ``a @ b``; see `gemm_reduce_scatter`.

    Tile sizes are chosen as for a product of (M, N) unless given. The parts of peers travel in the dtype of ``c``.
    ``any_order``: they are added to one float32 matrix as they come, instead of each having a place of its own.
    ``copies``: the copy engines send them in chunks (`copy_engine.gemm_reduce_scatter`); None: where that pays and
    nothing else is asked for.
    """
    (rows, columns), size = (own(a).shape[0], own(b).shape[1]), world.size
    if copies or (copies is None and not any_order and not meta and copy_engine.pays(rows, columns, size)):
        copy_engine.gemm_reduce_scatter(world, a, b, c, **meta)
        return
    each = share(rows, size)
    meta = {**configuration(rows, columns), "MULTIPLE": multiple(each), **meta}
    tiles = tw.cdiv(each, meta["BM"]), tw.cdiv(columns, meta["BN"])
    if any_order:
        sums = symmetric(world, "gemm_rs", (each, columns), "float32")
        sent = flags(world, "gemm_rs", (*tiles, size))
        world.launch(clear, (tw.cdiv(each, 16), tw.cdiv(columns, 256)), sums)
        world.launch(gemm_reduce_scatter_any_order, (*tiles, size), a, b, sums, sent, c, **meta)
        return
    parts = symmetric(world, "gemm_rs", (size, each, columns), own(c).dtype)
    sent = flags(world, "gemm_rs", (size, *tiles))
    world.launch(gemm_reduce_scatter, (*tiles, size), a, b, parts, sent, c, **meta)


def multiple(rows: int) -> int:
    """``MULTIPLE`` for parts of so many rows: what the copy engine asks for, or nothing."""
    return LINE if rows % LINE == 0 else 1


def reference(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Each rank's rows in float64."""
    total = sum(x.astype(np.float64) @ y.astype(np.float64) for x, y in zip(a, b, strict=True))
    each = share(a[0].shape[0], len(a))
    return [total[rank * each : (rank + 1) * each] for rank in range(len(a))]
