"""Saving what lies in a tensor and putting it back, wherever its memory is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.ir.types import DTYPES
from tilewright.runtime.arguments import TensorView, canonical_dtype
from tilewright.runtime.cuda import CudaDevice
from tilewright.runtime.device import Device
from tilewright.runtime.errors import DeviceError

Restore = Callable[[], None]


def save(device: Device, argument: Any, name: str) -> Restore:
    """Copy a tensor's contents; the function that is returned writes them back, on torch's current stream.

    Torch tensors, NumPy arrays, and on CUDA devices whatever has an address. DeviceError otherwise.
    """
    torch = sys.modules.get("torch")
    torch_tensor: Any = getattr(torch, "Tensor", ())
    if isinstance(argument, torch_tensor):
        copy = argument.clone()
        return lambda: _restore_torch(torch, argument, copy)
    if isinstance(argument, np.ndarray):
        saved = argument.copy()
        return lambda: np.copyto(argument, saved)
    if isinstance(device, CudaDevice):
        return _save_memory(device, device.view(argument, name))
    raise DeviceError(f"The contents of '{name}' cannot be saved on {device.name}: pass a torch tensor.")


def _restore_torch(torch: Any, tensor: Any, copy: Any) -> None:
    with torch.no_grad():
        tensor.copy_(copy)


def _save_memory(device: CudaDevice, view: TensorView) -> Restore:
    """All bytes from a view's first element to its last."""
    item = DTYPES[canonical_dtype(view.dtype)].bytes
    if 0 in view.shape:
        return lambda: None
    reach = [step * (extent - 1) * item for step, extent in zip(view.strides, view.shape, strict=True)]
    start = view.address + sum(n for n in reach if n < 0)
    size = sum(abs(n) for n in reach) + item
    with device.current():
        copy = device.call("cuMemAlloc", size)
        device.call("cuMemcpyDtoD", copy, start, size)

    def restore() -> None:
        with device.current():
            device.call("cuMemcpyDtoD", start, copy, size)
            device.call("cuMemFree", copy)

    return restore
