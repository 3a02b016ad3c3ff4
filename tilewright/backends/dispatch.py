"""The backend of a target: scheduled Tile IR to one binary with an entry for each function."""

from __future__ import annotations

from tilewright.backends.result import BackendResult
from tilewright.ir.core import Module
from tilewright.ir.target import Target


def compile_module(module: Module, target: Target) -> BackendResult:
    """Compile all functions of a module. Raises `IRError` or `BackendError`; LLVM may end the process."""
    if target.vendor == "nvidia":
        from tilewright.backends.nvidia.compile import compile_functions
    else:
        from tilewright.backends.amd.compile import compile_functions
    return compile_functions(module.functions, target)


def preload() -> None:
    """Import what compiling needs, ahead of the first request."""
    import tilewright.backends.amd.compile
    import tilewright.backends.nvidia.compile
    import tilewright.ir.parser  # noqa: F401
