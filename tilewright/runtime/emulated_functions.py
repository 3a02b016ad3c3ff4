"""Loaded kernels of emulated devices: what differs between executing AMD assembly and PTX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.ir.abi import KernelABI, TensorParam
from tilewright.runtime.arguments import TensorView, canonical_dtype
from tilewright.runtime.tensor_maps import ELEMENT_TYPES, tensor_map_geometry

if TYPE_CHECKING:
    from tilewright.runtime.emulator.memory import GlobalMemory


class EmulatedFunction(ABC):
    """One kernel, decoded."""

    @abstractmethod
    def launch(self, memory: GlobalMemory, blocks: tuple[int, int, int], abi: KernelABI, arguments: bytes) -> Any:
        """Run to the end; statistics of what was executed. EmulatorError for faults."""

    def tensor_maps(self, abi: KernelABI, views: Sequence[TensorView], memory: GlobalMemory) -> list[bytes]:
        """The tensor maps that the kernel takes; ``views`` have addresses in ``memory``."""
        return []


class AmdFunction(EmulatedFunction):
    """A kernel of AMD assembly."""

    def __init__(self, asm: str, name: str, target: str) -> None:
        from tilewright.runtime.emulator.amd import AmdEmulator

        self.emulator = AmdEmulator(asm, name, target)

    def launch(self, memory: GlobalMemory, blocks: tuple[int, int, int], abi: KernelABI, arguments: bytes) -> Any:
        arguments = arguments.ljust(self.emulator.kernel.get("kernarg_size"), b"\0")
        return self.emulator.launch(memory, blocks, (abi.threads,), arguments)


class PtxFunction(EmulatedFunction):
    """A kernel of PTX. ``seed`` picks a random legal interleaving. Device prints go to standard output."""

    def __init__(self, asm: str, name: str, seed: int | None = None) -> None:
        from tilewright.runtime.emulator.nvidia import PtxEmulator

        self.emulator = PtxEmulator(asm, name)
        self.seed = seed

    def launch(self, memory: GlobalMemory, blocks: tuple[int, int, int], abi: KernelABI, arguments: bytes) -> Any:
        return self.emulator.launch(
            memory, blocks, (abi.threads,), arguments, shared_bytes=abi.shared_bytes, seed=self.seed
        )

    def tensor_maps(self, abi: KernelABI, views: Sequence[TensorView], memory: GlobalMemory) -> list[bytes]:
        from tilewright.runtime.emulator.nvidia import encode_tensor_map

        names = [p.name for p in abi.params if isinstance(p, TensorParam)]
        by_name = dict(zip(names, views, strict=True))
        maps = []
        for param in abi.tensor_maps:
            view = by_name[param.param]
            geometry = tensor_map_geometry(param, view)
            address = memory.allocate(np.zeros(16, np.uint8), "spare cell") if 0 in view.shape else view.address
            element = ELEMENT_TYPES[canonical_dtype(view.dtype)]
            maps.append(
                encode_tensor_map(element, address, geometry.dims, geometry.strides, geometry.box, param.swizzle)
            )
        return maps
