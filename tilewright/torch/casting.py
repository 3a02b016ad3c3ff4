"""Autocast that is switched on and off inside of one of Dynamo's graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

#: the arguments of each autocast that a node is inside of, outermost first
Region = tuple[tuple[Any, ...], ...]


def autocast_regions(graph: Any) -> dict[Any, Region]:
    """The region of each node."""
    regions: dict[Any, Region] = {}
    inside: dict[Any, tuple[Any, ...]] = {}
    for node in graph.nodes:
        if node.target is _exit_autocast:
            inside.pop(node.args[0], None)
        regions[node] = tuple(inside.values())
        if node.target is _enter_autocast:
            inside[node] = node.args
    return regions


@contextmanager
def entered(region: Region) -> Iterator[None]:
    """As if inside of a region."""
    with ExitStack() as stack:
        for device, dtype, enabled, caching in region:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=caching))
        yield


__all__ = ["Region", "autocast_regions", "entered"]
