"""Cross-entropy of logits and class indices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels import cross_entropy as kernels
from tilewright.kernels.rows import row_major_grid
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import Refusal, empty_rows, refuse_place, refuse_tensors

_INT32 = range(-(2**31), 2**31)


def _outputs(logits: Any, target: Any, ignored: int, smoothing: float) -> tuple[Any, Any]:
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)


def _launch(made: tuple[Any, Any], logits: Any, target: Any, ignored: int, smoothing: float) -> None:
    loss, lse = made
    if loss.numel():
        meta = kernels.blocks(logits.element_size())
        arguments = logits, target, loss, lse, ignored
        kernels.cross_entropy[(logits.shape[0],)](*arguments, SMOOTHING=smoothing, **meta)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    logits, target, ctx.ignored, ctx.smoothing = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, output[1])


def _backward(ctx: Any, dloss: Any, dlse: Any) -> tuple[Any, None, None, None]:
    return _cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignored, ctx.smoothing), None, None, None


_cross_entropy = torch_op(
    "tilewright::cross_entropy(Tensor logits, Tensor target, int ignored, float smoothing) -> (Tensor, Tensor)",
    outputs=_outputs,
    launch=_launch,
    backward=_backward,
    setup_context=_context,
    pure=True,
)


def _launch_backward(
    dlogits: Any, dloss: Any, logits: Any, target: Any, lse: Any, ignored: int, smoothing: float
) -> None:
    if dlogits.numel():
        width = kernels.blocks(logits.element_size())["BN"]
        grid = row_major_grid(logits.shape[0], logits.shape[1], 1, width)
        arguments = logits, target, lse, dloss, dlogits, ignored
        kernels.cross_entropy_backward[grid](*arguments, SMOOTHING=smoothing, BN=width)


_cross_entropy_backward = torch_op(
    "tilewright::cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor lse, int ignored,"
    " float smoothing) -> Tensor",
    outputs=lambda dloss, logits, *rest: empty_rows(logits),
    launch=_launch_backward,
    pure=True,
)


def _refuse(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    float32: bool = False,
) -> Refusal:
    reason = refuse_tensors(input) or refuse_place(input, target)
    if reason:
        return reason
    if weight is not None:
        return "class weights"
    if size_average is not None or reduce is not None:
        return "the deprecated size_average or reduce"
    if target.dtype != torch.int64:
        return "targets are no class indices"
    if input.ndim != 2 or target.ndim != 1 or input.shape[0] != target.shape[0]:
        return "logits are no matrix of a row for each target"
    if ignore_index not in _INT32 or reduction not in ("none", "mean", "sum") or not 0.0 <= label_smoothing <= 1.0:
        return "an option out of range"
    return None


def _eager(input: Any, *rest: Any, float32: bool = False, **options: Any) -> Any:
    return F.cross_entropy(input.float() if float32 else input, *rest, **options)


@functional(_refuse, _eager)
def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    float32: bool = False,
) -> Any:
    """`torch.nn.functional.cross_entropy` of logits (M, V) and class indices (M,), computed in float32.

    ``float32``: as of ``input.float()``, whose dtype the result then has, without this copy. Not as in torch, a class
    that is neither in range nor ``ignore_index`` raises no error: its loss has no meaning.
    """
    loss, _ = _cross_entropy(input, target, ignore_index, label_smoothing)
    if reduction == "mean":
        loss = loss.sum() / (target != ignore_index).sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss if float32 else loss.to(input.dtype)


__all__ = ["cross_entropy"]
