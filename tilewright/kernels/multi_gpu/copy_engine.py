"""All-to-all, and all-gather with a product, by the GPUs' copy engines, which leave the SMs to the product.

Ranks meet before the copies, so that nobody writes to what another one still reads, and behind them, so that nobody
reads what has not arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tilewright as tw
from tilewright.kernels.gemm import ADD_COLUMNS, ADD_ROWS, add_partials, configuration, gemm
from tilewright.kernels.multi_gpu.workspace import flags, own, symmetric
from tilewright.kernels.workspace import temporary


@tw.kernel
def meet(here: tw.Symmetric) -> None:
    """Ends when all ranks have begun it. ``here`` flags (world,). Grid: (1,)."""
    tw.barrier(here)


def all_to_all(world: Any, x: Any, y: Any, stream: Any = None) -> None:
    """``y[p]`` of rank r becomes ``x[r]`` of rank p.

    x and symmetric y (world, ...) have one shape and dtype and are row-major.
    """
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


__all__ = ["all_gather_gemm", "all_to_all", "gather_columns_gemms", "gather_gemms", "meet"]
