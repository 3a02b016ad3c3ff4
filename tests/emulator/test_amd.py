"""The AMD emulator: kernels compiled by LLVM for gfx942 and gfx950, and snippets of assembly, against NumPy."""

from __future__ import annotations

import struct
from typing import Any

import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import pytest

from tilewright.runtime.emulator.amd import AmdEmulator, DecodeError, EmulatorFault, GlobalMemory
from tilewright.runtime.emulator.amd.state import LANES

ARCHS = ("gfx942", "gfx950")
LANE = np.arange(LANES)

PRELUDE = """
target triple = "amdgcn-amd-amdhsa"
declare i32 @llvm.amdgcn.workitem.id.x()
declare i32 @llvm.amdgcn.workgroup.id.x()
declare i32 @llvm.amdgcn.workgroup.id.y()
declare void @llvm.amdgcn.s.barrier()
declare float @llvm.exp2.f32(float)
declare float @llvm.maxnum.f32(float, float)
declare i32 @llvm.amdgcn.update.dpp.i32(i32, i32, i32, i32, i32, i1)
declare i32 @llvm.amdgcn.ds.bpermute(i32, i32)
declare i32 @llvm.amdgcn.readlane.i32(i32, i32)
declare ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1), i16, i64, i32)
declare float @llvm.amdgcn.raw.ptr.buffer.load.f32(ptr addrspace(8), i32, i32, i32)
declare <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8), i32, i32, i32)
declare void @llvm.amdgcn.raw.ptr.buffer.store.f32(float, ptr addrspace(8), i32, i32, i32)
declare void @llvm.amdgcn.raw.ptr.buffer.load.lds(ptr addrspace(8), ptr addrspace(3), i32, i32, i32, i32, i32)
"""


@pytest.fixture(scope="module", autouse=True)
def _targets() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def compile_ir(ir: str, arch: str, threads: int = 256) -> str:
    """LLVM IR -> assembly text; kernels carry attribute group #0."""
    attributes = f'attributes #0 = {{ "amdgpu-flat-work-group-size"="{threads},{threads}" }}\n'
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


def wrap(body: str, *, vgprs: int = 64, accum: int = 32, lds: int = 0, kernarg: int = 16) -> str:
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
    .end_amdhsa_kernel
"""


def snippet(body: str, inputs: list[np.ndarray], arch: str = "gfx942", outputs: int = 1, **options: Any) -> np.ndarray:
    """Run ``body`` on one wave: v1.. hold the uint32 inputs [64] each; v10.. are the outputs. -> [outputs, 64]."""
    data = np.zeros((max(len(inputs), 1), LANES), np.uint32)
    for row, value in enumerate(inputs):
        data[row] = np.broadcast_to(np.asarray(value), (LANES,)).view(np.uint32)
    lines = ["s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32_e32 v31, 2, v0"]
    lines += [f"global_load_dword v{i + 1}, v31, s[4:5] offset:{256 * i}" for i in range(len(inputs))]
    lines += ["s_waitcnt vmcnt(0)", body]
    lines += [f"global_store_dword v31, v{10 + i}, s[6:7] offset:{256 * i}" for i in range(outputs)]
    result = run(wrap("\n".join(lines), **options), arch, [data, np.zeros((outputs, LANES), np.uint32)], threads=64)[1]
    return result


def floats(*values: float) -> np.ndarray:
    return np.resize(np.array(values, np.float32), LANES).view(np.uint32)


def ints(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.int64), LANES).astype(np.uint32)


# ---- kernels compiled by LLVM -----------------------------------------------------------------------


VECTOR_ADD = """
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %b, ptr addrspace(1) %c, i32 %n) #0 {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %g = call i32 @llvm.amdgcn.workgroup.id.x()
  %base = mul i32 %g, 256
  %i = add i32 %base, %t
  %inside = icmp slt i32 %i, %n
  br i1 %inside, label %yes, label %no
yes:
  %pa = getelementptr float, ptr addrspace(1) %a, i32 %i
  %pb = getelementptr float, ptr addrspace(1) %b, i32 %i
  %pc = getelementptr float, ptr addrspace(1) %c, i32 %i
  %x = load float, ptr addrspace(1) %pa
  %y = load float, ptr addrspace(1) %pb
  %s = fadd float %x, %y
  store float %s, ptr addrspace(1) %pc
  ret void
no:
  ret void
}
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_vector_add_with_a_mask(arch: str) -> None:
    n = 1000
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=n).astype(np.float32) for _ in range(2))
    result = run(compile_ir(VECTOR_ADD, arch), arch, [a, b, np.full(1024, -1, np.float32), np.int32(n)], grid=4)[2]
    np.testing.assert_array_equal(result[:n], a + b)
    assert (result[n:] == -1).all()


def test_an_access_outside_its_array_names_instruction_line_and_wave() -> None:
    asm = compile_ir(VECTOR_ADD, "gfx942")
    a = np.ones(1000, np.float32)
    with pytest.raises(EmulatorFault, match="outside any allocation") as caught:
        run(asm, "gfx942", [a, a, a, np.int32(1001)], grid=4)
    assert caught.value.instruction.startswith("global_load_dword")
    assert asm.splitlines()[caught.value.line - 1].strip() == caught.value.instruction
    assert caught.value.wave == (3, 3)


REDUCE = """
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %c) #0 {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %g = call i32 @llvm.amdgcn.workgroup.id.x()
  %base = shl i32 %g, 6
  %i = add i32 %base, %t
  %pa = getelementptr float, ptr addrspace(1) %a, i32 %i
  %x = load float, ptr addrspace(1) %pa
  %s0 = fmul float %x, 0x3FF7154760000000
  %m = call float @allmax(float %s0)
  %d = fsub float %s0, %m
  %e = call float @llvm.exp2.f32(float %d)
  %s = call float @allsum(float %e)
  %q = fdiv float %e, %s
  %pc = getelementptr float, ptr addrspace(1) %c, i32 %i
  store float %q, ptr addrspace(1) %pc
  ret void
}
"""


def _lane_reduction(name: str, combine: str) -> str:
    """An all-lanes reduction: row_shr 1, 2, 4, 8, row_bcast 15 and 31, readlane 63."""
    lines = [f"define internal float @{name}(float %x) alwaysinline {{", "  %v0 = bitcast float %x to i32"]
    steps = [(0x111, 15), (0x112, 15), (0x114, 15), (0x118, 15), (0x142, 10), (0x143, 12)]
    for i, (control, rows) in enumerate(steps):
        neutral = "0" if name == "allsum" else "-8388608"  # 0xff800000 is -inf
        lines += [
            f"  %m{i} = call i32 @llvm.amdgcn.update.dpp.i32(i32 {neutral}, i32 %v{i}, "
            f"i32 {control}, i32 {rows}, i32 15, i1 false)",
            f"  %a{i} = bitcast i32 %v{i} to float",
            f"  %b{i} = bitcast i32 %m{i} to float",
            f"  %r{i} = {combine.format(a=f'%a{i}', b=f'%b{i}')}",
            f"  %v{i + 1} = bitcast float %r{i} to i32",
        ]
    lines += [
        "  %last = call i32 @llvm.amdgcn.readlane.i32(i32 %v6, i32 63)",
        "  %out = bitcast i32 %last to float",
        "  ret float %out",
        "}",
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("arch", ARCHS)
def test_softmax_with_dpp_reductions(arch: str) -> None:
    ir = REDUCE
    ir += _lane_reduction("allmax", "call float @llvm.maxnum.f32(float {a}, float {b})")
    ir += _lane_reduction("allsum", "fadd float {a}, {b}")
    asm = compile_ir(ir, arch, threads=64)
    assert "row_bcast:31" in asm
    x = (np.random.default_rng(1).normal(size=(8, 64)) * 4).astype(np.float32)
    result = run(asm, arch, [x, np.zeros_like(x)], grid=8, threads=64)[1]
    e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(result, e / e.sum(axis=1, keepdims=True), rtol=3e-6)


TRANSPOSE = """
@lds = internal addrspace(3) global [272 x float] poison
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %c) #0 {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %g = call i32 @llvm.amdgcn.workgroup.id.x()
  %base = shl i32 %g, 8
  %i = add i32 %base, %t
  %pa = getelementptr float, ptr addrspace(1) %a, i32 %i
  %x = load float, ptr addrspace(1) %pa
  %row = lshr i32 %t, 4
  %column = and i32 %t, 15
  %r17 = mul i32 %row, 17
  %in = add i32 %r17, %column
  %pin = getelementptr float, ptr addrspace(3) @lds, i32 %in
  store float %x, ptr addrspace(3) %pin
  fence syncscope("workgroup") release
  call void @llvm.amdgcn.s.barrier()
  fence syncscope("workgroup") acquire
  %c17 = mul i32 %column, 17
  %out = add i32 %c17, %row
  %pout = getelementptr float, ptr addrspace(3) @lds, i32 %out
  %y = load float, ptr addrspace(3) %pout
  %pc = getelementptr float, ptr addrspace(1) %c, i32 %i
  store float %y, ptr addrspace(1) %pc
  ret void
}
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_lds_transpose_with_a_barrier(arch: str) -> None:
    asm = compile_ir(TRANSPOSE, arch)
    assert "s_barrier" in asm
    x = np.arange(5 * 256, dtype=np.float32).reshape(5, 16, 16)
    result = run(asm, arch, [x, np.zeros_like(x)], grid=5, batch_waves=8)[1]
    np.testing.assert_array_equal(result, x.transpose(0, 2, 1))


COLLATZ = """
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %c) #0 {
entry:
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %pa = getelementptr i64, ptr addrspace(1) %a, i32 %t
  %x = load i64, ptr addrspace(1) %pa
  br label %loop
loop:
  %v = phi i64 [%x, %entry], [%next, %loop]
  %n = phi i32 [0, %entry], [%n1, %loop]
  %odd = and i64 %v, 1
  %isodd = icmp ne i64 %odd, 0
  %half = lshr i64 %v, 1
  %m = mul i64 %v, 3
  %m1 = add i64 %m, 1
  %next = select i1 %isodd, i64 %m1, i64 %half
  %n1 = add i32 %n, 1
  %end = icmp eq i64 %next, 1
  br i1 %end, label %out, label %loop
out:
  %pc = getelementptr i32, ptr addrspace(1) %c, i32 %t
  store i32 %n1, ptr addrspace(1) %pc
  ret void
}
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_loop_with_divergent_trip_counts(arch: str) -> None:
    x = np.arange(2, 258, dtype=np.int64) + (1 << 33)

    def steps(value: int) -> int:
        count = 0
        while value != 1:
            value = 3 * value + 1 if value & 1 else value >> 1
            count += 1
        return count

    result = run(compile_ir(COLLATZ, arch), arch, [x, np.zeros(256, np.int32)])[1]
    np.testing.assert_array_equal(result, [steps(int(v)) for v in x])


WAVE_LOOP = """
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %c) #0 {
entry:
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %w = lshr i32 %t, 6
  %first = call i32 @llvm.amdgcn.readfirstlane.i32(i32 %w)
  %trips = add i32 %first, 1
  br label %loop
loop:
  %i = phi i32 [0, %entry], [%i1, %loop]
  %s = phi float [0.0, %entry], [%s1, %loop]
  %p = getelementptr float, ptr addrspace(1) %a, i32 %i
  %x = load volatile float, ptr addrspace(1) %p
  %s1 = fadd float %s, %x
  %i1 = add i32 %i, 1
  %more = icmp slt i32 %i1, %trips
  br i1 %more, label %loop, label %out
out:
  %pc = getelementptr float, ptr addrspace(1) %c, i32 %t
  store float %s1, ptr addrspace(1) %pc
  ret void
}
declare i32 @llvm.amdgcn.readfirstlane.i32(i32)
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_waves_of_a_workgroup_diverge_in_scalar_control_flow(arch: str) -> None:
    a = np.arange(1, 5, dtype=np.float32)
    result = run(compile_ir(WAVE_LOOP, arch), arch, [a, np.zeros(256, np.float32)])[1]
    np.testing.assert_array_equal(result, np.repeat(np.cumsum(a), 64))


def _elementwise(body: str, types: tuple[str, ...], result: str) -> str:
    """A kernel that computes %r from %x0, %x1 .. at each of 256 elements."""
    names = [f"ptr addrspace(1) %a{i}" for i in range(len(types))] + ["ptr addrspace(1) %c"]
    lines = [f"define amdgpu_kernel void @k({', '.join(names)}) #0 {{", "%t = call i32 @llvm.amdgcn.workitem.id.x()"]
    for i, kind in enumerate(types):
        lines += [f"%p{i} = getelementptr {kind}, ptr addrspace(1) %a{i}, i32 %t"]
        lines += [f"%x{i} = load {kind}, ptr addrspace(1) %p{i}"]
    lines += [body, f"%pc = getelementptr {result}, ptr addrspace(1) %c, i32 %t"]
    return "\n".join([*lines, f"store {result} %r, ptr addrspace(1) %pc", "ret void", "}", ""])


INTEGER_CASES = {
    "sdiv i32": (np.int32, lambda a, b: np.trunc(a.astype(np.float64) / b)),
    "urem i32": (np.uint32, lambda a, b: a % b),
    "sdiv i64": (np.int64, lambda a, b: np.array([int(x) // int(y) if (x < 0) == (y < 0) else -(-int(x) // int(y))
                                                  if x < 0 else -(int(x) // -int(y)) for x, y in zip(a, b)])),
    "urem i64": (np.uint64, lambda a, b: a % b),
    "udiv i16": (np.uint16, lambda a, b: a // b),
    "sdiv i8": (np.int8, lambda a, b: np.trunc(a / b.astype(np.float64))),
    "mul i64": (np.int64, lambda a, b: a * b),
    "sub i64": (np.int64, lambda a, b: a - b),
    "lshr i64": (np.uint64, lambda a, b: a >> (b & np.uint64(63))),
    "ashr i32": (np.int32, lambda a, b: a >> (b & 31)),
    "xor i64": (np.int64, lambda a, b: a ^ b),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", INTEGER_CASES)
def test_integer_arithmetic(case: str, arch: str) -> None:
    dtype, reference = INTEGER_CASES[case]
    operation, kind = case.split()
    rng = np.random.default_rng(3)
    info = np.iinfo(dtype)
    a = rng.integers(info.min, info.max, 256, dtype=dtype, endpoint=True)
    b = rng.integers(info.min, info.max, 256, dtype=dtype, endpoint=True)
    b[::3] = b[::3] % 17 + 1
    b[b == 0] = 3
    b[(b == -1) if info.min < 0 else (b == 0)] = 5
    body = f"%r = {operation} {kind} %x0, %x1"
    if "shr" in operation:
        body = f"%m = and {kind} %x1, {8 * np.dtype(dtype).itemsize - 1}\n%r = {operation} {kind} %x0, %m"
    result = run(compile_ir(_elementwise(body, (kind, kind), kind), arch), arch, [a, b, np.zeros(256, dtype)])[2]
    np.testing.assert_array_equal(result, reference(a, b).astype(dtype))


def test_integer_division_is_exact_at_the_edges() -> None:
    a = np.array([0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 123456789], np.uint32)
    x, y = (np.resize(v, 256) for v in np.meshgrid(a, np.maximum(a, 1)))
    asm = compile_ir(_elementwise("%r = udiv i32 %x0, %x1", ("i32", "i32"), "i32"), "gfx942")
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    np.testing.assert_array_equal(run(asm, "gfx942", [x, y, np.zeros(256, np.uint32)])[2], x // y)


FLOAT_CASES: dict[str, tuple[str, str, Any]] = {
    "fdiv f32": ("float", "%r = fdiv float %x0, %x1", lambda a, b: a / b),
    "fdiv f64": ("double", "%r = fdiv double %x0, %x1", lambda a, b: a / b),
    "fdiv f16": ("half", "%r = fdiv half %x0, %x1", lambda a, b: (a.astype(np.float32) / b).astype(np.float16)),
    "sqrt f32": ("float", "%q = fmul float %x0, %x0\n%r = call float @llvm.sqrt.f32(float %q)",
                 lambda a, b: np.sqrt(a * a)),
    "fma f32": ("float", "%r = call float @llvm.fma.f32(float %x0, float %x1, float %x0)",
                lambda a, b: (a.astype(np.longdouble) * b + a).astype(np.float32)),
    "fma f64": ("double", "%r = call double @llvm.fma.f64(double %x0, double %x1, double 1.0)",
                lambda a, b: (a.astype(np.longdouble) * b + 1).astype(np.float64)),
    "floor f32": ("float", "%r = call float @llvm.floor.f32(float %x0)", lambda a, b: np.floor(a)),
    "select f32": ("float", "%g = fcmp ogt float %x0, %x1\n%r = select i1 %g, float %x0, float %x1", np.maximum),
    "abs f32": ("float", "%n = call float @llvm.fabs.f32(float %x0)\n%m = fneg float %x1\n%r = fadd float %n, %m",
                lambda a, b: np.abs(a) - b),
    "mul f16": ("half", "%r = fmul half %x0, %x1", lambda a, b: a * b),
    "max f16": ("half", "%g = fcmp ogt half %x0, %x1\n%r = select i1 %g, half %x0, half %x1", np.maximum),
}  # fmt: skip
FLOAT_DECLARATIONS = """
declare float @llvm.sqrt.f32(float)
declare float @llvm.fma.f32(float, float, float)
declare double @llvm.fma.f64(double, double, double)
declare float @llvm.floor.f32(float)
declare float @llvm.fabs.f32(float)
"""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", FLOAT_CASES)
def test_float_arithmetic_is_correctly_rounded(case: str, arch: str) -> None:
    kind, body, reference = FLOAT_CASES[case]
    dtype = {"float": np.float32, "double": np.float64, "half": np.float16}[kind]
    rng = np.random.default_rng(4)
    a, b = (rng.normal(size=256) * 10.0 ** rng.integers(-2, 3, 256) for _ in range(2))
    a, b = a.astype(dtype), b.astype(dtype)
    asm = compile_ir(_elementwise(body, (kind, kind), kind) + FLOAT_DECLARATIONS, arch)
    result = run(asm, arch, [a, b, np.zeros(256, dtype)])[2]
    np.testing.assert_array_max_ulp(result, reference(a, b).astype(dtype), 1 if case == "fma f64" else 0)


def test_division_with_extreme_operands() -> None:
    with np.errstate(all="ignore"):
        values = np.array([0, -0.0, 1, -3, np.inf, -np.inf, np.nan, 1e-40, 3e38, -2e-38, 1e-30, 7e25], np.float32)
        a, b = (np.resize(v, 256) for v in np.meshgrid(values, values))
        asm = compile_ir(_elementwise("%r = fdiv float %x0, %x1", ("float", "float"), "float"), "gfx942")
        result = run(asm, "gfx942", [np.ascontiguousarray(a), np.ascontiguousarray(b), np.zeros(256, np.float32)])[2]
        np.testing.assert_array_equal(result, a / b)


CAST_CASES = {
    "fptosi float i32": (np.float32, np.int32),
    "fptoui float i32": (np.float32, np.uint32),
    "sitofp i32 float": (np.int32, np.float32),
    "uitofp i32 float": (np.uint32, np.float32),
    "sitofp i64 float": (np.int64, np.float32),
    "uitofp i64 double": (np.uint64, np.float64),
    "fptosi double i64": (np.float64, np.int64),
    "fpext half float": (np.float16, np.float32),
    "fptrunc float half": (np.float32, np.float16),
    "fptrunc double float": (np.float64, np.float32),
    "fptrunc float bfloat": (np.float32, ml_dtypes.bfloat16),
    "fpext bfloat float": (ml_dtypes.bfloat16, np.float32),
    "sext i8 i32": (np.int8, np.int32),
    "zext i16 i64": (np.uint16, np.int64),
    "trunc i64 i8": (np.int64, np.int8),
    "sitofp i8 half": (np.int8, np.float16),
    "uitofp i8 float": (np.uint8, np.float32),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CAST_CASES)
def test_casts(case: str, arch: str) -> None:
    operation, source, target = case.split()
    from_dtype, to_dtype = CAST_CASES[case]
    rng = np.random.default_rng(5)
    if np.dtype(from_dtype).kind in "iu":
        info = np.iinfo(from_dtype)
        x = rng.integers(info.min, info.max, 256, dtype=from_dtype, endpoint=True)
        x[::4] = x[::4] & 0x7F
    else:
        x = (rng.normal(size=256) * 1000).astype(from_dtype)
        x = np.abs(x) if "ui" in operation else x
    asm = compile_ir(_elementwise(f"%r = {operation} {source} %x0 to {target}", (source,), target), arch)
    result = run(asm, arch, [x, np.zeros(256, to_dtype)])[1]
    np.testing.assert_array_equal(result, x.astype(to_dtype))


BUFFER = """
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %c, i32 %bytes, i32 %outbytes) #0 {
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %size = zext i32 %bytes to i64
  %outsize = zext i32 %outbytes to i64
  %ra = call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %a, i16 0, i64 %size, i32 159744)
  %rc = call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %c, i16 0, i64 %outsize, i32 159744)
  %off = shl i32 %t, 2
  %x = call float @llvm.amdgcn.raw.ptr.buffer.load.f32(ptr addrspace(8) %ra, i32 %off, i32 0, i32 0)
  %y = fadd float %x, 1.0
  call void @llvm.amdgcn.raw.ptr.buffer.store.f32(float %y, ptr addrspace(8) %rc, i32 %off, i32 0, i32 0)
  ret void
}
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_buffers_read_zero_and_drop_stores_out_of_range(arch: str) -> None:
    a, c = np.arange(100, dtype=np.float32), np.full(256, -7, np.float32)
    result = run(compile_ir(BUFFER, arch), arch, [a, c, np.int32(400), np.int32(800)])[1]
    np.testing.assert_array_equal(result[:100], a + 1)
    np.testing.assert_array_equal(result[100:200], 1)
    np.testing.assert_array_equal(result[200:], -7)


def test_a_descriptor_larger_than_its_array_faults() -> None:
    a, c = np.arange(100, dtype=np.float32), np.zeros(256, np.float32)
    with pytest.raises(EmulatorFault, match="outside any allocation"):
        run(compile_ir(BUFFER, "gfx942"), "gfx942", [a, c, np.int32(1024), np.int32(1024)])


# ---- matrix instructions ---------------------------------------------------------------------------


def _to_bits(x: np.ndarray, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(x.astype(dtype))


def _fragments(matrix: np.ndarray, items: int) -> np.ndarray:
    """[blocks, rows, K] -> what each lane holds, [64, items] (ISA chapter 7)."""
    blocks, rows, k = matrix.shape
    out = np.zeros((64, items), matrix.dtype)
    for b in range(blocks):
        for row in range(rows):
            for kk in range(k):
                out[row + rows * (b + blocks * (kk // items)), kk % items] = matrix[b, row, kk]
    return out


def _unpack(lanes: np.ndarray, m: int, blocks: int, double: bool) -> np.ndarray:
    """[64, items] of D -> [blocks, M, N], by the formulas of the ISA's own tables."""
    out = np.zeros((blocks, m, m), lanes.dtype)
    for lane in range(64):
        for item in range(lanes.shape[1]):
            if m == 32:
                b, i, j = item // 16, 8 * (item % 16 // 4) + 4 * (lane // 32) + item % 4, lane % 32
            elif m == 16 and double:
                b, i, j = 0, 4 * item + lane // 16, lane % 16
            elif m == 16:
                b, i, j = item // 4, 4 * (lane // 16) + item % 4, lane % 16
            else:
                b, i, j = lane // 4, item, lane % 4
            out[b, i, j] = lanes[lane, item]
    return out


# intrinsic: (M, K, blocks, NumPy type of the elements, LLVM type of a fragment, architectures)
BF16, F16, FNUZ, OCP = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e4m3fn
MFMA_CASES: dict[str, tuple[int, int, int, Any, str, tuple[str, ...]]] = {
    "f32.32x32x8f16": (32, 8, 1, F16, "<4 x half>", ARCHS),
    "f32.16x16x16f16": (16, 16, 1, F16, "<4 x half>", ARCHS),
    "f32.32x32x8bf16.1k": (32, 8, 1, BF16, "<4 x i16>", ARCHS),
    "f32.16x16x16bf16.1k": (16, 16, 1, BF16, "<4 x i16>", ARCHS),
    "f32.32x32x16.f16": (32, 16, 1, F16, "<8 x half>", ("gfx950",)),
    "f32.16x16x32.f16": (16, 32, 1, F16, "<8 x half>", ("gfx950",)),
    "f32.32x32x16.bf16": (32, 16, 1, BF16, "<8 x bfloat>", ("gfx950",)),
    "f32.16x16x32.bf16": (16, 32, 1, BF16, "<8 x bfloat>", ("gfx950",)),
    "f32.4x4x4f16": (4, 4, 16, F16, "<4 x half>", ARCHS),
    "f32.32x32x4f16": (32, 4, 2, F16, "<4 x half>", ARCHS),
    "f32.16x16x4bf16.1k": (16, 4, 4, BF16, "<4 x i16>", ARCHS),
    "f32.32x32x2f32": (32, 2, 1, np.float32, "float", ARCHS),
    "f32.16x16x4f32": (16, 4, 1, np.float32, "float", ARCHS),
    "f64.16x16x4f64": (16, 4, 1, np.float64, "double", ARCHS),
    "f32.16x16x32.fp8.fp8": (16, 32, 1, None, "i64", ARCHS),
    "f32.32x32x16.fp8.fp8": (32, 16, 1, None, "i64", ARCHS),
    "i32.16x16x32.i8": (16, 32, 1, np.int8, "i64", ARCHS),
    "i32.32x32x16.i8": (32, 16, 1, np.int8, "i64", ARCHS),
    "i32.16x16x64.i8": (16, 64, 1, np.int8, "<4 x i32>", ("gfx950",)),
}


@pytest.mark.parametrize(("name", "arch"), [(n, a) for n, case in MFMA_CASES.items() for a in case[5]])
def test_mfma(name: str, arch: str) -> None:
    m, k, blocks, dtype, fragment, _ = MFMA_CASES[name]
    dtype = dtype or (FNUZ if arch == "gfx942" else OCP)
    result_name = name.split(".")[0]
    element, result_dtype = {"f32": ("float", np.float32), "i32": ("i32", np.int32), "f64": ("double", np.float64)}[
        result_name
    ]
    count = m * m * blocks // 64
    vector = f"<{count} x {element}>"
    call = f"@llvm.amdgcn.mfma.{name}"
    ir = f"""
declare {vector} {call}({fragment}, {fragment}, {vector}, i32, i32, i32)
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %b, ptr addrspace(1) %c) #0 {{
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %pa = getelementptr {fragment}, ptr addrspace(1) %a, i32 %t
  %pb = getelementptr {fragment}, ptr addrspace(1) %b, i32 %t
  %pc = getelementptr {vector}, ptr addrspace(1) %c, i32 %t
  %x = load {fragment}, ptr addrspace(1) %pa
  %y = load {fragment}, ptr addrspace(1) %pb
  %z = load {vector}, ptr addrspace(1) %pc
  %r = call {vector} {call}({fragment} %x, {fragment} %y, {vector} %z, i32 0, i32 0, i32 0)
  store {vector} %r, ptr addrspace(1) %pc
  ret void
}}
"""
    rng = np.random.default_rng(6)
    shape = (blocks, m, k)
    if dtype == np.int8:
        a, b = (rng.integers(-128, 128, shape).astype(np.int8) for _ in range(2))
    else:
        a, b = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    c = np.arange(64 * count).reshape(64, count).astype(result_dtype) / result_dtype(4)
    c = c.astype(result_dtype)
    items = m * k * blocks // 64
    after = run(
        compile_ir(ir, arch, 64), arch, [_fragments(a, items), _fragments(b, items), np.ascontiguousarray(c)], threads=64
    )[2]
    expected = a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2) + _unpack(c, m, blocks, element == "double")
    result = _unpack(after, m, blocks, element == "double")
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


def _gemm_ir(lds_dma: bool) -> str:
    """C[M,N] f32 = A[M,K] x B[N,K]^T, bf16: blocks of 64x64, four waves of 32x32, K in steps of 16 through LDS."""
    def stage(matrix: str, row: str, place: int) -> list[str]:
        lines = [
            f"  %{matrix}row = add i32 {row}, %lrow",
            f"  %{matrix}r = mul i32 %{matrix}row, %k2",
            f"  %{matrix}c = add i32 %{matrix}r, %lcol",
            f"  %{matrix}o = add i32 %{matrix}c, %koff",
        ]
        if lds_dma:
            lines += [f"  %{matrix}l = add i32 %wavelds, {place}"]
            lines += [f"  %{matrix}p = getelementptr i8, ptr addrspace(3) @lds, i32 %{matrix}l"]
            for half in range(2):
                lines += [f"  %{matrix}h{half} = getelementptr i8, ptr addrspace(3) %{matrix}p, i32 {256 * half}"]
                lines += [f"  %{matrix}s{half} = add i32 %{matrix}o, %half{half}"]
                lines += [
                    f"  call void @llvm.amdgcn.raw.ptr.buffer.load.lds(ptr addrspace(8) %r{matrix}, "
                    f"ptr addrspace(3) %{matrix}h{half}, i32 4, i32 %{matrix}s{half}, i32 0, i32 0, i32 0)"
                ]
            return lines
        return [
            *lines,
            f"  %{matrix}q = getelementptr i8, ptr addrspace(1) %{matrix}, i32 %{matrix}o",
            f"  %{matrix}v = load <2 x i32>, ptr addrspace(1) %{matrix}q",
            f"  %{matrix}w = add i32 %t8, {place}",
            f"  %{matrix}p = getelementptr i8, ptr addrspace(3) @lds, i32 %{matrix}w",
            f"  store <2 x i32> %{matrix}v, ptr addrspace(3) %{matrix}p",
        ]

    barrier = ['  fence syncscope("workgroup") release', "  call void @llvm.amdgcn.s.barrier()"]
    barrier += ['  fence syncscope("workgroup") acquire']
    row_bits = "  %lrow = lshr i32 %t, 2\n  %lc = and i32 %t, 3\n  %lcol = shl i32 %lc, 3"
    if lds_dma:  # a wave's 64 lanes fill 256 bytes at a time: rows of 32 bytes, 8 lanes each
        row_bits = "  %wave8 = shl i32 %w, 4\n  %l8 = lshr i32 %l, 3\n  %lrow = add i32 %wave8, %l8\n"
        row_bits += "  %lc = and i32 %l, 7\n  %lcol = shl i32 %lc, 2"
    lines = [
        "@lds = internal addrspace(3) global [4096 x i8] poison, align 16",
        "declare i32 @llvm.amdgcn.readfirstlane.i32(i32)",
        "declare <16 x float> @llvm.amdgcn.mfma.f32.32x32x8bf16.1k"
        "(<4 x i16>, <4 x i16>, <16 x float>, i32, i32, i32)",
        "define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %b, ptr addrspace(1) %c, i32 %n, i32 %k) #0 {",
        "entry:",
        "  %t = call i32 @llvm.amdgcn.workitem.id.x()",
        "  %t8 = shl i32 %t, 3",
        "  %bx = call i32 @llvm.amdgcn.workgroup.id.x()",
        "  %by = call i32 @llvm.amdgcn.workgroup.id.y()",
        "  %k2 = shl i32 %k, 1",
        "  %l = and i32 %t, 63",
        "  %wv = lshr i32 %t, 6",
        "  %w = call i32 @llvm.amdgcn.readfirstlane.i32(i32 %wv)",
        "  %wavelds = shl i32 %w, 9",
        "  %half0 = add i32 0, 0",
        "  %half1 = shl i32 %k2, 3",
        row_bits,
        "  %row0 = shl i32 %bx, 6",
        "  %col0 = shl i32 %by, 6",
        "  %wr = lshr i32 %w, 1",
        "  %wc = and i32 %w, 1",
        "  %wrow = shl i32 %wr, 5",
        "  %wcol = shl i32 %wc, 5",
        "  %l32 = and i32 %l, 31",
        "  %hi = lshr i32 %l, 5",
        "  %hi8 = shl i32 %hi, 3",
    ]
    for matrix in "ab":
        lines += [
            f"  %r{matrix} = call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %{matrix}, "
            "i16 0, i64 2147483646, i32 159744)"
        ]
    lines += [
        "  br label %loop",
        "loop:",
        "  %kk = phi i32 [0, %entry], [%kn, %loop]",
        "  %acc = phi <16 x float> [zeroinitializer, %entry], [%acc2, %loop]",
        "  %koff = shl i32 %kk, 1",
        *stage("a", "%row0", 0),
        *stage("b", "%col0", 2048),
        *barrier,
        "  %fr = add i32 %wrow, %l32",
        "  %fr32 = shl i32 %fr, 5",
        "  %fra = add i32 %fr32, %hi8",
        "  %fc = add i32 %wcol, %l32",
        "  %fc32 = shl i32 %fc, 5",
        "  %fcb = add i32 %fc32, %hi8",
    ]
    for step in range(2):
        lines += [
            f"  %oa{step} = add i32 %fra, {16 * step}",
            f"  %ob{step} = add i32 %fcb, {2048 + 16 * step}",
            f"  %pa{step} = getelementptr i8, ptr addrspace(3) @lds, i32 %oa{step}",
            f"  %pb{step} = getelementptr i8, ptr addrspace(3) @lds, i32 %ob{step}",
            f"  %fa{step} = load <4 x i16>, ptr addrspace(3) %pa{step}",
            f"  %fb{step} = load <4 x i16>, ptr addrspace(3) %pb{step}",
            f"  %acc{step + 1} = call <16 x float> @llvm.amdgcn.mfma.f32.32x32x8bf16.1k(<4 x i16> %fa{step}, "
            f"<4 x i16> %fb{step}, <16 x float> %acc{step or ''}, i32 0, i32 0, i32 0)",
        ]
    lines += [
        *barrier,
        "  %kn = add i32 %kk, 16",
        "  %more = icmp slt i32 %kn, %k",
        "  br i1 %more, label %loop, label %out",
        "out:",
        "  %hi4 = shl i32 %hi, 2",
        "  %crow0 = add i32 %row0, %wrow",
        "  %crow1 = add i32 %crow0, %hi4",
        "  %ccol0 = add i32 %col0, %wcol",
        "  %ccol = add i32 %ccol0, %l32",
    ]
    for r in range(16):
        lines += [
            f"  %e{r} = extractelement <16 x float> %acc2, i32 {r}",
            f"  %cr{r} = add i32 %crow1, {8 * (r // 4) + r % 4}",
            f"  %cm{r} = mul i32 %cr{r}, %n",
            f"  %ci{r} = add i32 %cm{r}, %ccol",
            f"  %cp{r} = getelementptr float, ptr addrspace(1) %c, i32 %ci{r}",
            f"  store float %e{r}, ptr addrspace(1) %cp{r}",
        ]
    return "\n".join([*lines, "  ret void", "}", ""])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("lds_dma", [False, True])
def test_bf16_gemm_through_lds(arch: str, lds_dma: bool) -> None:
    m, n, k = (128, 192, 64) if lds_dma else (512, 512, 512)
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(m, k)).astype(BF16), rng.normal(size=(n, k)).astype(BF16)
    asm = compile_ir(_gemm_ir(lds_dma), arch)
    assert (" lds" in asm) == lds_dma
    c = run(asm, arch, [a, b, np.zeros((m, n), np.float32), np.int32(n), np.int32(k)], grid=(m // 64, n // 64))[2]
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64).T, atol=1e-3 * np.sqrt(k))


E8M0_ONE = 127


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("m", [16, 32])
def test_scaled_mfma(code: int, m: int) -> None:
    k = 2048 // m
    bits = (8, 8, 6, 6, 4)[code]
    dtype = (OCP, ml_dtypes.float8_e5m2, ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn, ml_dtypes.float4_e2m1fn)[code]
    rng = np.random.default_rng(8)
    a, b = (rng.normal(size=(m, k)).astype(dtype) for _ in range(2))
    scale_a, scale_b = (rng.integers(E8M0_ONE - 3, E8M0_ONE + 4, (m, k // 32)).astype(np.uint8) for _ in range(2))

    def pack(matrix: np.ndarray) -> np.ndarray:
        out = np.zeros((64, bits), np.uint32)
        for lane in range(64):
            row, group = lane % m, lane // m
            for item in range(32):
                column = 32 * group + item if bits < 8 else k // 2 * (item // 16) + 16 * group + item % 16
                value = int(matrix[row, column].view(np.uint8))
                for bit in range(bits):
                    position = item * bits + bit
                    out[lane, position // 32] |= np.uint32((value >> bit & 1) << position % 32)
        return out

    def scales(octets: np.ndarray) -> np.ndarray:
        return (octets.T.reshape(64).astype(np.uint32) << np.uint32(16)) | np.uint32(0x55AA00FF)

    count = m * m // 64
    loads = [(f"v{8 + i}", i) for i in range(bits)] + [(f"v{16 + i}", bits + i) for i in range(bits)]
    loads += [("v24", 2 * bits), ("v25", 2 * bits + 1)]
    data = np.concatenate([pack(a).T, pack(b).T, scales(scale_a)[None], scales(scale_b)[None]])
    lines = ["s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32_e32 v31, 2, v0"]
    lines += [f"global_load_dword {register}, v31, s[4:5] offset:{256 * row}" for register, row in loads]
    name = f"v_mfma_scale_f32_{m}x{m}x{k}_f8f6f4"
    last = bits - 1
    lines += [f"{name} a[0:{count - 1}], v[8:{8 + last}], v[16:{16 + last}], 0, v24, v25 "
              f"op_sel:[0,0,0] op_sel_hi:[1,1,0] cbsz:{code} blgp:{code}"]  # fmt: skip
    for i in range(count):
        lines += [f"v_accvgpr_read_b32 v26, a{i}", f"global_store_dword v31, v26, s[6:7] offset:{256 * i}"]
    out = run(wrap("\n".join(lines)), "gfx950", [data, np.zeros((count, 64), np.float32)], threads=64)[1]
    # scales() puts the octet at bits 23:16, with one of 0xaa's or-ed in where it is zero there
    factor_a = np.exp2((scale_a | 0xAA).astype(np.float64) - 127)
    factor_b = np.exp2((scale_b | 0xAA).astype(np.float64) - 127)
    wide_a = a.astype(np.float64) * np.repeat(factor_a, 32, axis=1)
    wide_b = b.astype(np.float64) * np.repeat(factor_b, 32, axis=1)
    expected = wide_a @ wide_b.T
    result = _unpack(np.ascontiguousarray(out.T), m, 1, False)[0]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
