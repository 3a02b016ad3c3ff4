"""Kernels to an HSACO: scheduled Tile IR -> MLIR -> LLVM IR -> object -> our linker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tilewright.backends.amd.buffers import check_extents
from tilewright.backends.amd.codeobject import KernelInfo, read_code_object
from tilewright.backends.amd.link import link
from tilewright.backends.amd.mfma import MFMA_LOWERINGS
from tilewright.backends.amd.registers import function_attributes
from tilewright.backends.amd.target_ops import AmdOps
from tilewright.backends.llvm import TargetMachineSpec, emit_assembly, emit_object, merge, optimize
from tilewright.backends.lower import LOWERINGS, Handler, KernelEntry, Table, declare_kernel, start_lowering
from tilewright.backends.result import BackendResult, Resources
from tilewright.ir.core import Function, Operation
from tilewright.ir.target import Target

AMD_LOWERINGS: Table = {**LOWERINGS, **MFMA_LOWERINGS}


def lower_function(
    function: Function,
    target: Target,
    *,
    kernel_name: str | None = None,
    table: Mapping[type[Operation], Handler] = AMD_LOWERINGS,
) -> KernelEntry:
    """The kernel in MLIR. Raises `IRError` at the operation that cannot be lowered."""
    entry = declare_kernel(function, target, kernel_name, llvm_attributes=function_attributes(function, target))
    lowering = start_lowering(entry, function, target, AmdOps(target), table)
    with lowering.in_scope(0, entry.abi.threads // target.warp_size):
        check_extents(lowering, function)
        lowering.lower_block(function.body.block)
    entry.fb.ret()
    return entry


def compile_functions(functions: Sequence[Function], target: Target) -> BackendResult:
    """Compile to one HSACO. Raises `IRError` or `BackendError`; LLVM may end the process, so run it in a worker."""
    entries = [lower_function(function, target) for function in functions]
    spec = TargetMachineSpec(target.triple, target.cpu, target.llvm_features)
    merged = merge([optimize(entry.module.finish(debug_info=True), spec) for entry in entries])
    asm = {"llvm": merged.text(), "amdgcn": emit_assembly(merged)}
    binary = link(emit_object(merged))
    kernels = read_code_object(binary).kernels
    return BackendResult(binary, tuple((e.abi, _resources(kernels[e.abi.name])) for e in entries), asm)


def compile_function(function: Function, target: Target) -> BackendResult:
    """`compile_functions` of one."""
    return compile_functions([function], target)


def _resources(info: KernelInfo) -> Resources:
    return Resources(
        registers=info.vgprs,
        shared_bytes=info.lds_bytes,
        spill_stores=info.vgpr_spills,
        stack_bytes=info.scratch_bytes,
        accumulation_registers=info.agprs,
        scalar_registers=info.sgprs,
    )
