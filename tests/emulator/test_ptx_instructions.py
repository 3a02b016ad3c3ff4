"""Arithmetic of the PTX emulator: every instruction family against exact references, in PTX that ptxas accepts."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ptx_snippets import LANE, check_table, evaluate, ints, run, typed

BF16 = ml_dtypes.bfloat16
U32, I32, U64, I64, F32, F64, F16 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64, np.float16


# --- floats ----------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.4028234e38, 1e-40, -1e-44, 1.17549435e-38]


def floats(dtype: Any, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(32) * 10.0 ** rng.integers(-3, 4, 32)
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
        values[rng.choice(32, len(SPECIAL), replace=False)] = np.array(SPECIAL).astype(dtype)
    return values


def rounded(value: Fraction, digits: int, lowest: int, mode: str) -> float:
    """An exact value to ``digits`` bits, exponents from 2**lowest on."""
    if value == 0:
        return -0.0 if mode == "rm" else 0.0  # of a sum
    magnitude = abs(value)
    exponent = math.floor(math.log2(magnitude.numerator) - math.log2(magnitude.denominator))
    while Fraction(2) ** exponent > magnitude:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    step = Fraction(2) ** max(exponent - digits + 1, lowest)
    quotient, rest = divmod(value, step)
    up = {
        "rn": rest * 2 > step or (rest * 2 == step and quotient % 2 == 1),
        "rz": value < 0 and rest != 0,
        "rm": False,
        "rp": rest != 0,
    }[mode]
    return float((quotient + up) * step)


def exact(function: Callable[..., Fraction], mode: str, *arrays: np.ndarray) -> np.ndarray:
    """float32 results of a function of Fractions."""
    return np.array(
        [rounded(function(*map(Fraction, map(float, row))), 24, -149, mode) for row in zip(*arrays, strict=True)], F32
    )


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_float32_is_rounded_once(mode: str) -> None:
    rng = np.random.default_rng(3)
    a, b, c = ((rng.standard_normal(32) * 2.0 ** rng.integers(-30, 30, 32)).astype(F32) for _ in range(3))
    a[0], b[0], c[0] = 1 + 2**-23, 1 + 2**-22, -(1 + 2**-21)
    a[1], b[1], c[1] = 1.0, 2.0**-24, 0  # a tie
    a[2], b[2], c[2] = 2.0**-100, 2.0**-40, 2.0**-149  # subnormal
    a[3], b[3], c[3] = 1 + 2**-12, 1 + 2**-12, 2.0**-70  # the product lies on a tie, which c breaks
    a[4], b[4], c[4] = 1 + 2**-12, 1 + 2**-12, -(2.0**-70)
    check_table(
        [
            (f"add.{mode}.f32 %d, %a, %b;", F32, exact(lambda x, y: x + y, mode, a, b)),
            (f"sub.{mode}.f32 %d, %a, %b;", F32, exact(lambda x, y: x - y, mode, a, b)),
            (f"mul.{mode}.f32 %d, %a, %b;", F32, exact(lambda x, y: x * y, mode, a, b)),
            (f"fma.{mode}.f32 %d, %a, %b, %c;", F32, exact(lambda x, y, z: x * y + z, mode, a, b, c)),
            (f"div.{mode}.f32 %d, %a, %b;", F32, exact(lambda x, y: x / y, mode, a, b)),
            (f"rcp.{mode}.f32 %d, %a;", F32, exact(lambda x: 1 / x, mode, a)),
            (f"cvt.{mode}.f32.f64 %d, %w;", F32,
             exact(lambda x: x, mode, a.astype(F64) * b)),
        ],
        {"a": a, "b": b, "c": c, "w": a.astype(F64) * b},
    )  # fmt: skip


def test_square_roots_in_all_modes() -> None:
    a = np.abs(np.random.default_rng(9).standard_normal(32)).astype(F32)
    a[:3] = [4.0, 0.0, 2.25]
    results = evaluate([(f"sqrt.{m}.f32 %d, %a;", F32) for m in ("rn", "rz", "rm", "rp")], {"a": a})
    np.testing.assert_array_equal(results[0], np.sqrt(a))
    for x, down, up in zip(a, results[2], results[3], strict=True):
        assert Fraction(float(down)) ** 2 <= Fraction(float(x)) <= Fraction(float(up)) ** 2
        assert up in (down, np.nextafter(down, F32(np.inf)))
    np.testing.assert_array_equal(results[1], results[2])


def test_special_values_flushing_and_saturation() -> None:
    a, b = floats(F32, 1), floats(F32, 2)
    tiny = np.float32(2.0**-126)

    def flush(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < tiny, np.copysign(F32(0), x), x)

    with np.errstate(all="ignore"):
        total = a + b
        clipped = np.where(total > 0, np.minimum(total, 1), F32(0))
        check_table(
            [
                ("add.f32 %d, %a, %b;", F32, total),
                ("mul.f32 %d, %a, %b;", F32, a * b),
                ("add.ftz.f32 %d, %a, %b;", F32, flush(flush(a) + flush(b))),
                ("mul.ftz.f32 %d, %a, %b;", F32, flush(flush(a) * flush(b))),
                ("add.sat.f32 %d, %a, %b;", F32, clipped),
                ("min.f32 %d, %a, %b;", F32, np.fmin(a, b)),
                ("max.f32 %d, %a, %b;", F32, np.fmax(a, b)),
                ("min.NaN.f32 %d, %a, %b;", F32, np.minimum(a, b)),
                ("max.NaN.f32 %d, %a, %b;", F32, np.maximum(a, b)),
                ("abs.f32 %d, %a;", F32, np.abs(a)),
                ("neg.f32 %d, %a;", F32, -a),
                ("copysign.f32 %d, %a, %b;", F32, np.copysign(b, a)),
                ("setp.lt.f32 %d, %a, %b;", np.bool_, a < b),
                ("setp.ne.f32 %d, %a, %b;", np.bool_, (a != b) & ~np.isnan(a) & ~np.isnan(b)),
                ("setp.neu.f32 %d, %a, %b;", np.bool_, a != b),
                ("setp.geu.f32 %d, %a, %b;", np.bool_, ~(a < b)),
                ("setp.num.f32 %d, %a, %b;", np.bool_, ~np.isnan(a) & ~np.isnan(b)),
                ("testp.subnormal.f32 %d, %a;", np.bool_, (a != 0) & (np.abs(a) < tiny)),
                ("testp.finite.f32 %d, %a;", np.bool_, np.isfinite(a)),
                ("set.lt.f32.f32 %d, %a, %b;", F32, (a < b).astype(F32)),
                ("set.lt.u32.f32 %d, %a, %b;", U32, np.where(a < b, U32(0xFFFFFFFF), U32(0))),
            ],
            {"a": a, "b": b},
        )


def test_comparisons_of_halves() -> None:
    a = np.array([0.0, 6e-8, -6e-8, 1.0, np.nan], np.float16)
    b = np.array([6e-8, -6e-8, 0.0, 2.0, 1.0], np.float16)
    (a, b), one = (np.resize(x, 32) for x in (a, b)), np.float16(1)
    check_table(
        [
            ("set.lt.f16.f16 %d, %a, %b;", np.float16, np.where(a < b, one, np.float16(0))),
            ("set.lt.ftz.f16.f16 %d, %a, %b;", np.float16, np.where((a == 1) & (b == 2), one, np.float16(0))),
            ("setp.eq.ftz.f16 %d, %a, %b;", np.bool_, np.resize([True, True, True, False, False], 32)),
            ("{.reg .pred q; setp.eq.f16 q, %a, %a; set.lt.and.u32.f16 %d, %a, %b, !q;}", U32, np.zeros(32)),
        ],
        {"a": a, "b": b},
    )
    octets = np.resize(np.arange(0x3F70, 0x3F90, dtype=np.uint16), 32)  # bf16 around one
    check_table([("set.lt.bf16.bf16 %d, %a, %b;", np.uint16, np.where(octets < 0x3F80, 0x3F80, 0))],
                {"a": octets, "b": np.full(32, 0x3F80, np.uint16)})  # fmt: skip


def test_comparisons_of_pairs() -> None:
    """The first predicate is for the lower halves, the second for the upper ones."""
    rng = np.random.default_rng(7)
    a, b = (rng.integers(-2, 3, (32, 2)).astype(np.float16) for _ in range(2))
    a[0, 1] = np.nan
    words = {"a": a.view(U32)[:, 0], "b": b.view(U32)[:, 0]}
    check_table(
        [
            ("{.reg .pred q; setp.lt.f16x2 %d|q, %a, %b;}", np.bool_, (a < b)[:, 0]),
            ("{.reg .pred q; setp.lt.f16x2 q|%d, %a, %b;}", np.bool_, (a < b)[:, 1]),
            ("{.reg .pred q; setp.neu.f16x2 q|%d, %a, %b;}", np.bool_, (a != b)[:, 1]),
            ("set.ge.f16x2.f16x2 %d, %a, %b;", U32, (a >= b).astype(np.float16).view(U32)[:, 0]),
        ],
        words,
    )


def test_nan_and_zeros_as_on_a_gpu() -> None:
    """What the PTX ISA leaves open, as an H200 gave it (benchmarks/results/emulator_agreement.json)."""
    single = np.resize(np.array([0x7FC00001, 0xFFC00001], U32), 32)
    double = np.resize(np.array([0x7FF8000000000001, 0xFFF8000000000001], np.uint64), 32)
    half = np.resize(np.array([0x0001, 0x83FF], np.uint16), 32)
    u16, u64 = np.uint16, np.uint64
    check_table(
        [
            ("cvt.f32.f32 %d, %s;", U32, single),
            ("cvt.ftz.f64.f32 %d, %s;", u64, np.full(32, 0x7FFFFFFFE0000000, u64)),
            ("cvt.rn.tf32.f32 %d, %s;", U32, np.full(32, 0x7FFFE000, U32)),
            ("cvt.rz.relu.tf32.f32 %d, %s;", U32, np.full(32, 0x7FFFE000, U32)),
            ("cvt.rna.tf32.f32 %d, %s;", U32, np.resize(np.array([0x7FC00000, 0xFFC00000], U32), 32)),
            ("cvt.rn.f16.f64 %d, %w;", u16, np.resize(np.array([0x7E00, 0xFE00], u16), 32)),
            ("cvt.rz.bf16.f64 %d, %w;", u16, np.resize(np.array([0x7FC0, 0xFFC0], u16), 32)),
            ("neg.ftz.f16 %d, %h;", u16, np.resize(np.array([0x8000, 0x0000], u16), 32)),
            ("abs.ftz.f16 %d, %h;", u16, np.zeros(32, u16)),
        ],
        {"s": single, "w": double, "h": half},
    )
    signalling = np.resize(np.array([0x7FF7BBC95F02C30A, 0xFFF37EB90EF5457D], np.uint64), 32)
    quiet = np.resize(np.array([0x7FFFBBC95F02C30A, 0xFFFB7EB90EF5457D], np.uint64), 32)
    check_table([("neg.f64 %d, %a;", u64, quiet), ("abs.f64 %d, %a;", u64, quiet)], {"a": signalling})
    # below the smallest normal number by one of its 11 digits: flushed, where subnormal steps would round up to it
    nearly = {"a": np.full(32, 0x2000, u16), "b": np.full(32, 0x1FFF, u16), "c": np.zeros(32, u16)}
    cases = [
        ("mul.ftz.f16 %d, %a, %b;", 0),
        ("fma.rn.ftz.f16 %d, %a, %b, %c;", 0),
        ("fma.rn.f16 %d, %a, %b, %c;", 0x0400),
        ("mul.f16 %d, %a, %b;", 0x0400),
    ]
    check_table([(text, u16, np.full(32, wanted, u16)) for text, wanted in cases], nearly)
    # nearer to it than a half of the last of them
    nearer = {"a": np.full(32, 0x877A, u16), "b": np.full(32, 0x04AE, u16), "c": np.full(32, 0x0400, u16)}
    check_table([("fma.rn.ftz.f16 %d, %a, %b, %c;", u16, np.full(32, 0x0400, u16))], nearer)
    huge = np.full(32, 1e200)
    wide = np.resize(np.array([-np.inf, 1e308]), 32)
    check_table(
        [("fma.rn.f64 %d, %a, %a, %c;", np.float64, np.resize(np.array([-np.inf, np.inf]), 32))],
        {"a": huge, "c": wide},
    )


def test_pairs_of_integers() -> None:
    a, b = (typed(np.roll(ints(32, s), s), U32) for s in (1, 2))
    left, right = (x[:, None].view(np.int16) for x in (a, b))

    def packed(pairs: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(pairs).view(U32)[:, 0]

    check_table(
        [
            ("min.s16x2 %d, %a, %b;", U32, packed(np.minimum(left, right))),
            ("max.u16x2 %d, %a, %b;", U32, packed(np.maximum(left.view(np.uint16), right.view(np.uint16)))),
            ("max.relu.s16x2 %d, %a, %b;", U32, packed(np.maximum(np.maximum(left, right), 0))),
            ("add.u16x2 %d, %a, %b;", U32, packed(left + right)),
        ],
        {"a": a, "b": b},
    )


def test_zeros_of_both_signs() -> None:
    a, b = np.array([0.0, -0.0, 0.0, -0.0], F32), np.array([0.0, 0.0, -0.0, -0.0], F32)
    check_table(
        [
            ("min.f32 %d, %a, %b;", F32, np.resize(np.array([0.0, -0.0, -0.0, -0.0]), 32)),
            ("max.f32 %d, %a, %b;", F32, np.resize(np.array([0.0, 0.0, 0.0, -0.0]), 32)),
            ("add.rm.f32 %d, 0f3F800000, 0fBF800000;", F32, np.full(32, -0.0)),
            ("add.rn.f32 %d, 0f3F800000, 0fBF800000;", F32, np.zeros(32)),
        ],
        {"a": a, "b": b},
    )


def test_a_nan_has_the_canonical_bits() -> None:
    lines = [("mul.f32 %d, %a, %b;", U32), ("add.f32 %d, %a, %b;", U32), ("sqrt.rn.f32 %d, %c;", U32)]
    got = evaluate(lines, {"a": np.array([0xFFC12345], U32), "b": np.ones(1, F32), "c": np.array([-1.0], F32)})
    assert all((result == 0x7FFFFFFF).all() for result in got)


@pytest.mark.parametrize("dtype", [F16, BF16, F64])
def test_other_formats(dtype: Any) -> None:
    name = {2: "bf16" if dtype is BF16 else "f16", 8: "f64"}[np.dtype(dtype).itemsize]
    a, b, c = (floats(F64, s) for s in (1, 2, 3))
    with np.errstate(all="ignore"):
        if dtype is not F64:
            a, b, c = (np.clip(np.nan_to_num(v), -200, 200) for v in (a, b, c))
        a, b, c = (v.astype(dtype) for v in (a, b, c))
        wide = [v.astype(np.longdouble) for v in (a, b, c)]
        fused = (wide[0] * wide[1] + wide[2]).astype(F64).astype(dtype)
        cases = [
            (f"add.rn.{name} %d, %a, %b;", dtype, (wide[0] + wide[1]).astype(dtype)),
            (f"sub.rn.{name} %d, %a, %b;", dtype, (wide[0] - wide[1]).astype(dtype)),
            (f"mul.rn.{name} %d, %a, %b;", dtype, (wide[0] * wide[1]).astype(dtype)),
            (f"min.{name} %d, %a, %b;", dtype, np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.minimum(a, b)))),
            (f"max.{name} %d, %a, %b;", dtype, np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b)))),
            (f"neg.{name} %d, %a;", dtype, -a),
            (f"abs.{name} %d, %a;", dtype, np.abs(a)),
            (f"setp.lt.{name} %d, %a, %b;", np.bool_, a < b),
        ]
        if dtype is not F64:
            cases.append((f"fma.rn.{name} %d, %a, %b, %c;", dtype, fused))
        bits = {2: np.uint16, 8: U64}[np.dtype(dtype).itemsize]
        got = evaluate(
            [(text, bits if kind is dtype else kind) for text, kind, _ in cases],
            {"a": a.view(bits), "b": b.view(bits), "c": c.view(bits)},
        )
        for (text, kind, wanted), actual in zip(cases, got, strict=True):
            actual = actual.view(dtype) if kind is dtype else actual
            np.testing.assert_array_equal(actual.astype(F64), wanted.astype(F64), err_msg=text)


def test_fma_of_doubles_is_fused() -> None:
    a = np.array([1 + 2.0**-52, 3.0, 1e10 + 1], F64)
    b = np.array([1 - 2.0**-52, 1 / 3.0, 1e10 - 1], F64)
    c = np.array([-1.0, -1.0, -1e20], F64)
    wanted = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    check_table([("fma.rn.f64 %d, %a, %b, %c;", F64, np.resize(wanted, 32))], {"a": a, "b": b, "c": c})


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_pairs(dtype: Any) -> None:
    name = "bf16x2" if dtype is BF16 else "f16x2"
    values = [np.random.default_rng(s).standard_normal((32, 2)).astype(dtype) for s in range(3)]
    a, b, c = (v.view(U32)[:, 0] for v in values)
    x, y, z = (v.astype(F64) for v in values)
    cases = [
        (f"add.rn.{name} %d, %a, %b;", x + y),
        (f"mul.rn.{name} %d, %a, %b;", x * y),
        (f"fma.rn.{name} %d, %a, %b, %c;", x * y + z),
        (f"fma.rn.relu.{name} %d, %a, %b, %c;", np.maximum(x * y + z, 0)),
        (f"max.{name} %d, %a, %b;", np.maximum(x, y)),
    ]
    got = evaluate([(text, U32) for text, _ in cases], {"a": a, "b": b, "c": c})
    for (text, wanted), actual in zip(cases, got, strict=True):
        np.testing.assert_array_equal(actual[:, None].view(dtype), wanted.astype(dtype), err_msg=text)


def test_mixed_precision_sums() -> None:
    a, c = (
        np.random.default_rng(0).standard_normal(32).astype(F16),
        np.random.default_rng(1).standard_normal(32).astype(F32),
    )
    got = evaluate_100("add.rn.f32.f16 %d, %a, %c;", {"a": a.view(np.uint16), "c": c})
    np.testing.assert_array_equal(got, a.astype(F32) + c)


def evaluate_100(text: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return evaluate([(text, F32)], inputs, "sm_100a")[0]


@pytest.mark.parametrize(
    ("text", "function", "low", "high"),
    [
        ("ex2.approx.f32", np.exp2, -120, 120),
        ("ex2.approx.ftz.f32", np.exp2, -120, 120),
        ("lg2.approx.f32", np.log2, 1e-3, 1e3),
        ("rcp.approx.f32", lambda x: 1 / x, 0.1, 1e3),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 0.1, 1e3),
        ("sqrt.approx.f32", np.sqrt, 0.1, 1e3),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 0.1, 1e3),
        ("sin.approx.f32", np.sin, -3, 3),
        ("cos.approx.f32", np.cos, -3, 3),
        ("tanh.approx.f32", np.tanh, -3, 3),
    ],
)
def test_approximate_functions(text: str, function: Any, low: float, high: float) -> None:
    a = np.linspace(low, high, 32).astype(F32)
    (got,) = evaluate([(f"{text} %d, %a;", F32)], {"a": a})
    np.testing.assert_allclose(got, function(a.astype(F64)), rtol=1e-6, atol=1e-7)


# --- conversions -----------------------------------------------------------------------------------


def test_conversions_between_integers() -> None:
    a = typed(ints(32, 1), I32)
    check_table(
        [
            ("cvt.s64.s32 %d, %a;", I64, a.astype(I64)),
            ("cvt.u64.u32 %d, %a;", U64, a.view(U32).astype(U64)),
            ("cvt.s16.s32 %d, %a;", np.int16, a.astype(np.int16)),
            ("cvt.u32.u8 %d, %a;", U32, a.view(U32) & 0xFF),
            ("cvt.s32.s8 %d, %a;", I32, a.astype(np.int8).astype(I32)),
            ("cvt.sat.u8.s32 %d, %a;", np.uint16, np.clip(a, 0, 255).astype(np.uint16)),
            ("cvt.sat.s16.s32 %d, %a;", np.int16, np.clip(a, -32768, 32767)),
            ("cvt.pack.sat.s16.s32 %d, %a, %b;", U32,
             np.clip(a, -32768, 32767).astype(I64) << 16 & 0xFFFF0000 | np.clip(np.roll(a, 3), -32768, 32767) & 0xFFFF),
        ],
        {"a": a, "b": np.roll(a, 3)},
    )  # fmt: skip


def test_conversions_from_and_to_floats() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.7, 2.3, 1e10, -1e10, np.nan, np.inf, -np.inf, 255.5, -0.0], F32)
    values = np.resize(values, 32)
    wide = values.astype(F64)

    def to_int(rounding: Any, dtype: Any) -> np.ndarray:
        info = np.iinfo(dtype)
        return np.array([0 if math.isnan(v) else int(min(max(v, info.min), info.max)) for v in rounding(wide)]).astype(
            dtype
        )

    n = typed(ints(64, 3), I64)
    with np.errstate(all="ignore"):
        check_table(
            [
                ("cvt.rni.s32.f32 %d, %a;", I32, to_int(np.rint, I32)),
                ("cvt.rzi.s32.f32 %d, %a;", I32, to_int(np.trunc, I32)),
                ("cvt.rmi.s32.f32 %d, %a;", I32, to_int(np.floor, I32)),
                ("cvt.rpi.u32.f32 %d, %a;", U32, to_int(np.ceil, U32)),
                ("cvt.rni.f32.f32 %d, %a;", F32, np.rint(values)),
                ("cvt.rpi.f32.f32 %d, %a;", F32, np.ceil(values)),
                ("cvt.f64.f32 %d, %a;", F64, wide),
                ("cvt.sat.f32.f32 %d, %a;", F32, np.where(values > 0, np.minimum(values, 1), 0)),
                ("cvt.rn.f32.s64 %d, %n;", F32, np.array([rounded(Fraction(int(v)), 24, -149, "rn") for v in n])),
                ("cvt.rz.f32.s64 %d, %n;", F32, np.array([rounded(Fraction(int(v)), 24, -149, "rz") for v in n])),
                ("cvt.rn.f64.s64 %d, %n;", F64, np.array([float(int(v)) for v in n])),
                ("cvt.rn.f32.u32 %d, %n32;", F32, n.astype(U32).astype(F64)),
            ],
            {"a": values, "n": n, "n32": n.astype(U32)},
        )


def test_conversions_to_small_floats() -> None:
    rng = np.random.default_rng(5)
    a = (rng.standard_normal(32) * 10.0 ** rng.integers(-6, 5, 32)).astype(F32)
    b = np.roll(a, 7)
    a[:4] = [1 + 2**-9 + 2**-20, 1 + 2**-9, -(1 + 3 * 2**-9), 7e4]

    def half(values: np.ndarray, mode: str) -> np.ndarray:
        return np.array([rounded(Fraction(float(v)), 11, -24, mode) for v in values])

    def brain(values: np.ndarray, mode: str) -> np.ndarray:
        return np.array([rounded(Fraction(float(v)), 8, -133, mode) for v in values])

    with np.errstate(over="ignore"):
        in_range = np.clip(a, -60000, 60000)
        lines = [
            ("cvt.rn.f16.f32 %d, %c;", half(in_range, "rn").astype(F16)),
            ("cvt.rz.f16.f32 %d, %c;", half(in_range, "rz").astype(F16)),
            ("cvt.rn.bf16.f32 %d, %a;", brain(a, "rn").astype(BF16)),
            ("cvt.rz.bf16.f32 %d, %a;", brain(a, "rz").astype(BF16)),
        ]
        got = evaluate([(text, np.uint16) for text, _ in lines], {"a": a, "c": in_range})
        for (text, wanted), actual in zip(lines, got, strict=True):
            np.testing.assert_array_equal(actual, wanted.view(np.uint16), err_msg=text)
        pairs = [
            ("cvt.rn.bf16x2.f32 %d, %a, %b;", BF16, a, b),
            ("cvt.rn.f16x2.f32 %d, %a, %b;", F16, a, b),
            ("cvt.rn.relu.bf16x2.f32 %d, %a, %b;", BF16, np.maximum(a, 0), np.maximum(b, 0)),
        ]
        got = evaluate([(text, U32) for text, *_ in pairs], {"a": a, "b": b})
        for (text, dtype, high, low), actual in zip(pairs, got, strict=True):
            wanted = np.stack([low.astype(dtype), high.astype(dtype)], axis=1)
            np.testing.assert_array_equal(actual[:, None].view(dtype), wanted, err_msg=text)
        for name, dtype, most in (("e4m3", ml_dtypes.float8_e4m3fn, 448), ("e5m2", ml_dtypes.float8_e5m2, 57344)):
            (pair,) = evaluate([(f"cvt.rn.satfinite.{name}x2.f32 %d, %a, %b;", np.uint16)], {"a": a, "b": b})
            wanted = np.stack([np.clip(v, -most, most).astype(dtype) for v in (b, a)], axis=1)
            np.testing.assert_array_equal(pair[:, None].view(np.uint8), wanted.view(np.uint8))
            (back,) = evaluate([(f"cvt.rn.f16x2.{name}x2 %d, %a;", U32)], {"a": pair})
            np.testing.assert_array_equal(back[:, None].view(F16), wanted.astype(F16))
    check_table(
        [
            ("cvt.f32.f16 %d, %h;", F32, a.astype(F16).astype(F32)),
            ("cvt.f32.bf16 %d, %g;", F32, a.astype(BF16).astype(F32)),
            ("cvt.rna.tf32.f32 %d, %a;", U32, a.view(U32) + U32(0x1000) & U32(0xFFFFE000)),
        ],
        {"a": a, "h": a.astype(F16).view(np.uint16), "g": a.astype(BF16).view(np.uint16)},
    )


# --- moves and selection -----------------------------------------------------------------------------


def test_selection_and_moves() -> None:
    a, b, p = typed(ints(32, 1), U32), typed(ints(32, 2), U32), LANE % 3 == 0
    wide = typed(ints(64, 1), U64)
    check_table(
        [
            ("selp.b32 %d, %a, %b, %p;", U32, np.where(p, a, b)),
            ("slct.u32.s32 %d, %a, %b, %b;", U32, np.where(b.view(I32) >= 0, a, b)),
            ("mov.b64 %d, {%a, %b};", U64, b.astype(U64) << U64(32) | a),
            ("{.reg .b32 t; mov.b64 {t, %d}, %w;}", U32, (wide >> U64(32)).astype(U32)),
            ("{.reg .b16 s, t; mov.b32 {s, t}, %a; mov.b32 %d, {t, s};}", U32, a << U32(16) | a >> U32(16)),
            ("setp.lt.and.u32 %d, %a, %b, %p;", np.bool_, (a < b) & p),
            ("setp.lt.or.u32 %d, %a, %b, !%p;", np.bool_, (a < b) | ~p),
            ("{.reg .pred t; setp.lt.u32 t|%d, %a, %b;}", np.bool_, a >= b),
            ("xor.pred %d, %p, %p;", np.bool_, np.zeros(32, np.bool_)),
            ("not.pred %d, %p;", np.bool_, ~p),
            ("mov.f32 %d, 0f40490FDB;", F32, np.full(32, np.pi, F32)),
            ("mov.u32 %d, %laneid;", U32, LANE),
            ("mov.u32 %d, %lanemask_lt;", U32, (1 << LANE) - 1),
            ("{ @%p mov.b32 %d, 1; @!%p mov.b32 %d, 2; }", U32, np.where(p, 1, 2)),
        ],
        {"a": a, "b": b, "p": p, "w": wide},
    )


# --- lanes -------------------------------------------------------------------------------------------


def test_exchange_between_lanes() -> None:
    a = typed(ints(32, 1), U32)
    p = LANE % 5 == 0
    few = (a % 4).astype(U32)
    same = np.array([sum(1 << j for j in range(32) if few[j] == few[i]) for i in range(32)], object)
    check_table(
        [
            ("shfl.sync.idx.b32 %d, %a, 5, 31, -1;", U32, np.full(32, a[5])),
            ("shfl.sync.bfly.b32 %d, %a, 3, 31, -1;", U32, a[LANE ^ 3]),
            ("shfl.sync.up.b32 %d, %a, 2, 0, -1;", U32, a[np.where(LANE >= 2, LANE - 2, LANE)]),
            ("shfl.sync.down.b32 %d, %a, 2, 31, -1;", U32, a[np.where(LANE < 30, LANE + 2, LANE)]),
            ("shfl.sync.idx.b32 %d, %a, 1, 6175, -1;", U32, a[LANE // 8 * 8 + 1]),  # segments of 8
            ("{.reg .b32 t; shfl.sync.down.b32 t|%d, %a, 2, 31, -1;}", np.bool_, LANE < 30),
            ("vote.sync.ballot.b32 %d, %p, -1;", U32, np.full(32, sum(1 << i for i in range(0, 32, 5)))),
            ("vote.sync.any.pred %d, %p, -1;", np.bool_, np.ones(32, np.bool_)),
            ("vote.sync.all.pred %d, %p, -1;", np.bool_, np.zeros(32, np.bool_)),
            ("match.any.sync.b32 %d, %few, -1;", U32, typed(same, U32)),
            ("redux.sync.add.u32 %d, %few, -1;", U32, np.full(32, few.sum())),
            ("redux.sync.max.u32 %d, %a, -1;", U32, np.full(32, a.max())),
            ("{.reg .b32 t; elect.sync t|%d, -1;}", np.bool_, LANE == 0),
            ("activemask.b32 %d;", U32, np.full(32, 0xFFFFFFFF)),
        ],
        {"a": a, "p": p, "few": few},
    )


def test_half_a_warp_exchanges_in_a_branch() -> None:
    body = """
    .reg .b32 %r<9>; .reg .pred %p; .reg .b64 %rd<9>;
    setp.lt.u32 %p, %lane, 16;
    mov.b32 %r1, 77;
    @!%p bra done;
    shfl.sync.bfly.b32 %r1, %lane, 1, 31, 0xFFFF;
done:
    mul.wide.u32 %rd1, %thread, 4; add.u64 %rd2, %ptr0, %rd1; st.global.u32 [%rd2], %r1;
    """
    (got,) = run(body, [np.zeros(32, U32)])
    np.testing.assert_array_equal(got, np.where(LANE < 16, LANE ^ 1, 77))
