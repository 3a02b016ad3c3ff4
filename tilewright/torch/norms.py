"""Root-mean-square and layer normalisation over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.column_sum import column_sums
from tilewright.kernels.layernorm import layer_rows
from tilewright.kernels.norm_backward import gradient_programs, norm_gradients
from tilewright.kernels.rmsnorm import rms_rows
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import Refusal, as_rows, empty_rows, refuse_place, refuse_tensors


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
    return (*_rms_norm_backward(dy, None, *ctx.saved_tensors), None)


_rms_norm = torch_op(
    "tilewright::rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    outputs=lambda x, weight, eps: (empty_rows(x), _statistic(x)),
    launch=_launch_rms,
    backward=_rms_backward,
    setup_context=_rms_context,
    leading=("x",),
    pure=True,
)


def _launch_add_rms(made: tuple[Any, Any, Any], x: Any, residual: Any, weight: Any, eps: float) -> None:
    y, total, inverse = made
    if y.numel():
        sums = {"residual": as_rows(residual), "total": as_rows(total)}
        rms_rows(as_rows(x), weight, as_rows(y), eps, **sums, inverse=inverse.view(-1))


def _add_rms_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any, Any]) -> None:
    _, total, inverse = output
    ctx.mark_non_differentiable(inverse)
    ctx.save_for_backward(total, inputs[2], inverse)


def _add_rms_backward(ctx: Any, dy: Any, dtotal: Any, dinverse: Any) -> tuple[Any, Any, Any, None]:
    dx, dweight = _rms_norm_backward(dy, dtotal, *ctx.saved_tensors)
    return dx, dx, dweight, None


#: x and a residual, their sum and its statistic
_add_rms_norm = torch_op(
    "tilewright::add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    outputs=lambda x, *rest: (empty_rows(x), empty_rows(x), _statistic(x)),
    launch=_launch_add_rms,
    backward=_add_rms_backward,
    setup_context=_add_rms_context,
    leading=("x", "residual"),
    pure=True,
)


def _launch_rms_backward(made: tuple[Any, Any], dy: Any, dtotal: Any, x: Any, weight: Any, inverse: Any) -> None:
    dx, dweight = made
    if not dx.numel():
        dweight.zero_()
        return
    rows = as_rows(x)
    partial = x.new_empty((gradient_programs(*rows.shape), 1, rows.shape[1]), dtype=torch.float32)
    beside = None if dtotal is None else as_rows(dtotal)
    norm_gradients(as_rows(dy), rows, weight, inverse.view(-1), as_rows(dx), partial, beside)
    column_sums(partial[:, 0], dweight[None])


_rms_norm_backward = torch_op(
    "tilewright::rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor inverse)"
    " -> (Tensor, Tensor)",
    outputs=lambda dy, dtotal, x, weight, inverse: (empty_rows(x), weight.new_empty(weight.shape)),
    launch=_launch_rms_backward,
    pure=True,
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
    dx, dweight, dbias = _layer_norm_backward(dy, None, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None, None


_layer_norm = torch_op(
    "tilewright::layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    outputs=lambda x, weight, bias, eps: (empty_rows(x), _statistic(x), _statistic(x)),
    launch=_launch_layer,
    backward=_layer_backward,
    setup_context=_layer_context,
    leading=("x",),
    pure=True,
)


def _launch_add_layer(made: tuple[Any, ...], x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> None:
    y, total, mean, inverse = made
    if y.numel():
        sums = {"residual": as_rows(residual), "total": as_rows(total)}
        statistics = {"mean": mean.view(-1), "inverse": inverse.view(-1)}
        layer_rows(as_rows(x), weight, as_rows(y), eps, bias=bias, **sums, **statistics)


def _add_layer_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, total, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.has_bias = inputs[3] is not None
    ctx.save_for_backward(total, inputs[2], mean, inverse)


def _add_layer_backward(ctx: Any, dy: Any, dtotal: Any, *rest: Any) -> tuple[Any, ...]:
    dx, dweight, dbias = _layer_norm_backward(dy, dtotal, *ctx.saved_tensors)
    return dx, dx, dweight, dbias if ctx.has_bias else None, None


_add_layer_norm = torch_op(
    "tilewright::add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=lambda x, *rest: (empty_rows(x), empty_rows(x), _statistic(x), _statistic(x)),
    launch=_launch_add_layer,
    backward=_add_layer_backward,
    setup_context=_add_layer_context,
    leading=("x", "residual"),
    pure=True,
)


def _launch_layer_backward(
    made: tuple[Any, Any, Any], dy: Any, dtotal: Any, x: Any, weight: Any, mean: Any, inverse: Any
) -> None:
    dx, dweight, dbias = made
    if not dx.numel():
        dweight.zero_(), dbias.zero_()
        return
    rows = as_rows(x)
    partial = x.new_empty((gradient_programs(*rows.shape), 2, rows.shape[1]), dtype=torch.float32)
    beside = None if dtotal is None else as_rows(dtotal)
    norm_gradients(as_rows(dy), rows, weight, inverse.view(-1), as_rows(dx), partial, beside, mean.view(-1))
    column_sums(partial[:, 0], dweight[None])
    column_sums(partial[:, 1], dbias[None])


_layer_norm_backward = torch_op(
    "tilewright::layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor mean, Tensor inverse)"
    " -> (Tensor, Tensor, Tensor)",
    outputs=lambda dy, dtotal, x, weight, *rest: (
        empty_rows(x),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    ),
    launch=_launch_layer_backward,
    pure=True,
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


def _refuse_sum(input: Any, residual: Any) -> Refusal:
    if not isinstance(residual, torch.Tensor) or residual.dtype != input.dtype or residual.shape != input.shape:
        return "a residual of another shape or dtype"
    return refuse_place(input, residual)


def _refuse_add_rms(
    input: Any, residual: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Refusal:
    return _refuse(input, normalized_shape, weight) or _refuse_sum(input, residual)


def _eager_add_rms(
    input: Any, residual: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> tuple[Any, Any]:
    total = input + residual
    return F.rms_norm(total, normalized_shape, weight, eps), total


@functional(_refuse_add_rms, _eager_add_rms)
def add_rms_norm(
    input: Any, residual: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> tuple[Any, Any]:
    """`rms_norm` of ``input + residual``, and this sum, in one kernel; both have the same shape and dtype."""
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps
    y, total, _ = _add_rms_norm(input, residual, _weight(input, weight), epsilon)
    return y, total


def _refuse_add_layer(
    input: Any, residual: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Refusal:
    return _refuse(input, normalized_shape, weight, bias) or _refuse_sum(input, residual)


def _eager_add_layer(
    input: Any, residual: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Any, Any]:
    total = input + residual
    return F.layer_norm(total, normalized_shape, weight, bias, eps), total


@functional(_refuse_add_layer, _eager_add_layer)
def add_layer_norm(
    input: Any, residual: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Any, Any]:
    """`layer_norm` of ``input + residual``, and this sum, in one kernel; both have the same shape and dtype."""
    return _add_layer_norm(input, residual, _weight(input, weight), bias, eps)[:2]


__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]
