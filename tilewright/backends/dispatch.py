"""The backend of a target: scheduled Tile IR to one binary with an entry for each function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tilewright.backends.result import BackendResult, Resources
from tilewright.ir.abi import KernelABI
from tilewright.ir.core import Module
from tilewright.ir.target import Target


@dataclass(frozen=True)
class CompiledModule:
    """A binary, its entries in the order of the module's functions, and texts by kind."""

    binary: bytes
    entries: tuple[tuple[KernelABI, Resources], ...]
    asm: Mapping[str, str] = field(default_factory=dict)


def compile_module(module: Module, target: Target) -> CompiledModule:
    """Compile all functions of a module. Raises `IRError` or `BackendError`; LLVM may end the process."""
    if target.vendor == "nvidia":
        from tilewright.backends.nvidia.compile import compile_function
    else:
        from tilewright.backends.amd.compile import compile_function
    results: list[BackendResult] = [compile_function(f, target) for f in module.functions]
    first = results[0]
    return CompiledModule(first.binary, tuple((r.abi, r.resources) for r in results), first.asm)


def preload() -> None:
    """Import what compiling needs, ahead of the first request."""
    import tilewright.backends.amd.compile
    import tilewright.backends.nvidia.compile
    import tilewright.ir.parser  # noqa: F401
