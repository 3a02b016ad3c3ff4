"""The backend of a target: scheduled Tile IR to one binary with an entry for each function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilewright.backends.result import BackendResult
from tilewright.ir.core import Function, Module
from tilewright.ir.target import Target, get_target


def compile_module(module: Module, target: Target) -> BackendResult:
    """Compile all functions of a module. Raises `IRError` or `BackendError`; LLVM may end the process."""
    return _backend(target)(module.functions, target)


def preload(target: str) -> None:
    """Import what compiling for a target needs, ahead of the first request."""
    _backend(get_target(target))


def _backend(target: Target) -> Callable[[Sequence[Function], Target], BackendResult]:
    if target.vendor == "nvidia":
        from tilewright.backends.nvidia.compile import compile_functions
    else:
        from tilewright.backends.amd.compile import compile_functions
    return compile_functions
