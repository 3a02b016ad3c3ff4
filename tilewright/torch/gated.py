"""The first half of a gated feed-forward layer: two products of one input, one of them through an activation."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from tilewright.kernels import activations
from tilewright.kernels import gemm_epilogue as epilogue
from tilewright.kernels.rows import row_major_grid
from tilewright.torch import products
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.products import ACTIVATIONS, activation_gradient, known_activation
from tilewright.torch.support import Refusal, as_rows, empty_rows, refuse_tensors, traced, trains

#: tile of the elementwise gradient
_ROWS, _COLUMNS = 4, 1024


def _out(x: Any, gate: Any) -> Any:
    return x.new_empty((*x.shape[:-1], gate.shape[0]))


def _launch(out: Any, x: Any, gate: Any, up: Any, activation: str) -> None:
    if out.numel():
        epilogue.gated(as_rows(x), gate.t(), up.t(), as_rows(out), activation=ACTIVATIONS[activation][0])


def _backward(ctx: Any, dy: Any) -> tuple[Any, Any, Any, None]:
    """Without the two products kept: they are computed again."""
    (x, gate, up), (activation,) = ctx.saved_tensors, ctx.numbers
    left, right = (products._linear(x, weight, None, None, "none") for weight in (gate, up))
    return _products_backward(ctx, x, gate, up, *_elementwise(dy, left, right, activation))


_gated = torch_op(
    "tilewright::gated_linear(Tensor x, Tensor gate, Tensor up, str activation) -> Tensor",
    outputs=lambda x, gate, *rest: _out(x, gate),
    launch=_launch,
    backward=_backward,
    leading=("x",),
    pure=True,
)


def _launch_kept(made: tuple[Any, Any, Any], x: Any, gate: Any, up: Any, activation: str) -> None:
    if made[0].numel():
        step = ACTIVATIONS[activation][0]
        epilogue.gated(as_rows(x), gate.t(), up.t(), *map(as_rows, made), activation=step)


def _kept_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any, Any]) -> None:
    x, gate, up, ctx.activation = inputs
    _, left, right = output
    ctx.mark_non_differentiable(left, right)
    ctx.save_for_backward(x, gate, up, left, right)


def _kept_backward(ctx: Any, dy: Any, dleft: Any, dright: Any) -> tuple[Any, Any, Any, None]:
    x, gate, up, left, right = ctx.saved_tensors
    return _products_backward(ctx, x, gate, up, *_elementwise(dy, left, right, ctx.activation))


#: the same, and the two products before they meet, which the backward pass needs
_gated_kept = torch_op(
    "tilewright::gated_linear_kept(Tensor x, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor, Tensor)",
    outputs=lambda x, gate, *rest: (_out(x, gate), _out(x, gate), _out(x, gate)),
    launch=_launch_kept,
    backward=_kept_backward,
    setup_context=_kept_context,
    pure=True,
)


def _elementwise(dy: Any, left: Any, right: Any, activation: str) -> tuple[Any, Any]:
    """The gradients of the two products where they meet; in a graph by torch, as `activation_gradient`."""
    if traced():
        return activation_gradient(dy * right, left, activation), dy * ACTIVATIONS[activation][2](left)
    return _elementwise_backward(dy, left, right, activation)


def _products_backward(ctx: Any, x: Any, gate: Any, up: Any, dleft: Any, dright: Any) -> tuple[Any, Any, Any, None]:
    needs_x, needs_gate, needs_up, _ = ctx.needs_input_grad
    rows, dleft, dright = as_rows(x), as_rows(dleft), as_rows(dright)
    dx = None
    if needs_x:
        first = products._matmul(dleft, gate)
        dx = products._linear(dright, up.t(), None, first, "none").view(x.shape)
    dgate = products._matmul(dleft.t(), rows) if needs_gate else None
    dup = products._matmul(dright.t(), rows) if needs_up else None
    return dx, dgate, dup, None


def _launch_elementwise(made: tuple[Any, Any], dy: Any, left: Any, right: Any, activation: str) -> None:
    if dy.numel():
        dleft, dright = map(as_rows, made)
        grid = row_major_grid(dleft.shape[0], dleft.shape[1], _ROWS, _COLUMNS)
        arguments = as_rows(dy), as_rows(left), dleft, as_rows(right), dright
        function = ACTIVATIONS[activation][1]
        activations.activation_backward[grid](*arguments, FN=function, BM=_ROWS, BN=_COLUMNS)


_elementwise_backward = torch_op(
    "tilewright::gated_backward(Tensor dy, Tensor left, Tensor right, str activation) -> (Tensor, Tensor)",
    outputs=lambda dy, left, right, activation: (empty_rows(left), empty_rows(right)),
    launch=_launch_elementwise,
    pure=True,
)


# --- function -------------------------------------------------------------------------------------


def _refuse(input: Any, gate: Any, up: Any, activation: str = "silu") -> Refusal:
    reason = refuse_tensors(input, gate, up)
    if reason:
        return reason
    if input.ndim < 2 or gate.ndim != 2:
        return f"an input of {input.ndim} and a weight of {gate.ndim} dimensions"
    if tuple(gate.shape) != tuple(up.shape) or input.shape[-1] != gate.shape[1]:
        return "the sizes do not fit"
    return None


def _eager(input: Any, gate: Any, up: Any, activation: str = "silu") -> Any:
    return ACTIVATIONS[known_activation(activation)][2](F.linear(input, gate)) * F.linear(input, up)


@functional(_refuse, _eager, lowered=True)
def gated_linear(input: Any, gate: Any, up: Any, activation: str = "silu") -> Any:
    """``activation(input @ gate.T) * (input @ up.T)`` in one kernel: input (..., K), gate and up (N, K).

    ``activation`` as in `linear`. Sums and what follows in float32, one rounding. Where gradients flow the kernel also
    writes the two products.
    """
    known_activation(activation)
    if trains(input, gate, up):
        return _gated_kept(input, gate, up, activation)[0]
    return _gated(input, gate, up, activation)


__all__ = ["gated_linear"]
