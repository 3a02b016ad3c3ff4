"""Symmetric memory of several GPUs that one process drives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from tilewright.ir.abi import FAULT_WORDS
from tilewright.runtime.errors import DeviceError
from tilewright.runtime.gpu_memory import GpuMemory, gpu_array, torch_with_gpus
from tilewright.runtime.host_arrays import array_bytes
from tilewright.runtime.launching import stream_handle
from tilewright.runtime.symmetric_memory import Allocation, Copy, Run, SharedWords, SymmetricMemory, check_size


class GpuRanks(SymmetricMemory):
    """What providers share whose ranks are GPUs: ``gpus`` are those of this process, by rank."""

    def __init__(self, size: int, gpus: dict[int, GpuMemory]) -> None:
        self.size, self.gpus, self.ranks = size, gpus, tuple(gpus)
        self.uses_torch = torch_with_gpus() is not None

    def device(self, rank: int) -> str:
        return self.gpus[rank].name

    def array(self, rank: int, allocation: Allocation, shape: tuple[int, ...], dtype: str) -> Any:
        return gpu_array(self.gpus[rank], allocation.addresses[rank], shape, dtype, allocation.owner)

    def fill(self, rank: int, allocation: Allocation, values: Any | None) -> None:
        address = allocation.addresses[rank]
        if values is None:
            self.gpus[rank].clear(address, allocation.nbytes)
        elif data := array_bytes(values):
            self.gpus[rank].write(address, data)

    def place(self, rank: int, data: bytes) -> int:
        return self.gpus[rank].place(data)

    def copy(self, rank: int, copy: Copy, stream: Any) -> None:
        self.gpus[rank].start_copy(*copy, self._stream(rank, stream))

    def start_copies(self, rank: int, runs: Sequence[Run], stream: Any, ordered: bool) -> list[Any]:
        return self.gpus[rank].start_copies(runs, self._stream(rank, stream), ordered)

    def join(self, rank: int, copy: Any, stream: Any) -> None:
        self.gpus[rank].wait_event(self._stream(rank, stream), copy)

    def side_stream(self, rank: int) -> Any:
        return self.gpus[rank].side_stream()

    def rejoin(self, rank: int, stream: Any) -> None:
        self.gpus[rank].rejoin(self._stream(rank, stream))

    def _stream(self, rank: int, stream: Any) -> int:
        """The handle of what a caller passed as a stream."""
        return stream_handle(stream, torch_with_gpus() if self.uses_torch else None, self.gpus[rank].ordinal)

    def fault_record(self, rank: int) -> SharedWords:
        return self.gpus[rank].shared_words(FAULT_WORDS)

    def explain(self, rank: int, reason: Callable[[], str | None]) -> None:
        self.gpus[rank].explain(reason)

    def synchronize(self) -> None:
        for gpu in self.gpus.values():
            gpu.synchronize()


class LocalMemory(GpuRanks):
    """A rank for each of several GPUs of this process, each of which has access to all the others' memory."""

    def __init__(self, gpus: Sequence[GpuMemory]) -> None:
        check_size(len(gpus))
        names = [gpu.name for gpu in gpus]
        if len(set(names)) != len(names):
            raise DeviceError(f"Every rank needs a GPU of its own, not {', '.join(names)}.")
        for gpu in gpus:
            for other in gpus:
                if not gpu.reaches(other.ordinal):
                    raise DeviceError(
                        f"{gpu.name} cannot access the memory of {other.name}: there is no NVLink and no PCIe peer "
                        "access between them (nvidia-smi topo -p2p r). Use GPUs that are connected."
                    )
        super().__init__(len(gpus), dict(enumerate(gpus)))
        self._mapped: list[tuple[GpuMemory, int, int]] = []

    def allocate(self, nbytes: int) -> Allocation:
        ordinals = [gpu.ordinal for gpu in self.gpus.values()]
        addresses = []
        for gpu in self.gpus.values():
            size = gpu.padded(nbytes)
            handle = gpu.create(size)
            try:
                addresses.append(gpu.map(handle, size, ordinals))
            finally:
                gpu.release(handle)  # the mapping keeps it
            self._mapped.append((gpu, addresses[-1], size))
        return Allocation(tuple(addresses), nbytes)

    def agree(self, what: str, value: Any) -> None:
        """One process agrees with itself."""

    def barrier(self) -> None:
        """One process is all there is to wait for."""

    def close(self) -> None:
        with suppress(DeviceError):
            self.synchronize()
        while self._mapped:
            gpu, address, size = self._mapped.pop()
            with suppress(DeviceError):  # after a kernel has failed nothing can be given back but by ending the process
                gpu.unmap(address, size)
        for gpu in self.gpus.values():
            with suppress(DeviceError):
                gpu.close()
