"""The AMD emulator executes kernels that LLVM compiled for gfx942 and gfx950; NumPy says what must come out."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from amd_assembly import ARCHS, compile_ir, elementwise, run, wrap

from tilewright.runtime.emulator.amd import EmulatorFault

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
    move = "@llvm.amdgcn.update.dpp.i32"
    steps = [(0x111, 15), (0x112, 15), (0x114, 15), (0x118, 15), (0x142, 10), (0x143, 12)]
    for i, (control, rows) in enumerate(steps):
        neutral = "0" if name == "allsum" else "-8388608"  # 0xff800000 is -inf
        lines += [
            f"  %m{i} = call i32 {move}(i32 {neutral}, i32 %v{i}, i32 {control}, i32 {rows}, i32 15, i1 false)",
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
    ir += "declare float @llvm.maxnum.f32(float, float)\n"
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


def _divide(a: int, b: int) -> int:
    """Division that truncates, at any size."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_CASES = {
    "sdiv i32": (np.int32, lambda a, b: np.trunc(a.astype(np.float64) / b)),
    "urem i32": (np.uint32, lambda a, b: a % b),
    "sdiv i64": (np.int64, lambda a, b: np.array([_divide(int(x), int(y)) for x, y in zip(a, b, strict=True)])),
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
    result = run(compile_ir(elementwise(body, (kind, kind), kind), arch), arch, [a, b, np.zeros(256, dtype)])[2]
    np.testing.assert_array_equal(result, reference(a, b).astype(dtype))


def test_integer_division_is_exact_at_the_edges() -> None:
    a = np.array([0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 123456789], np.uint32)
    x, y = (np.resize(v, 256) for v in np.meshgrid(a, np.maximum(a, 1)))
    asm = compile_ir(elementwise("%r = udiv i32 %x0, %x1", ("i32", "i32"), "i32"), "gfx942")
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    np.testing.assert_array_equal(run(asm, "gfx942", [x, y, np.zeros(256, np.uint32)])[2], x // y)


FLOAT_CASES: dict[str, tuple[str, str, Any]] = {
    "fdiv f32": ("float", "%r = fdiv float %x0, %x1", lambda a, b: a / b),
    "fdiv f64": ("double", "%r = fdiv double %x0, %x1", lambda a, b: a / b),
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
    asm = compile_ir(elementwise(body, (kind, kind), kind) + FLOAT_DECLARATIONS, arch)
    result = run(asm, arch, [a, b, np.zeros(256, dtype)])[2]
    np.testing.assert_array_max_ulp(result, reference(a, b).astype(dtype), 1 if case == "fma f64" else 0)


def test_division_with_extreme_operands() -> None:
    with np.errstate(all="ignore"):
        values = np.array([0, -0.0, 1, -3, np.inf, -np.inf, np.nan, 1e-40, 3e38, -2e-38, 1e-30, 7e25], np.float32)
        a, b = (np.resize(v, 256) for v in np.meshgrid(values, values))
        asm = compile_ir(elementwise("%r = fdiv float %x0, %x1", ("float", "float"), "float"), "gfx942")
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
    asm = compile_ir(elementwise(f"%r = {operation} {source} %x0 to {target}", (source,), target), arch)
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


def test_code_that_does_not_end() -> None:
    with pytest.raises(EmulatorFault, match="runs past the end"):
        run(wrap("s_nop 0", kernarg=0).replace("s_endpgm", "s_nop 0"), "gfx942", [], threads=64)
