"""Matrix products: `matmul`, also of batches, and `linear` with a bias and an activation in the same kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels import activations, gemm
from tilewright.kernels import gemm_epilogue as epilogue
from tilewright.kernels.gemm_batched import batched
from tilewright.kernels.rows import row_major_grid
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import NO_TENSOR, Refusal, as_rows, empty_rows, refuse_tensors, traced

#: activation -> its step behind a product, (function, derivative) for the gradient, and torch's function
ACTIVATIONS: dict[str, tuple[Any, Any, Any]] = {
    "relu": (epilogue.relu, activations.relu, F.relu),
    "gelu": (epilogue.gelu, activations.gelu, F.gelu),
    "gelu_tanh": (epilogue.gelu_tanh, activations.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (epilogue.silu, activations.silu, F.silu),
}
#: tile of the gradient of an activation
_ROWS, _COLUMNS = 4, 1024


# --- operators ------------------------------------------------------------------------------------


def _launch_matmul(out: Any, a: Any, b: Any) -> None:
    if out.numel():
        gemm.matmul(a, b, out)


def _matmul_backward(ctx: Any, dy: Any) -> tuple[Any, Any]:
    a, b = ctx.saved_tensors
    da = _matmul(dy, b.t()) if ctx.needs_input_grad[0] else None
    db = _matmul(a.t(), dy) if ctx.needs_input_grad[1] else None
    return da, db


_matmul = torch_op(
    "tilewright::matmul(Tensor a, Tensor b) -> Tensor",
    outputs=lambda a, b: a.new_empty((a.shape[0], b.shape[1])),
    launch=_launch_matmul,
    backward=_matmul_backward,
    pure=True,
)


def _launch_batched(out: Any, a: Any, b: Any) -> None:
    if out.numel():
        batched(a, b, out)


def _batched_backward(ctx: Any, dy: Any) -> tuple[Any, Any]:
    a, b = ctx.saved_tensors
    da = _batched(dy, b.mT) if ctx.needs_input_grad[0] else None
    db = _batched(a.mT, dy) if ctx.needs_input_grad[1] else None
    return da, db


_batched = torch_op(
    "tilewright::batched_matmul(Tensor a, Tensor b) -> Tensor",
    outputs=lambda a, b: a.new_empty((*a.shape[:-1], b.shape[-1])),
    launch=_launch_batched,
    backward=_batched_backward,
    pure=True,
)


def _launch_linear(out: Any, x: Any, weight: Any, bias: Any, residual: Any, activation: str) -> None:
    if not out.numel():
        return
    steps: tuple[Any, ...] = (epilogue.add_bias,) if bias is not None else ()
    if activation != "none":
        steps = (*steps, ACTIVATIONS[activation][0])
    if residual is not None:
        steps, residual = (*steps, epilogue.add_residual), as_rows(residual)
    if steps:
        epilogue.linear(as_rows(x), weight.t(), as_rows(out), steps, vector=bias, matrix=residual)
    else:
        gemm.matmul(as_rows(x), weight.t(), as_rows(out))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, residual, ctx.activation = inputs
    # of the activations relu alone shows its derivative in its result
    shown = ctx.activation == "relu" and residual is None
    ctx.save_for_backward(x, weight, bias, output if shown else None)


def _linear_backward(ctx: Any, dy: Any) -> tuple[Any, Any, Any, Any, None]:
    x, weight, bias, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual, _ = ctx.needs_input_grad
    dresidual = dy if needs_residual else None
    if ctx.activation != "none":
        before = _linear(x, weight, bias, None, "none") if y is None else y
        dy = activation_gradient(dy, before, ctx.activation)
    gradient = as_rows(dy)
    dx = _matmul(gradient, weight).view(x.shape) if needs_x else None
    dweight = _matmul(gradient.t(), as_rows(x)) if needs_weight else None
    dbias = gradient.sum(0) if needs_bias else None
    return dx, dweight, dbias, dresidual, None


_linear = torch_op(
    "tilewright::linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation) -> Tensor",
    outputs=lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
    launch=_launch_linear,
    backward=_linear_backward,
    setup_context=_linear_context,
    leading=("x", "residual"),
    pure=True,
)


def _launch_activation_backward(dx: Any, dy: Any, x: Any, activation: str) -> None:
    if dx.numel():
        out, function = as_rows(dx), ACTIVATIONS[activation][1]
        grid = row_major_grid(out.shape[0], out.shape[1], _ROWS, _COLUMNS)
        activations.activation_backward[grid](as_rows(dy), as_rows(x), out, FN=function, BM=_ROWS, BN=_COLUMNS)


#: the gradient of an activation in torch's operators
_TRACED: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
}


def activation_gradient(dy: Any, x: Any, activation: str) -> Any:
    """``dy`` times the derivative at ``x``: our kernel; in a graph torch's, which Inductor fuses with neighbours."""
    if traced():
        return _TRACED[activation](dy, x)
    return _activation_backward(dy, x, activation)


_activation_backward = torch_op(
    "tilewright::activation_backward(Tensor dy, Tensor x, str activation) -> Tensor",
    outputs=lambda dy, x, activation: empty_rows(dy),
    launch=_launch_activation_backward,
    pure=True,
)


# --- functions ------------------------------------------------------------------------------------


def _refuse_matmul(input: Any, other: Any) -> Refusal:
    reason = refuse_tensors(input, other) if other is not None else NO_TENSOR
    if reason:
        return reason
    if input.ndim < 2 or other.ndim < 2:
        return f"a product of {input.ndim} and {other.ndim} dimensions"
    if input.shape[-1] != other.shape[-2]:
        return "the sizes do not fit"
    pairs = zip(input.shape[-3::-1], other.shape[-3::-1], strict=False)
    return None if all(x == y or 1 in (x, y) for x, y in pairs) else "the sizes do not fit"


@functional(_refuse_matmul, torch.matmul, lowered=True)
def matmul(input: Any, other: Any) -> Any:
    """``input @ other`` as of `torch.matmul`, without vectors: (..., M, K) with (K, N), or (..., K, N) broadcast.

    Sums in float32 and rounds once. float32 operands are multiplied exactly, not in tf32. Operands with up to two axes
    of batches are read where they lie, in any order; more axes become one.
    """
    if other.ndim > 2:
        return _of_batches(input, other)
    if input.ndim == 2:
        return _matmul(input, other)
    return _matmul(as_rows(input), other).view((*input.shape[:-1], other.shape[1]))


def _of_batches(input: Any, other: Any) -> Any:
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]) for x in (input, other))
    if len(batch) > 2:
        a, b = (x.flatten(1, -3) for x in (a, b))
    y = _batched(a, b)
    return y if len(batch) <= 2 else y.view(*batch, *y.shape[-2:])


def _refuse_linear(
    input: Any, weight: Any, bias: Any = None, activation: str | None = None, residual: Any = None
) -> Refusal:
    reason = refuse_tensors(input, weight, bias, residual) if weight is not None else NO_TENSOR
    if reason:
        return reason
    if input.ndim < 2 or weight.ndim != 2:
        return f"an input of {input.ndim} and a weight of {weight.ndim} dimensions"
    if input.shape[-1] != weight.shape[1] or (bias is not None and tuple(bias.shape) != tuple(weight.shape[:1])):
        return "the sizes do not fit"
    if residual is not None and tuple(residual.shape) != (*input.shape[:-1], weight.shape[0]):
        return "a residual of another shape"
    return None


def _eager_linear(
    input: Any, weight: Any, bias: Any = None, activation: str | None = None, residual: Any = None
) -> Any:
    y = F.linear(input, weight, bias)
    y = y if activation is None else ACTIVATIONS[known_activation(activation)][2](y)
    return y if residual is None else y + residual


def known_activation(activation: str) -> str:
    """The name; ValueError unless an activation has it."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear has no activation {activation!r}; it has {', '.join(ACTIVATIONS)}")
    return activation


@functional(_refuse_linear, _eager_linear, lowered=True)
def linear(input: Any, weight: Any, bias: Any = None, activation: str | None = None, residual: Any = None) -> Any:
    """``activation(input @ weight.T + bias) + residual`` in one kernel; else `F.linear` and what follows.

    input (..., K), weight (N, K), bias (N,), residual (..., N). ``activation``: "relu", "gelu", "gelu_tanh" or "silu".
    All of it applies to float32 sums; the result is rounded once. What is before an activation is not kept: the
    backward pass computes it again (not for relu without a residual). float32 operands are multiplied exactly, not in
    tf32.
    """
    return _linear(input, weight, bias, residual, "none" if activation is None else known_activation(activation))


__all__ = ["ACTIVATIONS", "activation_gradient", "known_activation", "linear", "matmul"]
