"""Kernels to a cubin: scheduled Tile IR -> MLIR -> LLVM IR -> PTX -> ptxas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tilewright.backends.llvm import TargetMachineSpec, emit_assembly, merge, optimize
from tilewright.backends.lower import Handler, KernelEntry, block_threads, declare_kernel, start_lowering
from tilewright.backends.nvidia import ptxas
from tilewright.backends.nvidia.lowerings import NVIDIA_LOWERINGS, PINNED_LOWERINGS
from tilewright.backends.nvidia.ptxas import Assembled, assemble
from tilewright.backends.nvidia.roles import check_registers
from tilewright.backends.nvidia.target_ops import NvidiaOps
from tilewright.backends.nvidia.tma import plan_tensor_maps
from tilewright.backends.result import BackendResult, Resources
from tilewright.ir.abi import KernelABI
from tilewright.ir.core import Function, Operation
from tilewright.ir.target import Target


def lower_function(
    function: Function,
    target: Target,
    *,
    kernel_name: str | None = None,
    table: Mapping[type[Operation], Handler] = NVIDIA_LOWERINGS,
) -> KernelEntry:
    """The kernel in MLIR. Raises `IRError` at the operation that cannot be lowered."""
    warps = block_threads(function, target) // target.warp_size
    entry = declare_kernel(function, target, kernel_name, plan_tensor_maps(function, warps))
    lowering = start_lowering(entry, function, target, NvidiaOps(target), table)
    with lowering.in_scope(0, warps):
        lowering.lower_block(function.body.block)
    entry.fb.ret()
    return entry


def compile_functions(functions: Sequence[Function], target: Target) -> BackendResult:
    """Compile to one cubin. Raises `IRError` or `BackendError`; LLVM may end the process, so run it in a worker."""
    entries, asm, assembled = _assembled(functions, target, NVIDIA_LOWERINGS)
    if assembled.advisories:
        entries, asm, assembled = _assembled(functions, target, PINNED_LOWERINGS)
    for function, entry in zip(functions, entries, strict=True):
        check_registers(function, assembled.resources[entry.abi.name].registers)
    used = [(e.abi, _resources(assembled.resources[e.abi.name], e.abi)) for e in entries]
    return BackendResult(assembled.cubin, tuple(used), asm, assembled.advisories)


def _assembled(
    functions: Sequence[Function], target: Target, table: Mapping[type[Operation], Handler]
) -> tuple[list[KernelEntry], dict[str, str], Assembled]:
    entries = [lower_function(function, target, table=table) for function in functions]
    spec = TargetMachineSpec(target.triple, target.cpu, target.llvm_features)
    merged = merge([optimize(entry.module.finish(debug_info=True), spec) for entry in entries])
    asm = {"llvm": merged.text(), "ptx": emit_assembly(merged)}
    return entries, asm, assemble(_without_lines(asm["ptx"]), target.cpu)


def _without_lines(ptx: str) -> str:
    """The text without ``.loc`` and ``.file``, for which ptxas would put tables and the text itself into the cubin.

    Lines keep their numbers. In the artifact's text they stay: emulated devices name them in faults.
    """
    return re.sub(r"^[ \t]*\.(loc|file)\b.*$", "", ptx, flags=re.MULTILINE)


def compile_function(function: Function, target: Target) -> BackendResult:
    """`compile_functions` of one."""
    return compile_functions([function], target)


def _resources(used: ptxas.Resources, abi: KernelABI) -> Resources:
    return Resources(
        registers=used.registers,
        shared_bytes=used.shared_bytes + abi.shared_bytes,
        spill_stores=used.spill_stores,
        spill_loads=used.spill_loads,
        stack_bytes=used.stack_bytes,
        barriers=used.barriers,
    )
