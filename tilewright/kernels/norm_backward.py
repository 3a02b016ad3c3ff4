"""Gradients of `rmsnorm` and `layernorm`, which differ in whether the rows are centred."""

from __future__ import annotations

from typing import Any

import tilewright as tw
from tilewright.kernels.rows import (
    LONG_WARPS,
    WIDEST,
    WIDEST_GRADIENTS,
    gradient_tiles,
    is_spread,
    long_gradient_tiles,
    spread_gradient_tiles,
)
from tilewright.kernels.workspace import Workspace

_workspace = Workspace()


@tw.function
def centred(x, centre, m, j, BM, BN, hint):
    """The tile (m, j) of x, minus the rows' means ``centre`` (BM,) where there are any."""
    row = tw.load(x, (m, j), (BM, BN), eviction_policy=hint).to(tw.float32)
    if centre is not None:
        row = row - centre[:, None]
    return row


@tw.function
def row_means(products, gradient, mean, columns):
    """The means over rows of both tiles, of the second only where rows are centred; threads meet once for both."""
    if mean is None:
        return tw.sum(products, axis=1) / columns, None
    sums = tw.sum(tw.cat((products[:, :, None], gradient[:, :, None]), axis=2), axis=1) / columns
    return sums[:, 0], sums[:, 1]


@tw.kernel
def norm_backward(
    dy: tw.Tensor,
    x: tw.Tensor,
    weight: tw.Tensor,
    inverse: tw.Tensor,
    dx: tw.Tensor,
    partial: tw.Tensor,
    dtotal: tw.Tensor = None,
    mean: tw.Tensor = None,
    sums: tw.Tensor = None,
    *,
    BIAS: tw.constexpr = False,
    BM: tw.constexpr = 1,
    BN: tw.constexpr = 4096,
    READ: tw.constexpr = None,
    AGAIN: tw.constexpr = False,
) -> None:
    """``dx`` of a norm, and sums over rows for the gradients of the weight and, with BIAS, of the bias.

    dy, x and dx (M, N); x is what was normalised: with a residual their sum. ``inverse`` (M,) and, of `layernorm`,
    ``mean`` (M,) are what the forward pass wrote. ``dtotal`` (M, N) is the gradient that reaches x on other ways, added
    to dx. partial (P, 1 + BIAS, N) float32: the sums of each program's rows, for `column_sums` to add up.

    Grid: (P,), any P, for rows up to BN elements; (P, cdiv(N, BN)) where ``sums`` from `norm_backward_sums` are given.
    READ: a hint to the cache for matrices. AGAIN: rows do not wait in registers for their sums but are read once more,
    on Hopper from the copies in shared memory that they came through.
    """
    p, j = tw.program_id(0), tw.program_id(1)
    columns = x.shape[1]
    scale = tw.load(weight, j, BN).to(tw.float32)
    dweight, dbias = tw.zeros((BN,), tw.float32), tw.zeros((BN,), tw.float32)
    for m in tw.range(p, tw.cdiv(x.shape[0], BM), tw.num_programs(0)):
        factor = tw.load(inverse, m, BM)[:, None]
        centre = None if mean is None else tw.load(mean, m, BM)
        normal = centred(x, centre, m, j, BM, BN, READ) * factor
        # 0 outside, so that it is of no account what `centred` gives there
        gradient = tw.load(dy, (m, j), (BM, BN), eviction_policy=READ).to(tw.float32)
        dweight = dweight + tw.sum(gradient * normal, axis=0)
        if BIAS:
            dbias = dbias + tw.sum(gradient, axis=0)
        gradient = gradient * scale
        if sums is None:
            along, middle = row_means(gradient * normal, gradient, mean, columns)
        else:
            along = tw.load(sums[0], m, BM)
            middle = None if mean is None else tw.load(sums[1], m, BM)
        if AGAIN:
            normal = centred(x, centre, m, j, BM, BN, READ) * factor
            gradient = tw.load(dy, (m, j), (BM, BN), eviction_policy=READ).to(tw.float32) * scale
        out = gradient - normal * along[:, None]
        if mean is not None:
            out = out - middle[:, None]
        out = out * factor
        if dtotal is not None:
            out = out + tw.load(dtotal, (m, j), (BM, BN), eviction_policy=READ).to(tw.float32)
        tw.store(dx, (m, j), out.to(dx.dtype))
    tw.store(partial, (p, 0, j), dweight[None, None, :])
    if BIAS:
        tw.store(partial, (p, 1, j), dbias[None, None, :])


@tw.kernel
def norm_backward_sums(
    dy: tw.Tensor,
    x: tw.Tensor,
    weight: tw.Tensor,
    inverse: tw.Tensor,
    sums: tw.Tensor,
    mean: tw.Tensor = None,
    *,
    BN: tw.constexpr = 4096,
) -> None:
    """What `norm_backward` needs of whole rows that are longer than its tiles: (2, M) float32. Grid: (M,).

    The means over a row of ``dy * weight * normal`` and, if ``mean`` is given, of ``dy * weight``.
    """
    m = tw.program_id(0)
    factor = tw.load(inverse, m, 1)[:, None]
    centre = None if mean is None else tw.load(mean, m, 1)
    along, middle = tw.zeros((1, BN), tw.float32), tw.zeros((1, BN), tw.float32)
    for j in tw.range(tw.cdiv(x.shape[1], BN)):
        gradient = tw.load(dy, (m, j), (1, BN)).to(tw.float32) * tw.load(weight, j, BN).to(tw.float32)
        along = along + gradient * centred(x, centre, m, j, 1, BN, None) * factor
        if mean is not None:
            middle = middle + gradient
    tw.store(sums[0], m, tw.sum(along, axis=1) / x.shape[1])
    if mean is not None:
        tw.store(sums[1], m, tw.sum(middle, axis=1) / x.shape[1])


def gradient_programs(rows: int, columns: int) -> int:
    """How many partial sums `norm_gradients` makes: P of `norm_backward`."""
    return (gradient_tiles(rows, columns) if columns <= WIDEST else long_gradient_tiles(rows))[1]


def norm_gradients(
    dy: Any, x: Any, weight: Any, inverse: Any, dx: Any, partial: Any, dtotal: Any = None, mean: Any = None
) -> None:
    """`norm_backward` of rows of any length: partial (`gradient_programs`, 1 or 2, N). Arrays of NumPy or torch."""
    rows, columns = x.shape
    bias = partial.shape[1] == 2
    if columns <= WIDEST:
        meta, programs = gradient_tiles(rows, columns, mean is not None)
        norm_backward[(programs,)](dy, x, weight, inverse, dx, partial, dtotal, mean, BIAS=bias, **meta)
        return
    if mean is None and columns <= WIDEST_GRADIENTS and is_spread(x):
        meta, programs = spread_gradient_tiles(rows, columns)
        norm_backward[(programs,)](dy, x, weight, inverse, dx, partial, dtotal, BIAS=bias, **meta)
        return
    sums = _workspace.take(x, (2, rows))
    norm_backward_sums[(rows,)](dy, x, weight, inverse, sums, mean, num_warps=LONG_WARPS)
    meta, programs = long_gradient_tiles(rows)
    grid = programs, tw.cdiv(columns, meta["BN"])
    norm_backward[grid](dy, x, weight, inverse, dx, partial, dtotal, mean, sums, BIAS=bias, **meta)


__all__ = ["gradient_programs", "norm_backward", "norm_backward_sums", "norm_gradients"]
