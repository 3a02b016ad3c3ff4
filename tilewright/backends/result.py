"""What a backend gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tilewright.ir.abi import KernelABI
from tilewright.ir.resources import Resources

__all__ = ["BackendResult", "Resources"]


@dataclass(frozen=True)
class BackendResult:
    """A binary, its entries in the order of the functions, and texts by kind ("llvm", "ptx" or "amdgcn").

    ``advisories``: what the assembler says will make it slow.
    """

    binary: bytes
    entries: tuple[tuple[KernelABI, Resources], ...]
    asm: Mapping[str, str] = field(default_factory=dict)
    advisories: tuple[str, ...] = ()

    @property
    def abi(self) -> KernelABI:
        """How to launch the first entry."""
        return self.entries[0][0]

    @property
    def resources(self) -> Resources:
        """What the first entry uses."""
        return self.entries[0][1]
