"""Sparse matrix instructions, the lanes that BLGP exchanges, and signs of f64 products (ISA chapter 7)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from amd_assembly import ARCHS, LANE, compile_ir, run, wrap

from tilewright.runtime.emulator.amd.errors import DecodeError, EmulatorFault

FORMATS: dict[tuple[str, str], Any] = {
    **{(name, arch): dtype for arch in ARCHS for name, dtype in
       (("f16", np.float16), ("bf16", ml_dtypes.bfloat16), ("i8", np.int8), ("f32", np.float32), ("f64", np.float64))},
    ("fp8", "gfx942"): ml_dtypes.float8_e4m3fnuz, ("bf8", "gfx942"): ml_dtypes.float8_e5m2fnuz,
    ("fp8", "gfx950"): ml_dtypes.float8_e4m3fn, ("bf8", "gfx950"): ml_dtypes.float8_e5m2,
}  # fmt: skip


def matrix(shape: tuple[int, ...], name: str, arch: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if name == "i8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.integers(-8, 9, shape).astype(FORMATS[name, arch])


def words(items: np.ndarray) -> np.ndarray:
    """[64, n] of any type -> [registers, 64] uint32."""
    return np.ascontiguousarray(items).view(np.uint32).T


def multiply(instruction: str, arch: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    """Run an instruction on registers A at v2, B after it, then ``rest``; C and D at a[0:]. -> D, [registers, 64].

    The text has %a, %b, %c for the registers of each, and %0, ... for those of ``rest``.
    """
    operands, lines, first = [words(x) for x in (a, b, *rest)], [], 2
    places = []
    for operand in operands:
        places.append(f"v[{first}:{first + len(operand) - 1}]" if len(operand) > 1 else f"v{first}")
        lines += [(first + i, row) for i, row in enumerate(operand)]
        first += len(operand)
    count, start = len(words(c)), first + first % 2
    accumulators = f"a[0:{count - 1}]"
    data = np.stack([row for _, row in lines] + list(words(c)))
    body = ["s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32_e32 v1, 2, v0", "s_waitcnt lgkmcnt(0)"]
    for row in range(len(data)):
        register = f"v{lines[row][0]}" if row < len(lines) else f"a{row - len(lines)}"
        body.append(f"global_load_dword {register}, v1, s[4:5]")
        body.append("s_add_u32 s4, s4, 0x100\ns_addc_u32 s5, s5, 0")
    text = instruction.replace("%a", places[0]).replace("%b", places[1]).replace("%c", accumulators)
    for i, place in enumerate(places[2:]):
        text = text.replace(f"%{i}", place)
    body += ["s_waitcnt vmcnt(0)", text, "s_nop 15", "s_nop 3"]
    for i in range(count):
        body += [f"v_accvgpr_read_b32 v{start}, a{i}", f"global_store_dword v1, v{start}, s[6:7]"]
        body.append("s_add_u32 s6, s6, 0x100\ns_addc_u32 s7, s7, 0\ns_waitcnt vmcnt(0)")
    assembly = wrap("\n".join(body), vgprs=64, accum=32)
    return run(assembly, arch, [data, np.zeros((count, 64), np.uint32)], threads=64)[1]


def unpack(out: np.ndarray, m: int) -> np.ndarray:
    """The M x M matrix of D's registers (ISA section 7.1.4.2): rows in groups of four."""
    result = np.zeros((m, m), out.dtype)
    for item in range(len(out)):
        row = 8 * (item // 4) + 4 * (LANE // 32) + item % 4 if m == 32 else 4 * (LANE // 16) + item
        result[row, LANE % m] = out[item]
    return result


#: (mnemonic, K columns of the first lanes of each group of 4 or 8 elements, architectures)
SPARSE = [
    ("f32_16x16x32_f16", ARCHS), ("f32_32x32x16_bf16", ARCHS), ("i32_16x16x64_i8", ARCHS), ("i32_32x32x32_i8", ARCHS),
    ("f32_16x16x64_fp8_bf8", ARCHS), ("f32_32x32x32_bf8_fp8", ARCHS), ("f32_16x16x64_bf16", ("gfx950",)),
    ("f32_32x32x32_f16", ("gfx950",)), ("i32_16x16x128_i8", ("gfx950",)), ("i32_32x32x64_i8", ("gfx950",)),
    ("f32_16x16x128_bf8_bf8", ("gfx950",)), ("f32_32x32x64_fp8_fp8", ("gfx950",)),
]  # fmt: skip


def columns(held: int, group: int, k: int, runs: int) -> np.ndarray:
    """K of the elements of B that a lane of ``group`` holds (ISA tables 34 and 36, and those of section 7.5.1.3)."""
    run_length = held // runs
    return np.concatenate([half * (k // runs) + group * run_length + np.arange(run_length) for half in range(runs)])


@pytest.mark.parametrize(("settings", "chosen"), [("", 0), (" abid:1", 1), (" cbsz:1 abid:1", 0)])
@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name, archs in SPARSE for arch in archs])
def test_sparse_products(name: str, arch: str, settings: str, chosen: int) -> None:
    result, dims, types = name.split("_", 2)
    m, _, k = (int(x) for x in dims.split("x"))
    first, _, second = types.partition("_")
    second = second or first
    bits = 16 if first in ("f16", "bf16") else 8
    runs = 2 if k * m * bits // 8 > 1024 else 1
    held = m * k // 64
    rng = np.random.default_rng(5)
    a, b = matrix((m, k), first, arch, 1), matrix((k, m), second, arch, 2)
    kept = np.sort(np.argsort(rng.random((m, k // 4, 4)), axis=2)[..., :2], axis=2)  # two of each four
    a_lanes = np.zeros((64, held // 2), a.dtype)
    b_lanes = np.zeros((64, held), b.dtype)
    # sets that do not count are full of other indices
    index = rng.integers(0, 1 << 32, 64, dtype=np.uint32)
    sets = 32 // held
    shift = held * (chosen % sets)
    masked = np.zeros_like(a)
    for lane in range(64):
        row, places = lane % m, columns(held, lane // m, k, runs)
        b_lanes[lane] = b[places, row]
        code = 0
        for item in range(held // 2):
            group = places[item // 2 * 4] // 4
            which = int(kept[row, group, item % 2])
            a_lanes[lane, item] = masked[row, 4 * group + which] = a[row, 4 * group + which]
            code |= which << 2 * item
        field = ((1 << held) - 1) << shift
        index[lane] = np.uint32(int(index[lane]) & ~field & 0xFFFFFFFF | code << shift)
    dtype = np.float32 if result == "f32" else np.int32
    c = np.arange(m * m, dtype=dtype).reshape(64, -1) / dtype(1)
    out = multiply(f"v_smfmac_{name} %c, %a, %b, %0{settings}", arch, a_lanes, b_lanes, c.astype(dtype), index[:, None])
    exact = masked.astype(np.float64) @ b.astype(np.float64) + unpack(c.astype(dtype).T, m)
    assert np.abs(exact).max() > 100
    np.testing.assert_array_equal(unpack(out.view(dtype), m), exact)


def test_wider_sparse_products_are_new() -> None:
    with pytest.raises(DecodeError, match="does not exist on gfx942"):
        run(wrap("v_smfmac_f32_16x16x64_f16 v[12:15], v[0:3], v[4:11], v16"), "gfx942", [], threads=64)


def test_sparse_products_need_wait_states() -> None:
    """The indices count as a source; the destination is source C (ISA section 7.6, table 38)."""
    first = "v_smfmac_f32_16x16x32_f16 v[12:15], v[0:1], v[4:7], v8"
    for second in ("v_smfmac_f32_16x16x32_f16 v[16:19], v[0:1], v[4:7], v12", "v_mov_b32 v9, v12"):
        with pytest.raises(EmulatorFault, match="reads the result .* but 7 are needed"):
            run(wrap(f"{first}\n{second}"), "gfx942", [], threads=64)
    with pytest.raises(EmulatorFault, match="accumulates to the result .* but 5 are needed"):
        run(wrap(f"{first}\nv_smfmac_f32_16x16x32_f16 v[14:17], v[0:1], v[4:7], v8"), "gfx942", [], threads=64)


@pytest.mark.parametrize(
    ("name", "left", "right", "arch"),
    [("16x16x32.f16", "<4 x half>", "<8 x half>", "gfx942"), ("16x16x32.f16", "<4 x half>", "<8 x half>", "gfx950"),
     ("16x16x64.f16", "<8 x half>", "<16 x half>", "gfx950")],
)  # fmt: skip
def test_what_llvm_emits(name: str, left: str, right: str, arch: str) -> None:
    """Its spelling and its wait states; with the indices 0 and 1 the sum of the first two of each four."""
    call = f"@llvm.amdgcn.smfmac.f32.{name}"
    ones = "i32 1145324612"  # 0, 1 in every four bits
    asm = compile_ir(f"""
declare <4 x float> {call}({left}, {right}, <4 x float>, i32, i32, i32)
define amdgpu_kernel void @k(ptr addrspace(1) %a, ptr addrspace(1) %c) #0 {{
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %pa = getelementptr {left}, ptr addrspace(1) %a, i32 %t
  %pb = getelementptr {right}, ptr addrspace(1) %a, i32 %t
  %pc = getelementptr <4 x float>, ptr addrspace(1) %c, i32 %t
  %x = load {left}, ptr addrspace(1) %pa
  %y = load {right}, ptr addrspace(1) %pb
  %r = call <4 x float> {call}({left} %x, {right} %y, <4 x float> zeroinitializer, {ones}, i32 0, i32 0)
  %s = call <4 x float> {call}({left} %x, {right} %y, <4 x float> %r, {ones}, i32 0, i32 0)
  store <4 x float> %s, ptr addrspace(1) %pc
  ret void
}}
""", arch, 64)  # fmt: skip
    k = int(name.split(".")[0].split("x")[2])
    data = np.ones((64, k // 4), np.float16)
    out = run(asm, arch, [data, np.zeros((64, 4), np.float32)], threads=64)[1]
    np.testing.assert_array_equal(out, np.float32(k))


BLGP = [LANE, LANE % 32, LANE % 32 + 32, (LANE + 16) % 64, LANE % 16, LANE % 16 + 16, LANE % 16 + 32, LANE % 16 + 48]


@pytest.mark.parametrize("pattern", range(8))
def test_lanes_of_b(pattern: int) -> None:
    """ISA table "Permutations corresponding to BLGP values", on an instruction of one element a lane."""
    a, b = matrix((64, 1), "f32", "gfx942", 1), matrix((64, 1), "f32", "gfx942", 2)
    c = np.zeros((64, 16), np.float32)
    out = multiply(f"v_mfma_f32_32x32x2_f32 %c, %a, %b, %c blgp:{pattern}", "gfx942", a, b, c)
    moved = b[BLGP[pattern], 0].reshape(2, 32)
    np.testing.assert_array_equal(unpack(out.view(np.float32), 32), a[:, 0].reshape(2, 32).T @ moved)


@pytest.mark.parametrize("signs", [(0, 0, 0), (1, 0, 0), (0, 1, 1), (0, 0, 1)])
def test_signs_of_f64_products(signs: tuple[int, int, int]) -> None:
    a, b, c = (matrix((64, n), "f64", "gfx950", seed) for seed, n in ((1, 1), (2, 1), (3, 4)))
    neg = f"neg:[{signs[0]},{signs[1]},{signs[2]}]"
    out = multiply(f"v_mfma_f64_16x16x4_f64 %c, %a, %b, %c {neg}", "gfx950", a, b, c)
    got = np.ascontiguousarray(out.T).view(np.float64)
    left, right = a[:, 0].reshape(4, 16).T, b[:, 0].reshape(4, 16)
    product = (left @ right) * (-1) ** (signs[0] + signs[1])
    rows = 4 * np.arange(4)[None] + LANE[:, None] // 16
    np.testing.assert_array_equal(got, product[rows, LANE[:, None] % 16] + c * (-1) ** signs[2])
