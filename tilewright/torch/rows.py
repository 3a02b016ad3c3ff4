"""Softmax over the last dimension."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from tilewright.kernels.softmax import softmax_rows, softmax_rows_backward
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import Refusal, as_rows, empty_rows, refuse_tensors


def _launch(y: Any, x: Any) -> None:
    if y.numel():
        softmax_rows(as_rows(x), as_rows(y))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, dy: Any) -> Any:
    return _softmax_backward(dy, *ctx.saved_tensors)


_softmax = torch_op(
    "tilewright::softmax(Tensor x) -> Tensor",
    outputs=empty_rows,
    launch=_launch,
    backward=_backward,
    setup_context=_context,
    leading=("x",),
    pure=True,
)


def _launch_backward(dx: Any, dy: Any, y: Any) -> None:
    if dx.numel():
        softmax_rows_backward(as_rows(dy), as_rows(y), as_rows(dx))


_softmax_backward = torch_op(
    "tilewright::softmax_backward(Tensor dy, Tensor y) -> Tensor",
    outputs=lambda dy, y: empty_rows(y),
    launch=_launch_backward,
    pure=True,
)


def _refuse(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Refusal:
    reason = refuse_tensors(input)
    if reason:
        return reason
    if not isinstance(dim, int) or input.ndim == 0 or dim not in (-1, input.ndim - 1):
        return "not along the last dimension"
    if dtype not in (None, input.dtype):
        return "converts to another dtype"
    return None


@functional(_refuse, F.softmax)
def softmax(input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """`torch.nn.functional.softmax` along the last dimension, in float32."""
    return _softmax(input)


__all__ = ["softmax"]
