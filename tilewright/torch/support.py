"""What the library's kernels take. A refusal is a short text that says why; None means that they do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import tilewright as tw

#: targets that the tile sizes of the kernel library are for, and fit
TARGETS = frozenset({"sm_90a"})
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Refusal = str | None
#: the refusal that operators may answer by casting their arguments
IN_AUTOCAST = "inside autocast"
IN_FORWARD_MODE = "inside forward-mode differentiation"
NO_TENSOR = "an argument is no tensor"


def refuse_tensors(first: Any, *others: Any) -> Refusal:
    """Why the kernels do not take these tensors together (None among ``others``: an argument that is absent)."""
    tensors = [first, *(x for x in others if x is not None)]
    if not all(isinstance(x, torch.Tensor) for x in tensors):
        return NO_TENSOR
    if first.dtype not in FLOATS:
        return f"dtype {_name(first.dtype)}"
    if any(x.dtype != first.dtype for x in tensors):
        return "the dtypes differ"
    if any(x.numel() == 0 for x in tensors):
        return "an empty tensor"
    return _refuse_place(tensors)


def refuse_place(*tensors: Any) -> Refusal:
    """Why the kernels do not run where these tensors are."""
    return _refuse_place(tensors) if all(isinstance(x, torch.Tensor) for x in tensors) else NO_TENSOR


def _refuse_place(tensors: Sequence[Any]) -> Refusal:
    device = tensors[0].device
    if any(x.device != device for x in tensors):
        return "the devices differ"
    if any(x.layout != torch.strided or is_traceable_wrapper_subclass(x) for x in tensors):
        return "a tensor of another kind"  # sparse, distributed, nested, quantized
    if device.type not in ("cpu", "cuda", "meta"):
        return f"device {device.type}"
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return IN_AUTOCAST
    if forward_ad._current_level >= 0:
        return IN_FORWARD_MODE
    if torch._C._functorch.peek_interpreter_stack() is not None and not _only_vmap():
        return "inside a transform of torch.func"
    return _refuse_gpu(device.index or 0) if device.type == "cuda" else None


def _only_vmap() -> bool:
    """Whether the transforms of torch.func that are at work are all vmap, which operators have rules for."""
    stack = torch._C._functorch.get_interpreter_stack()
    return all(level.key() == torch._C._functorch.TransformType.Vmap for level in stack or ())


def trains(*tensors: Any) -> bool:
    """Whether gradients of these tensors (or None) are recorded."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def traced() -> bool:
    """Whether calls are recorded into a graph, whose operators a compiler may fuse."""
    return get_proxy_mode() is not None


@cache
def _refuse_gpu(ordinal: int) -> Refusal:
    """Why the library's kernels do not fit a GPU. A GPU that is not there, as in traces without one, is taken."""
    if not torch.cuda.is_available():
        return None
    name = f"{'hip' if torch.version.hip else 'cuda'}:{ordinal}"
    found = next((info.target for info in tw.devices() if info.name == name), "unknown")
    return None if found in TARGETS else f"no tile sizes for a GPU of target {found}"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def empty_rows(x: Any) -> Any:
    """A new contiguous tensor of x's shape and dtype, contents undefined."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def as_rows(x: Any) -> Any:
    """A tensor as a matrix of its rows along the last dimension."""
    return x.reshape(-1, x.shape[-1])


__all__ = [
    "FLOATS", "IN_AUTOCAST", "IN_FORWARD_MODE", "NO_TENSOR", "TARGETS", "Refusal", "as_rows", "empty_rows",
    "refuse_place", "refuse_tensors", "traced", "trains",
]  # fmt: skip
