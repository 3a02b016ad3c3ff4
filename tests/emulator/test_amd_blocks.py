"""CDNA4 conversions of 32 elements of 6 bits, and stochastic rounding (CDNA4 ISA section 7.3, chapter 12)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from amd_assembly import compile_ir, ints, run, snippet, wrap

F32 = np.float32
NARROW: dict[str, Any] = {"fp6": ml_dtypes.float6_e2m3fn, "bf6": ml_dtypes.float6_e3m2fn}
LARGEST = {"fp6": 7.5, "bf6": 28.0}
WIDE: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
#: LLVM's type of 32 elements
VECTOR = {"f32": "<32 x float>", "f16": "<32 x half>", "bf16": "<32 x bfloat>"}


def pack(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, 32] of 6 bits -> uint32 [n, 6], the first in the lowest bits."""
    bits = np.unpackbits(codes[..., None], axis=2, bitorder="little")[..., :6].reshape(len(codes), 192)
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)


def wide_values(wide: str, seed: int = 0) -> np.ndarray:
    """[64, 32], with numbers too large, half-way cases and denormals of the narrow formats among them."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((64, 32)) * np.exp2(rng.integers(-6, 7, (64, 32)))).astype(WIDE[wide])
    values[0, :8] = [1e4, -1e4, 0.0625, 0.1875, -0.0, 5.25, -7.75, 0.03125]
    return values


def convert(instruction: str, operands: list[np.ndarray], results: int, scalars: str = "") -> np.ndarray:
    """Run one instruction on operands [64, n] from v2 on; its text has %d and %0, %1, ... -> uint32 [64, results]."""
    words = [np.ascontiguousarray(x).view(np.uint32).reshape(64, -1) for x in operands]
    data = np.concatenate(words, axis=1).T
    places, first = [], 2
    for word in words:
        count = word.shape[1]
        places.append(f"v[{first}:{first + count - 1}]" if count > 1 else f"v{first}")
        first += count
    lines = ["s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32_e32 v1, 2, v0", scalars, "s_waitcnt lgkmcnt(0)"]
    for row in range(len(data)):
        lines += [f"global_load_dword v{2 + row}, v1, s[4:5]", "s_add_u32 s4, s4, 0x100\ns_addc_u32 s5, s5, 0"]
    text = instruction.replace("%d", f"v[{first}:{first + results - 1}]")
    for i, place in enumerate(places):
        text = text.replace(f"%{i}", place)
    lines += ["s_waitcnt vmcnt(0)", text]
    for i in range(results):
        lines += [f"global_store_dword v1, v{first + i}, s[6:7]", "s_add_u32 s6, s6, 0x100\ns_addc_u32 s7, s7, 0"]
    body = wrap("\n".join(lines), vgprs=128, accum=128)
    return run(body, "gfx950", [data, np.zeros((results, 64), np.uint32)], threads=64)[1].T


def narrowed(values: np.ndarray, name: str) -> np.ndarray:
    """Codes of the nearest numbers of the format, saturated."""
    return np.clip(values, -LARGEST[name], LARGEST[name]).astype(F32).astype(NARROW[name]).view(np.uint8)


@pytest.mark.parametrize("wide", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["fp6", "bf6"])
def test_narrowing(name: str, wide: str) -> None:
    values = wide_values(wide)
    out = convert(f"v_cvt_scalef32_pk32_{name}_{wide} %d, %0, 2.0", [values], 6)
    np.testing.assert_array_equal(out, pack(narrowed(values.astype(np.float64) / 2, name)))


@pytest.mark.parametrize("name", ["fp6", "bf6"])
def test_two_sources_are_interleaved(name: str) -> None:
    even, odd = wide_values("f32")[:, :16].copy(), wide_values("f32", 1)[:, :16].copy()
    out = convert(f"v_cvt_scalef32_2xpk16_{name}_f32 %d, %0, %1, 0.5", [even, odd], 6)
    both = np.stack([even, odd], axis=2).reshape(64, 32)
    np.testing.assert_array_equal(out, pack(narrowed(both.astype(np.float64) * 2, name)))


@pytest.mark.parametrize("wide", list(WIDE))
@pytest.mark.parametrize("name", ["fp6", "bf6"])
def test_widening(name: str, wide: str) -> None:
    codes = np.random.default_rng(3).integers(0, 64, (64, 32)).astype(np.uint8)
    codes[0], codes[1] = np.arange(32), np.arange(32, 64)  # all of them
    scale = np.resize(np.array([1.0, 0.25, 8.0], F32), 64)
    count = 32 if wide == "f32" else 16
    out = convert(f"v_cvt_scalef32_pk32_{wide}_{name} %d, %0, %1", [pack(codes), scale[:, None]], count)
    wanted = codes.view(NARROW[name]).astype(F32) * scale[:, None]
    np.testing.assert_array_equal(np.ascontiguousarray(out).view(WIDE[wide]), wanted.astype(WIDE[wide]))


def test_known_codes() -> None:
    """ISA table 30: largest, smallest normal and smallest denormal numbers of both formats, and what has no code."""
    values = np.zeros((64, 32), np.float16)
    values[:, :9] = [7.5, 1.0, 0.125, -7.5, 100.0, np.inf, -np.inf, 0.0624, 0.0626]
    for name, wanted in (("fp6", [31, 8, 1, 63, 31, 31, 63, 0, 1]), ("bf6", [24, 12, 2, 56, 31, 31, 63, 1, 1])):
        out = convert(f"v_cvt_scalef32_pk32_{name}_f16 %d, %0, 1.0", [values], 6)
        codes = np.zeros((64, 32), np.uint8)
        codes[:, :9] = wanted
        np.testing.assert_array_equal(out, pack(codes))


def prng(value: int) -> int:
    """v_prng_b32 (CDNA4 ISA chapter 12): taps 7, 6, 2, 0."""
    return (value << 1 & 0xFFFFFFFF) ^ (0xC5 if value >> 31 else 0)


@pytest.mark.parametrize("wide", list(WIDE))
@pytest.mark.parametrize("name", ["fp6", "bf6"])
def test_each_element_takes_the_next_random_number(name: str, wide: str) -> None:
    """1 + 3/4 of a step goes up where the random number is at least 1/4."""
    step = 0.125 if name == "fp6" else 0.25
    values = np.full((64, 32), 1 + 0.75 * step).astype(WIDE[wide])
    seeds = np.random.default_rng(4).integers(0, 1 << 32, 64, dtype=np.uint32)
    out = convert(f"v_cvt_scalef32_sr_pk32_{name}_{wide} %d, %0, %1, 1.0", [values, seeds[:, None]], 6)
    wanted = np.zeros((64, 32), F32)
    for lane, seed in enumerate(seeds.tolist()):
        for item in range(32):
            wanted[lane, item] = 1 + step * (seed >= 1 << 30)
            seed = prng(seed)
    np.testing.assert_array_equal(out, pack(narrowed(wanted, name)))
    assert 0.6 < (wanted > 1).mean() < 0.9


@pytest.mark.parametrize("wide", list(WIDE))
def test_stochastic_fp4(wide: str) -> None:
    """Pairs: 1.25 and 1.25, in steps of a half; the second takes the next random number, into octet 1."""
    seeds = np.array([0x7FFFFFFF, 0x80000000, 0x3FFFFFFF, 0xC0000000], np.uint32)
    source = "v[4:5]" if wide == "f32" else "v4"
    pair = {"f32": 0x3FA00000, "f16": 0x3D003D00, "bf16": 0x3FA03FA0}[wide]
    body = f"v_mov_b32 v4, 0x{pair:x}\nv_mov_b32 v5, 0x{pair:x}\nv_mov_b32 v10, 0x55555555\n"
    body += f"v_cvt_scalef32_sr_pk_fp4_{wide} v10, {source}, v1, 1.0 op_sel:[0,0,1,0]"
    out = snippet(body, [np.resize(seeds, 64)], "gfx950")[0, :4]
    # fp4: 1.0 is 2, 1.5 is 3; it goes up from 2**31 on
    pairs = [(3 if s >> 31 else 2) | (3 if prng(s) >> 31 else 2) << 4 for s in seeds.tolist()]
    assert out.tolist() == [0x55550055 | pair << 8 for pair in pairs]
    assert len(set(pairs)) == 4


@pytest.mark.parametrize(("name", "code"), [("fp8", 0x38), ("bf8", 0x3C)])
@pytest.mark.parametrize("wide", list(WIDE))
def test_stochastic_fp8_with_a_scale(name: str, code: int, wide: str) -> None:
    """4.25 or 4.5 by 4: half a place above one."""
    value = np.array([4.25 if name == "fp8" else 4.5]).astype(WIDE[wide])
    bits = int(value.view(f"u{value.itemsize}")[0])
    body = f"v_mov_b32 v4, 0x{bits:x}\nv_mov_b32 v10, 0\n"
    body += f"v_cvt_scalef32_sr_{name}_{wide} v10, v4, v1, 4.0 op_sel:[0,0,1,1]"
    out = snippet(body, [ints(0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)], "gfx950")[0, :4]
    assert out.tolist() == [code << 24, code << 24, code + 1 << 24, code + 1 << 24]


@pytest.mark.parametrize(("name", "one"), [("f16", 0x3C00), ("bf16", 0x3F80)])
def test_stochastic_halves(name: str, one: int) -> None:
    """1 + a quarter of a place, to the upper half."""
    place = 2.0**-10 if name == "f16" else 2.0**-7
    value = np.full(64, 1 + place / 4, F32).view(np.uint32)
    body = f"v_mov_b32 v10, 0x1234\nv_cvt_sr_{name}_f32 v10, v2, v1 op_sel:[0,0,1]"
    out = snippet(body, [ints(0, 0xBFFFFFFF, 0xC0000000, 0xFFFFFFFF), value], "gfx950")[0, :4]
    assert out.tolist() == [one << 16 | 0x1234, one << 16 | 0x1234, one + 1 << 16 | 0x1234, one + 1 << 16 | 0x1234]


@pytest.mark.parametrize("wide", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["fp6", "bf6"])
def test_what_llvm_emits(name: str, wide: str) -> None:
    """Its spelling: to 6 bits and back."""
    vector, narrow = VECTOR[wide], f"@llvm.amdgcn.cvt.scalef32.pk32.{name}.{wide}"
    back = f"@llvm.amdgcn.cvt.scalef32.pk32.{wide}.{name}"
    asm = compile_ir(f"""
declare <6 x i32> {narrow}({vector}, float)
declare {vector} {back}(<6 x i32>, float)
define amdgpu_kernel void @k(ptr addrspace(1) %a) #0 {{
  %t = call i32 @llvm.amdgcn.workitem.id.x()
  %p = getelementptr {vector}, ptr addrspace(1) %a, i32 %t
  %x = load {vector}, ptr addrspace(1) %p
  %n = call <6 x i32> {narrow}({vector} %x, float 4.0)
  %r = call {vector} {back}(<6 x i32> %n, float 4.0)
  store {vector} %r, ptr addrspace(1) %p
  ret void
}}
""", "gfx950", 64)  # fmt: skip
    values = wide_values(wide)
    out = run(asm, "gfx950", [values], threads=64)[0]
    exact = np.clip(values.astype(np.float64) / 4, -LARGEST[name], LARGEST[name]).astype(F32).astype(NARROW[name])
    np.testing.assert_array_equal(out, (exact.astype(F32) * 4).astype(WIDE[wide]))
