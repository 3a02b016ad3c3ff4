"""Symmetric memory of processes with a GPU each, which pass each other file descriptors of their memory."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from tilewright.runtime.errors import DeviceError
from tilewright.runtime.gpu_memory import GpuMemory
from tilewright.runtime.rendezvous import Rendezvous
from tilewright.runtime.symmetric_local import GpuRanks
from tilewright.runtime.symmetric_memory import Allocation, check_size, differing


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
        handle = self.gpu.create(size)
        try:
            own = self.gpu.map(handle, size, [self.gpu.ordinal])
            self._own.append((own, size))
            descriptor = self.gpu.export(handle)
            try:
                _, received = self.meeting.gather_descriptors(None, descriptor)
            finally:
                os.close(descriptor)
        finally:
            self.gpu.release(handle)
        addresses = tuple(own if one is None else self._map_peer(rank, one, size) for rank, one in enumerate(received))
        self.meeting.barrier()
        return Allocation(addresses, nbytes)

    def _map_peer(self, rank: int, descriptor: int, size: int) -> int:
        """The memory of another rank in this process. The descriptor stays open until it is mapped, as HIP wants it."""
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
        finally:
            os.close(descriptor)
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

    def _unmap(self, mapped: list[tuple[int, int]]) -> None:
        while mapped:
            with suppress(DeviceError):  # after a failed kernel only the end of the process gives memory back
                self.gpu.unmap(*mapped.pop())
