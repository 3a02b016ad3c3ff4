"""NumPy arrays as CUDA tensors and back, strides kept, with the dtypes that the two name differently."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

Array = np.ndarray[Any, Any]
#: NumPy dtypes that torch knows under another name
TORCH = {
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
    np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn,
    np.dtype(ml_dtypes.float8_e5m2): torch.float8_e5m2,
}


def to_device(array: Array) -> torch.Tensor:
    if array.dtype in TORCH:
        raw = torch.from_numpy(array.view(np.int8 if array.itemsize == 1 else np.int16))
        return raw.cuda().view(TORCH[array.dtype])
    return torch.from_numpy(array).cuda()


def to_host(tensor: torch.Tensor, like: Array) -> Array:
    if like.dtype in TORCH:
        raw: Array = tensor.view(torch.int8 if like.itemsize == 1 else torch.int16).cpu().numpy()
        return raw.view(like.dtype)
    host: Array = tensor.cpu().numpy()
    return host
