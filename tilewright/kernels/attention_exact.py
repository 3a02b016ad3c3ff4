"""Sums of dq that runs agree on in every bit: integers, which have one value in any order.

Programs of `tilewright.kernels.attention_backward.attention_gradients` each add to dq what comes of a tile of keys, in
any order. A program's walk has one order, so a contribution is a function of the inputs; it is rounded to a multiple of
a step, one for each query, and added as int32. Sums modulo 2^32 do not depend on the order either, so whether a sum is
right is all there is to show. There are two forms.

By a bound. The weights of a query add up to 1, thus |dq| <= 2 |do| max|v| max|k|, and so for the contributions of any
keys. `attention_largest` reads k and v for it. The step is 2^-29 of |do| max|v| max|k|: sums are below 2^30 steps.
A float32 of that size has no room for it in its last bits, so it is split into two parts (`nearest_integer`).

By a guess that is checked, for at most MOST_ADDED tiles of keys. `attention_guess` calculates the same bound from a few
keys, and the step is the next power of two from 2^-25 of it on. Adding 2^-126 to a contribution in units of 2^-149
rounds it: floats from 0 to 2^-125 are that far apart, and their bits, as integers, count them. So the bits are 2^23 + x
for contributions of -2^23 <= x < 2^23 steps; all others, infinities and NaN too, set one of the 8 upper bits. Programs
gather those bits by or, and set the flag of their group of heads if any contribution had some. `attention_rows` begins
sums at -2^23 for each program that will add to them, so in the end a sum is that of at most MOST_ADDED = 2^8 numbers
x, and fits. Where a flag is set `attention_dq_again` calculates dq of the group anew, in float32: one program walks
over the keys of each tile of queries, in one order. A flag is the maximum of functions of the inputs over all programs,
so neither which result is taken nor either of them depends on the order of programs.

So results have the same bits in every run, whatever the inputs; what a wrong guess costs is time.
"""

from __future__ import annotations

from typing import Any

import tilewright as tw
from tilewright.kernels.attention import LOG2E
from tilewright.kernels.attention_bias_gradient import TILE

#: added to a float below 2^30: its upper part in units of 512, and what is left of it in units of 1, are the last bits
#: of the sums. (bits of UPPER << 9) + bits of LOWER is a multiple of 2^32.
UPPER, LOWER = 7327449088.0, 12582912.0
#: the smallest normal float: around it floats are equally far apart, SPACING, as those that are smaller yet
SMALLEST, SPACING = 2.0**-126, 2.0**-149
#: keys that are looked at to guess the size of gradients: at so many places so many
PLACES, LOOKED_AT = 4, 32
#: programs whose contributions, each below 2^23 steps, fit into a sum
MOST_ADDED = 256
#: programs that calculate dq again: two for each of an H200's multiprocessors
AGAIN = 264


@tw.kernel
def attention_largest(
    k: tw.Tensor,
    v: tw.Tensor,
    largest: tw.Tensor,
    lengths: tw.Tensor = None,
    k_starts: tw.Tensor = None,
    *,
    D: tw.constexpr,
    DV: tw.constexpr,
) -> None:
    """Of each tile of keys the largest element of k and the largest square of a row of v.

    k (B, G, N, D), v (B, G, N, DV), largest (2, B, G, cdiv(N, TILE)) float32, lengths as of `attention`. Rows before
    the first packed sequence and behind the last do not count. Grid: (cdiv(N, TILE), G, B).
    """
    n, g, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    keys = tw.load(k[b, g], (n, 0), (TILE, D)).to(tw.float32)
    values = tw.load(v[b, g], (n, 0), (TILE, DV)).to(tw.float32)
    if lengths is not None:
        exist = (n * TILE + tw.arange(0, TILE) < tw.load(lengths, b))[:, None]
        keys, values = tw.where(exist, keys, 0.0), tw.where(exist, values, 0.0)
    if k_starts is not None:
        rows = n * TILE + tw.arange(0, TILE)
        exist = (rows >= tw.load(k_starts, 0)) & (rows < tw.load(k_starts, k_starts.shape[0] - 1))
        keys, values = tw.where(exist[:, None], keys, 0.0), tw.where(exist[:, None], values, 0.0)
    tw.store(largest[0, b, g], n, tw.max(tw.max(tw.abs(keys), axis=1)[None, :], axis=1))
    tw.store(largest[1, b, g], n, tw.max(tw.sum(values * values, axis=1)[None, :], axis=1))


@tw.kernel
def attention_bound(largest: tw.Tensor, bound: tw.Tensor) -> None:
    """max|v| max|k| of a group of heads. largest as in `attention_largest`, bound (B, G) float32. Grid: (G, B)."""
    g, b = tw.program_id(0), tw.program_id(1)
    key, value = tw.zeros((1, 128), tw.float32), tw.zeros((1, 128), tw.float32)
    for j in tw.range(tw.cdiv(largest.shape[3], 128)):
        key = tw.maximum(key, tw.load(largest[0, b, g], j, (128,))[None, :])
        value = tw.maximum(value, tw.load(largest[1, b, g], j, (128,))[None, :])
    tw.store(bound[b], g, tw.max(key, axis=1) * tw.sqrt(tw.max(value, axis=1)))


@tw.kernel
def attention_guess(
    k: tw.Tensor, v: tw.Tensor, bound: tw.Tensor, flags: tw.Tensor, *, D: tw.constexpr, DV: tw.constexpr
) -> None:
    """`attention_bound` of a few keys. Zeros to ``flags`` (B + 1, G) int32: of groups, and whether any is set.

    The last is the first element of the last row. Grid: (G, B).
    """
    g, b = tw.program_id(0), tw.program_id(1)
    key, value = tw.zeros((LOOKED_AT,), tw.float32), tw.zeros((LOOKED_AT,), tw.float32)
    apart = tw.cdiv(k.shape[2], LOOKED_AT * PLACES)
    for i in tw.static_range(PLACES):
        keys = tw.load(k[b, g], (i * apart, 0), (LOOKED_AT, D)).to(tw.float32)
        values = tw.load(v[b, g], (i * apart, 0), (LOOKED_AT, DV)).to(tw.float32)
        key = tw.maximum(key, tw.max(tw.abs(keys), axis=1))
        value = tw.maximum(value, tw.sum(values * values, axis=1))
    tw.store(bound[b], g, tw.max(key[None, :], axis=1) * tw.sqrt(tw.max(value[None, :], axis=1)))
    tw.store(flags[b], g, tw.zeros((1,), tw.int32))
    if b == 0:
        tw.store(flags[k.shape[0]], g, tw.zeros((1,), tw.int32))


@tw.function
def nearest_integer(x: Any) -> Any:
    """Floats below 2^30 as int32, rounded: by additions, since conversions share a slow unit with exp2."""
    upper = x + UPPER
    lower = x + (UPPER + LOWER - upper)
    return (tw.bitcast(upper, tw.int32) << 9) + tw.bitcast(lower, tw.int32)


@tw.function
def any_bits(x: Any) -> Any:
    """Bits that are set in some of 32 and more elements: those of a product that lie in one thread's registers."""
    rows, columns = x.shape
    x = x.reshape(rows // 16, 2, 8, columns // 8, 4, 2)
    x = x[:, 0] | x[:, 1]
    x = x[:, :, :, :, 0] | x[:, :, :, :, 1]
    found = x[:, :, 0]
    for i in tw.static_range(1, columns // 8):
        found = found | x[:, :, i]
    return found


@tw.function
def note_beyond(flags: Any, found: Any, b: Any, g: Any, entries: Any) -> None:
    """Set the flag of a group if ``found`` of `any_bits` has any that no contribution in range has."""
    rows, lines, lanes = found.shape
    beyond = tw.max(tw.where((found >> 24) != 0, 1, 0).reshape(1, rows * lines * lanes), axis=1)
    tw.atomic_max(flags[b], g, beyond)
    tw.atomic_max(flags[entries], 0, beyond)


@tw.kernel
def attention_dq_again(
    q: tw.Tensor,
    k: tw.Tensor,
    v: tw.Tensor,
    do: tw.Tensor,
    rows: tw.Tensor,
    flags: tw.Tensor,
    dq: tw.Tensor,
    scale: tw.float32,
    *,
    D: tw.constexpr = 128,
    DV: tw.constexpr = 128,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 64,
    CAUSAL: tw.constexpr = False,
) -> None:
    """dq of groups whose flag is set: each program walks over the keys of its tiles of queries. Grid: any (P,).

    Other arguments as of `attention_gradients` and `attention_guess`.
    """
    tiles, shift = tw.cdiv(q.shape[2], BM), k.shape[2] - q.shape[2]
    end = tw.where(tw.load(flags[q.shape[0]], 0) != 0, tiles * q.shape[1] * q.shape[0], 0)
    for t in tw.range(tw.program_id(0), end, tw.num_programs(0)):
        m, h, b = t % tiles, t // tiles % q.shape[1], t // tiles // q.shape[1]
        g = h // (q.shape[1] // k.shape[1])
        if tw.load(flags[b], g) != 0:
            logarithm, delta = tw.load(rows[0, b, h], m, (BM,)), tw.load(rows[1, b, h], m, (BM,))
            queries = tw.load(q[b, h], (m, 0), (BM, D))
            gradients = tw.load(do[b, h], (m, 0), (BM, DV))
            places = m * BM + shift + tw.arange(0, BM)
            count = tw.cdiv(k.shape[2], BN)
            if CAUSAL:
                count = tw.minimum(count, tw.cdiv(tw.maximum((m + 1) * BM + shift, 0), BN))
            dqueries = tw.zeros((BM, D), tw.float32)
            for n in tw.range(count):
                keys = tw.load(k[b, g], (n, 0), (BN, D))
                s = tw.dot(queries, keys.T) * (scale * LOG2E)
                dp = tw.dot(gradients, tw.load(v[b, g], (n, 0), (BN, DV)).T)
                columns = n * BN + tw.arange(0, BN)
                p = tw.where((columns < k.shape[2])[None, :], tw.exp2(s - logarithm[:, None]), 0.0)
                if CAUSAL:
                    p = tw.where(columns[None, :] <= places[:, None], p, 0.0)
                dqueries = tw.dot((p * (dp - delta[:, None])).to(q.dtype), keys, dqueries)
            tw.store(dq[b, h], (m, 0), (dqueries * scale).to(dq.dtype))
