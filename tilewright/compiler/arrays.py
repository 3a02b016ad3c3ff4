"""Where an array lives, what view type describes it, and its host memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.frontend.errors import ArgumentError
from tilewright.ir.types import DTYPES, ViewType
from tilewright.runtime.arguments import DevicePointer, TensorView, canonical_dtype, read_tensor

#: what makes the copy engine and 16-byte vectors usable (bytes)
FAST_ALIGNMENT = 16


def where(tensors: Mapping[str, Any]) -> str:
    """The device that holds the arrays: "cpu" or "cuda:N". ArgumentError when they are spread."""
    places = {name: _place(value) for name, value in tensors.items()}
    distinct = sorted(set(places.values()))
    if len(distinct) > 1:
        listing = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise ArgumentError(f"the arrays of one launch live on several devices: {listing}", hint="move them to one")
    return distinct[0] if distinct else "cpu"


def _place(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return f"cuda:{value.get_device()}" if value.is_cuda else "cpu"
    if isinstance(value, DevicePointer) or hasattr(value, "__cuda_array_interface__"):
        return "cuda:0"
    return "cpu"


def view_type(value: Any) -> ViewType:
    """The view type of an array: dynamic sizes, its unit stride, and 16-byte alignment where it has it."""
    view = tensor_view(value)
    dtype = DTYPES.get(canonical_dtype(view.dtype))
    if dtype is None:
        raise ArgumentError(f"arrays of {view.dtype} are not supported")
    unit = contiguous_axis(view.shape, view.strides)
    strides = tuple(1 if axis == unit else None for axis in range(len(view.shape)))
    steps = [s * dtype.bytes for axis, s in enumerate(view.strides) if axis != unit and view.shape[axis] > 1]
    aligned = all(n % FAST_ALIGNMENT == 0 for n in [view.address, *steps])
    return ViewType((None,) * len(view.shape), dtype, strides, FAST_ALIGNMENT if aligned else dtype.bytes)


def contiguous_axis(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The axis to address with stride one: the last that has it, preferring axes longer than one."""
    axes = [axis for axis, stride in enumerate(strides) if stride == 1]
    long = [axis for axis in axes if shape[axis] > 1]
    return (long or axes or [None])[-1]


def tensor_view(value: Any) -> TensorView:
    """Address, shape, strides (elements) and dtype of a NumPy array or a GPU tensor."""
    if isinstance(value, np.ndarray):
        steps = tuple(s // value.itemsize for s in value.strides)
        return TensorView(value.ctypes.data, value.shape, steps, value.dtype.name, None)
    return read_tensor(value, "tensor", sys.modules.get("torch"))[0]


def host_array(value: Any) -> np.ndarray[Any, Any]:
    """A NumPy array that shares memory with a NumPy array or a CPU torch tensor."""
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.is_cuda:
            raise ArgumentError("a CUDA tensor cannot run on the cpu device", hint="move it with .cpu()")
        if str(value.dtype) in ("torch.bfloat16", "torch.float8_e4m3fn", "torch.float8_e5m2"):
            import ml_dtypes

            raw = torch.int16 if value.element_size() == 2 else torch.int8
            return value.detach().view(raw).numpy().view(getattr(ml_dtypes, str(value.dtype).removeprefix("torch.")))
        return np.asarray(value.detach().numpy())
    raise ArgumentError(f"expected a NumPy array or a CPU torch tensor, got {type(value).__name__}")
