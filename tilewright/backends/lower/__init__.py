"""Shared lowering: scheduled Tile IR to MLIR's LLVM dialect, for both GPU backends. Importing it fills `LOWERINGS`."""

from tilewright.backends.lower import control, convert, memory, reduce, reshape, scalars, shared, views
from tilewright.backends.lower.context import (
    LOWERINGS,
    BufferRef,
    Handler,
    Lowering,
    Registers,
    SlotRef,
    Table,
    ThreadScope,
    TokenRef,
    ViewRef,
    lowers,
)
from tilewright.backends.lower.entry import KernelEntry, block_threads, declare_kernel, start_lowering
from tilewright.backends.lower.target_ops import TargetOps

__all__ = [
    "LOWERINGS",
    "BufferRef",
    "Handler",
    "KernelEntry",
    "Lowering",
    "Registers",
    "SlotRef",
    "Table",
    "TargetOps",
    "ThreadScope",
    "TokenRef",
    "ViewRef",
    "block_threads",
    "control",
    "convert",
    "declare_kernel",
    "lowers",
    "memory",
    "reduce",
    "reshape",
    "scalars",
    "shared",
    "start_lowering",
    "views",
]
