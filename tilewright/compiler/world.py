"""`tw.World`: ranks whose kernels run at the same time and reach each other's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, cycle, repeat
from typing import TYPE_CHECKING, Any, cast

from tilewright.compiler.environment import WAIT_TIMEOUT
from tilewright.compiler.launch import Grid, interpret_ranks
from tilewright.frontend.errors import ArgumentError
from tilewright.runtime.device import open_device
from tilewright.runtime.errors import DeviceError
from tilewright.runtime.rendezvous import new_address
from tilewright.runtime.symmetric import SymmetricHeap, SymmetricTensor
from tilewright.runtime.symmetric_memory import SymmetricMemory

if TYPE_CHECKING:
    from tilewright.compiler.kernel import Kernel
    from tilewright.runtime.cuda import CudaDevice
    from tilewright.runtime.gpu_memory import GpuMemory
    from tilewright.runtime.hip import HipDevice


class World(SymmetricHeap):
    """``size`` ranks: ``empty``, ``zeros``, ``flags``, ``tensor`` make symmetric tensors, `launch` runs kernels.

    Every rank launches the same kernels of a world in the same order, on one stream at a time. Worlds are made by
    the class methods: `emulated` and `interpreter` without GPUs, `local` for several GPUs of one process,
    `distributed` where torch.distributed is up, `connect` for other processes. Close a world when it is done
    with (``with tw.World.local([0, 1]) as world:``).
    """

    #: of the launches to come, in the interpreter
    seeds: Iterator[int | None]
    turns: Iterator[int]

    @classmethod
    def interpreter(cls, ranks: int, *, seed: int | None = None) -> World:
        """Ranks that run side by side in the interpreter, on NumPy arrays. Waiting in vain is an error.

        ``seed``: blocks go on in a random order, another one in each launch, and puts land at any time; without one
        they go on in turn and puts land as late as they may.
        """
        from tilewright.runtime.symmetric_host import HostMemory

        world = cls(HostMemory(ranks), timeout=0)
        world.seeds = repeat(None) if seed is None else count(seed)
        world.turns = cycle((1, 0))
        return world

    @classmethod
    def emulated(
        cls, target: str, ranks: int, *, seed: int | None = None, races: bool = False, progress: bool | None = None
    ) -> World:
        """Emulated GPUs of ``target`` ("sm_90a", "gfx942") on NumPy arrays; options as of `tw.emulate`."""
        from tilewright.runtime.emulated import EmulationOptions
        from tilewright.runtime.emulated_group import EmulatedGroup
        from tilewright.runtime.symmetric_host import HostMemory
        from tilewright.runtime.symmetric_memory import check_size

        check_size(ranks)
        return cls(HostMemory(ranks, EmulatedGroup(target, ranks, EmulationOptions(seed, races, progress))), timeout=0)

    @classmethod
    def local(cls, devices: Sequence[int | str]) -> World:
        """One process and a GPU for each rank: ordinals of CUDA devices, or names ("hip:1").

        DeviceError unless each of them has access to the memory of all others.
        """
        from tilewright.runtime.symmetric_local import LocalMemory

        return cls._on_gpus(LocalMemory([gpu_memory(device) for device in devices]))

    @classmethod
    def distributed(cls, group: Any = None, *, patience: float = 0) -> World:
        """The processes of a torch process group (None: all), each with torch's current GPU; tensors are torch's.

        ``patience``: seconds that a kernel waits at least before it gives up, where `TILEWRIGHT_WAIT_TIMEOUT` is less.
        Collective. DeviceError if torch.distributed is not up or a GPU cannot reach another one's memory.
        """
        from tilewright.runtime.symmetric_torch import TorchMemory, current_gpu

        return cls._on_gpus(TorchMemory(gpu_memory(current_gpu()), group), patience)

    @classmethod
    def connect(cls, rank: int, size: int, address: str, device: int | str | None = None) -> World:
        """Processes of one machine that meet at ``address``, one from `World.address` that all were told.

        ``device``: an ordinal of a CUDA device or a name (default: ordinal ``rank``). Collective. DeviceError
        after a minute without the others, or if a GPU cannot reach another one's memory.
        """
        from tilewright.runtime.symmetric_connect import ConnectedMemory

        gpu = gpu_memory(rank if device is None else device)
        return cls._on_gpus(ConnectedMemory(gpu, rank, size, address))

    @staticmethod
    def address() -> str:
        """An address for `connect` that no other job has."""
        return new_address()

    @classmethod
    def _on_gpus(cls, memory: SymmetricMemory, patience: float = 0) -> World:
        given = WAIT_TIMEOUT.get()
        return cls(memory, timeout=max(given, patience) if given else 0)

    def launch(self, kernel: Kernel, grid: Grid, *args: Any, stream: Any = None, **meta: Any) -> None:
        """``kernel[grid](*args, **meta)`` on every rank of this process, all started together.

        Symmetric tensors stand for each rank's own. A list is by rank: one element for each rank of this process;
        so may ``stream`` be. Other arguments are the same for all. Raises what a launch does; DeviceError
        when kernels failed or wait for each other in vain.
        """
        devices = self.devices
        if len(devices) == 1 and devices[0] != "cpu" and not any(type(value) is list for value in args):
            kernel.bind(grid, devices[0])(*args, stream=self._of(stream, 0), **meta)
            return
        columns = [self._by_rank(value) for value in args]
        arguments = list(zip(*columns, strict=True)) if columns else [()] * len(devices)
        named = {name: self._by_rank(value) for name, value in meta.items()}
        keywords = [{name: values[i] for name, values in named.items()} for i in range(len(devices))]
        if devices[0] == "cpu":
            interpret_ranks(kernel, grid, arguments, keywords, seed=next(self.seeds), turn=next(self.turns))
            return
        streams = self._by_rank(stream)
        with self.memory.together():
            starts = [
                kernel.bind(grid, device).complete(given, keyword)
                for device, given, keyword in zip(devices, arguments, keywords, strict=True)
            ]
            for start, each in zip(starts, streams, strict=True):
                start(each)

    def _by_rank(self, value: Any) -> Sequence[Any]:
        """An argument of each of this process's ranks."""
        if isinstance(value, list):
            if len(value) != len(self.ranks):
                message = f"a list of {len(value)} arguments for the {len(self.ranks)} ranks of this process"
                raise ArgumentError(message, hint="give one for each rank; write a compile-time sequence as a tuple")
            return [self._by_rank(own)[i] if isinstance(own, SymmetricTensor) else own for i, own in enumerate(value)]
        if not isinstance(value, SymmetricTensor):
            return [value] * len(self.ranks)
        if value.heap is not self:
            raise ArgumentError(f"{value!r} is a tensor of another world", hint="make it with this one")
        return value.arrays if self.devices[0] == "cpu" else value.bound

    def __repr__(self) -> str:
        return f"<world of {self.size} ranks: {', '.join(self.devices)}>"


def gpu_memory(device: int | str) -> GpuMemory:
    """The memory of a GPU by name ("hip:1") or as the ordinal of a CUDA device. DeviceError if there is none."""
    name = f"cuda:{device}" if isinstance(device, int) else device
    opened = open_device(name)
    if name.startswith("cuda"):
        from tilewright.runtime.gpu_memory import CudaMemory

        return CudaMemory(cast("CudaDevice", opened))
    if name.startswith("hip"):
        from tilewright.runtime.hip_memory import HipMemory

        return HipMemory(cast("HipDevice", opened))
    raise DeviceError(f"{name} has no memory that other GPUs reach: use cuda:N, hip:N or an emulated world.")


__all__ = ["World"]
