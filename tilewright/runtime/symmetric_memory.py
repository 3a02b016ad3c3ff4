"""The interface between worlds and the places that their memory comes from.

A provider has a module of its own: host memory (`symmetric_host`), several GPUs of one process
(`symmetric_local`), one GPU in each of several processes (`symmetric_connect`), torch's symmetric memory
(`symmetric_torch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir.abi import FAULT_WORDS, MOST_RANKS
from tilewright.runtime.errors import DeviceError

#: target and source address, bytes
Copy = tuple[int, int, int]
#: copies that follow one another
Run = Sequence[Copy]


@dataclass(frozen=True)
class Allocation:
    """``nbytes`` of every rank's memory: ``addresses`` by rank, as this process sees them. ``owner`` keeps them."""

    addresses: tuple[int, ...]
    nbytes: int
    owner: Any = None


@dataclass(frozen=True)
class SharedWords:
    """int32 words of host memory that a kernel writes: ``words`` to read them here, ``address`` for the kernel."""

    words: np.ndarray[Any, Any]
    address: int

    @staticmethod
    def absent() -> SharedWords:
        """For devices whose kernels cannot fail by themselves."""
        return SharedWords(np.zeros(FAULT_WORDS, np.int32), 0)


class SymmetricMemory(ABC):
    """Memory on ``size`` ranks, of which ``ranks`` belong to this process.

    `allocate`, `agree` and `barrier` are collective: every process calls them in the same order.
    """

    size: int
    ranks: Sequence[int]
    #: arrays are torch tensors, and launches follow torch's streams
    uses_torch: bool = False

    @abstractmethod
    def device(self, rank: int) -> str:
        """The device of one of this process's ranks, as `open_device` takes it; "cpu" for the interpreter."""

    @abstractmethod
    def allocate(self, nbytes: int) -> Allocation:
        """Memory on all ranks that all of them reach, with any contents."""

    @abstractmethod
    def array(self, rank: int, allocation: Allocation, shape: tuple[int, ...], dtype: str) -> Any:
        """The array of one of this process's ranks at the start of an allocation, row-major."""

    @abstractmethod
    def fill(self, rank: int, allocation: Allocation, values: Any | None) -> None:
        """Overwrite the rank's part of an allocation with an array's bytes, or with zeros, before returning."""

    @abstractmethod
    def place(self, rank: int, data: bytes) -> int:
        """Put bytes into the memory of the rank's device, at a multiple of 128; they stay until `close`."""

    @abstractmethod
    def copy(self, rank: int, copy: Copy, stream: Any) -> None:
        """Give a stream of the rank's device a copy."""

    @abstractmethod
    def start_copies(self, rank: int, runs: Sequence[Run], stream: Any, ordered: bool) -> list[Any]:
        """Start runs of copies behind what a stream of the rank's device has been given; something to `join` for each.

        They go beside the stream, and beside each other unless ``ordered``.
        """

    @abstractmethod
    def join(self, rank: int, copy: Any, stream: Any) -> None:
        """Let the stream wait for a copy."""

    @abstractmethod
    def side_stream(self, rank: int) -> Any:
        """The stream of the rank's ordered copies, for launches behind them."""

    @abstractmethod
    def rejoin(self, rank: int, stream: Any) -> None:
        """Let the stream wait for what `side_stream` has been given."""

    def fault_record(self, rank: int) -> SharedWords:
        """The record that a kernel of the rank writes when it gives up waiting."""
        return SharedWords.absent()

    @abstractmethod
    def explain(self, rank: int, reason: Callable[[], str | None]) -> None:
        """Have failed calls of the rank's device say ``reason()`` where that is not None, until `close`."""

    @abstractmethod
    def agree(self, what: str, value: Any) -> None:
        """DeviceError on every rank unless all processes pass the same ``value`` (numbers, strings, lists)."""

    def together(self) -> AbstractContextManager[None]:
        """Launches of this process's ranks within start at the same time."""
        return nullcontext()

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for this process's devices. DeviceError for what failed on them."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every process has come here. DeviceError when one is gone."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; no process reaches another's any more. Never raises."""


def check_size(size: int) -> None:
    """DeviceError for a number of ranks that no world has."""
    if not 1 <= size <= MOST_RANKS:
        raise DeviceError(f"A world has 1 to {MOST_RANKS} ranks, not {size}.")


def differing(what: str, values: Sequence[Any]) -> DeviceError | None:
    """What to raise when the ranks' values are not all the same."""
    if all(value == values[0] for value in values):
        return None
    listing = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
    return DeviceError(
        f"The ranks disagree on {what}: {listing}. Every rank must make the same calls in the same order."
    )
