"""What a conversion of layouts takes at least, found by looking at all elements."""

from __future__ import annotations

from math import prod

import numpy as np

from tilewright.ir.layout import LinearLayout


def conversion_kind(src: LinearLayout, dst: LinearLayout) -> str:
    """What turning src into dst takes: "identity", "registers" (renaming), "shuffle" (same warp) or "shared"."""
    permutation = src.register_permutation(dst)
    if permutation is not None:
        return "identity" if permutation == list(range(src.num_registers)) else "registers"
    if src.num_warps != dst.num_warps or src.num_lanes != dst.num_lanes:
        return "shared"
    flat_src, flat_dst = (np.ravel_multi_index(x.all_coords(), x.tile_shape) for x in (src, dst))
    for warp in range(src.num_warps):
        held = np.zeros(prod(src.tile_shape), bool)
        held[flat_src[..., warp]] = True
        if not held[flat_dst[..., warp]].all():
            return "shared"
    return "shuffle"
