"""Attention as servers need it: sequences of different lengths in one tensor, and one new query for each sequence."""

from __future__ import annotations

from typing import Any

import torch

import tilewright as tw
from tilewright.kernels import attention as kernels
from tilewright.kernels import attention_decode as decoding
from tilewright.kernels.attention_backward import varlen_backward
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.sdpa import attention, refuse_factors, refuse_heads, refuse_lengths, refuse_single, spelled_out
from tilewright.torch.support import Refusal, refuse_place, refuse_tensors, trains

# --- packed sequences -----------------------------------------------------------------------------


def _outputs_varlen(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
    # rows that belong to no sequence stay 0
    return q.new_zeros((*q.shape[:2], v.shape[2])), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _launch_varlen(made: tuple[Any, Any], q: Any, k: Any, v: Any, q_starts: Any, k_starts: Any, *numbers: Any) -> None:
    out, lse = made
    longest_q, _, causal, left, scale, cap = numbers
    if out.numel() and longest_q:
        plain = left is None and cap is None
        meta = kernels.configuration(longest_q if plain else 0, max(q.shape[2], v.shape[2]))
        grid = tw.cdiv(longest_q, meta["BM"]), q.shape[1], q_starts.shape[0] - 1
        arguments = q, k, v, out, q_starts, k_starts, scale * kernels.LOG2E, lse, left
        sizes = {"D": q.shape[2], "DV": v.shape[2], "CAUSAL": causal, "CAP": cap}
        kernels.attention_varlen[grid](*arguments, **sizes, **meta)


def _varlen_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    q, k, v, q_starts, k_starts, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, q_starts, k_starts)


def _launch_varlen_backward(
    made: tuple[Any, Any, Any], dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *starts_and_numbers: Any
) -> None:
    q_starts, k_starts, longest_q, longest_k, causal, left, scale, cap = starts_and_numbers
    if out.numel() and longest_q and longest_k:
        arguments = q, k, v, out, dout, lse, *made, q_starts, k_starts, longest_q, longest_k, causal
        varlen_backward(*arguments, scale=scale, left=left, cap=cap)


_varlen_backward = torch_op(
    "tilewright::attention_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor q_starts, Tensor k_starts, SymInt longest_q, SymInt longest_k, bool causal, int? left, float scale,"
    " float? cap) -> (Tensor, Tensor, Tensor)",
    outputs=lambda dout, q, k, v, *rest: tuple(torch.zeros_like(x) for x in (q, k, v)),
    launch=_launch_varlen_backward,
)


def _varlen_gradients(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    return (*_varlen_backward(dout, *ctx.saved_tensors, *ctx.numbers), *[None] * 8)


_varlen = torch_op(
    "tilewright::attention_varlen(Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor k_starts, SymInt longest_q,"
    " SymInt longest_k, bool causal, int? left, float scale, float? cap) -> (Tensor, Tensor)",
    outputs=_outputs_varlen,
    launch=_launch_varlen,
    backward=_varlen_gradients,
    setup_context=_varlen_context,
)


def _refuse_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Refusal:
    reason = refuse_tensors(query, key, value) or refuse_place(query, cu_seq_q, cu_seq_k)
    if reason:
        return reason
    if any(x.ndim != 3 for x in (query, key, value)):
        return "no packed heads"
    if value.shape[:2] != key.shape[:2] or query.shape[1] % key.shape[1]:
        return "the sizes of query, key and value differ"
    if cu_seq_q.dtype != torch.int32 or cu_seq_k.dtype != torch.int32 or cu_seq_q.shape != cu_seq_k.shape:
        return "starts are no int32 of one size"
    return refuse_heads(query, key, value) or refuse_single(query) or refuse_factors(scale, softcap)


def _eager_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    max_k: int | None = None,
    **options: Any,
) -> Any:
    """All pairs of queries and keys, masked."""
    places = []
    for starts, packed in ((cu_seq_q, query), (cu_seq_k, key)):
        index = torch.arange(packed.shape[0], device=packed.device)
        number = torch.searchsorted(starts.long(), index, right=True) - 1
        behind = starts.long()[(number + 1).clamp(max=starts.shape[0] - 1)] - index  # the last one is 1
        places.append((number, behind))
    (q_number, q_behind), (k_number, k_behind) = places
    seen = (q_number[:, None] == k_number) & (q_number[:, None] < cu_seq_q.shape[0] - 1)
    if is_causal:
        seen &= k_behind >= q_behind[:, None]
    if window is not None:
        seen &= k_behind <= q_behind[:, None] + window
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    return spelled_out(q, k, v, seen, enable_gqa=grouped, **options)[0].transpose(0, 1)


@functional(_refuse_varlen, _eager_varlen, lowered=True)
def attention_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    *,
    max_k: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Any:
    """Attention within each of several sequences that lie one after the other.

    query (T, H, D), key (S, G, D), value (S, G, DV), H a multiple of G; ``cu_seq_q`` and ``cu_seq_k`` (B + 1,) int32
    are where sequences begin and the last ends; ``max_q`` and ``max_k``, the longest sequences or more (``max_k``
    serves the gradient alone, and is S if not given, which costs programs without work). ``is_causal`` and ``window``
    (as many keys before a query's own) align the last query of a sequence with its last key. Rows of no sequence give
    0, and their gradients are 0. Sums of the backward pass have one order.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    longest = max_q, key.shape[0] if max_k is None else max_k
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, *longest, is_causal, window, factor, softcap)[0]


# --- decoding -------------------------------------------------------------------------------------


def _launch_decode(out: Any, q: Any, k: Any, v: Any, lengths: Any, pages: Any, scale: float) -> None:
    if not out.numel():
        return
    keys = k.shape[2] if pages is None else pages.shape[1] * k.shape[2]
    count = decoding.splits(q.shape[0], k.shape[1], keys)
    parts = q.new_empty((*q.shape[:2], count, v.shape[3]), dtype=torch.float32)
    logarithms = q.new_empty((*q.shape[:2], count), dtype=torch.float32)
    decoding.decode(q, k, v, out, lengths, parts, logarithms, pages, scale=scale)


_decode = torch_op(
    "tilewright::attention_decode(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? pages, float scale) -> Tensor",
    outputs=lambda q, k, v, *rest: q.new_empty((*q.shape[:2], v.shape[3])),
    launch=_launch_decode,
    pure=True,
)


def _refuse_decode(
    query: Any, key: Any, value: Any, lengths: Any, pages: Any = None, *, scale: float | None = None
) -> Refusal:
    reason = refuse_tensors(query, key, value) or refuse_place(query, *(x for x in (lengths, pages) if x is not None))
    if reason:
        return reason
    if query.ndim != 3 or key.ndim != 4 or value.ndim != 4:
        return "the dimensions of query, key and value differ"
    if key.shape[:3] != value.shape[:3]:
        return "the sizes of query, key and value differ"
    if query.shape[1] % key.shape[1] or query.shape[1] > decoding.ROWS * key.shape[1]:
        return f"more than {decoding.ROWS} heads for each head of keys"
    if pages is None and key.shape[0] != query.shape[0]:
        return "the sizes of query, key and value differ"
    if pages is not None and (pages.dtype != torch.int32 or key.shape[2] < 16 or key.shape[2] & (key.shape[2] - 1)):
        return "pages are no int32, or their size is no power of two from 16"
    reason = refuse_lengths(lengths, query) or refuse_heads(query, key, value) or refuse_factors(scale)
    return reason or ("gradients of decoding" if trains(query, key, value) else None)


def _eager_decode(
    query: Any, key: Any, value: Any, lengths: Any, pages: Any = None, *, scale: float | None = None
) -> Any:
    if pages is not None:  # (B, P, G, N, D) to (B, G, P * N, D)
        key, value = (x[pages.long()].transpose(1, 2).flatten(2, 3) for x in (key, value))
    grouped = query.shape[1] != key.shape[1]
    return attention(query[:, :, None], key, value, scale=scale, enable_gqa=grouped, lengths=lengths)[:, :, 0]


@functional(_refuse_decode, _eager_decode, lowered=True)
def attention_decode(
    query: Any, key: Any, value: Any, lengths: Any, pages: Any = None, *, scale: float | None = None
) -> Any:
    """Attention of one query for each sequence, keys split over programs: query (B, H, D), the result (B, H, D).

    key and value (B, G, N, D), H a multiple of G, of which the first ``lengths`` (B,) int32 exist; with ``pages``
    (B, P) int32 they lie in pages (pages, G, N, D), those of a sequence in the order of its row. Where gradients flow
    it is `attention` with one query, of pages that torch puts together: a step of decoding is nothing to train, and
    that walk over keys has gradients.
    """
    return _decode(query, key, value, lengths, pages, query.shape[-1] ** -0.5 if scale is None else scale)


__all__ = ["attention_decode", "attention_varlen"]
