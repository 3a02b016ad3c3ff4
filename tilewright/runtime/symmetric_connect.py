"""Symmetric memory of processes with a GPU each, which pass each other file descriptors of their memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar, cast

from tilewright.runtime.errors import DeviceError
from tilewright.runtime.gpu_memory import GpuMemory
from tilewright.runtime.rendezvous import Rendezvous
from tilewright.runtime.symmetric_local import GpuRanks
from tilewright.runtime.symmetric_memory import Allocation, check_size, differing

T = TypeVar("T")


class ConnectedMemory(GpuRanks):
    """The GPU of this process as ``rank`` of ``size``; see `Rendezvous` for ``address``."""

    def __init__(self, gpu: GpuMemory, rank: int, size: int, address: str) -> None:
        check_size(size)
        super().__init__(size, {rank: gpu})
        self.gpu, self.rank = gpu, rank
        self.meeting = Rendezvous(rank, size, address)
        self._own: list[tuple[int, int]] = []
        self._theirs: list[tuple[int, int]] = []

    def agree(self, what: str, value: Any) -> None:
        error = differing(what, self.meeting.gather(value))
        if error is not None:
            raise error

    def allocate(self, nbytes: int) -> Allocation:
        size = max(self.meeting.gather(self.gpu.padded(nbytes)))
        own_before, theirs_before = len(self._own), len(self._theirs)
        try:
            with ExitStack() as descriptors:  # they stay open until all is mapped, as HIP wants it
                own, descriptor = self._all_succeed(lambda: self._export(size, descriptors))
                _, received = self.meeting.gather_descriptors(None, descriptor)
                theirs = {rank: one for rank, one in enumerate(received) if one is not None}
                for one in theirs.values():
                    descriptors.callback(os.close, one)
                peers = self._all_succeed(
                    lambda: {rank: self._map_peer(rank, one, size) for rank, one in theirs.items()}
                )
        except DeviceError:  # it failed on all ranks: none keeps memory for it
            self._unmap(self._theirs, theirs_before)
            self._unmap(self._own, own_before)
            raise
        return Allocation(tuple(peers.get(rank, own) for rank in range(self.size)), nbytes)

    def _export(self, size: int, descriptors: ExitStack) -> tuple[int, int]:
        """New memory of this rank: its address and a descriptor of it, which ``descriptors`` closes."""
        handle = self.gpu.create(size)
        try:
            own = self.gpu.map(handle, size, [self.gpu.ordinal])
            self._own.append((own, size))
            descriptor = self.gpu.export(handle)
            descriptors.callback(os.close, descriptor)
            return own, descriptor
        finally:
            self.gpu.release(handle)  # mapping and descriptor keep it

    def _all_succeed(self, action: Callable[[], T]) -> T:
        """What ``action`` gives here. If it fails on one rank, its DeviceError is raised on all."""
        result, failure = None, None
        try:
            result = action()
        except DeviceError as error:
            failure = error
        complaints = self.meeting.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for complaint in filter(None, complaints):
            raise DeviceError(complaint)
        return cast(T, result)

    def _map_peer(self, rank: int, descriptor: int, size: int) -> int:
        """The memory of another rank in this process."""
        try:
            handle = self.gpu.import_(descriptor)
            try:
                address = self.gpu.map(handle, size, [self.gpu.ordinal])
            finally:
                self.gpu.release(handle)
        except DeviceError as error:
            raise DeviceError(
                f"Rank {self.rank} ({self.gpu.name}) cannot access the memory of rank {rank}: {error} The GPUs must be "
                "of one machine, with NVLink or PCIe peer access between them.",
                error.code,
            ) from error
        self._theirs.append((address, size))
        return address

    def barrier(self) -> None:
        self.meeting.barrier()

    def close(self) -> None:
        """Peers' memory first, then all meet, then the own memory: nobody's memory ends under another's feet."""
        with suppress(DeviceError):
            self.synchronize()
        self._unmap(self._theirs)
        with suppress(DeviceError):
            self.meeting.barrier()
        self._unmap(self._own)
        with suppress(DeviceError):
            self.gpu.close()
        self.meeting.close()

    def _unmap(self, mapped: list[tuple[int, int]], keep: int = 0) -> None:
        while len(mapped) > keep:
            with suppress(DeviceError):  # after a failed kernel only the end of the process gives memory back
                self.gpu.unmap(*mapped.pop())
