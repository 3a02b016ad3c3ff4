"""Every kernel of several GPUs as a case: run it on a world with random inputs and poisoned outputs, and compare.

A case takes the world, a seed, and the tile sizes that the target can compute; it raises where a result is wrong. Sizes
are ragged: no multiples of tiles, and rows that do not divide among the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tests.support.kernel_checks import Array, check, errors
from tilewright.kernels.multi_gpu import (
    all_gather_gemm,
    all_reduce,
    collectives,
    gemm_all_reduce,
    gemm_reduce_scatter,
    moe,
    ring_attention,
    ring_attention_backward,
    ulysses,
)

BF16 = ml_dtypes.bfloat16


class Tiles(NamedTuple):
    """Tile sizes, and how many rows a rank has."""

    bm: int
    bn: int
    bk: int
    rows: int


#: small tiles, and the smallest that Hopper's matrix unit takes, with few rows: emulation is slow
SMALL, WGMMA = Tiles(16, 32, 16, 25), Tiles(64, 32, 32, 41)


class Inputs:
    """Random numbers for the ranks of a world, and memory that nobody has written."""

    def __init__(self, world: Any, seed: int) -> None:
        self.world, self.ranks = world, range(world.size)
        self.random = np.random.default_rng([seed, world.size])

    def normal(self, *shape: int) -> list[Array]:
        return [self.random.standard_normal(shape).astype(BF16) for _ in self.ranks]

    def symmetric(self, *shape: int) -> Any:
        """A symmetric tensor of NaNs."""
        tensor = self.world.empty(shape, "bf16")
        for rank in self.ranks:
            tensor[rank][...] = np.nan
        return tensor

    def filled(self, values: list[Array]) -> Any:
        return self.world.tensor(values)


def nans(like: list[Array], dtype: Any = BF16) -> list[Array]:
    return [np.full(array.shape, np.nan, dtype) for array in like]


def check_all(actual: list[Array], exact: list[Array]) -> None:
    for got, wanted in zip(actual, exact, strict=True):
        if wanted.size:
            check(got, wanted, "bf16")


def of_ranks(tensor: Any, ranks: range) -> list[Array]:
    return [tensor[rank] for rank in ranks]


# --- matrix products ------------------------------------------------------------------------------


def gemm_rs(world: Any, seed: int, tiles: Tiles, any_order: bool = False) -> None:
    inputs, (bm, bn, bk, each) = Inputs(world, seed), tiles
    rows = each * world.size - world.size // 2
    a, b = inputs.normal(rows, bk + 9), inputs.normal(bk + 9, bn + 7)
    exact = gemm_reduce_scatter.reference(a, b)
    c = nans(exact)
    gemm_reduce_scatter.gemm_rs(world, a, b, c, any_order=any_order, BM=bm, BN=bn, BK=bk)
    check_all(c, exact)


def gemm_rs_any_order(world: Any, seed: int, tiles: Tiles) -> None:
    gemm_rs(world, seed, tiles, any_order=True)


def gemm_ar(world: Any, seed: int, tiles: Tiles, one_shot: bool = False) -> None:
    inputs, (bm, bn, bk, each) = Inputs(world, seed), tiles
    rows, columns = each * world.size - (0 if one_shot else world.size // 2), bn + 7
    a, b = inputs.normal(rows, 2 * bk + 8), inputs.normal(2 * bk + 8, columns)
    c = inputs.symmetric(world.size, gemm_all_reduce.share(rows, world.size), columns)
    gemm_all_reduce.gemm_ar(world, a, b, c, one_shot=one_shot, BM=bm, BN=bn, BK=bk)
    exact = gemm_all_reduce.reference(a, b)
    check_all([part.reshape(-1, columns)[:rows] for part in of_ranks(c, inputs.ranks)], [exact] * world.size)
    for part in of_ranks(c, inputs.ranks):
        np.testing.assert_array_equal(part[: rows // part.shape[1]], c[0][: rows // part.shape[1]], "equal bits")


def gemm_ar_one_shot(world: Any, seed: int, tiles: Tiles) -> None:
    gemm_ar(world, seed, tiles, one_shot=True)


def ag_gemm(world: Any, seed: int, tiles: Tiles) -> None:
    inputs, (bm, bn, bk, each) = Inputs(world, seed), tiles
    rows, b = inputs.normal(each, 3 * bk + 8), inputs.normal(3 * bk + 8, bn + 7)
    a = inputs.symmetric(world.size, *rows[0].shape)
    for rank, part in enumerate(rows):
        a[rank][rank] = part
    exact = all_gather_gemm.reference(rows, b)
    c = nans(exact)
    all_gather_gemm.ag_gemm(world, a, b, c, communicators=2, BM=bm, BN=bn, BK=bk, WIDTH=2 * bk, PARTS=2)
    check_all(c, exact)
    check_all(of_ranks(a, inputs.ranks), [np.stack(rows).astype(np.float64)] * world.size)


# --- collectives ----------------------------------------------------------------------------------


def reduce_all(world: Any, seed: int, tiles: Tiles, algorithm: str = "push") -> None:
    inputs = Inputs(world, seed)
    x, y = inputs.filled(inputs.normal(1000)), inputs.symmetric(1000)
    parts = {"PARTS": 2, "AHEAD": 1 + seed % 2} if algorithm == "push" else {}
    all_reduce.all_reduce(world, x, y, algorithm=algorithm, BN=128, **parts)
    check_all(of_ranks(y, inputs.ranks), [all_reduce.reference(of_ranks(x, inputs.ranks))] * world.size)
    for rank in inputs.ranks:
        np.testing.assert_array_equal(y[rank], y[0], "equal bits")


def reduce_all_pull(world: Any, seed: int, tiles: Tiles) -> None:
    reduce_all(world, seed, tiles, "pull")


def reduce_all_packets(world: Any, seed: int, tiles: Tiles) -> None:
    reduce_all(world, seed, tiles, "packets")


def reduce_all_two_shot(world: Any, seed: int, tiles: Tiles) -> None:
    reduce_all(world, seed, tiles, "two-shot")


def gather(world: Any, seed: int, tiles: Tiles) -> None:
    inputs, axis = Inputs(world, seed), seed % 3
    x = inputs.normal(5, 6, 40)
    exact = collectives.gather_reference(x, axis)
    y = inputs.symmetric(*exact.shape)
    collectives.gather(world, x, y, axis, BM=4, BN=64)
    for rank in inputs.ranks:
        np.testing.assert_array_equal(y[rank], exact)


def scatter_sum(world: Any, seed: int, tiles: Tiles) -> None:
    inputs, axis, shape = Inputs(world, seed), seed % 3, [5, 6, 40]
    shape[axis] *= world.size
    x = inputs.filled(inputs.normal(*shape))
    exact = collectives.scatter_sum_reference(of_ranks(x, inputs.ranks), axis)
    y = nans(exact)
    collectives.scatter_sum(world, x, y, axis, BM=4, BN=64)
    check_all(y, exact)


def exchange(world: Any, seed: int, tiles: Tiles) -> None:
    inputs, axes, shape = Inputs(world, seed), (seed % 3, seed // 3 % 3), [5, 6, 40]
    shape[axes[0]] *= world.size
    x = inputs.normal(*shape)
    exact = collectives.exchange_reference(x, *axes)
    y = inputs.symmetric(*exact[0].shape)
    collectives.exchange(world, x, y, *axes)
    for rank in inputs.ranks:
        np.testing.assert_array_equal(y[rank], exact[rank])


# --- attention ------------------------------------------------------------------------------------


def ulysses_sdpa(world: Any, seed: int, tiles: Tiles) -> None:
    inputs, causal, (rows, keys, _, length), size = Inputs(world, seed), bool(seed % 2), tiles, world.size
    batch, depth, width = 2, 32, 16
    q, k = inputs.normal(batch, length, 2 * size, depth), inputs.normal(batch, length, size, depth)
    v = inputs.normal(batch, length, size, width)
    o, logarithms = ulysses.reference(q, k, v, causal)
    out, lse = inputs.symmetric(*o[0].shape), nans(logarithms, np.float32)
    ulysses.ulysses_sdpa(world, q, k, v, out, lse, causal, BM=rows, BN=keys)
    check_all(of_ranks(out, inputs.ranks), o)
    check_all(lse, logarithms)


def ring(world: Any, seed: int, tiles: Tiles, causal: bool = False, **options: Any) -> None:
    inputs, (rows, keys, _, length), size = Inputs(world, seed), tiles, world.size
    chunks, batch, depth, groups = 2 if causal else 1, 1 + seed % 2, 32, 1 if tiles is WGMMA else 2
    many, few = (chunks, batch, 2 * groups, length, depth), (chunks, batch, groups, length, depth)
    q, k, v, do = (inputs.normal(*shape) for shape in (many, few, few, many))
    exact, logarithms = ring_attention.reference(q, k, v, causal)
    whole = [inputs.symmetric(batch, groups, chunks * size, length, depth) for _ in (k, v)]
    for gathered, parts in zip(whole, (k, v), strict=True):
        for rank, part in enumerate(parts):
            for chunk, place in zip(part, (rank, 2 * size - 1 - rank), strict=False):
                gathered[rank][:, :, place] = chunk
    o, lse = nans(exact), nans(logarithms, np.float32)
    ring_attention.ring_sdpa(world, q, *whole, o, lse, causal, BM=rows, BN=keys, **options)
    check_all(o, exact)
    check_all(lse, logarithms)
    gradients = [nans(x) for x in (q, k, v)]
    ring_attention_backward.ring_sdpa_backward(
        world,
        q,
        *whole,
        o,
        do,
        lse,
        *gradients,
        causal,
        deterministic=options["communicators"] > 0,
        BM=min(rows, 64),
        BN=rows,
    )
    for got, wanted in zip(gradients, ring_attention_backward.reference(q, k, v, do, causal), strict=True):
        for part, exact_part in zip(got, wanted, strict=True):
            mean, largest = errors(part, exact_part, "bf16")
            # the first queries see few keys: their gradients are large, and so is what rounding the weights leaves
            assert mean < 4e-3 and largest < 0.15, (mean, largest)


def ring_full(world: Any, seed: int, tiles: Tiles) -> None:
    ring(world, seed, tiles, communicators=3, ROWS=tiles.bm)


def ring_copied(world: Any, seed: int, tiles: Tiles) -> None:
    ring(world, seed, tiles, causal=bool(seed % 2), communicators=0, num_warps=max(4, tiles.bm // 16))


def ring_causal(world: Any, seed: int, tiles: Tiles) -> None:
    ring(world, seed, tiles, causal=True, communicators=3, ROWS=tiles.bm)


# --- mixture of experts ---------------------------------------------------------------------------


def mixture(world: Any, seed: int, tiles: Tiles) -> None:
    """Experts of very different load; on the first rank all tokens choose the same."""
    inputs, (bm, bn, bk, tokens), size, each, choices = Inputs(world, seed), tiles, world.size, 3, 2
    depth, width, random = bk + 8, bn + 8, inputs.random
    x, w = (
        inputs.normal(tokens, depth),
        [np.stack(m) for m in zip(*(inputs.normal(depth, width) for _ in range(each)), strict=True)],
    )
    experts = [
        np.stack([random.permutation(each * size)[:choices] for _ in range(tokens)]).astype(np.int32)
        for _ in inputs.ranks
    ]
    experts[0][:] = [each * size - 1, 0]
    weights = [random.random((tokens, choices), np.float32) for _ in inputs.ranks]
    exact = moe.reference(x, experts, weights, w)
    whole = inputs.symmetric(size, tokens, depth)
    for rank, part in enumerate(x):
        whole[rank][rank] = part
    out = nans(exact)
    moe.moe(world, whole, experts, weights, w, out, BM=bm, BN=bn, BK=bk)
    check_all(out, exact)


CASES: dict[str, Callable[[Any, int, Tiles], None]] = {
    case.__name__: case
    for case in (
        gemm_rs, gemm_rs_any_order, gemm_ar, gemm_ar_one_shot, ag_gemm, reduce_all, reduce_all_pull,
        reduce_all_packets, reduce_all_two_shot, gather, scatter_sum, exchange, ulysses_sdpa, ring_full, ring_causal,
        ring_copied,
        mixture,
    )
}  # fmt: skip
