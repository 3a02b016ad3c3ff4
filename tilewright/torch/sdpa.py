"""Scaled dot-product attention with the signature of torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.attention import sdpa
from tilewright.kernels.attention_backward import sdpa_backward
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import Refusal, refuse_place, refuse_tensors, trains

#: sizes of a head that the kernels have tiles for
DEPTHS = (16, 32, 64, 128)


# --- operators ------------------------------------------------------------------------------------


def _outputs(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
    out = torch.empty_like(q)  # with q's order of dimensions, as torch's kernels have it
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch(
    made: tuple[Any, Any], q: Any, k: Any, v: Any, bias: Any, left: int | None, causal: bool, scale: float
) -> None:
    out, lse = made
    if out.numel():
        sdpa(q, k, v, out, causal, scale=scale, lse=lse, bias=bias, left=left)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    q, k, v, bias, ctx.left, ctx.causal, ctx.scale = inputs
    if bias is not None:
        raise NotImplementedError("tilewright::attention has no gradient with a bias")
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    gradients = _attention_backward(dout, q, k, v, out, lse, ctx.left, ctx.causal, ctx.scale)
    return (*gradients, None, None, None, None)


_attention = torch_op(
    "tilewright::attention(Tensor q, Tensor k, Tensor v, Tensor? bias, int? left, bool causal, float scale)"
    " -> (Tensor, Tensor)",
    outputs=_outputs,
    launch=_launch,
    backward=_backward,
    setup_context=_context,
    pure=True,
)


def _launch_backward(
    made: tuple[Any, Any, Any],
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    left: int | None,
    causal: bool,
    scale: float,
) -> None:
    dq, dk, dv = made
    if out.numel():
        sdpa_backward(q, k, v, out, dout, lse, dq, dk, dv, causal, scale=scale, left=left)
    else:
        dk.zero_(), dv.zero_()


_attention_backward = torch_op(
    "tilewright::attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int? left,"
    " bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    outputs=lambda dout, q, k, v, *rest: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
    launch=_launch_backward,
    pure=True,
)


# --- function -------------------------------------------------------------------------------------


def _refuse(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
) -> Refusal:
    reason = refuse_tensors(query, key, value)
    if reason:
        return reason
    if dropout_p != 0.0:
        return "dropout"
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        return "not four dimensions"
    if attn_mask is not None:
        reason = _refuse_mask(attn_mask, query, key, value, is_causal)
    return reason or _refuse_sizes(query.shape, key.shape, value.shape, is_causal, enable_gqa)


def _refuse_mask(mask: Any, query: Any, key: Any, value: Any, is_causal: bool) -> Refusal:
    reason = refuse_place(query, mask)
    if reason:
        return reason
    if mask.dtype not in (torch.bool, query.dtype):
        return "a mask of another dtype"
    if mask.ndim > 4 or mask.numel() == 0:
        return "a mask of another size"
    wanted = (*query.shape[:3], key.shape[2])
    if any(have not in (1, want) for have, want in zip(mask.shape[::-1], wanted[::-1], strict=False)):
        return "a mask of another size"
    return "a mask where gradients flow" if trains(query, key, value, mask) else None


def _refuse_sizes(query: Any, key: Any, value: Any, is_causal: bool, enable_gqa: bool) -> Refusal:
    batch, heads, rows, depth = query
    if depth not in DEPTHS:
        return f"heads of {depth}, not {' or '.join(map(str, DEPTHS))}"
    if value != key or key[0] != batch or key[3] != depth:
        return "the sizes of query, key and value differ"
    if key[1] != heads and (not enable_gqa or heads % key[1]):
        return "the numbers of heads differ"
    if is_causal and rows > key[2]:
        return "causal with more queries than keys"  # torch aligns the first ones, the kernels the last ones
    return None


def _torch(query: Any, key: Any, value: Any, *rest: Any, window: int | None = None, **options: Any) -> Any:
    given = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)), **options}
    if window is not None:
        _check_window(given.get("attn_mask"), given.get("is_causal", False))
        rows = torch.arange(query.shape[2], device=query.device)[:, None]
        columns = torch.arange(key.shape[2], device=query.device)
        given |= {"attn_mask": (columns <= rows) & (columns >= rows - window), "is_causal": False}
    return F.scaled_dot_product_attention(query, key, value, **given)


def _check_window(mask: Any, is_causal: bool) -> None:
    if mask is not None or not is_causal:
        raise ValueError("attention: a window needs is_causal=True and no attn_mask")


@functional(_refuse, _torch, lowered=True)
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`; query (B, H, M, D), key and value (B, H or G, N, D).

    The kernels take no dropout, D of 16, 32, 64 or 128, with ``is_causal`` M up to N, and a mask where no gradients
    flow; torch does the rest. The backward pass stores no weights, and its sums have one order. ``window``, beside
    ``is_causal``: a query sees its own key and that many before it.
    """
    if window is not None:
        _check_window(attn_mask, is_causal)
    if is_causal and query.shape[2] != key.shape[2]:  # torch aligns the first query with the first key
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~bias, float("-inf"))
        bias = bias.expand(*query.shape[:3], key.shape[2])
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _attention(query, key, value, bias, window, is_causal, factor)[0]


__all__ = ["attention"]
