"""Helpers of the AMD emulator's tests: compile LLVM IR, wrap assembly into a kernel, launch it."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np

from tilewright.runtime.emulator.amd import AmdEmulator, GlobalMemory
from tilewright.runtime.emulator.amd.state import LANES

ARCHS = ("gfx942", "gfx950")
LANE = np.arange(LANES)

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

PRELUDE = """
target triple = "amdgcn-amd-amdhsa"
declare i32 @llvm.amdgcn.workitem.id.x()
declare i32 @llvm.amdgcn.workgroup.id.x()
declare i32 @llvm.amdgcn.workgroup.id.y()
declare void @llvm.amdgcn.s.barrier()
declare float @llvm.exp2.f32(float)
declare i32 @llvm.amdgcn.update.dpp.i32(i32, i32, i32, i32, i32, i1)
declare i32 @llvm.amdgcn.ds.bpermute(i32, i32)
declare i32 @llvm.amdgcn.readlane.i32(i32, i32)
declare ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1), i16, i64, i32)
declare float @llvm.amdgcn.raw.ptr.buffer.load.f32(ptr addrspace(8), i32, i32, i32)
declare <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8), i32, i32, i32)
declare void @llvm.amdgcn.raw.ptr.buffer.store.f32(float, ptr addrspace(8), i32, i32, i32)
declare void @llvm.amdgcn.raw.ptr.buffer.load.lds(ptr addrspace(8), ptr addrspace(3), i32, i32, i32, i32, i32)
"""


def compile_ir(ir: str, arch: str, threads: int = 256, more: str = "") -> str:
    """LLVM IR -> assembly text; kernels carry attribute group #0, to which ``more`` adds attributes."""
    attributes = f'attributes #0 = {{ "amdgpu-flat-work-group-size"="{threads},{threads}" {more} }}\n'
    module = llvm.parse_assembly(PRELUDE + ir + attributes)
    module.verify()
    target = llvm.Target.from_triple("amdgcn-amd-amdhsa")
    machine = target.create_target_machine(cpu=arch, opt=3, reloc="pic")
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    text: str = machine.emit_assembly(module.clone())
    return text


def run(asm: str, arch: str, arguments: list[Any], grid: Any = 1, threads: int = 256, **options: Any) -> list[Any]:
    """Launch kernel k with arrays and scalars (NumPy values); the arrays afterwards."""
    memory = GlobalMemory()
    packed, addresses = b"", []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            addresses.append(memory.allocate(argument))
            value = np.uint64(addresses[-1])
        else:
            value = argument
        packed += bytes(-len(packed) % value.itemsize) + value.tobytes()
    grid = grid if isinstance(grid, tuple) else (grid,)
    AmdEmulator(asm, "k", arch).launch(memory, grid, (threads,), packed, **options)
    return [memory.read_back(address) for address in addresses]


def wrap(body: str, *, vgprs: int = 64, accum: int = 32, lds: int = 0, kernarg: int = 16, denormals: int = 3) -> str:
    """A kernel k around assembly lines; s[0:1] point to the arguments, s2 is the workgroup, v0 the item."""
    return f"""
k:
{body}
    s_endpgm
    .section .rodata
    .amdhsa_kernel k
        .amdhsa_group_segment_fixed_size {lds}
        .amdhsa_kernarg_size {kernarg}
        .amdhsa_user_sgpr_count 2
        .amdhsa_user_sgpr_kernarg_segment_ptr 1
        .amdhsa_system_sgpr_workgroup_id_x 1
        .amdhsa_next_free_vgpr {vgprs}
        .amdhsa_accum_offset {accum}
        .amdhsa_float_denorm_mode_32 {denormals}
    .end_amdhsa_kernel
"""


def snippet(body: str, inputs: list[np.ndarray], arch: str = "gfx942", outputs: int = 1, **options: Any) -> np.ndarray:
    """Run ``body`` on one wave: v1.. hold the uint32 inputs [64] each; v10.. are the outputs. -> [outputs, 64]."""
    data = np.zeros((max(len(inputs), 1), LANES), np.uint32)
    for row, value in enumerate(inputs):
        data[row] = np.broadcast_to(np.asarray(value), (LANES,)).view(np.uint32)
    lines = ["s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32_e32 v31, 2, v0", "s_waitcnt lgkmcnt(0)"]
    lines += [f"global_load_dword v{i + 1}, v31, s[4:5] offset:{256 * i}" for i in range(len(inputs))]
    lines += ["s_waitcnt vmcnt(0)", body, "s_waitcnt vmcnt(0) lgkmcnt(0)"]
    lines += [f"global_store_dword v31, v{10 + i}, s[6:7] offset:{256 * i}" for i in range(outputs)]
    arrays = [data, np.zeros((outputs, LANES), np.uint32)]
    result: np.ndarray = run(wrap("\n".join(lines), **options), arch, arrays, threads=64)[1]
    return result


def floats(*values: float) -> np.ndarray:
    return np.resize(np.array(values, np.float32), LANES).view(np.uint32)


def ints(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.int64), LANES).astype(np.uint32)


def elementwise(body: str, types: tuple[str, ...], result: str) -> str:
    """A kernel that computes %r from %x0, %x1 .. at each of 256 elements."""
    names = [f"ptr addrspace(1) %a{i}" for i in range(len(types))] + ["ptr addrspace(1) %c"]
    lines = [f"define amdgpu_kernel void @k({', '.join(names)}) #0 {{", "%t = call i32 @llvm.amdgcn.workitem.id.x()"]
    for i, kind in enumerate(types):
        lines += [f"%p{i} = getelementptr {kind}, ptr addrspace(1) %a{i}, i32 %t"]
        lines += [f"%x{i} = load {kind}, ptr addrspace(1) %p{i}"]
    lines += [body, f"%pc = getelementptr {result}, ptr addrspace(1) %c, i32 %t"]
    return "\n".join([*lines, f"store {result} %r, ptr addrspace(1) %pc", "ret void", "}", ""])
