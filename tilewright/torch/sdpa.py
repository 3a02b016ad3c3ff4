"""Scaled dot-product attention with the signature of torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.attention import sdpa
from tilewright.kernels.attention_backward import sdpa_backward
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import Refusal, refuse_tensors

#: sizes of a head that the kernels have tiles for
DEPTHS = (16, 32, 64, 128)


# --- operators ------------------------------------------------------------------------------------


def _outputs(q: Any, k: Any, v: Any, causal: bool, scale: float) -> tuple[Any, Any]:
    out = torch.empty_like(q)  # with q's order of dimensions, as torch's kernels have it
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch(made: tuple[Any, Any], q: Any, k: Any, v: Any, causal: bool, scale: float) -> None:
    out, lse = made
    if out.numel():
        sdpa(q, k, v, out, causal, scale=scale, lse=lse)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    q, k, v, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, Any, Any, None, None]:
    q, k, v, out, lse = ctx.saved_tensors
    return (*_attention_backward(dout, q, k, v, out, lse, ctx.causal, ctx.scale), None, None)


_attention = torch_op(
    "tilewright::attention(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor, Tensor)",
    outputs=_outputs,
    launch=_launch,
    backward=_backward,
    setup_context=_context,
)


def _launch_backward(
    made: tuple[Any, Any, Any],
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    causal: bool,
    scale: float,
) -> None:
    dq, dk, dv = made
    if out.numel():
        sdpa_backward(q, k, v, out, dout, lse, dq, dk, dv, causal, scale=scale)
    else:
        dk.zero_(), dv.zero_()


_attention_backward = torch_op(
    "tilewright::attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    outputs=lambda dout, q, k, v, *rest: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
    launch=_launch_backward,
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
) -> Refusal:
    reason = refuse_tensors(query, key, value)
    if reason:
        return reason
    if attn_mask is not None:
        return "a mask"
    if dropout_p != 0.0:
        return "dropout"
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        return "not four dimensions"
    return _refuse_sizes(query.shape, key.shape, value.shape, is_causal, enable_gqa)


def _refuse_sizes(query: Any, key: Any, value: Any, is_causal: bool, enable_gqa: bool) -> Refusal:
    batch, heads, rows, depth = query
    if depth not in DEPTHS:
        return f"heads of {depth}, not {' or '.join(map(str, DEPTHS))}"
    if value != key or key[0] != batch or key[3] != depth:
        return "the sizes of query, key and value differ"
    if key[1] != heads and (not enable_gqa or heads % key[1]):
        return "the numbers of heads differ"
    if is_causal and rows != key[2]:
        return "causal with as many queries as keys only"  # torch aligns the first ones, the kernels the last ones
    return None


@functional(_refuse, F.scaled_dot_product_attention)
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
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`; query (B, H, M, D), key and value (B, G, N, D).

    The kernels take no mask and no dropout, D of 16, 32, 64 or 128, and with ``is_causal`` M equal to N; torch does the
    rest. The backward pass stores no weights, and its sums have one order.
    """
    return _attention(query, key, value, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)[0]


__all__ = ["attention"]
