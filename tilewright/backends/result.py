"""What a backend gives back for one kernel."""

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


@dataclass(frozen=True)
class BackendResult:
    """A compiled kernel: texts by kind ("mlir", "llvm", "ptx" or "amdgcn"), the binary, and how to launch it."""

    binary: bytes
    abi: KernelABI
    resources: Resources
    asm: Mapping[str, str] = field(default_factory=dict)
