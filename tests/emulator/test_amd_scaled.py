"""CDNA4 conversions with a block scale, stochastic rounding, transposing loads of narrow elements."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from amd_assembly import LANE, ints, snippet

F32 = np.float32
FORMATS: dict[str, Any] = {
    "fp8": ml_dtypes.float8_e4m3fn,
    "bf8": ml_dtypes.float8_e5m2,
    "fp4": ml_dtypes.float4_e2m1fn,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f32": np.float32,
}
LARGEST = {"fp8": 448.0, "bf8": 57344.0, "fp4": 6.0}
OLD = 0xDEADBEEF


def values(seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(64) * 3).astype(F32)


def codes(value: np.ndarray, name: str, saturate: bool = True) -> np.ndarray:
    """The bits of the format, saturated or with NaN or infinity for what is too large."""
    bounded = np.clip(value, -LARGEST[name], LARGEST[name]) if saturate else value
    return bounded.astype(FORMATS[name]).view(np.uint8).astype(np.uint32)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("wide", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["fp8", "bf8", "fp4"])
def test_narrowing_with_a_scale(name: str, wide: str, saturate: bool) -> None:
    """D = source / 4, in the upper half, or octet 2.

    Too large a number becomes the largest one of fp4, and of fp8 and bf8 if MODE.FP16_OVFL is set.
    """
    x, y = (values(seed).astype(FORMATS[wide]).astype(F32) for seed in (1, 2))
    x[0] = 60000.0 if wide == "f16" else 1e6
    x = x.astype(FORMATS[wide]).astype(F32)
    if wide == "f32":
        inputs, sources = [x.view(np.uint32), y.view(np.uint32)], "v1, v2"
    else:
        pair = [v.astype(FORMATS[wide]).view(np.uint16).astype(np.uint32) for v in (x, y)]
        inputs, sources = [pair[0] | (pair[1] << np.uint32(16))], "v1"
    upper = "op_sel:[0,0,0,1]" if wide == "f32" or name == "fp4" else "op_sel:[0,0,1]"
    select = "op_sel:[0,0,0,1]" if name == "fp4" else upper
    body = f"s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), {int(saturate)}\n"
    body += f"v_mov_b32_e32 v10, 0x{OLD:x}\nv_mov_b32_e32 v9, 4.0\n"
    body += f"v_cvt_scalef32_pk_{name}_{wide} v10, {sources}, v9 {select}"
    low, high = (codes(v / 4, name, saturate or name == "fp4") for v in (x, y))
    if name == "fp4":
        expected = (OLD & 0xFF00FFFF) | ((low | (high << np.uint32(4))) << np.uint32(16))
    else:
        expected = (OLD & 0xFFFF) | (low << np.uint32(16)) | (high << np.uint32(24))
    np.testing.assert_array_equal(snippet(body, inputs, "gfx950")[0], expected)


@pytest.mark.parametrize("wide", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", ["fp8", "bf8", "fp4"])
def test_widening_with_a_scale(name: str, wide: str) -> None:
    """D = source * 1/2, from the upper half, or octet 3."""
    words = np.random.default_rng(3).integers(0, 1 << 32, 64, dtype=np.uint32) & np.uint32(0x37373737)
    select = "op_sel:[1,1,0,0]" if name == "fp4" else "op_sel:[1,0,0]"
    destination = "v[10:11]" if wide == "f32" else "v10"
    body = f"v_mov_b32_e32 v9, 0.5\nv_cvt_scalef32_pk_{wide}_{name} {destination}, v1, v9 {select}"
    octets = words.view(np.uint8).reshape(64, 4)
    if name == "fp4":
        parts = [(octets[:, 3] >> shift & 15).view(FORMATS[name]) for shift in (0, 4)]
    else:
        parts = [np.ascontiguousarray(octets[:, k]).view(FORMATS[name]) for k in (2, 3)]
    wanted = [(part.astype(F32) * F32(0.5)).astype(FORMATS[wide]) for part in parts]
    result = snippet(body, [words], "gfx950", 2 if wide == "f32" else 1)
    if wide == "f32":
        np.testing.assert_array_equal(result.view(F32), np.stack(wanted))
    else:
        low, high = (w.view(np.uint16).astype(np.uint32) for w in wanted)
        np.testing.assert_array_equal(result[0], low | (high << np.uint32(16)))
    if name != "fp4" and wide != "bf16":
        body = f"v_mov_b32_e32 v10, 0\nv_mov_b32_e32 v9, 0.5\nv_cvt_scalef32_{wide}_{name} v10, v1, v9 op_sel:[1,1,0,0]"
        one = snippet(body, [words], "gfx950")[0]
        bits = wanted[1].view(np.uint32 if wide == "f32" else np.uint16).astype(np.uint32)
        np.testing.assert_array_equal(one, bits)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_stochastic_rounding(arch: str) -> None:
    """1.03125 lies a quarter of the way from 1 to 1.125 (e4m3): random numbers from 3/4 on round it up."""
    random = (LANE.astype(np.uint64) << np.uint64(26)).astype(np.uint32)
    body = "v_mov_b32_e32 v10, 0\nv_mov_b32_e32 v9, 0x3f840000\nv_cvt_sr_fp8_f32 v10, v9, v1 op_sel:[0,0,0,1]"
    dtype = ml_dtypes.float8_e4m3fnuz if arch == "gfx942" else ml_dtypes.float8_e4m3fn
    low, high = (int(np.array(x).astype(dtype).view(np.uint8)) << 16 for x in (1.0, 1.125))
    np.testing.assert_array_equal(snippet(body, [random], arch)[0], np.where(LANE >= 48, high, low))


def test_random_numbers_and_saturating_shifts() -> None:
    x = ints(1, 0x80000001, 5000, -5000, 700, -3)
    shifted = x << np.uint32(1)
    random = np.where(x >> np.uint32(31), shifted ^ np.uint32(197), shifted)
    np.testing.assert_array_equal(snippet("v_prng_b32_e32 v10, v1", [x], "gfx950")[0], random)
    body = "v_mov_b32_e32 v10, 0\nv_ashr_pk_i8_i32 v10, v1, v1, 3"
    octet = np.clip(x.view(np.int32) >> 3, -128, 127).astype(np.uint32) & np.uint32(255)
    np.testing.assert_array_equal(snippet(body, [x], "gfx950")[0], octet | (octet << np.uint32(8)))


@pytest.mark.parametrize("bits", [4, 6])
def test_transposing_reads_of_narrow_elements(bits: int) -> None:
    """Each of 16 lanes addresses a row of 16 elements, and receives a column (CDNA4 ISA chapter 11)."""
    count = bits * 16 // 32
    words = np.random.default_rng(4).integers(0, 1 << 32, (count, 64), dtype=np.uint32)
    body = "v_lshlrev_b32_e32 v9, 4, v0\n"
    body += "".join(f"ds_write_b32 v9, v{1 + i} offset:{4 * i}\n" for i in range(count))
    body += f"ds_read_b{32 * count}_tr_b{bits} v[10:{9 + count}], v9"
    result = snippet(body, list(words), "gfx950", count, lds=1024)

    def elements(rows: np.ndarray) -> np.ndarray:
        stream = np.unpackbits(np.ascontiguousarray(rows.T).view(np.uint8), axis=1, bitorder="little")
        return stream.reshape(4, 16, 16, bits)

    np.testing.assert_array_equal(elements(result), elements(words).swapaxes(1, 2))
