"""Compile programs for CDNA and run them on the emulator: what several tests use."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.backends.amd.compile import compile_function
from tilewright.backends.result import BackendResult
from tilewright.compiler.kernel import Kernel
from tilewright.frontend.build import build_module
from tilewright.ir.abi import TensorParam
from tilewright.ir.core import Function, Module
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.passes.manager import PassContext, PassManager, PassOptions
from tilewright.passes.pipelines import default_pipeline
from tilewright.runtime.emulator.amd import AmdEmulator, GlobalMemory, LaunchStatistics

NUMPY = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "i8": np.int8,
    "i32": np.int32,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
}
ROW_MAJOR, COLUMN_MAJOR = (None, 1), (1, None)


def matrix(dtype: str = "bf16", strides: tuple[int | None, ...] = ROW_MAJOR, align: int = 16) -> ViewType:
    """A matrix of dynamic shape."""
    return ViewType((None, None), DTYPES[dtype], strides, align)


def module_of(kernel: Kernel, **args: Any) -> Module:
    return build_module(kernel.definition, args)


def scheduled(module: Module, target: str, **options: int) -> Function:
    """The only function after the target's passes."""
    context = PassContext(get_target(target), PassOptions(**options))
    return PassManager(default_pipeline(context.target), context).run(module).functions[0]


def compiled(function: Function, target: str) -> BackendResult:
    return compile_function(function, get_target(target))


def emulate(
    result: BackendResult, target: str, arrays: Sequence[np.ndarray], grid: tuple[int, ...]
) -> LaunchStatistics:
    """Run on the emulator; the arrays are tensors in the kernel's order and are changed in place.

    A tensor of Fortran order is passed as it lies in memory, with its strides.
    """
    memory, packed, homes = GlobalMemory(), b"", []

    def append(code: str, value: int) -> None:
        nonlocal packed
        size = struct.calcsize(code)
        packed += bytes(-len(packed) % size) + struct.pack(code, value)

    for param, array in zip(result.abi.params, arrays, strict=True):
        assert isinstance(param, TensorParam)
        stored = array if array.flags.c_contiguous else array.T
        homes.append((stored, memory.allocate(stored, param.name)))
        append("<Q", homes[-1][1])
        for size, known in zip(array.shape, param.shape, strict=True):
            if known is None:
                append("<i", size)
        for stride, known in zip(array.strides, param.strides, strict=True):
            if known is None:
                append("<q", stride // array.itemsize)
    full = (*grid, 1, 1, 1)[:3]
    for size in full:
        append("<i", size)
    emulator = AmdEmulator(result.asm["amdgcn"], result.abi.name, target)
    statistics = emulator.launch(memory, full, (result.abi.threads,), packed)
    for stored, address in homes:
        stored[...] = memory.read_back(address)
    return statistics


def normal(*shape: int, dtype: str = "bf16", seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(NUMPY[dtype])
