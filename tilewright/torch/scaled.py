"""Products of 8-bit operands with scales."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.kernels import gemm_scaled as kernels
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import FLOATS, Refusal, as_rows, refuse_place

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def _launch(
    out: Any, x: Any, weight: Any, scale_x: Any, scale_weight: Any, bias: Any, dtype: Any, promote: bool
) -> None:
    if out.numel():
        scales = scale_x.reshape(-1), scale_weight.reshape(-1)
        kernels.scaled(as_rows(x), weight.t(), *scales, as_rows(out), bias, promote=promote)


_scaled = torch_op(
    "tilewright::scaled_linear(Tensor x, Tensor weight, Tensor scale_x, Tensor scale_weight, Tensor? bias,"
    " ScalarType dtype, bool promote) -> Tensor",
    outputs=lambda x, weight, scale_x, scale_weight, bias, dtype, promote: x.new_empty(
        (*x.shape[:-1], weight.shape[0]), dtype=dtype
    ),
    launch=_launch,
    pure=True,
)


def _refuse(
    input: Any,
    weight: Any,
    scale_input: Any,
    scale_weight: Any,
    bias: Any = None,
    out_dtype: Any = torch.bfloat16,
    fast_accumulation: bool = False,
) -> Refusal:
    tensors = [x for x in (input, weight, scale_input, scale_weight, bias) if x is not None]
    reason = refuse_place(*tensors)
    if reason:
        return reason
    if input.dtype not in EIGHT_BITS or weight.dtype not in EIGHT_BITS or out_dtype not in FLOATS:
        return f"dtypes {input.dtype}, {weight.dtype} and {out_dtype}"
    if (input.dtype == torch.int8) != (weight.dtype == torch.int8):
        return "the dtypes differ"
    if any(scale.dtype != torch.float32 for scale in (scale_input, scale_weight)):
        return "scales of another dtype"
    if input.ndim < 2 or weight.ndim != 2 or input.shape[-1] != weight.shape[1] or not input.numel():
        return "the sizes do not fit"
    rows = input.numel() // input.shape[-1]
    counts = scale_input.numel(), scale_weight.numel()
    return None if counts in ((1, 1), (rows, weight.shape[0])) else "one scale for all, or one for each row"


def _eager(
    input: Any,
    weight: Any,
    scale_input: Any,
    scale_weight: Any,
    bias: Any = None,
    out_dtype: Any = torch.bfloat16,
    fast_accumulation: bool = False,
) -> Any:
    left = input.float() * scale_input.reshape(-1, 1).expand(as_rows(input).shape[0], 1).reshape(*input.shape[:-1], 1)
    y = left @ (weight.float() * scale_weight.reshape(-1, 1)).t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


@functional(_refuse, _eager)
def scaled_linear(
    input: Any,
    weight: Any,
    scale_input: Any,
    scale_weight: Any,
    bias: Any = None,
    out_dtype: Any = torch.bfloat16,
    fast_accumulation: bool = False,
) -> Any:
    """``(input * scale_input) @ (weight * scale_weight).T + bias`` of 8-bit input (..., K) and weight (N, K).

    float8_e4m3fn and float8_e5m2 in any combination, or both int8. Scales are float32: one for each tensor, or one for
    each row of input and of weight. The result has ``out_dtype``. ``fast_accumulation`` leaves sums of fp8 to Hopper's
    matrix unit, which keeps about 14 bits; else every 128 of K are added up in float32. No gradients: none of these
    tensors has one in torch. Where the kernels do not fit, torch multiplies in float32.
    """
    promote = not fast_accumulation and input.dtype != torch.int8
    return _scaled(input, weight, scale_input, scale_weight, bias, out_dtype, promote)


__all__ = ["scaled_linear"]
