"""Collectives along any axes: all-gather, reduce-scatter and all-to-all.

Tensors are taken as matrices of parts, so that one kernel serves all axes: what lies before an axis makes rows, the
axis and what lies behind it one row of parts. A program sends its tiles and then waits for those of the same program of
all ranks. A flag for each tile would cost more than it tells: a signal waits until all that was put before has arrived,
and links want many bytes under way.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.multi_gpu.pushing import load_parts, put_parts
from tilewright.kernels.multi_gpu.workspace import flags, own

#: elements of a tile and its parts, and the blocks of a launch at most: all of them run at the same time
ELEMENTS, PARTS, BLOCKS = 16384, 4, 264
#: elements of a tile that `reduce_scatter` adds up
REDUCED = 8192


@tw.kernel
def all_gather(
    x: tw.Tensor,
    y: tw.Symmetric,
    done: tw.Symmetric,
    *,
    BM: tw.constexpr = 8,
    BN: tw.constexpr = 4096,
    PARTS: tw.constexpr = PARTS,
) -> None:
    """``y[:, p] = x_p`` on every rank: x (A, C), y (A, world, C), ``done`` flags (programs, world)."""
    me, world, columns = tw.rank(), tw.world_size(), tw.cdiv(x.shape[1], BN)
    tiles, program = tw.cdiv(x.shape[0], BM) * columns, tw.program_id(0)
    for tile in tw.range(program, tiles, tw.num_programs(0)):
        m, n = tile // columns, tile % columns
        parts = load_parts(x, m, n, BM, BN, PARTS)
        for distance in tw.range(world):
            peer = (me + 1 + distance) % world
            tokens = put_parts(y.peer(peer).permute(1, 0, 2)[me], m, n, parts, PARTS)
    for peer in tw.range(world):
        tw.signal(done[program, me], peer, after=tokens)
    tw.wait(done[program])


@tw.kernel
def reduce_scatter(x: tw.Symmetric, y: tw.Tensor, *, BM: tw.constexpr = 8, BN: tw.constexpr = 1024) -> None:
    """``y = sum over p of x_p[:, rank]``: x (A, world, C), y (A, C). Reads the peers' x, in the order of ranks."""
    me, columns = tw.rank(), tw.cdiv(y.shape[1], BN)
    for tile in tw.range(tw.program_id(0), tw.cdiv(y.shape[0], BM) * columns, tw.num_programs(0)):
        m, n = tile // columns, tile % columns
        total = tw.zeros((BM, BN), tw.float32)
        for source in tw.range(tw.world_size()):
            part = tw.get(x.peer(source).permute(1, 0, 2)[me], (m, n), (BM, BN))
            total = total + part.to(tw.float32)
        tw.store(y, (m, n), total.to(y.dtype))


@tw.kernel
def all_to_all(
    x: tw.Tensor,
    y: tw.Symmetric,
    done: tw.Symmetric,
    *,
    SCATTER: tw.constexpr = 0,
    GATHER: tw.constexpr = 1,
    BM: tw.constexpr = 8,
    BN: tw.constexpr = 4096,
    PARTS: tw.constexpr = PARTS,
) -> None:
    """Part r of each rank's x, along one axis, goes to rank r, which joins them along another.

    Of tensors (O, A, M, C) the axes 0: A and 1: C are scattered and gathered. The scattered one is split in x, the
    gathered one in y: (O, world, A, M, C) where that is A and (O, A, M, world, C) where it is C, with A and C now the
    sizes of a part. ``done`` flags (programs, world).
    """
    me, world = tw.rank(), tw.world_size()
    # views (world, O, M, A, C) of both
    from_ = x.permute(1, 0, 3, 2, 4)
    if SCATTER == 1:
        from_ = x.permute(3, 0, 2, 1, 4)
    rows, columns = tw.cdiv(from_.shape[3], BM), tw.cdiv(from_.shape[4], BN)
    middle = from_.shape[2]
    tiles = from_.shape[1] * middle * rows * columns
    program, programs = tw.program_id(0), tw.num_programs(0)
    for unit in tw.range(tw.cdiv(tw.maximum(tiles - program, 0), programs) * world):
        # at any time some programs copy to each peer, and some within the own rank, which needs no link
        tile, peer = program + unit // world * programs, (me + program + unit) % world
        n, m, plane = tile % columns, tile // columns % rows, tile // (columns * rows)
        parts = load_parts(from_[peer, plane // middle, plane % middle], m, n, BM, BN, PARTS)
        to = y.peer(peer).permute(1, 0, 3, 2, 4)
        if GATHER == 1:
            to = y.peer(peer).permute(3, 0, 2, 1, 4)
        tokens = put_parts(to[me, plane // middle, plane % middle], m, n, parts, PARTS)
    for peer in tw.range(world):
        tw.signal(done[program, me], peer, after=tokens)
    tw.wait(done[program])


# --- launches -------------------------------------------------------------------------------------


def tile_of(rows: int, columns: int, elements: int = ELEMENTS) -> dict[str, int]:
    """``BM`` and ``BN``: tiles of up to ``elements``, as wide as rows are, and smaller where there are few of them."""
    elements = min(elements, max(1024, 1 << (rows * columns // BLOCKS).bit_length()))
    width = min(1 << (columns - 1).bit_length(), elements)
    return {"BM": min(1 << (rows - 1).bit_length(), elements // width), "BN": width}


def parts_of(meta: dict[str, int]) -> dict[str, int]:
    """``PARTS``, and warps so that a thread holds 16 elements of each: fewer of small tiles."""
    parts = min(PARTS, meta["BN"] // 64 or 1)
    size = meta["BM"] * meta["BN"] // parts
    return {"PARTS": parts, "num_warps": max(1, min(8, size // 512))}


def tiles_of(rows: int, columns: int, meta: dict[str, int]) -> int:
    return tw.cdiv(rows, meta["BM"]) * tw.cdiv(columns, meta["BN"])


def gather(world: Any, x: Any, y: Any, axis: int = 0, **meta: int) -> None:
    """``y``, symmetric: the ranks' ``x`` one behind the other along ``axis``, on every rank. Contiguous arrays."""
    shape = own(x).shape
    before, behind = prod(shape[:axis]), prod(shape[axis:])
    meta = {**tile_of(before, behind), **meta}
    meta = {**parts_of(meta), **meta}
    programs = min(tiles_of(before, behind, meta), BLOCKS)
    done = flags(world, "gather", (programs, world.size))
    parts = y.reshape(before, world.size, behind)
    world.launch(all_gather, (programs,), reshaped(x, before, behind), parts, done, **meta)


def scatter_sum(world: Any, x: Any, y: Any, axis: int = 0, **meta: int) -> None:
    """``y``: the rank's part along ``axis`` of the sum of the ranks' ``x``, symmetric. Contiguous arrays."""
    shape = own(y).shape
    before, behind = prod(shape[:axis]), prod(shape[axis:])
    meta = {**tile_of(before, behind, REDUCED), **meta}
    grid = (min(tiles_of(before, behind, meta), BLOCKS),)
    world.launch(reduce_scatter, grid, x.reshape(before, world.size, behind), reshaped(y, before, behind), **meta)


def exchange(world: Any, x: Any, y: Any, scatter: int, gather: int, stream: Any = None, **meta: int) -> None:
    """Split every rank's ``x`` along the axis ``scatter``; part r goes to rank r, which joins them along ``gather``.

    ``y`` is symmetric. Contiguous arrays; x's size along ``scatter`` is a multiple of the number of ranks.
    """
    size, shape = world.size, own(x).shape
    if shape[scatter] % size:
        raise ValueError(f"axis {scatter} of {shape} does not divide among {size} ranks")
    first, second = sorted((scatter, gather))
    if first == second:
        second = len(shape)
    outer, a = prod(shape[:first]), shape[first]
    middle, c = prod(shape[first + 1 : second]), prod(shape[second:])
    if scatter == gather:  # what lies behind the axis makes rows of its own
        middle, c = 1, middle
    whole = [outer, a, middle, c]
    part = list(whole)
    part[1 if scatter == first else 3] //= size
    sizes = {"SCATTER": int(scatter != first), "GATHER": int(gather != first)}
    tile = {**tile_of(part[1], part[3]), **meta}
    tile = {**parts_of(tile), **tile}
    programs = min(outer * middle * tiles_of(part[1], part[3], tile), BLOCKS)
    done = flags(world, "exchange", (programs, size))
    from_, to = _split(part, size, sizes["SCATTER"]), _split(part, size, sizes["GATHER"])
    arrays = reshaped(x, *from_), y.reshape(*to), done
    world.launch(all_to_all, (programs,), *arrays, stream=stream, **sizes, **tile)


def _split(part: list[int], size: int, axis: int) -> list[int]:
    """The shape with a dimension for the ranks before the rows (axis 0) or the columns (1)."""
    place = 3 if axis else 1
    return [*part[:place], size, *part[place:]]


def reshaped(arrays: Any, *shape: int) -> Any:
    """Arrays of another shape in the same memory: one, or one of each rank."""
    return [x.reshape(*shape) for x in arrays] if isinstance(arrays, list | tuple) else arrays.reshape(*shape)


# --- references -----------------------------------------------------------------------------------


def gather_reference(x: list[np.ndarray[Any, Any]], axis: int) -> np.ndarray[Any, Any]:
    """What every rank gets."""
    return np.concatenate(x, axis)


def scatter_sum_reference(x: list[np.ndarray[Any, Any]], axis: int) -> list[np.ndarray[Any, Any]]:
    """Each rank's part in float64."""
    return np.split(np.sum([part.astype(np.float64) for part in x], axis=0), len(x), axis)


def exchange_reference(x: list[np.ndarray[Any, Any]], scatter: int, gather: int) -> list[np.ndarray[Any, Any]]:
    """What each rank gets."""
    parts = [np.split(array, len(x), scatter) for array in x]
    return [np.concatenate([parts[source][rank] for source in range(len(x))], gather) for rank in range(len(x))]
