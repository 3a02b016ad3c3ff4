"""All-to-all, and products with communication, by the GPUs' copy engines, which leave the SMs to others.

Ranks meet before the copies, so that nobody writes to what another one still reads, and behind them, so that nobody
reads what has not arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tilewright as tw
from tilewright.kernels.gemm import ADD_COLUMNS, ADD_ROWS, add_partials, configuration, gemm, product
from tilewright.kernels.multi_gpu.collectives import exchange
from tilewright.kernels.multi_gpu.workspace import flags, own, symmetric
from tilewright.kernels.workspace import temporary

#: programs that run at the same time: the SMs of an H100 or H200
UNITS = 132
#: in how many chunks the rows for others are multiplied and sent
CHUNKS = 2
#: tiles for each SM in a chunk from which on `pays`
LEAST_ROUNDS = 3
#: bytes for each rank from which on copy engines are faster in an all-to-all
LARGE = 64 << 20


@tw.kernel
def meet(here: tw.Symmetric) -> None:
    """Ends when all ranks have begun it. ``here`` flags (world,). Grid: (1,)."""
    tw.barrier(here)


def all_to_all(world: Any, x: Any, y: Any, stream: Any = None, copies: bool | None = None) -> None:
    """``y[p]`` of rank r becomes ``x[r]`` of rank p.

    x and symmetric y (world, ...) have one shape and dtype and are row-major. ``copies``: by the copy engines, not by a
    kernel; the default is by size, since the ranks meet twice for the copies, but the link carries more of them.
    """
    if not (y.nbytes >= LARGE * world.size if copies is None else copies):
        exchange(world, x, y, 0, 0, stream)
        return
    here = flags(world, "meet", (world.size,))
    world.launch(meet, (1,), here, stream=stream)
    world.push(x, y, stream)
    world.launch(meet, (1,), here, stream=stream)


def all_gather_gemm(world: Any, a: Any, b: Any, c: Any, stream: Any = None, **meta: int) -> None:
    """``c[p] = a_p @ b`` on each rank, of a symmetric ``a`` (world, R, K) whose part ``a[rank]`` the rank has written.

    b (K, N), c (world, R, N); of NumPy or torch. Afterwards ``a`` is whole on every rank. The own rows are multiplied
    while the first copies are under way, and what has come from one rank while that of the next comes.
    """
    size, each, _ = a.shape
    columns = own(b).shape[1]
    meta = {**configuration(each, columns), **meta}
    grid = tw.cdiv(each, meta["BM"]), tw.cdiv(columns, meta["BN"])
    results = c if isinstance(c, list) else [c] * len(world.ranks)
    here = flags(world, "meet", (size,))
    world.launch(meet, (1,), here, stream=stream)
    sent = world.spread(a, stream)
    for hop in range(size):
        if hop:
            sent.join(hop)
            world.launch(meet, (1,), here, stream=stream)
        sources = [(rank - hop) % size for rank in world.ranks]
        rows = [a[rank][source] for rank, source in zip(world.ranks, sources, strict=True)]
        products = [result[source] for result, source in zip(results, sources, strict=True)]
        world.launch(gemm, grid, rows, b, products, stream=stream, **meta)


def gather_gemms(world: Any, x: Any, whole: Any, factors: Sequence[Any], products: Sequence[Any], **meta: int) -> None:
    """``whole[p] = x_p`` and for each factor ``c[p] = x_p @ b``, where nothing but a staging buffer is symmetric.

    x (R, K) and whole (world, R, K) row-major; factors b (K, N), products c (world, R, N), whose N may differ. The
    own rows are multiplied while the first ones are fetched.
    """
    for sources, given in _arriving(world, x, whole):
        for b, c in zip(factors, products, strict=True):
            targets = [result[source] for result, source in zip(_each(c), sources, strict=True)]
            _multiply(world, given, b, targets, meta)


def gather_columns_gemms(
    world: Any, x: Any, whole: Any, factors: Sequence[Any], products: Sequence[Any], **meta: int
) -> None:
    """``whole[p] = x_p`` and for each factor ``c = sum over p of x_p @ b_p``, b_p the rows of b from p * K on.

    x (R, K) and whole (world, R, K) row-major; factors b (world * K, N), products c (R, N). The sums over ranks are in
    float32 and in the order of ranks: equal bits on all that have equal factors.
    """
    rows, depth = own(x).shape
    partials = [[temporary(each, (world.size, *each.shape)) for each in _each(c)] for c in products]
    for sources, given in _arriving(world, x, whole):
        for b, sums in zip(factors, partials, strict=True):
            given_b = _each(b) * (len(sources) // len(_each(b)))
            slices = [each[p * depth : (p + 1) * depth] for each, p in zip(given_b, sources, strict=True)]
            _multiply(world, given, slices, [each[p] for each, p in zip(sums, sources, strict=True)], meta)
    for sums, c in zip(partials, products, strict=True):
        grid = tw.cdiv(rows, ADD_ROWS), tw.cdiv(own(c).shape[1], ADD_COLUMNS)
        world.launch(add_partials, grid, sums, _each(c), RUNS=world.size, BM=ADD_ROWS, BN=ADD_COLUMNS)


def _arriving(world: Any, x: Any, whole: Any) -> Iterator[tuple[list[int], Any]]:
    """For each rank of the process whose rows are there, and these, the own ones first, until all have been given.

    Everybody has fetched everything when the last ones are: the staging buffer is free for the next call.
    """
    here, staged = flags(world, "meet", (world.size,)), symmetric(world, "gather", own(x).shape, own(x).dtype)
    world.fill_own(staged, x)
    world.launch(meet, (1,), here)
    fetched = world.fetch(staged, whole)
    for hop in range(world.size):
        if hop:
            fetched.join(hop)
        if hop == world.size - 1:
            world.launch(meet, (1,), here)
        sources = [(rank + hop) % world.size for rank in world.ranks]
        yield sources, [each[p] for each, p in zip(_each(whole), sources, strict=True)] if hop else _each(x)
    fetched.join()


def _multiply(world: Any, a: Any, b: Any, c: list[Any], meta: dict[str, int]) -> None:
    rows, columns = c[0].shape
    meta = {**configuration(rows, columns), **meta}
    world.launch(gemm, (tw.cdiv(rows, meta["BM"]), tw.cdiv(columns, meta["BN"])), a, b, c, **meta)


def _each(arrays: Any) -> list[Any]:
    """The array of each rank of this process."""
    return arrays if isinstance(arrays, list) else [arrays]


@tw.kernel
def gemm_plus_parts(
    a: tw.Tensor,
    b: tw.Tensor,
    parts: tw.Tensor,
    c: tw.Tensor,
    me: tw.int32,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
) -> None:
    """``c = a @ b + sum of parts[p] for p != me``: parts (world, M, N). Grid: (cdiv(M, BM), cdiv(N, BN)).

    Sums in float32, the parts in the order of ranks behind ``me``.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    total = product(a, b, m, n, BM, BN, BK)
    for hop in tw.range(1, parts.shape[0]):
        source = (me + hop) % parts.shape[0]
        total = total + tw.load(parts[source], (m, n), (BM, BN)).to(tw.float32)
    tw.store(c, (m, n), total.to(c.dtype))


def gemm_reduce_scatter(world: Any, a: Any, b: Any, c: Any, stream: Any = None, **meta: int) -> None:
    """``c`` of each rank: its rows of the sum of the ranks' ``a @ b``. As `gemm_rs`, with rows that divide evenly.

    a (M, K) and b (K, N) with the rank's part of K, c (M / world, N); of NumPy or torch. The rows of others are
    multiplied first, in chunks that the copy engines send while the next one is multiplied.
    """
    for _ in _product_of_own_rows(world, a, b, _by_rank(world, c), stream, meta):
        pass


def gemm_all_reduce(world: Any, a: Any, b: Any, c: Any, stream: Any = None, **meta: int) -> None:
    """``c``, symmetric (world, M / world, N): the sum of the ranks' ``a @ b`` on each rank, as `gemm_ar` gives it.

    As `gemm_reduce_scatter`; sums are sent to all while the next rows are multiplied, in chunks that become smaller, so
    that little is left to send behind the last one.
    """
    results = [c[rank][rank] for rank in world.ranks]
    sent = [
        world.spread(c, stream, rows) for rows in _product_of_own_rows(world, a, b, results, stream, meta, halving=True)
    ]
    for copies in sent:
        copies.join()
    world.launch(meet, (1,), flags(world, "meet", (world.size,)), stream=stream)


def pays(rows: int, columns: int, size: int) -> bool:
    """Whether sums of products had better be sent by the copy engines: a chunk's tiles take several rounds on the SMs.

    Each chunk is a launch, and ranks meet before it (docs/performance.md).
    """
    meta = configuration(tw.cdiv(rows, size), columns)
    tiles = tw.cdiv(rows // size // CHUNKS, meta["BM"]) * tw.cdiv(columns, meta["BN"])
    return size > 1 and rows % size == 0 and tiles >= LEAST_ROUNDS * UNITS


def _product_of_own_rows(
    world: Any, a: Any, b: Any, c: Sequence[Any], stream: Any, given: dict[str, int], halving: bool = False
) -> Iterator[tuple[int, int]]:
    """Launch products and copies that make ``c`` each rank's rows of the sum; gives the rows that each launch makes."""
    size, (rows, _), columns = world.size, own(a).shape, own(b).shape[1]
    if rows % size:
        raise ValueError(f"{rows} rows do not divide among {size} ranks: gemm_rs and gemm_ar take any")
    each, a_of, b_of = rows // size, _by_rank(world, a), _by_rank(world, b)
    meta = {**configuration(each, columns), **given}
    across, dtype = tw.cdiv(columns, meta["BN"]), own(list(c)).dtype
    step = tw.cdiv(tw.cdiv(each, CHUNKS), meta["BM"]) * meta["BM"]
    chunks = [(first, min(first + step, each)) for first in range(0, each, step)]
    here, under_way = flags(world, "meet", (size,)), []
    world.launch(meet, (1,), here, stream=stream)
    for number, (first, end) in enumerate(chunks):
        shape = size, end - first, columns
        source, target = (symmetric(world, f"gemm_rs {way} {number}", shape, dtype) for way in ("out", "in"))
        grid = tw.cdiv(end - first, meta["BM"]), across
        for hop in range(1, size):
            owners = [(rank + hop) % size for rank in world.ranks]
            theirs = [x[owner * each + first : owner * each + end] for x, owner in zip(a_of, owners, strict=True)]
            products = [source[rank][owner] for rank, owner in zip(world.ranks, owners, strict=True)]
            world.launch(gemm, grid, theirs, b_of, products, stream=stream, **meta)
        under_way.append((target, world.start_push(source, target, stream)))
    for (first, end), (parts, copies) in zip(chunks, under_way, strict=True):
        copies.join()
        world.launch(meet, (1,), here, stream=stream)
        least = UNITS // across * meta["BM"] if halving and end == each else end - first
        for start, stop in _halves(first, end, max(least, meta["BM"]), meta["BM"]):
            mine = [x[rank * each + start : rank * each + stop] for x, rank in zip(a_of, world.ranks, strict=True)]
            arrived = [parts[rank][:, start - first : stop - first] for rank in world.ranks]
            results = [result[start:stop] for result in c]
            grid = tw.cdiv(stop - start, meta["BM"]), across
            world.launch(gemm_plus_parts, grid, mine, b_of, arrived, results, list(world.ranks), stream=stream, **meta)
            yield start, stop


def _halves(first: int, end: int, least: int, step: int) -> Iterator[tuple[int, int]]:
    """Runs of rows, each half of what is left, down to ``least``; in multiples of ``step``."""
    while end - first > least:
        middle = first + tw.cdiv(tw.cdiv(end - first, 2), step) * step
        if middle >= end:
            break
        yield first, middle
        first = middle
    yield first, end


def _by_rank(world: Any, arrays: Any) -> list[Any]:
    return arrays if isinstance(arrays, list) else [arrays] * len(world.ranks)


__all__ = [
    "all_gather_gemm", "all_to_all", "gather_columns_gemms", "gather_gemms", "gemm_all_reduce", "gemm_reduce_scatter",
    "meet", "pays",
]  # fmt: skip
