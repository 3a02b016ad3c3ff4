"""Rows of a table by number, and the gradient of the table."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import block_tiles, row_major, row_major_grid
from tilewright.kernels.workspace import Workspace

_workspace = Workspace("int32")


@tw.kernel
def embedding(
    table: tw.Tensor, tokens: tw.Tensor, y: tw.Tensor, *, BM: tw.constexpr = 4, BN: tw.constexpr = 1024
) -> None:
    """``y[i] = table[tokens[i]]``: table (V, N), tokens (M,) of integers, y (M, N). Grid: `row_major_grid`.

    Tokens out of range give rows of zeros.
    """
    m, n = row_major(y.shape[1], BN)
    rows = tw.load(tokens, m, BM, pad=-1)
    tw.store(y, (m, n), tw.gather(table, rows, 0, tile=(0, n), shape=(BM, BN)).to(y.dtype))


@tw.kernel
def take_tickets(tokens: tw.Tensor, counts: tw.Tensor, tickets: tw.Tensor, *, BM: tw.constexpr = 128) -> None:
    """Counts the tokens (M,) of each value in ``counts`` (V,) int32, zero before; ``tickets[i]`` (M,) int32 is how
    many of its value came before, in any order. Grid: (cdiv(M, BM),). Tokens out of range are not counted.
    """
    p = tw.program_id(0)
    wanted = tw.load(tokens, p, BM, pad=-1)
    wanted = tw.where(wanted < counts.shape[0], wanted, -1)
    tw.store(tickets, p, tw.atomic_add(counts, wanted, tw.full((BM,), 1, tw.int32), 0))


@tw.kernel
def share_places(counts: tw.Tensor, given: tw.Tensor, first: tw.Tensor, *, BV: tw.constexpr = 1024) -> None:
    """Gives the tokens of each value v ``counts[v]`` places of their own, from ``first[v]`` (V,) int32 on.

    Grid: (cdiv(V, BV),). Which values come first is open. ``given`` (1,) int32, zero before: the places given away.
    """
    p = tw.program_id(0)
    count = tw.load(counts, p, BV)
    begin = tw.atomic_add(given, 0, tw.sum(count))
    tw.store(first, p, tw.cumsum(count, axis=0) - count + begin)


@tw.kernel
def take_places(
    tokens: tw.Tensor, tickets: tw.Tensor, first: tw.Tensor, unordered: tw.Tensor, *, BM: tw.constexpr = 128
) -> None:
    """Writes the number of each token to one of the places of its value in ``unordered`` (M,). Grid: (cdiv(M, BM),)."""
    p = tw.program_id(0)
    begin = tw.gather(first, tw.load(tokens, p, BM, pad=-1), 0, pad=-(1 << 30))
    tw.scatter(unordered, begin + tw.load(tickets, p, BM), p * BM + tw.arange(BM), 0)


@tw.kernel
def order_places(
    tokens: tw.Tensor,
    counts: tw.Tensor,
    first: tw.Tensor,
    unordered: tw.Tensor,
    order: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
) -> None:
    """``order`` (M,): the numbers of the tokens of each value, ascending, at its places. Grid: (cdiv(M, BM),)."""
    p = tw.program_id(0)
    wanted = tw.load(tokens, p, BM, pad=-1)
    wanted = tw.where(wanted < first.shape[0], wanted, -1)
    count, begin = tw.gather(counts, wanted, 0), tw.gather(first, wanted, 0, pad=-(1 << 30))
    own, rank = p * BM + tw.arange(BM), tw.zeros((BM,), tw.int32)
    for k in tw.range(tw.max(count)):
        other = tw.gather(unordered, tw.where(k < count, begin + k, -1), 0, pad=1 << 30)
        rank = rank + (other < own).to(tw.int32)
    tw.scatter(order, begin + rank, own, 0)


@tw.kernel
def embedding_backward(
    dy: tw.Tensor, order: tw.Tensor, first: tw.Tensor, counts: tw.Tensor, dtable: tw.Tensor, *, BN: tw.constexpr = 4096
) -> None:
    """``dtable[v]``: the sum of dy's rows whose token is v, in float32, in their order: always the same bits.

    dy (M, N), dtable (V, N), zero where no token points; the rows of v are the ``counts[v]`` entries of ``order`` from
    ``first[v]`` on. Each element is read and written once. Grid: `row_major_grid` of dtable with BM 1.
    """
    v, n = row_major(dy.shape[1], BN)
    begin = tw.load(first, v)
    total = tw.zeros((1, BN), tw.float32)
    for place in tw.range(begin, begin + tw.load(counts, v)):
        total = total + tw.load(dy, (tw.load(order, place), n), (1, BN)).to(tw.float32)
    tw.store(dtable, (v, n), total.to(dtable.dtype))


def embedding_gradient(dy: Any, tokens: Any, dtable: Any) -> None:
    """The gradient of `embedding` with the tokens in their order, which counting finds. Arrays of NumPy or torch."""
    (rows, columns), vocabulary = dy.shape, dtable.shape[0]
    counts, given, first, tickets, unordered, order = _cut(dy, (vocabulary, 1, vocabulary, rows, rows, rows))
    counts[:], given[:] = 0, 0
    tiles = (tw.cdiv(rows, 128),)
    take_tickets[tiles](tokens, counts, tickets)
    share_places[(tw.cdiv(vocabulary, 1024),)](counts, given, first)
    take_places[tiles](tokens, tickets, first, unordered)
    order_places[tiles](tokens, counts, first, unordered, order)
    width = block_tiles(columns)["BN"]
    grid, warps = row_major_grid(vocabulary, columns, 1, width), max(1, width // 1024)
    embedding_backward[grid](dy, order, first, counts, dtable, BN=width, num_warps=warps)


def _cut(like: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Arrays of int32 in one workspace, each from a multiple of 16 bytes on."""
    ends = list(itertools.accumulate(-(-size // 4) * 4 for size in sizes))
    whole = _workspace.take(like, (ends[-1],))
    return [whole[begin : begin + size] for begin, size in zip([0, *ends], sizes, strict=False)]


@tw.kernel
def embedding_backward_atomic(
    dy: tw.Tensor, tokens: tw.Tensor, dtable: tw.Tensor, *, BM: tw.constexpr = 4, BN: tw.constexpr = 1024
) -> None:
    """Adds dy's rows to the rows of ``dtable`` that their tokens name, in any order: the rounding may differ each time.

    dy (M, N), tokens (M,), dtable (V, N) of dy's dtype. Grid: `row_major_grid`.
    """
    m, n = row_major(dy.shape[1], BN)
    rows = tw.load(tokens, m, BM, pad=-1)
    tw.atomic_add(dtable, rows, tw.load(dy, (m, n), (BM, BN)), 0, tile=(0, n))


def reference(table: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows of the table."""
    rows: np.ndarray[Any, Any] = table[tokens]
    return rows


def reference_backward(dy: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any], vocabulary: int) -> np.ndarray[Any, Any]:
    """In float64."""
    out = np.zeros((vocabulary, dy.shape[1]))
    np.add.at(out, tokens, dy.astype(np.float64))
    return out
