"""Symmetric memory and flags that kernels hand results through, kept for the next launches on the same world."""

from __future__ import annotations

from typing import Any


def symmetric(world: Any, purpose: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """A symmetric tensor of any content; the same one for the same ``purpose``, shape and dtype.

    Launches of one world follow one another, so that kernels may share what they do not need at the same time.
    Every rank must ask for it: making one is a collective operation.
    """
    key = purpose, shape, str(dtype)
    if key not in world.workspaces:
        world.workspaces[key] = world.empty(shape, dtype)
    return world.workspaces[key]


def flags(world: Any, purpose: str, shape: tuple[int, ...]) -> Any:
    """Flags, as `symmetric` gives tensors. They need no reset: a launch does not see the signals of those before."""
    key = purpose, shape, "flags"
    if key not in world.workspaces:
        world.workspaces[key] = world.flags(shape)
    return world.workspaces[key]


def packets(world: Any, purpose: str, shape: tuple[int, ...]) -> Any:
    """Packets for `tw.send`, as `symmetric` gives tensors."""
    key = purpose, shape, "packets"
    if key not in world.workspaces:
        world.workspaces[key] = world.zeros(shape, "int64")
    return world.workspaces[key]


def own(arrays: Any) -> Any:
    """One rank's array, for its shape and dtype: of a list with one for each rank the first."""
    return arrays[0] if isinstance(arrays, list | tuple) else arrays


def share(size: int, world: int) -> int:
    """How many of ``size`` rows a rank has; the last ranks may have fewer."""
    return -(-size // world)


__all__ = ["flags", "own", "packets", "share", "symmetric"]
