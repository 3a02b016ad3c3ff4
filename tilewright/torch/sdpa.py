"""Scaled dot-product attention with the signature of torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.attention import sdpa
from tilewright.kernels.attention_backward import sdpa_backward
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import NO_TENSOR, Refusal, refuse_place, refuse_tensors

#: sizes of a head that the kernels have tiles for
DEPTHS = (16, 32, 64, 96, 128, 192, 256)
#: the largest in float32, for which tiles have twice the bytes
MOST_SINGLE = 128


# --- operators ------------------------------------------------------------------------------------


def _outputs(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
    out = torch.empty_like(q)  # with q's order of dimensions, as torch's kernels have it
    if v.shape[3] != q.shape[3]:
        out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch(
    made: tuple[Any, Any],
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    lengths: Any,
    left: int | None,
    causal: bool,
    scale: float,
    cap: float | None,
) -> None:
    out, lse = made
    if out.numel():
        pairs = _expanded(bias, q, k)
        sdpa(q, k, v, out, causal, scale=scale, lse=lse, bias=pairs, lengths=lengths, left=left, cap=cap)


def _expanded(bias: Any, q: Any, k: Any) -> Any:
    return None if bias is None else bias.expand(*q.shape[:3], k.shape[2])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    q, k, v, bias, lengths, *ctx.numbers = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, bias, lengths, out, lse)


def _backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    q, k, v, bias, lengths, out, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[3]
    *gradients, dbias = _attention_backward(dout, q, k, v, out, lse, bias, lengths, *ctx.numbers, needed)
    return (*gradients, dbias if needed else None, *[None] * 5)


_attention = torch_op(
    "tilewright::attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? lengths, int? left, bool causal,"
    " float scale, float? cap) -> (Tensor, Tensor)",
    outputs=_outputs,
    launch=_launch,
    backward=_backward,
    setup_context=_context,
    pure=True,
)


def _outputs_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, bias: Any, *rest: Any) -> Any:
    dbias = bias.new_empty(bias.shape) if rest[-1] else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _launch_backward(
    made: tuple[Any, Any, Any, Any],
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    bias: Any,
    lengths: Any,
    left: int | None,
    causal: bool,
    scale: float,
    cap: float | None,
    needs_bias: bool,
) -> None:
    dq, dk, dv, dbias = made
    if not out.numel():
        dk.zero_(), dv.zero_(), dbias.zero_()
        return
    arguments = q, k, v, out, dout, lse, dq, dk, dv, causal
    options = {"scale": scale, "lengths": lengths, "left": left, "cap": cap}
    sdpa_backward(*arguments, bias=_expanded(bias, q, k), dbias=dbias if needs_bias else None, **options)


_attention_backward = torch_op(
    "tilewright::attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? bias,"
    " Tensor? lengths, int? left, bool causal, float scale, float? cap, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_outputs_backward,
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
    lengths: Any = None,
    softcap: float | None = None,
) -> Refusal:
    if key is None or value is None:
        return NO_TENSOR
    reason = refuse_tensors(query, key, value) or refuse_factors(scale, softcap)
    if reason:
        return reason
    if dropout_p != 0.0:
        return "dropout"
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        return "not four dimensions"
    if attn_mask is not None:
        reason = _refuse_mask(attn_mask, query, key)
    if lengths is not None:
        reason = reason or refuse_lengths(lengths, query)
    return reason or _refuse_sizes(query, key, value, is_causal, enable_gqa)


def _refuse_mask(mask: Any, query: Any, key: Any) -> Refusal:
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
    return None


def refuse_factors(scale: float | None, softcap: float | None = None) -> Refusal:
    """Why kernels do not take these factors: they seek the largest of the scores before they multiply."""
    positive = all(factor is None or factor > 0 for factor in (scale, softcap))
    return None if positive else "a scale or soft cap that is not positive"


def refuse_lengths(lengths: Any, query: Any) -> Refusal:
    """Why kernels do not take these lengths of sequences."""
    if lengths.dtype != torch.int32 or tuple(lengths.shape) != tuple(query.shape[:1]):
        return "lengths are no int32 for each sequence"
    return refuse_place(query, lengths)


def refuse_heads(query: Any, key: Any, value: Any) -> Refusal:
    """Why kernels do not take heads of these sizes."""
    depth, width = query.shape[-1], value.shape[-1]
    if depth not in DEPTHS or width not in DEPTHS:
        return f"heads of {depth if depth not in DEPTHS else width}, not {' or '.join(map(str, DEPTHS))}"
    if query.dtype == torch.float32 and max(depth, width) > MOST_SINGLE:
        return f"float32 heads of more than {MOST_SINGLE}"
    return "the sizes of query, key and value differ" if key.shape[-1] != depth else None


def refuse_single(query: Any) -> Refusal:
    """Why kernels with the tiles of `attention` do not run: float32 products of theirs pass a GPU's registers."""
    return "float32 on a GPU" if query.dtype == torch.float32 and query.device.type == "cuda" else None


def _refuse_sizes(query: Any, key: Any, value: Any, is_causal: bool, enable_gqa: bool) -> Refusal:
    batch, heads, rows, _ = query.shape
    reason = refuse_heads(query, key, value) or refuse_single(query)
    if reason:
        return reason
    if value.shape[:3] != key.shape[:3] or key.shape[0] != batch:
        return "the sizes of query, key and value differ"
    if key.shape[1] != heads and (not enable_gqa or heads % key.shape[1]):
        return "the numbers of heads differ"
    if is_causal and rows > key.shape[2]:
        return "causal with more queries than keys"  # torch aligns the first ones, the kernels the last ones
    return None


def spelled_out(
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
    lengths: Any = None,
    softcap: float | None = None,
) -> Any:
    """`attention` by torch: with masks for what its function does not have, and formulas for soft caps."""
    mask = attn_mask
    if window is not None:
        _check_window(mask, is_causal)
    if window is not None or lengths is not None or softcap is not None:
        mask, is_causal = _whole_mask(query, key, mask, is_causal, window, lengths), False
    if softcap is not None:
        return _capped(query, key, value, mask, dropout_p, scale, softcap)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _whole_mask(query: Any, key: Any, mask: Any, is_causal: bool, window: int | None, lengths: Any) -> Any:
    """All that hides keys in one mask, None if nothing does; the first query is aligned with the first key."""
    columns = torch.arange(key.shape[2], device=query.device)
    seen = None
    if is_causal:
        rows = torch.arange(query.shape[2], device=query.device)[:, None]
        seen = columns <= rows
        if window is not None:
            seen = seen & (columns >= rows - window)
    if lengths is not None:
        exist = (columns < lengths[:, None])[:, None, None]
        seen = exist if seen is None else seen & exist
    if mask is None or seen is None:
        return seen if mask is None else mask
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def _capped(query: Any, key: Any, value: Any, mask: Any, dropout_p: float, scale: float | None, softcap: float) -> Any:
    """Attention with bounded scores, spelled out; rows that see nothing give 0."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        mask = mask if mask.dtype != torch.bool else torch.zeros_like(scores).masked_fill(~mask, float("-inf"))
        scores = scores + mask
    hidden = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(hidden, 0.0), -1, dtype=torch.float32).masked_fill(hidden, 0.0)
    return F.dropout(weights.to(query.dtype), dropout_p) @ value


def _check_window(mask: Any, is_causal: bool) -> None:
    if mask is not None or not is_causal:
        raise ValueError("attention: a window needs is_causal=True and no attn_mask")


@functional(_refuse, spelled_out, lowered=True)
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
    lengths: Any = None,
    softcap: float | None = None,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`; query (B, H, M, D), key (B, H or G, N, D), value (..., DV).

    The kernels take no dropout, D and DV of 16, 32, 64, 96, 128, 192 or 256 (float32: up to 128, and on the CPU) and
    with ``is_causal`` M up to N; torch does the rest. The backward pass stores no weights, and its sums have one order,
    those of an additive mask's gradient too. ``window``, beside ``is_causal``: a query sees its own key and that many
    before it. ``lengths`` (B,) int32: how many keys of each batch exist. ``softcap`` bounds scores, before masks are
    added: softcap * tanh(score / softcap). A query that sees no key gives 0.
    """
    if window is not None:
        _check_window(attn_mask, is_causal)
    if is_causal and query.shape[2] != key.shape[2]:  # torch aligns the first query with the first key
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
        if attn_mask is not None and attn_mask.shape[-1] != 1:
            attn_mask = attn_mask[..., : query.shape[2]]
    bias = attn_mask
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)] if bias.ndim else bias.reshape(1, 1, 1, 1)
        bias = bias.expand(*bias.shape[:3], key.shape[2])
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _attention(query, key, value, bias, lengths, window, is_causal, factor, softcap)[0]


__all__ = ["DEPTHS", "attention", "refuse_factors", "refuse_heads", "refuse_lengths", "refuse_single", "spelled_out"]
