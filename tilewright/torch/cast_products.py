"""Products of which one operand is cast to the other's dtype, inside of the kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.gemm_cast import cast_matmul
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.products import _matmul
from tilewright.torch.support import FLOATS, Refusal, as_rows, refuse_place

HALVES = (torch.bfloat16, torch.float16)
#: what the kernel casts from, to either of HALVES
SOURCES = (torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


def _launch(out: Any, a: Any, b: Any, scales: Any, bias: Any, turned: bool) -> None:
    if out.numel():
        biases = {"row_bias" if turned else "column_bias": bias}
        cast_matmul(a, b, out.t() if turned else out, scales=scales, **biases)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, ctx.turned = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Any) -> tuple[Any, ...]:
    a, b, scales = ctx.saved_tensors
    needs_a, needs_b, _, needs_bias, _ = ctx.needs_input_grad
    dc = dy.t() if ctx.turned else dy
    da = _matmul(dc, b.t()).to(a.dtype) if needs_a else None
    if da is not None and scales is not None:
        da = da * scales[:, None]
    db = None
    if needs_b:
        scaled = dc if scales is None else (dc * scales[:, None]).to(dc.dtype)
        db = _cast_matmul(a.t(), scaled, None, None, False)
    return da, db, None, dy.sum(0) if needs_bias else None, None


_cast_matmul = torch_op(
    "tilewright::cast_matmul(Tensor a, Tensor b, Tensor? scales, Tensor? bias, bool turned) -> Tensor",
    outputs=lambda a, b, scales, bias, turned: b.new_empty(
        (b.shape[1], a.shape[0]) if turned else (a.shape[0], b.shape[1])
    ),
    launch=_launch,
    backward=_backward,
    setup_context=_context,
    pure=True,
)


def _refuse(input: Any, weight: Any, bias: Any = None, scale: Any = None) -> Refusal:
    tensors = [x for x in (input, weight, bias, scale) if x is not None]
    reason = refuse_place(*tensors)
    if reason:
        return reason
    kinds = {input.dtype, weight.dtype}
    if (
        len(kinds & set(HALVES)) != 1
        or len(kinds & set(SOURCES)) != 1
        or (scale is not None and input.dtype in SOURCES)
    ):
        return f"dtypes {input.dtype} and {weight.dtype}"
    if bias is not None and bias.dtype not in kinds & set(HALVES):
        return "a bias of another dtype"
    if (
        input.ndim < 2
        or weight.ndim != 2
        or input.shape[-1] != weight.shape[1]
        or not input.numel()
        or not weight.numel()
    ):
        return "the sizes do not fit"
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:1]):
        return "the sizes do not fit"
    if scale is None:
        return None
    if scale.dtype not in FLOATS or scale.numel() not in (1, weight.shape[0]) or scale.ndim > 2:
        return "one scale for all, or one for each row"
    if scale.ndim == 2 and scale.shape[1] != 1:
        return "one scale for all, or one for each row"
    return "gradients of the scale" if torch.is_grad_enabled() and scale.requires_grad else None


def _eager(input: Any, weight: Any, bias: Any = None, scale: Any = None) -> Any:
    dtype = input.dtype if input.dtype in HALVES else weight.dtype
    whole = weight.to(dtype)
    if scale is not None:
        whole = (weight.float() * scale.float().reshape(-1, 1)).to(dtype)
    return F.linear(input.to(dtype), whole, bias)


@functional(_refuse, _eager)
def cast_linear(input: Any, weight: Any, bias: Any = None, scale: Any = None) -> Any:
    """`F.linear` of input (..., K) and weight (N, K), of which one is bfloat16 or float16 and the other is cast to it.

    That one is float32, or float8_e4m3fn or float8_e5m2; the cast happens on the way to the matrix unit and takes no
    pass over memory. ``scale``: of a weight that is cast, one for all or one for each row, float32 or 16 bits; it
    applies to float32 sums. bias (N,) has 16 bits, as has the result.
    """
    rows = as_rows(input)
    if input.dtype in HALVES:
        scales = None if scale is None else scale.reshape(-1).float().expand(weight.shape[0]).contiguous()
        y = _cast_matmul(weight, rows.t(), scales, bias, True)
    else:
        y = _cast_matmul(rows, weight.t(), None, bias, False)
    return y.view(*input.shape[:-1], weight.shape[0])


__all__ = ["HALVES", "SOURCES", "cast_linear"]
