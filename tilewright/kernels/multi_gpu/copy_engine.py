"""All-to-all, and products with communication, by the GPUs' copy engines, which leave the SMs to others.

Ranks meet before the copies, so that nobody writes to what another one still reads. Behind them they meet again, or are
told by a copy of flags that follows the data, so that nobody reads what has not arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
#: elements in a chunk from which on `pays`: a large tile for nearly each SM
LEAST_CHUNK = 128 * 128 * 256
#: bytes for each rank from which on copy engines are faster in an all-to-all
LARGE = 64 << 20


@tw.kernel
def meet(here: tw.Symmetric) -> None:
    """Ends when all ranks have begun it. ``here`` flags (2, world). Grid: (1,)."""
    tw.barrier(here[tw.turn()])


def let_meet(world: Any, stream: Any = None) -> Any:
    """Launch `meet`: what ``stream`` is given from now on begins when all ranks have come here. Gives the flags."""
    here = flags(world, "meet", (2, world.size))
    world.launch(meet, (1,), here, stream=stream)
    return here


@tw.kernel
def arrive(told: tw.Symmetric, earlier: tw.int32) -> None:
    """Ends when all other ranks have told this one that their copies are here. Grid: (1,).

    ``told`` flags (1, world, 2, world): those of all ranks where they met ``earlier`` launches ago, copied behind data.
    """
    me, world, turn = tw.rank(), tw.world_size(), (tw.turn() + earlier) % 2
    for hop in tw.range(1, world):
        tw.wait(told[0, (me + hop) % world, turn], earlier=earlier)


def all_to_all(world: Any, x: Any, y: Any, stream: Any = None, copies: bool | None = None) -> None:
    """``y[p]`` of rank r becomes ``x[r]`` of rank p.

    x and symmetric y (world, ...) have one shape and dtype and are row-major. ``copies``: by the copy engines, not by a
    kernel; the default is by size, since the ranks meet twice for the copies, but the link carries more of them.
    """
    if not (y.nbytes >= LARGE * world.size if copies is None else copies):
        exchange(world, x, y, 0, 0, stream)
        return
    here, told = let_meet(world, stream), flags(world, "told", (1, world.size, 2, world.size))
    world.push(x, y, stream, (here, told, 0))
    world.launch(arrive, (1,), told, 1, stream=stream)


def all_gather_gemm(world: Any, a: Any, b: Any, c: Any, stream: Any = None, **meta: int) -> None:
    """``c[p] = a_p @ b`` on each rank, of a symmetric ``a`` (world, R, K) whose part ``a[rank]`` the rank has written.

    b (K, N), c (world, R, N); of NumPy or torch. Afterwards ``a`` is whole on every rank. The own rows are multiplied
    while the first copies are under way, and what has come from one rank while that of the next comes.
    """
    size, each, _ = a.shape
    columns = own(b).shape[1]
    meta = {**configuration(each, columns), **meta}
    grid = tw.cdiv(each, meta["BM"]), tw.cdiv(columns, meta["BN"])
    here, told = let_meet(world, stream), flags(world, "told", (1, size, 2, size))
    sent = world.spread(a, stream, tell=(here, told, 0))
    own_rows = [a[rank][rank] for rank in world.ranks]
    own_products = [result[rank] for rank, result in zip(world.ranks, _by_rank(world, c), strict=True)]
    world.launch(gemm, grid, own_rows, b, own_products, stream=stream, **meta)
    for hop in range(1, size):
        world.launch(gemm_of_arrived, grid, a, told, b, c, hop, hop, stream=stream, **meta)
    sent.join()


@tw.kernel
def gemm_of_arrived(
    a: tw.Symmetric,
    told: tw.Symmetric,
    b: tw.Tensor,
    c: tw.Tensor,
    hop: tw.int32,
    earlier: tw.int32,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
) -> None:
    """``c[p] = a[p] @ b`` for rank p, ``hop`` ranks before this one, when that has told of a[p]: `arrive` has ``told``.

    a (world, R, K), b (K, N), c (world, R, N). Grid: (cdiv(R, BM), cdiv(N, BN)).
    """
    m, n, world = tw.program_id(0), tw.program_id(1), tw.world_size()
    source = (tw.rank() + world - hop) % world
    arrived = tw.wait(told[0, source, (tw.turn() + earlier) % 2], earlier=earlier)
    tw.store(c[source], (m, n), product(a[source], b, m, n, BM, BN, BK, arrived).to(c.dtype))


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
    staged = symmetric(world, "gather", own(x).shape, own(x).dtype)
    world.fill_own(staged, x)
    let_meet(world)
    fetched = world.fetch(staged, whole)
    for hop in range(world.size):
        if hop:
            fetched.join(hop)
        if hop == world.size - 1:
            let_meet(world)
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
def gemm_and_meet(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    here: tw.Symmetric,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
) -> None:
    """``c = a @ b``; ends when all ranks have begun it, as `meet`. Grid: (cdiv(M, BM), cdiv(N, BN), 2).

    The program that meets the others comes last: few tiles leave SMs over, and those of many come meanwhile.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    if tw.program_id(2) == 0:
        tw.store(c, (m, n), product(a, b, m, n, BM, BN, BK).to(c.dtype))
    elif m == 0 and n == 0:
        tw.barrier(here[tw.turn()])


@tw.kernel
def gemm_plus_parts(
    a: tw.Tensor,
    b: tw.Tensor,
    parts: tw.Symmetric,
    told: tw.Symmetric,
    c: tw.Tensor,
    first: tw.int32,
    chunk: tw.int32,
    earlier: tw.int32,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
) -> None:
    """``c = a @ b + sum of the other ranks' parts``: a (M, K), parts (world, R, N). Grid: (cdiv(M, BM), cdiv(N, BN)).

    The first row is row ``first * BM`` of the parts. They come in chunks of ``chunk`` row tiles, of whose arrival the
    flags ``told`` (chunks, world, 2, world) tell: those of the launch ``earlier`` launches ago in which all ranks met.
    Sums in float32, the parts in the order of ranks behind the own one.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    me, world, row = tw.rank(), tw.world_size(), first + tw.program_id(0)
    turn = (tw.turn() + earlier) % 2
    total = product(a, b, m, n, BM, BN, BK)
    for hop in tw.range(1, world):
        source = (me + hop) % world
        arrived = tw.wait(told[row // chunk, source, turn], earlier=earlier)
        total = total + tw.load(parts[source], (row, n), (BM, BN), after=arrived).to(tw.float32)
    tw.store(c, (m, n), total.to(c.dtype))


def gemm_reduce_scatter(world: Any, a: Any, b: Any, c: Any, stream: Any = None, **meta: int) -> None:
    """``c`` of each rank: its rows of the sum of the ranks' ``a @ b``. As `gemm_rs`, with rows that divide evenly.

    a (M, K) and b (K, N) with the rank's part of K, c (M / world, N); of NumPy or torch. The rows of others are
    multiplied first, in chunks that the copy engines send while the next one is multiplied; the own ones then get
    what arrives meanwhile.
    """
    sums = _Sums.start(world, a, b, own(_by_rank(world, c)).dtype, stream, meta)
    sums.finish(_by_rank(world, c), 0, sums.rows)
    sums.join()


def gemm_all_reduce(world: Any, a: Any, b: Any, c: Any, stream: Any = None, **meta: int) -> None:
    """``c``, symmetric (world, M / world, N): the sum of the ranks' ``a @ b`` on each rank, as `gemm_ar` gives it.

    As `gemm_reduce_scatter`; sums are sent to all while the next rows are multiplied, in chunks that become smaller, so
    that little is left to send behind the last one.
    """
    sums = _Sums.start(world, a, b, c.dtype, stream, meta)
    size, least = world.size, max(UNITS // sums.across, 1) * sums.meta["BM"]
    told, sent = flags(world, "told", (1, size, 2, size)), []
    for first, end in _halves(0, sums.rows, least, sums.meta["BM"]):
        sums.finish([c[rank][rank] for rank in world.ranks], first, end)
        tell = (sums.here, told, 0) if end == sums.rows else None
        sent.append(world.spread(c, stream, (first, end), tell))
    world.launch(arrive, (1,), told, sums.launches, stream=stream)
    for copies in sent:
        copies.join()
    sums.join()


@dataclass
class _Sums:
    """Products of others' rows that are on their way to them, and own rows that get what others have sent.

    ``rows`` of each rank and ``chunk`` of them that are told of together; ``launches`` that communicate since that in
    which the ranks met at the flags ``here``.
    """

    world: Any
    factors: tuple[list[Any], list[Any]]
    stream: Any
    meta: dict[str, int]
    rows: int
    across: int
    chunk: int
    parts: Any
    told: Any
    here: Any
    sent: list[Any] = field(default_factory=list)
    launches: int = 1

    @classmethod
    def start(cls, world: Any, a: Any, b: Any, dtype: Any, stream: Any, given: dict[str, int]) -> _Sums:
        """Multiply the rows of others, chunk after chunk, and send them, in the ``dtype`` of the result.

        The first launch lets the ranks meet too: its products are of no use to others before it has ended anyway.
        """
        size, (rows, _), columns = world.size, own(a).shape, own(b).shape[1]
        if rows % size:
            raise ValueError(f"{rows} rows do not divide among {size} ranks: gemm_rs and gemm_ar take any")
        each, shape = rows // size, (size, rows // size, columns)
        meta = {**configuration(each, columns), **given}
        chunk = tw.cdiv(tw.cdiv(each, CHUNKS), meta["BM"]) * meta["BM"]
        source, parts = (symmetric(world, f"gemm_rs {way}", shape, dtype) for way in ("out", "in"))
        told = flags(world, "gemm_rs told", (tw.cdiv(each, chunk), size, 2, size))
        here = flags(world, "meet", (2, size))
        factors, across = (_by_rank(world, a), _by_rank(world, b)), tw.cdiv(columns, meta["BN"])
        sums = cls(world, factors, stream, meta, each, across, chunk, parts, told, here)
        for number, first in enumerate(range(0, each, chunk)):
            end = min(first + chunk, each)
            for hop in range(1, size):
                owners = [(rank + hop) % size for rank in world.ranks]
                theirs = sums._rows_of(owners, first, end)
                products = [source[rank][owner][first:end] for rank, owner in zip(world.ranks, owners, strict=True)]
                grid = tw.cdiv(end - first, meta["BM"]), across
                if number == 0 and hop == 1:
                    world.launch(gemm_and_meet, (*grid, 2), theirs, factors[1], products, here, stream=stream, **meta)
                else:
                    world.launch(gemm, grid, theirs, factors[1], products, stream=stream, **meta)
            sums.sent.append(world.start_push(source, parts, stream, (first, end), (here, told, number)))
        return sums

    def finish(self, c: Sequence[Any], first: int, end: int) -> None:
        """Make own rows from ``first``, a multiple of tiles, to before ``end`` of each rank's ``c`` (R, N)."""
        tile = self.meta["BM"]
        mine, results = self._rows_of(self.world.ranks, first, end), [x[first:end] for x in c]
        numbers = first // tile, self.chunk // tile, self.launches
        grid, arrived = (tw.cdiv(end - first, tile), self.across), (self.parts, self.told)
        given = mine, self.factors[1], *arrived, results, *numbers
        self.world.launch(gemm_plus_parts, grid, *given, stream=self.stream, **self.meta)
        self.launches += 1

    def join(self) -> None:
        """Let the stream wait until what this rank has sent may be written again."""
        for copies in self.sent:
            copies.join()

    def _rows_of(self, owners: Sequence[int], first: int, end: int) -> list[Any]:
        """Of each rank's ``a`` some of the rows for the rank ``owners`` names."""
        places = [(owner * self.rows + first, owner * self.rows + end) for owner in owners]
        return [x[start:stop] for x, (start, stop) in zip(self.factors[0], places, strict=True)]


def pays(rows: int, columns: int, size: int) -> bool:
    """Whether sums of products of (rows, columns) over ``size`` ranks had better be sent by the copy engines.

    They gain what stores to a peer cost between the products. Each chunk is a launch, which has to keep the SMs busy
    while the copy before it is under way: chunks are at least as large as the smallest that were measured
    (docs/performance.md).
    """
    tile = configuration(tw.cdiv(rows, size), columns)["BM"]
    chunk = rows // size // CHUNKS // tile * tile
    return size > 1 and rows % size == 0 and chunk * columns >= LEAST_CHUNK


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
    "let_meet", "meet", "pays",
]  # fmt: skip
