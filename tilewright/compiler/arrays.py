"""Where an array lives, what view type describes it, and its host memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.frontend.errors import ArgumentError
from tilewright.ir.types import DTYPES, ViewType
from tilewright.runtime.arguments import DevicePointer, TensorView, Viewed, canonical_dtype, read_tensor

_KNOWN = "convert it to one of bool, int8 to int64, float16, bfloat16, float32, float64, float8_e4m3, float8_e5m2"

#: what makes the copy engine and 16-byte vectors usable (bytes)
FAST_ALIGNMENT = 16


def where(tensors: Mapping[str, Any]) -> str:
    """The device that holds the arrays: "cpu", "cuda:N" or "hip:N". ArgumentError when they are spread."""
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
        return f"{_torch_runtime(torch)}:{value.get_device()}" if value.is_cuda else "cpu"
    if isinstance(value, Viewed) and hasattr(value, "device"):
        _ = value.view  # raises for what one launch cannot take
        return str(value.device)
    if isinstance(value, DevicePointer) or hasattr(value, "__cuda_array_interface__"):
        return "cuda:0"
    return "cpu"


def _torch_runtime(torch: Any) -> str:
    """Torch for ROCm calls AMD's GPUs "cuda" too."""
    return "hip" if getattr(getattr(torch, "version", None), "hip", None) else "cuda"


def view_type(value: Any, name: str = "tensor") -> ViewType:
    """The view type of an array: dynamic sizes, its unit stride, and 16-byte alignment where it has it.

    ``name`` is the parameter's, for errors.
    """
    view = tensor_view(value, name)
    dtype = DTYPES.get(canonical_dtype(view.dtype))
    if dtype is None:
        raise ArgumentError(f"argument '{name}': arrays of {view.dtype} are not supported", hint=_KNOWN)
    unit = contiguous_axis(view.shape, view.strides)
    strides = tuple(1 if axis == unit else None for axis in range(len(view.shape)))
    steps = [s * dtype.bytes for axis, s in enumerate(view.strides) if axis != unit and view.shape[axis] > 1]
    aligned = all(n % FAST_ALIGNMENT == 0 for n in [view.address, *steps])
    return ViewType((None,) * len(view.shape), dtype, strides, FAST_ALIGNMENT if aligned else dtype.bytes)


def contiguous_axis(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The axis to address with stride one: the last that has it, preferring axes longer than one."""
    axes = [axis for axis, stride in enumerate(strides) if stride == 1]
    candidates = [axis for axis in axes if shape[axis] > 1] or axes
    return candidates[-1] if candidates else None


def tensor_view(value: Any, name: str = "tensor") -> TensorView:
    """Address, shape, strides (elements) and dtype of a NumPy array or a GPU tensor."""
    if isinstance(value, np.ndarray):
        if any(step % value.itemsize for step in value.strides) or not value.dtype.isnative:
            raise ArgumentError(
                f"argument '{name}': an array of {value.dtype.str} with strides of {value.strides} bytes",
                hint="pass a copy whose elements are native and follow each other: np.ascontiguousarray(x)",
            )
        steps = tuple(s // value.itemsize for s in value.strides)
        return TensorView(value.ctypes.data, value.shape, steps, value.dtype.name, None)
    return read_tensor(value, name, sys.modules.get("torch"))[0]


def host_array(value: Any, name: str = "tensor", from_gpu: bool = False) -> np.ndarray[Any, Any]:
    """A NumPy array that shares memory with a NumPy array or a CPU torch tensor.

    With ``from_gpu`` also a copy of a torch tensor in GPU memory, for `give_back`.
    """
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        raise ArgumentError(
            f"argument '{name}' must be a NumPy array or a CPU torch tensor, got {type(value).__name__}",
            hint="arrays in GPU memory run on their GPU: leave out the device",
        )
    value = value.detach()
    if value.device.type != "cpu":
        if not from_gpu:
            message = f"argument '{name}' is on {value.device}, and this launch is on the cpu"
            raise ArgumentError(message, hint="move it with .cpu()")
        value = value.cpu()
    kind = str(value.dtype).removeprefix("torch.")
    if kind in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):  # NumPy has no such dtypes of its own
        import ml_dtypes

        raw = torch.int16 if value.element_size() == 2 else torch.int8
        return np.asarray(value.view(raw).numpy().view(getattr(ml_dtypes, kind)))
    return np.asarray(value.numpy())


def give_back(value: Any, array: np.ndarray[Any, Any]) -> None:
    """Copy what `host_array` fetched from a GPU back to ``value``; nothing for arrays that lie here."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor) or value.device.type == "cpu":
        return
    raw = {"bfloat16": torch.int16, "float8_e4m3fn": torch.int8, "float8_e5m2": torch.int8}.get(
        str(value.dtype).removeprefix("torch.")
    )
    if raw is None:
        value.detach().copy_(torch.from_numpy(array))
    else:
        value.detach().view(raw).copy_(torch.from_numpy(array.view(np.int16 if array.itemsize == 2 else np.int8)))
