"""Symmetric memory of worlds without GPUs: the NumPy arrays of emulated and interpreted ranks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np

from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.types import DTYPES
from tilewright.runtime.emulated_group import EmulatedGroup
from tilewright.runtime.host_arrays import array_bytes
from tilewright.runtime.symmetric_memory import Allocation, Copy, Run, SymmetricMemory, check_size

#: what the emulators and vector accesses want of an address (bytes)
_ALIGNMENT = 256


class HostMemory(SymmetricMemory):
    """All ranks in this process: the GPUs of an emulated group, or without one the interpreter.

    New memory is filled with NaNs (bytes of ones), so that results which nobody wrote show.
    """

    def __init__(self, size: int, group: EmulatedGroup | None = None) -> None:
        check_size(size)
        self.size, self.ranks = size, range(size)
        self.group = group

    def device(self, rank: int) -> str:
        return "cpu" if self.group is None else self.group[rank].name

    def allocate(self, nbytes: int) -> Allocation:
        parts = [_aligned(nbytes) for _ in self.ranks]
        for part in parts:
            part.fill(0xFF)
        return Allocation(tuple(part.ctypes.data for part in parts), nbytes, parts)

    def array(self, rank: int, allocation: Allocation, shape: tuple[int, ...], dtype: str) -> Any:
        kind = NUMPY[DTYPES[dtype]]
        count = int(np.prod(shape))
        return allocation.owner[rank][: count * kind.itemsize].view(kind).reshape(shape)

    def fill(self, rank: int, allocation: Allocation, values: Any | None) -> None:
        part = allocation.owner[rank]
        data = np.zeros(part.size, np.uint8) if values is None else np.frombuffer(array_bytes(values), np.uint8)
        part[: data.size] = data

    def place(self, rank: int, data: bytes) -> int:
        """The emulator places tables in its own memory (`emulated_peers`), and the interpreter needs none."""
        return 0

    def copy(self, rank: int, copy: Copy, stream: Any) -> None:
        ctypes.memmove(*copy)

    def start_copies(self, rank: int, runs: Sequence[Run], stream: Any, ordered: bool) -> list[Any]:
        for copy in chain.from_iterable(runs):
            ctypes.memmove(*copy)
        return [None] * len(runs)

    def join(self, rank: int, copy: Any, stream: Any) -> None:
        """Copies have happened when they have been started."""

    def side_stream(self, rank: int) -> Any:
        return None

    def rejoin(self, rank: int, stream: Any) -> None:
        """Launches have finished when they return."""

    def explain(self, rank: int, reason: Callable[[], str | None]) -> None:
        """Kernels here do not give up: who waits in vain is found out."""

    def agree(self, what: str, value: Any) -> None:
        """One process agrees with itself."""

    def barrier(self) -> None:
        """One process is all there is to wait for."""

    def together(self) -> AbstractContextManager[None]:
        return nullcontext() if self.group is None else self.group.together()

    def synchronize(self) -> None:
        """Launches have finished when they return."""

    def close(self) -> None:
        """Arrays are freed when nobody has them any more."""


def _aligned(nbytes: int) -> np.ndarray[Any, Any]:
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes]
