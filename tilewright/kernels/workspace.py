"""Memory that the programs of a launch hand results through, kept from launch to launch."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np


class Workspace:
    """Float32 numbers of any content, and int32 counters that are zero whenever no kernel runs.

    The arrays for torch tensors on a GPU belong to their device and stream, where launches follow one another, and grow
    with the largest request. A graph that is being captured gets memory of its own, with the zeros written in it, since
    it may run beside the stream that it was captured on. Others (NumPy, CPU tensors) get new arrays each time.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Any, Any]] = {}
        #: views of what is kept, by device, stream, shape and number of counters
        self._views: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def take(self, like: Any, shape: tuple[int, ...], counters: int) -> tuple[Any, Any]:
        """Floats of that shape, and counters, where the array ``like`` lives."""
        if isinstance(like, np.ndarray):
            return np.empty(shape, np.float32), np.zeros(counters, np.int32)
        import torch

        if not like.is_cuda or torch.cuda.is_current_stream_capturing():
            return _new(torch, like, shape, counters)
        place = like.get_device(), torch.cuda.current_stream(like.device).cuda_stream
        key = (*place, shape, counters)
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = self._grow(torch, like, place, shape, counters)
        return found

    def _grow(
        self, torch: Any, like: Any, place: tuple[int, int], shape: tuple[int, ...], counters: int
    ) -> tuple[Any, Any]:
        size = prod(shape)
        kept = self._kept.get(place)
        if kept is None or kept[0].numel() < size or kept[1].numel() < counters:
            least = (0, 0) if kept is None else (kept[0].numel(), kept[1].numel())
            kept = self._kept[place] = _new(torch, like, (max(size, least[0]),), max(counters, least[1]))
            self._views = {key: views for key, views in self._views.items() if key[:2] != place}
        return kept[0][:size].view(shape), kept[1][:counters]


def _new(torch: Any, like: Any, shape: tuple[int, ...], counters: int) -> tuple[Any, Any]:
    floats = torch.empty(shape, dtype=torch.float32, device=like.device)
    return floats, torch.zeros(counters, dtype=torch.int32, device=like.device)


__all__ = ["Workspace"]
