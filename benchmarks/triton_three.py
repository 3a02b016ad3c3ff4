"""The rival of host.py: a Triton kernel of three tensors and three integers, and hardly any work."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def three(x_ptr, y_ptr, out_ptr, i, j, k):
    """``out = x + y * (i + j + k)`` for 128 elements; grid (1,)."""
    places = tl.arange(0, 128)
    tl.store(out_ptr + places, tl.load(x_ptr + places) + tl.load(y_ptr + places) * (i + j + k))
