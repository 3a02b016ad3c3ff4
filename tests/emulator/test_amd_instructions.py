"""Instructions and faults of the AMD emulator, in snippets of assembly."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from amd_assembly import LANE, floats, ints, run, snippet, wrap

from tilewright.runtime.emulator.amd import AmdEmulator, DecodeError, EmulatorFault, GlobalMemory

BF16 = ml_dtypes.bfloat16
X, Y, Z = ints(0, 1, 7, -1, 0x80000000, 0x12345678, 0xF0F0A5A5), ints(3, -5, 0x7FFFFFFF, 9, 31), ints(2, 8, 31, 13)
F, G = floats(0.5, -1.25, 3.0, 1e30, -0.0), floats(2.0, -3.5, 0.125, 7.0)
F32 = np.float32


def _u64(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))


def _bytes(x: np.ndarray, number: int) -> np.ndarray:
    return (x >> np.uint32(8 * number)) & np.uint32(255)


SNIPPETS: dict[str, tuple[str, list[np.ndarray], Any]] = {
    "v_add_u32_e32 v10, v1, v2": ("", [X, Y], X + Y),
    "v_sub_u32_e64 v10, v1, v2 clamp": ("", [X, Y], np.where(X > Y, X - Y, 0)),
    "v_lshl_or_b32 v10, v1, 5, v2": ("", [X, Y], (X << np.uint32(5)) | Y),
    "v_bfe_i32 v10, v1, 4, 8": ("", [X], ((X >> np.uint32(4)).astype(np.int8).astype(np.int32).view(np.uint32))),
    "v_perm_b32 v10, v1, v2, v3": (
        "", [X, Y, ints(0x07060302)], (Y >> np.uint32(16)) | (X & np.uint32(0xFFFF0000))),
    "v_alignbit_b32 v10, v1, v2, 12": ("", [X, Y], (_u64(Y, X) >> np.uint64(12)).astype(np.uint32)),
    "v_mul_hi_i32 v10, v1, v2": (
        "", [X, Y], ((X.view(np.int32).astype(np.int64) * Y.view(np.int32)) >> 32).astype(np.uint32)),
    "v_mad_u32_u24 v10, v1, v2, v3": ("", [X, Y, Z], (X & 0xFFFFFF) * (Y & 0xFFFFFF) + Z),
    "v_med3_i32 v10, v1, v2, v3": (
        "", [X, Y, Z], np.median(np.stack([X, Y, Z]).view(np.int32), axis=0).astype(np.int64).astype(np.uint32)),
    "v_ffbh_u32_e32 v10, v1": ("", [X], np.array([32 - int(x).bit_length() if x else -1 for x in X])),
    "v_bcnt_u32_b32 v10, v1, v2": ("", [X, Y], np.bitwise_count(X) + Y),
    "v_cvt_f32_ubyte2_e32 v10, v1": ("", [X], _bytes(X, 2).astype(F32)),
    "v_add_f32_e64 v10, -v1, |v2| mul:2": ("", [F, G], 2 * (np.abs(G.view(F32)) - F.view(F32))),
    "v_fma_f32 v10, v1, v2, 1.0 clamp": ("", [F, G], np.clip(F.view(F32) * G.view(F32) + F32(1), 0, 1)),
    "v_max3_f32 v10, v1, v2, 0.5": ("", [F, G], np.maximum(np.maximum(F.view(F32), G.view(F32)), F32(0.5))),
    "v_fmaak_f32 v10, v1, v2, 0x40490fdb": (
        "", [F, G], (F.view(F32).astype(np.float64) * G.view(F32) + F32(np.pi)).astype(F32)),
    "v_cvt_pkrtz_f16_f32 v10, v1, v2": (
        "", [floats(1.0009, -1.0009, 70000), floats(0.333)],
        np.resize(np.array([0x3C00, 0xBC00, 0x7BFF]), 64).astype(np.uint32) | np.uint32(0x3553 << 16)),
    "v_frexp_mant_f32_e32 v10, v1": ("", [F], np.frexp(F.view(F32))[0]),
    "v_cmp_class_f32_e64 s[8:9], v1, 0x60": (  # +0 and -0
        "v_cndmask_b32_e64 v10, 0, 1, s[8:9]", [F], (F.view(F32) == 0).astype(np.uint32)),
    "v_cmp_lt_i32_e32 vcc, v1, v2": (
        "v_cndmask_b32_e32 v10, v1, v2, vcc", [X, Y], np.maximum(X.view(np.int32), Y.view(np.int32)).view(np.uint32)),
    "v_mov_b32_dpp v10, v1 quad_perm:[3,2,1,0] row_mask:0xf bank_mask:0xf": ("", [X], X[LANE ^ 3]),
    "v_add_u32_dpp v10, v1, v2 row_ror:4 row_mask:0xf bank_mask:0xf": (
        "", [LANE.astype(np.uint32), Y], LANE // 16 * 16 + (LANE - 4) % 16 + Y),
    "v_mov_b32_dpp v10, v1 row_shl:1 row_mask:0xf bank_mask:0xf bound_ctrl:1": (
        "", [LANE.astype(np.uint32)], np.where(LANE % 16 == 15, 0, LANE + 1)),
    "v_mov_b32_dpp v10, v1 row_newbcast:5 row_mask:0xf bank_mask:0xf": (
        "", [LANE.astype(np.uint32)], LANE // 16 * 16 + 5),
    "v_mov_b32_dpp v10, v1 row_half_mirror row_mask:0xf bank_mask:0xf": ("", [LANE.astype(np.uint32)], LANE ^ 7),
    "v_add_u32_sdwa v10, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_1 src1_sel:WORD_1": (
        "", [X, Y], _bytes(X, 1) + (Y >> np.uint32(16))),
    "v_add_u32_sdwa v10, v1, sext(v2) dst_sel:BYTE_2 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:BYTE_0": (
        "", [X, Y], ((X + Y) & np.uint32(255)) << np.uint32(16)),
    "ds_swizzle_b32 v10, v1 offset:swizzle(SWAP,16)": ("", [X], X[LANE ^ 16]),
    "ds_swizzle_b32 v10, v1 offset:swizzle(BITMASK_PERM,\"00p1i\")": (
        "", [X], X[(LANE & 32) | ((LANE & 4) | 2 | (~LANE & 1))]),
    "v_readlane_b32 s8, v1, 5": ("s_nop 1\nv_mov_b32_e32 v10, s8", [X], np.full(64, X[5])),
    "v_mbcnt_lo_u32_b32 v10, -1, 0": ("v_mbcnt_hi_u32_b32 v10, -1, v10", [], LANE),
    "s_mov_b64 exec, 0xf0": (
        "v_readfirstlane_b32 s8, v1\ns_mov_b64 exec, -1\ns_nop 0\nv_mov_b32_e32 v10, s8", [X], np.full(64, X[4])),
    "v_pk_mul_f32 v[10:11], v[1:2], v[3:4] op_sel_hi:[1,0]": ("", [F, G, G, F], F.view(F32) * G.view(F32)),
    "v_pk_add_f16 v10, v1, v2 op_sel:[1,0] op_sel_hi:[0,1]": (
        "", [ints(0x3C004000), ints(0x44004800)], ints(0x46004880)),  # (1 + 8, 2 + 4): halves of v1 change places
    "v_mad_u64_u32 v[10:11], s[8:9], v1, v2, v[2:3]": (
        "", [X, Y, Z], (X.astype(np.uint64) * Y + _u64(Y, Z)).astype(np.uint32)),
    "v_ldexp_f32 v10, v1, 3": ("", [F], F.view(F32) * F32(8)),
    "v_fma_mix_f32 v10, v1, v2, v2 op_sel:[1,0,0] op_sel_hi:[1,0,0]": (
        "", [ints(0x40000000), G], G.view(F32) * F32(3)),
    "v_accvgpr_write_b32 a3, v1": ("v_accvgpr_read_b32 v10, a3", [X], X),
    "v_writelane_b32 v10, 42, 7": (
        "", [], np.where(LANE == 7, 42, 0)),
}  # fmt: skip


@pytest.mark.parametrize("first", SNIPPETS)
def test_snippet(first: str) -> None:
    rest, inputs, expected = SNIPPETS[first]
    expected = np.asarray(expected)
    expected = expected.view(np.uint32) if expected.dtype == F32 else expected.astype(np.int64).astype(np.uint32)
    setup = "v_mov_b32_e32 v10, 0\n" if "writelane" in first else ""
    result = snippet(setup + first + "\n" + rest, inputs)[0]
    assert expected.any()
    np.testing.assert_array_equal(result, expected)


GFX950_SNIPPETS: dict[str, tuple[list[np.ndarray], list[Any]]] = {
    "v_cvt_pk_bf16_f32 v10, v1, v2": (
        [F, G], [F.view(F32).astype(BF16).view(np.uint16) | (G.view(F32).astype(BF16).view(np.uint16).astype(np.uint32)
                                                             << np.uint32(16))]),
    "v_mov_b32_e32 v10, v1\nv_mov_b32_e32 v11, v2\ns_nop 1\nv_permlane32_swap_b32_e32 v10, v11": (
        [X, Y], [np.where(LANE < 32, X, Y[LANE % 32]), np.where(LANE < 32, X[LANE % 32 + 32], Y)]),
    "v_mov_b32_e32 v10, v1\nv_mov_b32_e32 v11, v2\ns_nop 1\nv_permlane16_swap_b32_e32 v10, v11": (
        [X, Y], [np.where(LANE & 16, Y[LANE & ~16], X), np.where(LANE & 16, Y, X[LANE | 16])]),
    "v_bitop3_b32 v10, v1, v2, v3 bitop3:0x96": ([X, Y, Z], [X ^ Y ^ Z]),
}  # fmt: skip


@pytest.mark.parametrize("body", GFX950_SNIPPETS)
def test_gfx950_snippet(body: str) -> None:
    inputs, expected = GFX950_SNIPPETS[body]
    result = snippet(body, inputs, "gfx950", len(expected))
    np.testing.assert_array_equal(result, np.stack(expected))


@pytest.mark.parametrize("bits", [16, 8])
def test_transposing_lds_read(bits: int) -> None:
    """The 16 lanes of a group address the rows of a matrix of 16 columns; each receives a column."""
    items = 64 // bits
    body = f"""
        v_lshlrev_b32_e32 v4, 3, v0
        ds_write2_b32 v4, v1, v2 offset1:1
        ds_read_b64_tr_b{bits} v[10:11], v4"""
    words = np.random.default_rng(9).integers(0, 1 << 32, (2, 64), dtype=np.uint32)
    result = snippet(body, list(words), "gfx950", 2, lds=512)
    matrices = np.ascontiguousarray(words.T).view(f"u{bits // 8}").reshape(4, items, 16)
    got = np.ascontiguousarray(result.T).view(f"u{bits // 8}").reshape(4, 16, items)
    np.testing.assert_array_equal(got, matrices.swapaxes(1, 2))


def test_scalar_arithmetic_with_carries_and_selects() -> None:
    body = """
        s_mov_b32 s8, 0xffffffff
        s_mov_b32 s9, 3
        s_add_u32 s10, s8, s9
        s_addc_u32 s11, s9, 0
        s_cmp_gt_i32 s9, s8
        s_cselect_b32 s12, 77, 88
        s_lshl_b64 s[14:15], s[8:9], 4
        s_bfe_u32 s13, s8, 0x50003
        s_flbit_i32_b32 s16, s9
        s_mul_hi_u32 s17, s8, s9
        s_ff1_i32_b64 s18, s[14:15]
        s_movk_i32 s19, 0x8000
        s_sub_i32 s20, s9, s19
    """
    registers = (10, 11, 12, 14, 15, 13, 16, 17, 18, 19, 20)
    moves = "\n".join(f"v_mov_b32_e32 v{10 + i}, s{r}" for i, r in enumerate(registers))
    result = snippet(body + moves, [], outputs=len(registers))[:, 0].tolist()
    assert result == [2, 4, 77, 0xFFFFFFF0, 0x3F, 31, 30, 2, 4, 0xFFFF8000, 0x8003]


def test_atomics_serialise_lanes_in_order() -> None:
    body = """
        v_mov_b32_e32 v2, 0
        v_mov_b32_e32 v3, 1
        ds_write_b32 v2, v2
        ds_add_rtn_u32 v10, v2, v3
        ds_read_b32 v11, v2
        global_atomic_add v12, v2, v3, s[4:5] sc0
        global_load_dword v13, v2, s[4:5]"""
    result = snippet(body, [X], outputs=4, lds=16)
    np.testing.assert_array_equal(result[0], LANE)
    np.testing.assert_array_equal(result[1], 64)
    np.testing.assert_array_equal(result[2], X[0] + LANE)
    np.testing.assert_array_equal(result[3], X[0] + 64)


# ---- faults -----------------------------------------------------------------------------------------


def test_every_unknown_instruction_is_named_at_decode_time() -> None:
    body = "v_frobnicate_b32 v1, v2\nv_add_u32_e32 v1, v1, v1\ns_teleport s3\nv_permlane32_swap_b32_e32 v1, v2"
    with pytest.raises(DecodeError) as caught:
        AmdEmulator(wrap(body), "k", "gfx942")
    text = str(caught.value)
    assert "v_frobnicate_b32" in text and "s_teleport" in text and "line 5" in text
    assert "does not exist on gfx942" in text and "v_add_u32" not in text


FAULTS = {
    "never written": "global_store_dword v31, v20, s[6:7]",
    "EXEC depends on": "s_and_saveexec_b64 s[8:9], s[20:21]",
    "a scalar comparison depends on": "s_cmp_eq_u32 s30, 0",
    "a branch depends on": "s_cbranch_vccz .Lhere\n.Lhere:",
    "lds access out of range: offset 128 of 128": "ds_write_b32 v31, v0",
    "misaligned 4-byte atomic": "v_mov_b32_e32 v3, 2\nglobal_atomic_add v3, v3, s[4:5]",
    "misaligned scalar load": "s_add_u32 s4, s4, 2\ns_load_dword s8, s[4:5], 0x0",
    "scalar load outside": "s_load_dword s8, s[4:5], 0x10000",
    "hangs": ".Lagain:\ns_branch .Lagain",
    "trapped": "s_trap 2",
}


@pytest.mark.parametrize("message", FAULTS)
def test_fault(message: str) -> None:
    body = f"s_load_dwordx4 s[4:7], s[0:1], 0x0\nv_lshlrev_b32_e32 v31, 2, v0\ns_waitcnt lgkmcnt(0)\n{FAULTS[message]}"
    with pytest.raises(EmulatorFault, match=message) as caught:
        run(wrap(body, lds=128), "gfx942", [X, X], threads=64, max_steps=1000)
    assert caught.value.line > 0
    assert caught.value.wave == (0, 0)


def test_poison_can_be_turned_off() -> None:
    body = "s_load_dwordx4 s[4:7], s[0:1], 0x0\nv_lshlrev_b32_e32 v31, 2, v0\ns_waitcnt lgkmcnt(0)"
    body += "\nglobal_store_dword v31, v20, s[6:7]"
    assert not run(wrap(body), "gfx942", [X, X], threads=64, poison=False)[1].any()


def test_an_undefined_upper_half_may_be_carried_along() -> None:
    """LLVM widens 32-bit values with undefined upper halves where it wants the lower half of a result."""
    widen = "v_mov_b32_e32 v20, v1\n{} v[8:9], 3, v[20:21]\nv_mov_b32_e32 v10, v8"
    np.testing.assert_array_equal(snippet(widen.format("v_lshlrev_b64"), [X])[0], X << np.uint32(3))
    with pytest.raises(EmulatorFault, match="never written"):
        snippet(widen.format("v_lshrrev_b64"), [X])


def test_a_lane_mask_may_be_undefined_where_lanes_are_off() -> None:
    """LLVM starts the mask of a value that is true in all active lanes from any register."""
    body = "{} s[20:21], s[20:21], exec\nv_cndmask_b32_e64 v10, 0, 1, s[20:21]"
    np.testing.assert_array_equal(snippet(body.format("s_or_b64"), [X])[0], np.ones_like(X))
    np.testing.assert_array_equal(snippet(body.format("s_andn2_b64"), [X])[0], np.zeros_like(X))
    with pytest.raises(EmulatorFault, match="never written"):
        snippet(body.format("s_and_b64"), [X])


BARRIER_SPLIT = """
    v_readfirstlane_b32 s8, v0
    s_cmp_lt_u32 s8, 64
    s_cbranch_scc1 .Lend
    s_barrier
.Lend:
"""


def test_barrier_mismatch_is_a_fault() -> None:
    with pytest.raises(EmulatorFault, match="barrier mismatch") as caught:
        run(wrap(BARRIER_SPLIT), "gfx942", [X, X], threads=256)
    assert caught.value.wave == (0, 1)
    run(wrap(BARRIER_SPLIT), "gfx942", [X, X], threads=256, strict_barriers=False)


def test_guard_gaps_and_freed_allocations() -> None:
    memory = GlobalMemory()
    first, second = memory.allocate(np.zeros(3, np.uint8)), memory.allocate(np.arange(4))
    assert second - first >= 4096 and first % 256 == second % 256 == 0
    np.testing.assert_array_equal(memory.read_back(second), np.arange(4))
    memory.write(second, np.full(2, 9))
    np.testing.assert_array_equal(memory.read_back(second), [9, 9, 2, 3])
    memory.free(first)
    body = "s_load_dwordx2 s[4:5], s[0:1], 0x0\nv_mov_b32_e32 v1, 0\ns_waitcnt lgkmcnt(0)\n"
    body += "global_load_ubyte v2, v1, s[4:5]"
    with pytest.raises(EmulatorFault, match="outside any allocation"):
        AmdEmulator(wrap(body), "k", "gfx942").launch(memory, (1,), (64,), first.to_bytes(8, "little") + bytes(8))


BUFFER_LOAD = """
    s_load_dwordx4 s[4:7], s[0:1], 0x0
    v_lshlrev_b32_e32 v31, 2, v0
    s_waitcnt lgkmcnt(0)
    s_mov_b64 s[8:9], s[4:5]
    s_mov_b32 s10, {records}
    s_mov_b32 s11, 0x27000
    s_movk_i32 s12, 0x40
    buffer_load_{kind} v[1:{last}], v31, s[8:11], s12 offen offset:16
    s_waitcnt vmcnt(0)
    global_store_dword v31, v{last}, s[6:7]
"""


def test_the_range_check_of_raw_buffers_counts_the_scalar_offset() -> None:
    body = BUFFER_LOAD.format(records=160, kind="dword", last=1)
    data = np.arange(1, 65, dtype=np.uint32)
    result = run(wrap(body), "gfx942", [data, X], threads=64)[1]
    np.testing.assert_array_equal(result, np.where(LANE < 20, (LANE + 21) % 65, 0))


def test_an_access_that_straddles_the_end_of_its_buffer_faults() -> None:
    with pytest.raises(EmulatorFault, match="straddles"):
        run(wrap(BUFFER_LOAD.format(records=160, kind="dwordx2", last=2)), "gfx942", [X, X], threads=64)
