"""Matrix products: `matmul`, and `linear` with a bias and an activation in the same kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels import activations, gemm
from tilewright.kernels import gemm_epilogue as epilogue
from tilewright.kernels.rows import row_major_grid
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import Refusal, refuse_tensors

#: activation -> its step behind a product, (function, derivative) for the gradient, and torch's function
ACTIVATIONS: dict[str, tuple[Any, Any, Any]] = {
    "relu": (epilogue.relu, activations.relu, F.relu),
    "gelu": (epilogue.gelu, activations.gelu, F.gelu),
    "gelu_tanh": (epilogue.gelu_tanh, activations.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (epilogue.silu, activations.silu, F.silu),
}
#: tile of the gradient of an activation
_ROWS, _COLUMNS = 4, 1024


def _rows(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


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
)


def _launch_linear(out: Any, x: Any, weight: Any, bias: Any, activation: str) -> None:
    if not out.numel():
        return
    steps = (epilogue.add_bias,) if bias is not None else ()
    if activation != "none":
        steps = (*steps, ACTIVATIONS[activation][0])
    if steps:
        epilogue.linear(_rows(x), weight.t(), _rows(out), steps, vector=bias)
    else:
        gemm.matmul(_rows(x), weight.t(), _rows(out))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.activation = inputs
    # of the activations relu alone shows its derivative in its result
    ctx.save_for_backward(x, weight, bias, output if ctx.activation == "relu" else None)


def _linear_backward(ctx: Any, dy: Any) -> tuple[Any, Any, Any, None]:
    x, weight, bias, y = ctx.saved_tensors
    if ctx.activation != "none":
        before = _linear(x, weight, bias, "none") if y is None else y
        dy = _activation_backward(dy, before, ctx.activation)
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    gradient = _rows(dy)
    dx = _matmul(gradient, weight).view(x.shape) if needs_x else None
    dweight = _matmul(gradient.t(), _rows(x)) if needs_weight else None
    dbias = gradient.sum(0) if needs_bias else None
    return dx, dweight, dbias, None


_linear = torch_op(
    "tilewright::linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    outputs=lambda x, weight, bias, activation: x.new_empty((*x.shape[:-1], weight.shape[0])),
    launch=_launch_linear,
    backward=_linear_backward,
    setup_context=_linear_context,
)


def _launch_activation_backward(dx: Any, dy: Any, x: Any, activation: str) -> None:
    if dx.numel():
        grid = row_major_grid(*_rows(dx).shape, _ROWS, _COLUMNS)
        function = ACTIVATIONS[activation][1]
        activations.activation_backward[grid](_rows(dy), _rows(x), _rows(dx), FN=function, BM=_ROWS, BN=_COLUMNS)


_activation_backward = torch_op(
    "tilewright::activation_backward(Tensor dy, Tensor x, str activation) -> Tensor",
    outputs=lambda dy, x, activation: dy.new_empty(dy.shape),
    launch=_launch_activation_backward,
)


# --- functions ------------------------------------------------------------------------------------


def _refuse_matmul(a: Any, b: Any) -> Refusal:
    reason = refuse_tensors(a, b)
    if reason:
        return reason
    if a.ndim < 2 or b.ndim != 2:
        return f"a product of {a.ndim} and {b.ndim} dimensions"
    return None if a.shape[-1] == b.shape[0] else "the sizes do not fit"


@functional(_refuse_matmul, torch.matmul)
def matmul(a: Any, b: Any) -> Any:
    """``a @ b`` with a (..., M, K) and b (K, N): `torch.matmul` where the second factor is a matrix.

    Sums in float32 and rounds once. float32 operands are multiplied exactly, not in tf32.
    """
    if a.ndim == 2:
        return _matmul(a, b)
    return _matmul(_rows(a), b).view((*a.shape[:-1], b.shape[1]))


def _refuse_linear(x: Any, weight: Any, bias: Any = None, activation: str | None = None) -> Refusal:
    reason = refuse_tensors(x, weight, bias)
    if reason:
        return reason
    if x.ndim < 2 or weight.ndim != 2:
        return f"an input of {x.ndim} and a weight of {weight.ndim} dimensions"
    if x.shape[-1] != weight.shape[1] or (bias is not None and tuple(bias.shape) != tuple(weight.shape[:1])):
        return "the sizes do not fit"
    return None


def _eager_linear(x: Any, weight: Any, bias: Any = None, activation: str | None = None) -> Any:
    y = F.linear(x, weight, bias)
    return y if activation is None else ACTIVATIONS[_known(activation)][2](y)


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear has no activation {activation!r}; it has {', '.join(ACTIVATIONS)}")
    return activation


@functional(_refuse_linear, _eager_linear)
def linear(x: Any, weight: Any, bias: Any = None, activation: str | None = None) -> Any:
    """``activation(x @ weight.T + bias)`` in one kernel: x (..., K), weight (N, K), bias (N,); `F.linear` and more.

    ``activation``: "relu", "gelu", "gelu_tanh" or "silu". It and the bias apply to float32 sums; the result is rounded
    once. What is before an activation is not kept: the backward pass computes it again (not for relu). float32
    operands are multiplied exactly, not in tf32.
    """
    return _linear(x, weight, bias, "none" if activation is None else _known(activation))


__all__ = ["ACTIVATIONS", "linear", "matmul"]
