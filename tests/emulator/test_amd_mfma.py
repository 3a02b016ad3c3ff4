"""Matrix instructions of the AMD emulator, by the register layouts of the ISA, and a GEMM through LDS."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from amd_assembly import ARCHS, compile_ir, run, wrap


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
    inputs = [_fragments(a, items), _fragments(b, items), np.ascontiguousarray(c)]
    after = run(compile_ir(ir, arch, 64), arch, inputs, threads=64)[2]
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
                places = f"ptr addrspace(8) %r{matrix}, ptr addrspace(3) %{matrix}h{half}"
                offsets = f"i32 4, i32 %{matrix}s{half}, i32 0, i32 0, i32 0"
                lines += [f"  call void @llvm.amdgcn.raw.ptr.buffer.load.lds({places}, {offsets})"]
            return lines
        return [
            *lines,
            f"  %{matrix}q = getelementptr i8, ptr addrspace(1) %{matrix}, i32 %{matrix}o",
            f"  %{matrix}v = load <2 x i32>, ptr addrspace(1) %{matrix}q",
            f"  %{matrix}w = add i32 %t8, {place}",
            f"  %{matrix}p = getelementptr i8, ptr addrspace(3) @lds, i32 %{matrix}w",
            f"  store <2 x i32> %{matrix}v, ptr addrspace(3) %{matrix}p",
        ]

    def fragments(step: int) -> str:
        return f"<4 x i16> %fa{step}, <4 x i16> %fb{step}, <16 x float> %acc{step or ''}"

    mfma = "@llvm.amdgcn.mfma.f32.32x32x8bf16.1k"
    barrier = ['  fence syncscope("workgroup") release', "  call void @llvm.amdgcn.s.barrier()"]
    barrier += ['  fence syncscope("workgroup") acquire']
    row_bits = "  %lrow = lshr i32 %t, 2\n  %lc = and i32 %t, 3\n  %lcol = shl i32 %lc, 3"
    if lds_dma:  # a wave's 64 lanes fill 256 bytes at a time: rows of 32 bytes, 8 lanes each
        row_bits = "  %wave8 = shl i32 %w, 4\n  %l8 = lshr i32 %l, 3\n  %lrow = add i32 %wave8, %l8\n"
        row_bits += "  %lc = and i32 %l, 7\n  %lcol = shl i32 %lc, 2"
    lines = [
        "@lds = internal addrspace(3) global [4096 x i8] poison, align 16",
        "declare i32 @llvm.amdgcn.readfirstlane.i32(i32)",
        f"declare <16 x float> {mfma}(<4 x i16>, <4 x i16>, <16 x float>, i32, i32, i32)",
        f"define amdgpu_kernel void @k({', '.join(f'ptr addrspace(1) %{p}' for p in 'abc')}, i32 %n, i32 %k) #0 {{",
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
        make = "@llvm.amdgcn.make.buffer.rsrc.p8.p1"
        arguments = f"ptr addrspace(1) %{matrix}, i16 0, i64 2147483646, i32 159744"
        lines += [f"  %r{matrix} = call ptr addrspace(8) {make}({arguments})"]
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
            f"  %acc{step + 1} = call <16 x float> {mfma}({fragments(step)}, i32 0, i32 0, i32 0)",
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
    dtype = (OCP, ml_dtypes.float8_e5m2, ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn, ml_dtypes.float4_e2m1fn)[
        code
    ]
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
        return (octets.T.reshape(64).astype(np.uint32) << np.uint32(16)) | np.uint32(0x550011FF)

    count = m * m // 64
    loads = [(f"v{8 + i}", i) for i in range(bits)] + [(f"v{16 + i}", bits + i) for i in range(bits)]
    loads += [("v24", 2 * bits), ("v25", 2 * bits + 1)]
    data = np.concatenate([pack(a).T, pack(b).T, scales(scale_a)[None], scales(scale_b)[None]])
    lines = ["s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32_e32 v31, 2, v0", "s_waitcnt lgkmcnt(0)"]
    lines += [f"global_load_dword {register}, v31, s[4:5] offset:{256 * row}" for register, row in loads]
    name = f"v_mfma_scale_f32_{m}x{m}x{k}_f8f6f4"
    last = bits - 1
    operands = f"a[0:{count - 1}], v[8:{8 + last}], v[16:{16 + last}], 0, v24, v25"
    lines += [
        "s_waitcnt vmcnt(0)",
        f"{name} {operands} op_sel:[0,0,0] op_sel_hi:[1,1,0] cbsz:{code} blgp:{code}",
        "s_nop 15",
        "s_nop 3",
    ]
    for i in range(count):
        lines += [f"v_accvgpr_read_b32 v26, a{i}", f"global_store_dword v31, v26, s[6:7] offset:{256 * i}"]
    out = run(wrap("\n".join(lines)), "gfx950", [data, np.zeros((count, 64), np.float32)], threads=64)[1]
    factor_a, factor_b = (np.exp2(np.repeat(s, 32, axis=1).astype(np.float64) - E8M0_ONE) for s in (scale_a, scale_b))
    expected = (a.astype(np.float64) * factor_a) @ (b.astype(np.float64) * factor_b).T
    result = _unpack(np.ascontiguousarray(out.T), m, 1, False)[0]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
