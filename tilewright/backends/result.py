"""What a backend gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tilewright.ir.abi import KernelABI


@dataclass(frozen=True)
class Resources:
    """What one kernel uses. Registers and the rest per thread; sizes are bytes. None: the target has no such thing."""

    registers: int
    shared_bytes: int
    spill_stores: int = 0
    spill_loads: int = 0
    stack_bytes: int = 0
    barriers: int | None = None
    #: AMD: accumulation registers among ``registers``, and scalar registers
    accumulation_registers: int | None = None
    scalar_registers: int | None = None

    @property
    def spills(self) -> int:
        """Spilled bytes (NVIDIA) or registers (AMD), stores and loads together."""
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class BackendResult:
    """A binary, its entries in the order of the functions, and texts by kind ("llvm", "ptx" or "amdgcn")."""

    binary: bytes
    entries: tuple[tuple[KernelABI, Resources], ...]
    asm: Mapping[str, str] = field(default_factory=dict)

    @property
    def abi(self) -> KernelABI:
        """How to launch the first entry."""
        return self.entries[0][0]

    @property
    def resources(self) -> Resources:
        """What the first entry uses."""
        return self.entries[0][1]
