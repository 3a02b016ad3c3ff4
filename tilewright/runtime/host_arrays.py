"""Bytes of arrays in host memory, whatever library they come from."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def array_bytes(values: Any) -> bytes:
    """The elements of a NumPy array or a torch tensor (of any device), row-major."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        values = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(values).tobytes()
