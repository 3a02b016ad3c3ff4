"""Symmetric memory from torch: for processes that torch.distributed has brought together."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from tilewright.runtime.errors import DeviceError
from tilewright.runtime.gpu_memory import GpuMemory, torch_dtype
from tilewright.runtime.symmetric_local import GpuRanks
from tilewright.runtime.symmetric_memory import Allocation, check_size, differing


class TorchMemory(GpuRanks):
    """The processes of a torch process group (None: all of them), each with torch's current GPU.

    Arrays are torch tensors. Multicast is left off: nothing here needs it.
    """

    def __init__(self, gpu: GpuMemory, group: Any = None) -> None:
        import torch
        import torch.distributed as distributed

        self._torch, self._distributed = torch, distributed
        self.group = distributed.group.WORLD if group is None else group
        size = distributed.get_world_size(self.group)
        check_size(size)
        super().__init__(size, {distributed.get_rank(self.group): gpu})
        self.gpu, self.rank = gpu, self.ranks[0]

    def agree(self, what: str, value: Any) -> None:
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value, group=self.group)
        error = differing(what, values)
        if error is not None:
            raise error

    def allocate(self, nbytes: int) -> Allocation:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        import torch.distributed._symmetric_memory as symmetric

        octets = symmetric.empty(nbytes, dtype=self._torch.uint8, device=f"cuda:{self.gpu.ordinal}")
        try:
            handle = symmetric.rendezvous(octets, group=self.group.group_name)
        except RuntimeError as error:
            raise DeviceError(
                f"torch could not share memory between the {self.size} ranks: {error} They must be GPUs of one "
                "machine, with NVLink or PCIe peer access between them."
            ) from error
        lead = octets.data_ptr() - handle.buffer_ptrs[self.rank]
        return Allocation(tuple(base + lead for base in handle.buffer_ptrs), nbytes, (octets, handle))

    def array(self, rank: int, allocation: Allocation, shape: tuple[int, ...], dtype: str) -> Any:
        kind = torch_dtype(self._torch, dtype)
        count = 1
        for extent in shape:
            count *= extent
        octets, _ = allocation.owner
        return octets[: count * kind.itemsize].view(kind).view(shape)

    def barrier(self) -> None:
        self._distributed.barrier(group=self.group)

    def close(self) -> None:
        """Torch frees the memory when its last tensor goes; the group stays the caller's."""
        for step in (self.synchronize, self.gpu.close):
            with suppress(DeviceError):  # after a failed kernel only the end of the process gives memory back
                step()


def current_gpu() -> str:
    """The device that torch launches on, as `open_device` takes it. DeviceError unless torch.distributed is up."""
    try:
        import torch
        import torch.distributed as distributed
    except ImportError as error:
        raise DeviceError(f"World.distributed needs torch with torch.distributed ({error}).") from error
    if not distributed.is_available() or not distributed.is_initialized():
        raise DeviceError("torch.distributed is not up: call torch.distributed.init_process_group first.")
    if not torch.cuda.is_available():
        raise DeviceError("World.distributed needs a GPU that torch sees.")
    kind = "hip" if torch.version.hip else "cuda"
    return f"{kind}:{torch.cuda.current_device()}"
