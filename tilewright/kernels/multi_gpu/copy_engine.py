"""All-to-all, and all-gather with a product, by the GPUs' copy engines, which leave the SMs to the product.

Ranks meet before the copies, so that nobody writes to what another one still reads, and behind them, so that nobody
reads what has not arrived.
"""

from __future__ import annotations

from typing import Any

import tilewright as tw
from tilewright.kernels.gemm import configuration, gemm
from tilewright.kernels.multi_gpu.workspace import flags, own


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


__all__ = ["all_gather_gemm", "all_to_all", "meet"]
