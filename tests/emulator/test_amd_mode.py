"""The MODE register: rounding, denormals and clamping of the AMD emulator's float instructions (ISA section 3.5)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from amd_assembly import ARCHS, compile_ir, elementwise, floats, run, snippet, wrap

from tilewright.runtime.emulator.amd.errors import EmulatorFault

F32, F16, F64 = np.float32, np.float16, np.float64
#: FP_ROUND: to nearest even, up, down, towards zero
NEAREST, UP, DOWN, ZERO = range(4)


def under(mode: str, body: str, inputs: list[np.ndarray], **options: Any) -> np.ndarray:
    """Outputs of ``body`` with a field of MODE set: "offset, bits), value"."""
    return snippet(f"s_setreg_imm32_b32 hwreg(HW_REG_MODE, {mode}\n{body}", inputs, **options)


def test_fields_are_set_and_read() -> None:
    body = """
    s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 9
    s_nop 1
    s_getreg_b32 s8, hwreg(HW_REG_MODE)
    s_getreg_b32 s9, hwreg(HW_REG_MODE, 2, 2)
    s_mov_b32 s10, 0xff6
    s_setreg_b32 hwreg(HW_REG_MODE, 4, 2), s10
    s_nop 1
    s_getreg_b32 s11, hwreg(HW_REG_MODE, 0, 10)
    s_getreg_b32 s12, 0x1881
    s_getreg_b32 s13, hwreg(HW_REG_XCC_ID)
    v_mov_b32 v10, s8
    v_mov_b32 v11, s9
    v_mov_b32 v12, s11
    v_mov_b32 v13, s12
    v_mov_b32 v14, s13
    """
    # the descriptor's defaults: denormals kept, DX10_CLAMP, IEEE; 0x1881 is four bits of MODE from bit 2 on
    wanted = [0x3F9, 2, 0x3E9, 0x3E9 >> 2 & 15, 0]
    assert snippet(body, [], outputs=5)[:, 0].tolist() == wanted


def exact_sum(a: F32, b: F32, c: F32) -> Fraction:
    return Fraction(float(a)) + Fraction(float(b))


def exact_product(a: F32, b: F32, c: F32) -> Fraction:
    return Fraction(float(a)) * Fraction(float(b))


def exact_fma(a: F32, b: F32, c: F32) -> Fraction:
    return exact_product(a, b, c) + Fraction(float(c))


def rounded(value: Fraction, dtype: Any, mode: int) -> Any:
    """A rational as a float of ``dtype``, by the definition of the mode."""
    near = dtype(float(value))
    below = near if Fraction(float(near)) <= value else np.nextafter(near, dtype(-np.inf))
    above = below if Fraction(float(below)) == value else np.nextafter(below, dtype(np.inf))
    if mode == NEAREST:
        return near
    return {UP: above, DOWN: below, ZERO: below if value > 0 else above}[mode]


SINGLE = [
    ("v_add_f32 v10, v1, v2", exact_sum),
    ("v_sub_f32 v10, v1, -v2", exact_sum),
    ("v_subrev_f32 v10, -v2, v1", exact_sum),
    ("v_mul_f32 v10, v1, v2", exact_product),
    ("v_fma_f32 v10, v1, v2, v3", exact_fma),
    ("v_mov_b32 v10, v3\nv_fmac_f32 v10, v1, v2", exact_fma),
    ("v_mov_b32 v4, v1\nv_mov_b32 v5, v1\nv_mov_b32 v6, v2\nv_mov_b32 v7, v2\nv_pk_add_f32 v[10:11], v[4:5], v[6:7]",
     exact_sum),
]  # fmt: skip


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize(("body", "exact"), SINGLE, ids=lambda x: str(x).split("\n")[-1].split()[0])
def test_rounding_of_single_precision(body: str, exact: Any, mode: int) -> None:
    rng = np.random.default_rng(1)
    values = [(rng.standard_normal(64) * np.exp2(rng.integers(-12, 13, 64))).astype(F32) for _ in range(3)]
    got = under(f"0, 2), {mode}", body, [v.view(np.uint32) for v in values])[0].view(F32)
    wanted = [rounded(exact(*three), F32, mode) for three in zip(*values, strict=True)]
    assert got.tolist() == wanted


@pytest.mark.parametrize("mode", range(4))
def test_double_precision_rounds_by_other_bits(mode: int) -> None:
    """And single precision does not."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal((2, 64)) * np.exp2(rng.integers(-9, 10, (2, 64)))
    inputs = [np.ascontiguousarray(v.view(np.uint32).reshape(64, 2)[:, part]) for v in values for part in (0, 1)]
    aligned = [f"v_mov_b32 v{14 + i}, v{1 + i}" for i in range(4)]
    lines = [*aligned, "v_add_f64 v[10:11], v[14:15], v[16:17]", "v_mov_b32 v1, 1.0", "v_add_f32 v12, v1, v13"]
    out = under(f"2, 2), {mode}", "v_mov_b32 v13, 0x30800000\n" + "\n".join(lines), inputs, outputs=3)
    got = np.ascontiguousarray(out[:2].T).view(F64)[:, 0]
    assert got.tolist() == [rounded(Fraction(a) + Fraction(b), F64, mode) for a, b in values.T.tolist()]
    assert (out[2].view(F32) == 1.0).all()


@pytest.mark.parametrize("mode", range(4))
def test_so_does_half_precision(mode: int) -> None:
    rng = np.random.default_rng(3)
    halves = (rng.standard_normal((2, 64)) * np.exp2(rng.integers(-4, 5, (2, 64)))).astype(F16)
    packed = [h.view(np.uint16).astype(np.uint32) * np.uint32(0x10001) for h in halves]
    for text, exact in (("v_mul_f16 v10, v1, v2", exact_product), ("v_pk_add_f16 v10, v1, v2", exact_sum)):
        result = (under(f"2, 2), {mode}", text, packed)[0] & np.uint32(0xFFFF)).astype(np.uint16).view(F16)
        assert result.tolist() == [rounded(exact(a, b, b), F16, mode) for a, b in zip(*halves, strict=True)]


@pytest.mark.parametrize("mode", range(4))
def test_rounding_of_conversions(mode: int) -> None:
    """Known values: 16777217 lies between two f32, 1/3 and -1/3 between two of f16 and f32."""
    integer = np.full(64, 16777217, np.uint32)
    got = under(f"0, 2), {mode}", "v_cvt_f32_i32 v10, v1", [integer])[0].view(F32)[0]
    assert got == (16777218.0 if mode == UP else 16777216.0)
    third = np.resize(np.array([1 / 3, -1 / 3], F32), 64)
    half = under(f"2, 2), {mode}", "v_cvt_f16_f32 v10, v1", [third.view(np.uint32)])[0].astype(np.uint16)
    # 1/3 in f16 is 0x3555 rounded down, 0x3556 rounded up
    assert half[:2].tolist() == [0x3556 if mode == UP else 0x3555, 0xB556 if mode == DOWN else 0xB555]
    double = np.resize(np.array([1 / 3, -1 / 3]), 64).view(np.uint32).reshape(64, 2).T
    body = "v_mov_b32 v4, v1\nv_mov_b32 v5, v2\nv_cvt_f32_f64 v10, v[4:5]"
    single = under(f"0, 2), {mode}", body, [np.ascontiguousarray(x) for x in double])[0]
    # 1/3 in f32 is 0x3EAAAAAA rounded down, 0x3EAAAAAB rounded up, which is nearer
    assert single[0] == (0x3EAAAAAB if mode in (NEAREST, UP) else 0x3EAAAAAA)
    assert single[1] == (0xBEAAAAAB if mode in (NEAREST, DOWN) else 0xBEAAAAAA)


def test_what_always_rounds_to_nearest() -> None:
    """v_cvt_pkrtz has its own mode, v_cvt_pk_f16_f32 of CDNA4 sets one (ISA chapter 12)."""
    third = np.full(64, 1 / 3, F32).view(np.uint32)
    assert under("0, 4), 5", "v_cvt_pkrtz_f16_f32 v10, v1, v1", [third])[0, 0] == 0x35553555
    assert under("0, 4), 5", "v_cvt_pk_f16_f32 v10, v1, v1", [third], arch="gfx950")[0, 0] == 0x35553555
    assert under("0, 4), 5", "v_cvt_pk_bf16_f32 v10, v1, v1", [third], arch="gfx950")[0, 0] == 0x3EAB3EAB


def test_zero_sums_are_negative_when_rounding_down() -> None:
    inputs = [floats(1.5, 0.0, -0.0), floats(-1.5, 0.0, 0.0)]
    assert under("0, 2), 2", "v_add_f32 v10, v1, v2", inputs)[0, :3].tolist() == [0x80000000, 0, 0x80000000]
    assert under("0, 2), 0", "v_add_f32 v10, v1, v2", inputs)[0, :3].tolist() == [0, 0, 0]


TINY = 2.0**-140


@pytest.mark.parametrize(
    ("mode", "kept"), [(0, (False, False)), (1, (True, False)), (2, (False, True)), (3, (True, True))]
)
def test_denormals_of_single_precision(mode: int, kept: tuple[bool, bool]) -> None:
    """(sources, results): a denormal source times 2**100, and a product of two normal numbers that is denormal."""
    inputs = [floats(-TINY, 2.0**-100), floats(2.0**100, 2.0**-40)]
    source, result = under(f"4, 2), {mode}", "v_mul_f32 v10, v1, v2", inputs)[0, :2].view(F32).tolist()
    assert (source, np.signbit(source)) == (-(2.0**-40) if mode & 1 else 0.0, True)
    assert result == (TINY if mode & 2 else 0.0)


def test_denormals_of_half_precision_are_set_apart() -> None:
    small = np.full(64, 2.0**-20, F16).view(np.uint16).astype(np.uint32)
    for offset, wanted in ((4, 2.0**-19), (6, 0.0)):
        out = under(f"{offset}, 2), 0", "v_add_f16 v10, v1, v1", [small])[0].astype(np.uint16).view(F16)
        assert out[0] == wanted


def test_denormals_that_are_compared_or_multiplied() -> None:
    compare = "v_cmp_lt_f32 vcc, 0, v1\nv_cndmask_b32 v10, 0, 1, vcc\nv_max_f32 v11, v1, 0"
    for mode, wanted in ((0, (0, 0)), (3, (1, int(floats(TINY)[0])))):
        assert under(f"4, 2), {mode}", compare, [floats(TINY)], outputs=2)[:, 0].tolist() == list(wanted)
    product = """
    v_mfma_f32_4x4x1_16b_f32 v[12:15], v1, v2, 0
    s_nop 7
    v_mov_b32 v10, v12
    """
    inputs = [floats(TINY), floats(2.0**100)]
    for mode, wanted in ((0, 0.0), (3, 2.0**-40)):
        body = "v_mov_b32 v12, 0\nv_mov_b32 v13, 0\ns_nop 1\n" + product
        assert under(f"4, 2), {mode}", body, inputs)[0].view(F32)[0] == wanted


@pytest.mark.parametrize("default", [0, 3])
def test_the_descriptor_sets_it(default: int) -> None:
    out = snippet("v_add_f32 v10, v1, v1", [floats(TINY)], denormals=default)[0].view(F32)
    assert out[0] == (2 * TINY if default else 0.0)


def test_each_wave_has_its_own() -> None:
    """Four workgroups, each with its number as rounding mode, in step."""
    body = """
    s_setreg_b32 hwreg(HW_REG_MODE, 0, 2), s2
    s_load_dwordx2 s[4:5], s[0:1], 0x0
    v_mov_b32 v1, 1.0
    v_mov_b32 v2, 0x30800000
    v_add_f32 v3, v1, v2
    v_lshlrev_b32 v4, 2, v0
    s_lshl_b32 s6, s2, 8
    v_add_u32 v4, s6, v4
    s_waitcnt lgkmcnt(0)
    global_store_dword v4, v3, s[4:5]
    """
    out = run(wrap(body, kernarg=8), "gfx942", [np.zeros(256, F32)], grid=4, threads=64)[0].reshape(4, 64)
    above = np.nextafter(F32(1), F32(2))
    assert out[:, 0].tolist() == [1.0, above, 1.0, 1.0] and (out == out[:, :1]).all()


def test_overflow_of_half_precision() -> None:
    """FP16_OVFL clamps what overflows, and leaves infinities."""
    inputs = [np.full(64, 60000, F16).view(np.uint16).astype(np.uint32), np.resize(
        np.array([60000, np.inf], F16).view(np.uint16).astype(np.uint32), 64)]  # fmt: skip
    for bit, wanted in ((1, 65504.0), (0, np.inf)):
        out = under(f"23, 1), {bit}", "v_add_f16 v10, v1, v2", inputs)[0].astype(np.uint16).view(F16)
        assert out[:2].tolist() == [wanted, np.inf]


def test_clamping_of_nan() -> None:
    nan = floats(np.nan, 2.0)
    for bit in (0, 1):
        out = under(f"8, 1), {bit}", "v_add_f32 v10, v1, v1 clamp", [nan])[0].view(F32)
        assert out[1] == 1.0 and (out[0] == 0.0 if bit else np.isnan(out[0]))


@pytest.mark.parametrize(
    ("line", "message"),
    [("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 28, 1), 1", "MODE.VSKIP is not emulated"),
     ("s_setreg_imm32_b32 hwreg(HW_REG_TRAPSTS, 0, 1), 1", "HW_REG_TRAPSTS cannot be written"),
     ("s_setreg_b32 hwreg(HW_REG_MODE, 0, 2), s20", "MODE depends on a register")],
)  # fmt: skip
def test_faults(line: str, message: str) -> None:
    with pytest.raises(EmulatorFault, match=message):
        snippet(line, [])


@pytest.mark.parametrize("arch", ARCHS)
def test_division_of_llvm_that_switches_denormals(arch: str) -> None:
    """Where kernels drop denormals, LLVM keeps them within a division alone."""
    ir = elementwise("%r = fdiv float %x0, %x1", ("float", "float"), "float")
    asm = compile_ir(ir, arch, more='"denormal-fp-math-f32"="preserve-sign"')
    assert asm.count("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2)") == 2
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal(256).astype(F32) * np.exp2(rng.integers(-60, 60, 256)).astype(F32) for _ in range(2))
    out = run(asm, arch, [x, y, np.zeros(256, F32)])[2]
    np.testing.assert_array_equal(out, x / y)
