"""Loaded kernels of emulated devices: what differs between executing AMD assembly and PTX."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tilewright.ir.abi import KernelABI, TensorMapParam, TensorParam
from tilewright.ir.target import get_target
from tilewright.runtime.arguments import TensorView, canonical_dtype
from tilewright.runtime.emulator.together import Machine
from tilewright.runtime.tensor_maps import ELEMENT_TYPES, tensor_map_geometry

if TYPE_CHECKING:
    from tilewright.runtime.emulator.memory import GlobalMemory
    from tilewright.runtime.emulator.races import Races
    from tilewright.runtime.emulator.together import Setting


class EmulatedFunction(ABC):
    """One kernel, decoded."""

    @abstractmethod
    def start(
        self, memory: GlobalMemory, blocks: tuple[int, int, int], abi: KernelABI, arguments: bytes, setting: Setting
    ) -> Machine:
        """The launch in progress, for `run_together`."""

    @abstractmethod
    def races(self) -> Races:
        """A new race detector, good for this kernel and for those of its kind that need no more views of memory."""

    @abstractmethod
    def blocks_per_unit(self, abi: KernelABI) -> int:
        """How many blocks of this kernel one SM or CU holds at once."""

    def tensor_maps(self, abi: KernelABI, views: Sequence[TensorView], memory: GlobalMemory) -> list[bytes | int]:
        """The tensor maps that the kernel takes, or addresses of them; ``views`` have addresses in ``memory``."""
        return []


class AmdFunction(EmulatedFunction):
    """A kernel of AMD assembly, which the code object ``binary`` must agree with, if there is one."""

    def __init__(self, asm: str, name: str, target: str, binary: bytes = b"") -> None:
        from tilewright.runtime.emulator.amd import AmdEmulator
        from tilewright.runtime.emulator.amd.code_object import check_code_object

        self.emulator = AmdEmulator(asm, name, target)
        if binary:
            check_code_object(self.emulator.kernel, binary)
        self.shared_limit = get_target(target).shared_bytes

    def start(
        self, memory: GlobalMemory, blocks: tuple[int, int, int], abi: KernelABI, arguments: bytes, setting: Setting
    ) -> Machine:
        arguments = arguments.ljust(self.emulator.kernel.get("kernarg_size"), b"\0")
        return self.emulator.start(memory, blocks, (abi.threads,), arguments, setting)

    def races(self) -> Races:
        from tilewright.runtime.emulator.amd.ordering import new_races

        return new_races()

    def blocks_per_unit(self, abi: KernelABI) -> int:
        return max(1, min(2048 // abi.threads, self.shared_limit // max(abi.shared_bytes, 1)))


class PtxFunction(EmulatedFunction):
    """A kernel of PTX. Device prints go to standard output."""

    def __init__(self, asm: str, name: str) -> None:
        from tilewright.runtime.emulator.nvidia import PtxEmulator

        self.emulator = PtxEmulator(asm, name)

    def start(
        self, memory: GlobalMemory, blocks: tuple[int, int, int], abi: KernelABI, arguments: bytes, setting: Setting
    ) -> Machine:
        return self.emulator.start(memory, blocks, (abi.threads,), arguments, setting, shared_bytes=abi.shared_bytes)

    def races(self) -> Races:
        return self.emulator.races()

    def blocks_per_unit(self, abi: KernelABI) -> int:
        limit = get_target(self.emulator.kernel.target.split(",")[0]).shared_bytes
        return max(1, min(2048 // abi.threads, limit // max(abi.shared_bytes, 1)))

    def tensor_maps(self, abi: KernelABI, views: Sequence[TensorView], memory: GlobalMemory) -> list[bytes | int]:
        names = [p.name for p in abi.params if isinstance(p, TensorParam)]
        by_name = dict(zip(names, views, strict=True))
        maps: list[bytes | int] = []
        for param in abi.tensor_maps:
            view = by_name[param.param]
            if param.peers:
                assert view.symmetric is not None, "the view has been checked"
                of_ranks = [view._replace(address=address) for address in view.symmetric.addresses]
                maps.append(view.symmetric.endpoint.place(b"".join(_tensor_map(param, v, memory) for v in of_ranks)))
            else:
                maps.append(_tensor_map(param, view, memory))
        return maps


def _tensor_map(param: TensorMapParam, view: TensorView, memory: GlobalMemory) -> bytes:
    from tilewright.runtime.emulator.nvidia import encode_tensor_map

    geometry = tensor_map_geometry(param, view)
    address = memory.allocate(np.zeros(16, np.uint8), "spare cell") if 0 in view.shape else view.address
    element = ELEMENT_TYPES[canonical_dtype(view.dtype)]
    return bytes(encode_tensor_map(element, address, geometry.dims, geometry.strides, geometry.box, param.swizzle))
