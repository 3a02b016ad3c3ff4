"""Root-mean-square and layer normalisation over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.layernorm import layer_rows
from tilewright.kernels.norm_backward import gradient_programs, norm_gradients
from tilewright.kernels.rmsnorm import rms_rows
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import Refusal, as_rows, refuse_tensors


def _statistic(x: Any) -> Any:
    """A float32 number for each row."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


# --- rms_norm -------------------------------------------------------------------------------------


def _launch_rms(made: tuple[Any, Any], x: Any, weight: Any, eps: float) -> None:
    y, inverse = made
    if y.numel():
        rms_rows(as_rows(x), weight, as_rows(y), eps, inverse=inverse.view(-1))


def _rms_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _rms_backward(ctx: Any, dy: Any, dinverse: Any) -> tuple[Any, Any, None]:
    return (*_rms_norm_backward(dy, *ctx.saved_tensors), None)


_rms_norm = torch_op(
    "tilewright::rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    outputs=lambda x, weight, eps: (x.new_empty(x.shape), _statistic(x)),
    launch=_launch_rms,
    backward=_rms_backward,
    setup_context=_rms_context,
)


def _launch_rms_backward(made: tuple[Any, Any], dy: Any, x: Any, weight: Any, inverse: Any) -> None:
    dx, dweight = made
    if not dx.numel():
        dweight.zero_()
        return
    rows = as_rows(x)
    partial = x.new_empty((gradient_programs(*rows.shape), 1, rows.shape[1]), dtype=torch.float32)
    norm_gradients(as_rows(dy), rows, weight, inverse.view(-1), as_rows(dx), partial)
    dweight.copy_(partial.sum((0, 1)))


_rms_norm_backward = torch_op(
    "tilewright::rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse) -> (Tensor, Tensor)",
    outputs=lambda dy, x, weight, inverse: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    launch=_launch_rms_backward,
)


# --- layer_norm -----------------------------------------------------------------------------------


def _launch_layer(made: tuple[Any, Any, Any], x: Any, weight: Any, bias: Any, eps: float) -> None:
    y, mean, inverse = made
    if y.numel():
        statistics = {"mean": mean.view(-1), "inverse": inverse.view(-1)}
        layer_rows(as_rows(x), weight, as_rows(y), eps, bias=bias, **statistics)


def _layer_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any, Any]) -> None:
    x, weight, bias, _ = inputs
    _, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, mean, inverse)


def _layer_backward(ctx: Any, dy: Any, dmean: Any, dinverse: Any) -> tuple[Any, Any, Any, None]:
    dx, dweight, dbias = _layer_norm_backward(dy, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None, None


_layer_norm = torch_op(
    "tilewright::layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    outputs=lambda x, weight, bias, eps: (x.new_empty(x.shape), _statistic(x), _statistic(x)),
    launch=_launch_layer,
    backward=_layer_backward,
    setup_context=_layer_context,
)


def _launch_layer_backward(made: tuple[Any, Any, Any], dy: Any, x: Any, weight: Any, mean: Any, inverse: Any) -> None:
    dx, dweight, dbias = made
    if not dx.numel():
        dweight.zero_(), dbias.zero_()
        return
    rows = as_rows(x)
    partial = x.new_empty((gradient_programs(*rows.shape), 2, rows.shape[1]), dtype=torch.float32)
    norm_gradients(as_rows(dy), rows, weight, inverse.view(-1), as_rows(dx), partial, mean=mean.view(-1))
    sums = partial.sum(0)
    dweight.copy_(sums[0])
    dbias.copy_(sums[1])


_layer_norm_backward = torch_op(
    "tilewright::layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor inverse)"
    " -> (Tensor, Tensor, Tensor)",
    outputs=lambda dy, x, weight, *rest: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    ),
    launch=_launch_layer_backward,
)


# --- functions ------------------------------------------------------------------------------------


def _refuse(x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None) -> Refusal:
    reason = refuse_tensors(x, weight, bias)
    if reason:
        return reason
    if len(normalized_shape) != 1:
        return "normalises several dimensions"
    if x.ndim < 1 or x.shape[-1] != normalized_shape[0]:
        return "the sizes do not fit"
    if any(p is not None and tuple(p.shape) != tuple(normalized_shape) for p in (weight, bias)):
        return "the sizes do not fit"
    return None


def _weight(x: Any, weight: Any) -> Any:
    return x.new_ones(x.shape[-1]) if weight is None else weight


def _refuse_rms(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Refusal:
    return _refuse(input, normalized_shape, weight)


@functional(_refuse_rms, F.rms_norm)
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """`torch.nn.functional.rms_norm` over the last dimension, in float32."""
    # torch's default is the epsilon of what it computes in
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps
    return _rms_norm(input, _weight(input, weight), epsilon)[0]


def _refuse_layer(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Refusal:
    return _refuse(input, normalized_shape, weight, bias)


@functional(_refuse_layer, F.layer_norm)
def layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """`torch.nn.functional.layer_norm` over the last dimension, in float32."""
    return _layer_norm(input, _weight(input, weight), bias, eps)[0]


__all__ = ["layer_norm", "rms_norm"]
