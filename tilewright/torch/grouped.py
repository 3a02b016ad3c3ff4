"""Products of groups of rows with a matrix for each group: a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels import gemm_grouped as kernels
from tilewright.torch.functional import functional
from tilewright.torch.operator import torch_op
from tilewright.torch.support import Refusal, refuse_place, refuse_tensors


def _launch(out: Any, a: Any, b: Any, starts: Any) -> None:
    if out.numel():
        kernels.grouped(a, b, starts, out)


def _backward(ctx: Any, dy: Any) -> tuple[Any, Any, None]:
    a, b, starts = ctx.saved_tensors
    needs_a, needs_b, _ = ctx.needs_input_grad
    da = _grouped(dy, b.transpose(1, 2), starts) if needs_a else None
    return da, _grouped_weights(a, dy, starts) if needs_b else None, None


#: starts (G + 1,) int32: where each group's rows begin, and where the last ends
_grouped = torch_op(
    "tilewright::grouped_mm(Tensor a, Tensor b, Tensor starts) -> Tensor",
    outputs=lambda a, b, starts: a.new_empty((a.shape[0], b.shape[2])),
    launch=_launch,
    backward=_backward,
    pure=True,
)


def _launch_weights(db: Any, a: Any, dy: Any, starts: Any) -> None:
    if db.numel():
        kernels.grouped_weights(a, dy, starts, db)


_grouped_weights = torch_op(
    "tilewright::grouped_mm_weights(Tensor a, Tensor dy, Tensor starts) -> Tensor",
    outputs=lambda a, dy, starts: a.new_empty((starts.shape[0] - 1, a.shape[1], dy.shape[1])),
    launch=_launch_weights,
    pure=True,
)


def _refuse(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Refusal:
    reason = refuse_tensors(mat_a, mat_b)
    if reason:
        return reason
    if mat_a.ndim != 2 or mat_b.ndim != 3 or mat_a.shape[1] != mat_b.shape[1]:
        return f"operands of {mat_a.ndim} and {mat_b.ndim} dimensions"
    if not isinstance(offs, torch.Tensor) or offs.dtype != torch.int32 or tuple(offs.shape) != (mat_b.shape[0],):
        return "no int32 ends of the groups"
    if bias is not None or out_dtype not in (None, mat_a.dtype):
        return "a bias or another dtype of the result"
    return refuse_place(mat_a, offs)


def _eager(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if hasattr(F, "grouped_mm"):
        return F.grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    return torch._grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)


@functional(_refuse, _eager, lowered=True)
def grouped_mm(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """`torch.nn.functional.grouped_mm` of rows (T, K), sorted by group, and a matrix (G, K, N) for each group.

    ``offs`` (G,) int32: the end of each group's rows; sizes are read on the device. Rows behind the last group are not
    written. A layer's weights (G, N, K) are given as ``weight.transpose(1, 2)``.
    """
    return _grouped(mat_a, mat_b, F.pad(offs, (1, 0)))


__all__ = ["grouped_mm"]
