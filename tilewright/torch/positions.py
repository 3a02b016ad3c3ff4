"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch

import tilewright as tw
from tilewright.kernels import rotary as kernels
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import FLOATS, Refusal, refuse_place, refuse_tensors


def _launch(y: Any, x: Any, cos: Any, sin: Any, interleaved: bool, inverse: bool) -> None:
    if y.numel():
        batch, rows, heads, depth = x.shape
        meta = kernels.tiles(heads)
        grid = tw.cdiv(rows, meta["BS"]), tw.cdiv(heads, meta["BH"]), batch
        kernels.rotary[grid](x, cos, sin, y, D=depth, INTERLEAVED=interleaved, INVERSE=inverse, **meta)


def _backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    return _rotary(dy, cos, sin, ctx.interleaved, not ctx.inverse), None, None, None, None


def _context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


_rotary = torch_op(
    "tilewright::rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    outputs=lambda x, *rest: torch.empty_like(x),
    launch=_launch,
    backward=_backward,
    setup_context=_context,
    pure=True,
)


def _refuse(x: Any, cos: Any, sin: Any, interleaved: bool = False) -> Refusal:
    reason = refuse_tensors(x) or refuse_place(x, cos, sin)
    if reason:
        return reason
    if cos.dtype not in FLOATS or sin.dtype not in FLOATS:
        return "angles of another dtype"
    if x.ndim != 4 or x.shape[3] & (x.shape[3] - 1) or x.shape[3] < 2:
        return "no heads whose size is a power of two"
    if tuple(cos.shape) != (x.shape[1], x.shape[3] // 2) or cos.shape != sin.shape:
        return "the sizes do not fit"
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "gradients of the angles"
    return None


def _eager(x: Any, cos: Any, sin: Any, interleaved: bool = False) -> Any:
    half = x.shape[-1] // 2
    parts = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    first, second = (part.float() for part in parts)
    c, s = (angle.float()[:, None] for angle in (cos, sin))
    turned = first * c - second * s, second * c + first * s
    whole = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return whole.to(x.dtype)


@functional(_refuse, _eager)
def rotary(x: Any, cos: Any, sin: Any, interleaved: bool = False) -> Any:
    """``(a cos - b sin, b cos + a sin)`` for each pair (a, b) of features: x (B, S, H, D), cos and sin (S, D / 2).

    Pairs are (i, i + D / 2), with ``interleaved`` (2 i, 2 i + 1). Computes in float32; cos and sin may have another
    dtype than x and get no gradient from the kernel. D is a power of two.
    """
    return _rotary(x, cos, sin, interleaved, False)


__all__ = ["rotary"]
