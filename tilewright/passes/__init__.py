"""Passes over the Tile IR. Importing this package registers all of them by name."""

from tilewright.passes import (
    canonicalize,
    cse,
    dce,
    fences,
    layouts,
    licm,
    mma,
    pipeline,
    placement,
    prefetch,
    roles,
    schedule,
    shared_plan,
    skew,
    staging,
    tile_order,
)

__all__ = [
    "canonicalize",
    "cse",
    "dce",
    "fences",
    "layouts",
    "licm",
    "mma",
    "pipeline",
    "placement",
    "prefetch",
    "roles",
    "schedule",
    "shared_plan",
    "skew",
    "staging",
    "tile_order",
]
