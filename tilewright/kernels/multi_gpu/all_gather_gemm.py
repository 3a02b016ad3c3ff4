"""Matrix product with rows gathered from all ranks: ``c_r = concat over p of (a_p) @ b_r``."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.gemm import configuration, product
from tilewright.kernels.multi_gpu.pushing import Pushers, load_parts, place_of, put_parts
from tilewright.kernels.multi_gpu.workspace import flags, own

#: columns that a pushing program moves at a time, and in how many parts it moves a tile of rows
WIDTH, PARTS = 512, 4
#: flags of a row tile, which the program that needs it looks at one after the other
FLAGS = 4
#: row tiles that run at the same time, column by column: what they read stays in L2
WINDOW = 8


@tw.kernel
def all_gather_gemm(
    a: tw.Symmetric,
    b: tw.Tensor,
    c: tw.Tensor,
    arrived: tw.Symmetric,
    communicators: tw.int32,
    rounds: tw.int32,
    period: tw.int32,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
    WIDTH: tw.constexpr = WIDTH,
    PARTS: tw.constexpr = PARTS,
    FLAGS: tw.constexpr = FLAGS,
    WINDOW: tw.constexpr = WINDOW,
) -> None:
    """``c[p] = a_p @ b``: a (world, R, K) whose part ``a[rank]`` is there before the launch; the rest arrives.

    b (K, N), c (world, R, N), ``arrived`` flags (world, cdiv(R, BM), FLAGS). Some programs push the own rows,
    see `tilewright.kernels.multi_gpu.pushing`; the others take the own rows first and then wait for each row tile of
    the peers, that which was sent first first. Grid: (communicators * rounds + world * row tiles * column tiles,).
    """
    me, world = tw.rank(), tw.world_size()
    rows, columns, slices = tw.cdiv(a.shape[1], BM), tw.cdiv(b.shape[1], BN), tw.cdiv(a.shape[2], WIDTH)
    pushes, number, tile = place_of(communicators, rounds, period)
    if pushes:
        each = tw.cdiv(slices, FLAGS)
        for unit in tw.range(number, rows * FLAGS, communicators * rounds):
            row, group = unit // FLAGS, unit % FLAGS
            for column in tw.range(group * each, tw.minimum((group + 1) * each, slices)):
                tiles = load_parts(a[me], row, column, BM, WIDTH, PARTS, tw.wait(arrived[me, row, group], when=False))
                for hop in tw.range(1, world):
                    tokens = put_parts(a.peer((me + hop) % world)[me], row, column, tiles, PARTS)
            for hop in tw.range(1, world):
                tw.signal(arrived[me, row, group], (me + hop) % world, after=tokens)
    else:
        distance, place = tile // (rows * columns), tile % (rows * columns)
        source = (me + world - distance) % world
        first = place // (WINDOW * columns) * WINDOW
        height = tw.minimum(rows - first, WINDOW)
        inner = place % (WINDOW * columns)
        m, n = first + inner % height, inner // height
        here = tw.wait(arrived[source, m], when=source != me)
        acc = product(a[source], b, m, n, BM, BN, BK, here)
        tw.store(c[source], (m, n), acc.to(c.dtype))


#: bytes that one SM of an H200 pushes in a microsecond, and products (multiply and add) that it does in one
PUSHED, PRODUCTS = 6.8e3, 2.9e6


def pushing_programs(bytes_: float, products: float) -> int:
    """How many programs push so many bytes, if each takes as long as a tile of so many ``products``."""
    return max(1, round(bytes_ / PUSHED / (products / PRODUCTS)))


def ag_gemm(world: Any, a: Any, b: Any, c: Any, *, communicators: int | None = None, **meta: int) -> None:
    """``c[p] = a_p @ b`` on each rank, of a symmetric ``a`` (world, R, K) whose part ``a[rank]`` the rank has written.

    b (K, N), c (world, R, N). Afterwards ``a`` is whole on every rank. Tile sizes, and how many
    blocks push at the same time (``communicators``), are chosen unless given.
    """
    size, each, depth = a.shape
    columns = own(b).shape[1]
    meta = {**configuration(size * each, columns), **meta}
    rows, across = tw.cdiv(each, meta["BM"]), tw.cdiv(columns, meta["BN"])
    arrived = flags(world, "ag_gemm", (size, rows, FLAGS))
    programs = pushing_programs((size - 1) * each * depth * 2, meta["BM"] * meta["BN"] * depth)
    pushers = Pushers.choose(min(programs, rows * FLAGS), rows * across, communicators)
    grid = (pushers.programs + size * rows * across,)
    numbers = pushers.communicators, pushers.rounds, pushers.period
    world.launch(all_gather_gemm, grid, a, b, c, arrived, *numbers, **meta)


def reference(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Each rank's (world, R, N) in float64; ``a`` has each rank's own rows (R, K)."""
    rows = np.stack(a).astype(np.float64)
    return [rows @ y.astype(np.float64) for y in b]
