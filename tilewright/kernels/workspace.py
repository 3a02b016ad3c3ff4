"""Memory that launches hand results through, kept for the next ones."""

from __future__ import annotations

from math import prod
from threading import local
from typing import Any

import numpy as np

import tilewright as tw

#: views that a thread keeps
_MOST_VIEWS = 1024


class _Kept(local):
    """What a thread keeps: launches of others come between its own, on the same stream too."""

    def __init__(self) -> None:
        #: by device and stream
        self.memory: dict[tuple[int, int], Any] = {}
        #: of that memory, by device, stream and shape
        self.views: dict[tuple[Any, ...], Any] = {}


class Workspace:
    """Numbers of one dtype, of any content.

    The memory for torch tensors on a GPU belongs to their device and stream and the calling thread, whose launches
    follow one another, and grows with the largest request. A graph that is being captured gets memory of its own, since
    it may run beside the stream that it was captured on, and so do launches that are recorded. Others (NumPy, CPU
    tensors) get a new array each time.
    """

    def __init__(self, dtype: str = "float32") -> None:
        self._dtype, self._kept = dtype, _Kept()

    def take(self, like: Any, shape: tuple[int, ...]) -> Any:
        """An array of that shape where the array ``like`` lives."""
        if isinstance(like, np.ndarray):
            return np.empty(shape, self._dtype)
        import torch

        if not like.is_cuda or tw.recording() or torch.cuda.is_current_stream_capturing():
            return torch.empty(shape, dtype=getattr(torch, self._dtype), device=like.device)
        place = like.get_device(), torch.cuda.current_stream(like.device).cuda_stream
        views = self._kept.views
        found = views.get((*place, shape))
        if found is None:
            memory = self._grow(torch, like, place, prod(shape))
            if len(views) >= _MOST_VIEWS:
                views.clear()
            found = views[(*place, shape)] = memory.view(shape)
        return found

    def _grow(self, torch: Any, like: Any, place: tuple[int, int], size: int) -> Any:
        kept = self._kept.memory.get(place)
        if kept is None or kept.numel() < size:
            kept = torch.empty(size, dtype=getattr(torch, self._dtype), device=like.device)
            self._kept.memory[place] = kept
            for key in [key for key in self._kept.views if key[:2] == place]:
                del self._kept.views[key]
        return kept[:size]


def temporary(like: Any, shape: tuple[int, ...], dtype: Any = "float32") -> Any:
    """A new array of any content where the array ``like`` lives: for launches that need too much to keep it.

    ``dtype`` is a name, or that of an array of the same kind.
    """
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    import torch

    named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.empty(tuple(shape), dtype=named, device=like.device)


__all__ = ["Workspace", "temporary"]
