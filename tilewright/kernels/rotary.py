"""Rotary position embedding: pairs of features turned by an angle that depends on the position."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw


@tw.kernel
def rotary(
    x: tw.Tensor,
    cos: tw.Tensor,
    sin: tw.Tensor,
    y: tw.Tensor,
    *,
    D: tw.constexpr = 128,
    BS: tw.constexpr = 1,
    BH: tw.constexpr = 32,
    INTERLEAVED: tw.constexpr = False,
    INVERSE: tw.constexpr = False,
) -> None:
    """``(a cos - b sin, b cos + a sin)`` for each pair (a, b) of features; x, y (B, S, H, D), cos, sin (S, D / 2).

    Pairs are (i, i + D / 2), with INTERLEAVED (2 i, 2 i + 1). INVERSE turns the other way: the gradient of x from that
    of y. Grid: (cdiv(S, BS), cdiv(H, BH), B). Computes in float32.
    """
    s, h, b = tw.program_id(0), tw.program_id(1), tw.program_id(2)
    if INTERLEAVED:
        pairs = tw.load(x[b], (s, h, 0), (BS, BH, D)).reshape(BS, BH, D // 2, 2).to(tw.float32)
        first, second = pairs[:, :, :, 0], pairs[:, :, :, 1]
    else:
        first = tw.load(x[b], (s, h, 0), (BS, BH, D // 2)).to(tw.float32)
        second = tw.load(x[b], (s, h, 1), (BS, BH, D // 2)).to(tw.float32)
    c = tw.load(cos, (s, 0), (BS, D // 2)).to(tw.float32)[:, None, :]
    d = tw.load(sin, (s, 0), (BS, D // 2)).to(tw.float32)[:, None, :]
    if INVERSE:
        d = -d
    first, second = first * c - second * d, second * c + first * d
    if INTERLEAVED:
        whole = tw.cat((first[:, :, :, None], second[:, :, :, None]), axis=3).reshape(BS, BH, D)
        tw.store(y[b], (s, h, 0), whole.to(y.dtype))
    else:
        tw.store(y[b], (s, h, 0), first.to(y.dtype))
        tw.store(y[b], (s, h, 1), second.to(y.dtype))


def tiles(heads: int) -> dict[str, int]:
    """``BS``, ``BH`` and ``num_warps``: all heads of a position, up to 32, eight for each warp."""
    height = 8
    while height < min(heads, 32):
        height *= 2
    return {"BS": 1, "BH": height, "num_warps": height // 8}


def reference(
    x: np.ndarray[Any, Any],
    cos: np.ndarray[Any, Any],
    sin: np.ndarray[Any, Any],
    interleaved: bool = False,
    inverse: bool = False,
) -> np.ndarray[Any, Any]:
    """In float64."""
    exact, half = x.astype(np.float64), x.shape[-1] // 2
    c, d = cos.astype(np.float64)[:, None, :], sin.astype(np.float64)[:, None, :] * (-1 if inverse else 1)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    out = np.empty_like(exact)
    out[..., first] = exact[..., first] * c - exact[..., second] * d
    out[..., second] = exact[..., second] * c + exact[..., first] * d
    return out
