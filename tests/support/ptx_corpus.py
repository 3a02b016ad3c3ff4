"""A generated corpus of PTX instructions, for comparing the emulator with a real GPU bit for bit.

Every family crosses its operations with types, rounding modes, flushing and saturation; operands mix random bit
patterns with values near the type's limits. Where the PTX ISA calls a function approximate, its family names how many
units in the last place the two may differ; everything else must be equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

#: values per operand
VALUES = 2048
UNSIGNED: dict[int, Any] = {16: np.uint16, 32: np.uint32, 64: np.uint64}
FLOATS: dict[str, int] = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_LIMITS = {
    "f16": (0x3C00, 0x7C00, 0x7BFF, 0x0001, 0x0400, 0x7E01, 0x03FF),
    "bf16": (0x3F80, 0x7F80, 0x7F7F, 0x0001, 0x0080, 0x7FC1, 0x007F),
    "f32": (0x3F800000, 0x7F800000, 0x7F7FFFFF, 0x00000001, 0x00800000, 0x7FC00001, 0x007FFFFF),
    "f64": (
        0x3FF0000000000000, 0x7FF0000000000000, 0x7FEFFFFFFFFFFFFF, 1, 0x0010000000000000, 0x7FF8000000000001,
        0x000FFFFFFFFFFFFF,
    ),
}  # fmt: skip
_EXPONENT = {"f16": 5, "bf16": 8, "f32": 8, "f64": 11}


@dataclass(frozen=True)
class Family:
    """Instructions on the same inputs. ``ulps``: how far approximate results may differ, 0 for exact ones.

    ``lines`` has (instruction, dtype of its result), ``kind`` the float type of approximate results.
    """

    name: str
    lines: tuple[tuple[str, Any], ...]
    inputs: dict[str, np.ndarray]
    ulps: int = 0
    kind: str = "f32"


def bits(width: int, seed: int) -> np.ndarray:
    """Random bit patterns: full ones, few bits, and neighbours of the powers of two."""
    rng = np.random.default_rng(seed)
    count = VALUES // 4
    full = (
        rng.integers(0, 1 << width, 2 * count, dtype=np.uint64, endpoint=False)
        if width < 64
        else rng.integers(0, 1 << 63, 2 * count, dtype=np.uint64) * np.uint64(2)
        + rng.integers(0, 2, 2 * count, dtype=np.uint64)
    )
    small = rng.integers(0, 300, count, dtype=np.uint64)
    powers = np.uint64(1) << rng.integers(0, width, count, dtype=np.uint64)
    near = powers + rng.integers(0, 3, count, dtype=np.uint64) - np.uint64(1)
    values = np.concatenate([full, small, near])
    rng.shuffle(values)
    return (values & np.uint64((1 << width) - 1)).astype(UNSIGNED[width])


def floats(name: str, seed: int) -> np.ndarray:
    """Bit patterns of a float type: any, of nearby exponents (so that sums round), and special ones of both signs."""
    width, exponent = FLOATS[name], _EXPONENT[name]
    rng = np.random.default_rng(seed)
    values = bits(width, seed)
    digits = width - 1 - exponent
    bias = (1 << (exponent - 1)) - 1
    near = VALUES // 2
    sign = rng.integers(0, 2, near).astype(np.uint64) << np.uint64(width - 1)
    scale = (rng.integers(bias - 4, bias + 5, near)).astype(np.uint64) << np.uint64(digits)
    values[:near] = (sign | scale | rng.integers(0, 1 << digits, near, dtype=np.uint64)).astype(values.dtype)
    special = np.array([*_LIMITS[name], 0], np.uint64)
    special = np.concatenate([special, special | np.uint64(1) << np.uint64(width - 1)])
    values[rng.integers(0, VALUES, 160)] = np.resize(special, 160).astype(values.dtype)
    return values


def families() -> Iterator[Family]:
    yield from _integers()
    yield from _bits()
    yield from _floats()
    yield from _approximate()
    yield from _conversions()
    yield from _rare_conversions()
    yield from _rare_arithmetic()
    yield from _half_functions()
    yield from _lanes()


def _integers() -> Iterator[Family]:
    for width in (16, 32, 64):
        dtype = UNSIGNED[width]
        a, b, c = bits(width, 1), bits(width, 2), bits(width, 3)
        divisor = np.where(b == 0, dtype(3), b)
        for sign in "us":
            name = f"{sign}{width}"
            lines: list[tuple[str, Any]] = [
                (f"{op}.{name} %d, %a, %b;", dtype) for op in ("add", "sub", "mul.lo", "mul.hi", "min", "max")
            ]
            lines += [(f"{op}.{name} %d, %a, %q;", dtype) for op in ("div", "rem")]
            lines += [(f"mad.lo.{name} %d, %a, %b, %c;", dtype), (f"sad.{name} %d, %a, %b, %c;", dtype)]
            lines += [(f"setp.{op}.{name} %d, %a, %b;", np.bool_) for op in ("eq", "ne", "lt", "le", "gt", "ge")]
            if sign == "s":
                lines += [(f"{op}.{name} %d, %a;", dtype) for op in ("neg", "abs")]
            if width > 16:
                lines.append((f"mad.hi.{name} %d, %a, %b, %c;", dtype))
            if width < 64:
                lines.append((f"mul.wide.{name} %d, %a, %b;", UNSIGNED[2 * width]))
            if width == 32:
                lines += [(f"{op}.{name} %d, %a, %b;", dtype) for op in ("mul24.lo", "mul24.hi")]
                lines.append((f"mad24.lo.{name} %d, %a, %b, %c;", dtype))
                lines.append((f"dp4a.{name}.{name} %d, %a, %b, %c;", dtype))
                lines.append((f"bfind.{name} %d, %a;", dtype))
                lines.append((f"bfind.shiftamt.{name} %d, %a;", dtype))
            if name == "s32":
                lines += [(f"{op}.sat.s32 %d, %a, %b;", dtype) for op in ("add", "sub")]
            yield Family(f"integer {name}", tuple(lines), {"a": a, "b": b, "c": c, "q": divisor})


def _bits() -> Iterator[Family]:
    n = np.random.default_rng(5).integers(0, 80, VALUES).astype(np.uint32)
    m = np.random.default_rng(6).integers(0, 40, VALUES).astype(np.uint32)
    for width in (16, 32, 64):
        dtype = UNSIGNED[width]
        lines: list[tuple[str, Any]] = [(f"{op}.b{width} %d, %a, %b;", dtype) for op in ("and", "or", "xor")]
        lines += [(f"not.b{width} %d, %a;", dtype), (f"cnot.b{width} %d, %a;", dtype)]
        lines += [(f"shl.b{width} %d, %a, %n;", dtype)]
        lines += [(f"shr.{kind}{width} %d, %a, %n;", dtype) for kind in "us"]
        if width > 16:
            lines += [(f"{op}.b{width} %d, %a;", np.uint32) for op in ("popc", "clz")]
            lines += [(f"brev.b{width} %d, %a;", dtype), (f"bfi.b{width} %d, %a, %b, %n, %m;", dtype)]
            lines += [(f"bfe.{kind}{width} %d, %a, %n, %m;", dtype) for kind in "us"]
        if width == 32:
            lines += [(f"shf.{side}.{mode}.b32 %d, %a, %b, %n;", dtype) for side in "lr" for mode in ("wrap", "clamp")]
            lines += [(f"lop3.b32 %d, %a, %b, %n, {table};", dtype) for table in (0x80, 0x96, 0xE8, 0xCA, 0x1B)]
            lines += [(f"prmt.b32{mode} %d, %a, %b, %n;", dtype)
                      for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16")]  # fmt: skip
            lines += [(f"bmsk.{mode}.b32 %d, %n, %m;", dtype) for mode in ("wrap", "clamp")]
            lines.append(("{.reg .b32 t; add.cc.u32 t, %a, %b; addc.u32 %d, %a, %n;}", dtype))
            lines.append(("{.reg .b32 t; sub.cc.u32 t, %a, %b; subc.u32 %d, %a, %n;}", dtype))
        yield Family(f"bits b{width}", tuple(lines), {"a": bits(width, 7), "b": bits(width, 8), "n": n, "m": m})


def _floats() -> Iterator[Family]:
    for name, width in FLOATS.items():
        dtype = UNSIGNED[width]
        inputs = {"a": floats(name, 11), "b": floats(name, 12), "c": floats(name, 13)}
        lines: list[tuple[str, Any]] = []
        if name in ("f32", "f64"):
            flush = ("", ".ftz") if name == "f32" else ("",)
            saturate = ("", ".sat") if name == "f32" else ("",)
            for mode in ("rn", "rz", "rm", "rp"):
                for ftz in flush:
                    for sat in saturate:
                        lines += [(f"{op}.{mode}{ftz}{sat}.{name} %d, %a, %b;", dtype) for op in ("add", "sub", "mul")]
                        lines.append((f"fma.{mode}{ftz}{sat}.{name} %d, %a, %b, %c;", dtype))
                    lines.append((f"div.{mode}{ftz}.{name} %d, %a, %b;", dtype))
                    lines += [(f"{op}.{mode}{ftz}.{name} %d, %a;", dtype) for op in ("rcp", "sqrt")]
        elif name == "f16":
            for suffix in ("", ".ftz", ".sat", ".ftz.sat"):
                lines += [(f"{op}{suffix}.f16 %d, %a, %b;", dtype) for op in ("add", "sub", "mul")]
                lines.append((f"fma.rn{suffix}.f16 %d, %a, %b, %c;", dtype))
            lines.append(("fma.rn.relu.f16 %d, %a, %b, %c;", dtype))
        else:
            lines += [(f"{op}.bf16 %d, %a, %b;", dtype) for op in ("add.rn", "sub.rn", "mul.rn")]
            lines += [(f"fma.rn{suffix}.bf16 %d, %a, %b, %c;", dtype) for suffix in ("", ".relu")]
        nan = ("", ".NaN") if name != "f64" else ("",)
        ftz = ("", ".ftz") if name in ("f32", "f16") else ("",)
        lines += [(f"{op}{f}{n}.{name} %d, %a, %b;", dtype) for op in ("min", "max") for f in ftz for n in nan]
        lines += [(f"{op}.{name} %d, %a;", dtype) for op in ("neg", "abs")]
        if name in ("f32", "f64"):
            lines += [(f"copysign.{name} %d, %a, %b;", dtype)]
            lines += [(f"testp.{what}.{name} %d, %a;", np.bool_)
                      for what in ("finite", "infinite", "number", "notanumber", "normal", "subnormal")]  # fmt: skip
        compares = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
        lines += [(f"setp.{op}.{name} %d, %a, %b;", np.bool_) for op in compares]
        for start in range(0, len(lines), 24):
            yield Family(f"float {name} {start // 24}", tuple(lines[start : start + 24]), inputs)
    for name in ("f16x2", "bf16x2"):
        part = name[:-2]
        inputs = {
            letter: floats(part, seed).astype(np.uint32) | floats(part, seed + 7).astype(np.uint32) << np.uint32(16)
            for letter, seed in (("a", 21), ("b", 22), ("c", 23))
        }
        mode = "" if part == "f16" else ".rn"
        pairs: list[tuple[str, Any]] = [(f"{op}{mode}.{name} %d, %a, %b;", np.uint32) for op in ("add", "sub", "mul")]
        pairs += [(f"fma.rn{suffix}.{name} %d, %a, %b, %c;", np.uint32) for suffix in ("", ".relu")]
        pairs += [(f"{op}.{name} %d, %a, %b;", np.uint32) for op in ("min", "max", "min.NaN", "max.NaN")]
        pairs += [(f"{op}.{name} %d, %a;", np.uint32) for op in ("neg", "abs")]
        yield Family(f"float {name}", tuple(pairs), inputs)


def _approximate() -> Iterator[Family]:
    """Functions whose results the PTX ISA leaves open within an error."""
    rng = np.random.default_rng(31)
    positive = np.exp2(rng.uniform(-100, 100, VALUES)).astype(np.float32).view(np.uint32)
    moderate = rng.uniform(-3, 3, VALUES).astype(np.float32).view(np.uint32)
    powers = rng.uniform(-120, 120, VALUES).astype(np.float32).view(np.uint32)
    for op, values, ulps in (
        ("ex2.approx", powers, 2), ("ex2.approx.ftz", powers, 2), ("rcp.approx", positive, 1),
        ("rcp.approx.ftz", positive, 1), ("sqrt.approx", positive, 2), ("rsqrt.approx", positive, 2),
    ):  # fmt: skip
        yield Family(op, ((f"{op}.f32 %d, %a;", np.uint32),), {"a": values}, ulps)
    # absolute errors: up to 2^-20.9 (sin, cos), 2^-22.6 (lg2, for arguments near 1), relative 2^-11 (tanh)
    for op, values, ulps in (("lg2.approx", positive, 1 << 12), ("sin.approx", moderate, 1 << 16),
                             ("cos.approx", moderate, 1 << 16), ("tanh.approx", moderate, 1 << 13)):  # fmt: skip
        yield Family(op, ((f"{op}.f32 %d, %a;", np.uint32),), {"a": values}, ulps)
    yield Family(
        "division", (("div.full.f32 %d, %a, %b;", np.uint32), ("div.approx.f32 %d, %a, %b;", np.uint32)),
        {"a": moderate, "b": (np.abs(moderate.view(np.float32)) + 0.1).astype(np.float32).view(np.uint32)}, 2,
    )  # fmt: skip


def _conversions() -> Iterator[Family]:
    small = {"f16": floats("f16", 41), "bf16": floats("bf16", 42)}
    f32, f64 = floats("f32", 43), floats("f64", 44)
    ints = {f"i{width}": bits(width, 45 + width) for width in (16, 32, 64)}
    # integers of floats: values in and around the integers' ranges
    rng = np.random.default_rng(46)
    near = (rng.standard_normal(VALUES) * np.exp2(rng.uniform(-2, 66, VALUES))).astype(np.float32)
    near[:8] = [0.5, 1.5, 2.5, -0.5, -1.5, np.nan, np.inf, -np.inf]
    wide = near.astype(np.float64) * 1.0000001
    lines: list[tuple[str, Any]] = []
    for mode in ("rni", "rzi", "rmi", "rpi"):
        for width in (16, 32, 64):
            lines += [(f"cvt.{mode}.{sign}{width}.f32 %d, %near;", UNSIGNED[width]) for sign in "us"]
            lines += [(f"cvt.{mode}.{sign}{width}.f64 %d, %wide;", UNSIGNED[width]) for sign in "us"]
        lines += [(f"cvt.{mode}.f32.f32 %d, %near;", np.uint32), (f"cvt.{mode}.f64.f64 %d, %wide;", np.uint64)]
    for start in range(0, len(lines), 20):
        yield Family(
            f"float to integer {start // 20}", tuple(lines[start : start + 20]),
            {"near": near.view(np.uint32), "wide": wide.view(np.uint64)},
        )  # fmt: skip
    lines = []
    for mode in ("rn", "rz", "rm", "rp"):
        for width in (32, 64):
            for sign in "us":
                lines += [(f"cvt.{mode}.f32.{sign}{width} %d, %i{width};", np.uint32),
                          (f"cvt.{mode}.f64.{sign}{width} %d, %i{width};", np.uint64)]  # fmt: skip
        lines += [(f"cvt.{mode}.f32.f64 %d, %f64;", np.uint32), (f"cvt.{mode}.ftz.f32.f64 %d, %f64;", np.uint32)]
    lines += [(f"cvt.{mode}.f16.f32 %d, %f32;", np.uint16) for mode in ("rn", "rz")]
    lines += [(f"cvt.{mode}.bf16.f32 %d, %f32;", np.uint16) for mode in ("rn", "rz")]
    lines += [("cvt.f64.f32 %d, %f32;", np.uint64), ("cvt.rna.tf32.f32 %d, %f32;", np.uint32)]
    lines += [(f"cvt.{mode}.{name}x2.f32 %d, %f32, %other;", np.uint32)
              for mode in ("rn", "rz", "rn.relu") for name in ("f16", "bf16")]  # fmt: skip
    lines += [(f"cvt.rn.satfinite.{name}x2.f32 %d, %f32, %other;", np.uint16) for name in ("e4m3", "e5m2")]
    for start in range(0, len(lines), 20):
        yield Family(
            f"to float {start // 20}", tuple(lines[start : start + 20]),
            {"f32": f32, "other": np.roll(f32, 9), "f64": f64, **ints},
        )  # fmt: skip
    widen: list[tuple[str, Any]] = [(f"cvt.f32.{name} %d, %{name};", np.uint32) for name in small]
    widen += [("cvt.f64.f16 %d, %f16;", np.uint64)]
    widen += [(f"cvt.rn.f16x2.{name}x2 %d, %i16;", np.uint32) for name in ("e4m3", "e5m2")]
    widen += [(f"cvt.{a}.{b} %d, %i{b[1:]};", UNSIGNED[int(a[1:])])
              for a in ("u16", "s16", "u32", "s32", "u64", "s64") for b in ("u16", "s16", "u32", "s32", "u64", "s64")
              if a[1:] != b[1:]]  # fmt: skip
    widen += [(f"cvt.sat.{a}.{b} %d, %i{b[1:]};", UNSIGNED[int(a[1:])])
              for a, b in (("s16", "s32"), ("u16", "s32"), ("s32", "s64"), ("u32", "s64"), ("s32", "u32"))]  # fmt: skip
    for start in range(0, len(widen), 20):
        yield Family(f"conversion {start // 20}", tuple(widen[start : start + 20]), {**small, **ints})


def _in_parts(name: str, lines: list[tuple[str, Any]], inputs: dict[str, np.ndarray]) -> Iterator[Family]:
    for start in range(0, len(lines), 20):
        yield Family(f"{name} {start // 20}", tuple(lines[start : start + 20]), inputs)


def _rare_conversions() -> Iterator[Family]:
    """Between 16-bit floats and integers, of small floats with flushing and saturation, and to tf32 and fp8."""
    f16, bf16, f32, f64 = floats("f16", 71), floats("bf16", 72), floats("f32", 73), floats("f64", 74)
    ints = {f"i{width}": bits(width, 75 + width) for width in (16, 32, 64)}
    pair = f16.astype(np.uint32) | np.roll(f16, 5).astype(np.uint32) << np.uint32(16)
    inputs = {"f16": f16, "bf16": bf16, "f32": f32, "other": np.roll(f32, 9), "f64": f64, "pair": pair, **ints}
    halves = ("f16", "bf16")
    lines: list[tuple[str, Any]] = []
    for mode in ("rni", "rzi", "rmi", "rpi"):
        for name in halves:
            lines += [(f"cvt.{mode}.{sign}{width}.{name} %d, %{name};", UNSIGNED[width])
                      for sign in "us" for width in (16, 32, 64)]  # fmt: skip
            lines.append((f"cvt.{mode}.{name}.{name} %d, %{name};", np.uint16))
        lines += [(f"cvt.{mode}.ftz.{sign}32.f32 %d, %f32;", np.uint32) for sign in "us"]
        lines += [(f"cvt.{mode}.{more}.f32.f32 %d, %f32;", np.uint32) for more in ("ftz", "sat")]
    for mode in ("rn", "rz", "rm", "rp"):
        for name in halves:
            lines += [(f"cvt.{mode}.{name}.{sign}{width} %d, %i{width};", np.uint16)
                      for sign in "us" for width in (16, 32, 64)]  # fmt: skip
            lines += [(f"cvt.{mode}.{name}.{wide} %d, %{wide};", np.uint16) for wide in ("f32", "f64")]
        lines += [(f"cvt.{mode}.bf16.f16 %d, %f16;", np.uint16), (f"cvt.{mode}.f16.bf16 %d, %bf16;", np.uint16)]
        lines += [(f"cvt.{mode}.sat.f32.f64 %d, %f64;", np.uint32), (f"cvt.{mode}.sat.f16.f32 %d, %f32;", np.uint16),
                  (f"cvt.{mode}.sat.f32.s32 %d, %i32;", np.uint32)]  # fmt: skip
    lines += [(f"cvt{more}.f32.f32 %d, %f32;", np.uint32) for more in ("", ".ftz", ".sat")]
    lines += [(f"cvt{more}.f32.f16 %d, %f16;", np.uint32) for more in (".ftz", ".sat")]
    lines += [("cvt.f64.bf16 %d, %bf16;", np.uint64), ("cvt.ftz.f64.f32 %d, %f32;", np.uint64)]
    lines += [(f"cvt.rn.relu.{name}.f32 %d, %f32;", np.uint16) for name in halves]
    lines += [(f"cvt.rz.relu.{name}x2.f32 %d, %f32, %other;", np.uint32) for name in halves]
    lines += [(f"cvt.{mode}.tf32.f32 %d, %f32;", np.uint32) for mode in ("rn", "rz", "rn.relu", "rz.relu")]
    for name in ("e4m3", "e5m2"):
        lines += [(f"cvt.rn.satfinite{relu}.{name}x2.f16x2 %d, %pair;", np.uint16) for relu in ("", ".relu")]
        lines += [(f"cvt.rn.satfinite.relu.{name}x2.f32 %d, %f32, %other;", np.uint16),
                  (f"cvt.rn.relu.f16x2.{name}x2 %d, %i16;", np.uint32)]  # fmt: skip
    yield from _in_parts("rare conversion", lines, inputs)


def _rare_arithmetic() -> Iterator[Family]:
    """Modifiers on pairs, signs by xor, selections, comparisons into registers, dots and packed integers."""
    f16, bf16, f32, f64 = floats("f16", 81), floats("bf16", 82), floats("f32", 83), floats("f64", 84)
    x, y = (part.astype(np.uint32) | np.roll(part, 3).astype(np.uint32) << np.uint32(16) for part in (f16, bf16))
    values = {"f16": f16, "bf16": bf16, "f32": f32, "f64": f64, "x": x, "y": y, "i": bits(32, 85)}
    inputs = {**values, **{f"{name}_": np.roll(value, 7) for name, value in values.items()}}
    inputs |= {"z": np.roll(x, 11), "j": bits(32, 86), "p": bits(32, 87) < 1 << 31}
    word = np.uint32
    lines: list[tuple[str, Any]] = []
    for more in (".ftz", ".sat", ".ftz.sat"):
        lines += [(f"{op}{more}.f16x2 %d, %x, %x_;", word) for op in ("add", "sub", "mul")]
        lines.append((f"fma.rn{more}.f16x2 %d, %x, %x_, %z;", word))
    lines += [("fma.rn.ftz.relu.f16x2 %d, %x, %x_, %z;", word)]
    for op in ("min", "max"):
        lines += [(f"{op}{more}.xorsign.abs.f32 %d, %f32, %f32_;", word) for more in ("", ".ftz.NaN")]
        lines += [(f"{op}.xorsign.abs.{name} %d, %{name}, %{name}_;", np.uint16) for name in ("f16", "bf16")]
        lines += [(f"{op}.NaN.xorsign.abs.bf16x2 %d, %y, %y_;", word), (f"{op}.ftz.f16x2 %d, %x, %x_;", word)]
        lines += [(f"{op}.{kind}16x2 %d, %i, %j;", word) for kind in "us"]
        lines += [(f"{op}.relu.{kind} %d, %i, %j;", word) for kind in ("s32", "s16x2")]
    lines += [(f"{op}.ftz.f32 %d, %f32;", word) for op in ("neg", "abs")]
    lines += [(f"{op}.ftz.f16 %d, %f16;", np.uint16) for op in ("neg", "abs")]
    lines += [(f"set.{op}.{kind}.f32 %d, %f32, %f32_;", word)
              for op in ("lt", "geu", "num", "ne") for kind in ("u32", "s32", "f32")]  # fmt: skip
    lines += [("set.lt.ftz.u32.f32 %d, %f32, %f32_;", word), ("set.gt.u32.s32 %d, %i, %j;", word),
              ("set.lt.u32.f64 %d, %f64, %f64_;", word), ("set.lt.and.u32.f32 %d, %f32, %f32_, %p;", word)]  # fmt: skip
    lines += [(f"set.lt.{name}.{name} %d, %{name}, %{name}_;", np.uint16) for name in ("f16", "bf16")]
    lines += [("slct.f32.s32 %d, %f32, %f32_, %i;", word), ("slct.ftz.u32.f32 %d, %i, %j, %f32;", word),
              ("slct.u64.f32 %d, %f64, %f64_, %f32;", np.uint64),
              ("slct.b16.s32 %d, %f16, %f16_, %i;", np.uint16)]  # fmt: skip
    lines += [(f"setp.lt.{op}.f32 %d, %f32, %f32_, %p;", np.bool_) for op in ("and", "or", "xor")]
    lines += [(f"setp.{op}.ftz.{name} %d, %{name}, %{name}_;", np.bool_)
              for op in ("eq", "gt") for name in ("f16", "f32")]  # fmt: skip
    lines += [("{.reg .pred q; setp.lt.f16x2 %d|q, %x, %x_;}", np.bool_),
              ("{.reg .pred q; setp.geu.ftz.f16x2 q|%d, %x, %x_;}", np.bool_),
              ("{.reg .pred q; setp.ne.xor.bf16x2 q|%d, %y, %y_, %p;}", np.bool_)]  # fmt: skip
    lines += [("set.gt.f16x2.f16x2 %d, %x, %x_;", word), ("set.leu.bf16x2.bf16x2 %d, %y, %y_;", word)]
    lines += [(f"dp4a.{a}.{b} %d, %i, %j, %f32;", word) for a, b in (("u32", "s32"), ("s32", "u32"))]
    lines += [(f"dp2a.{half}.{a}.{b} %d, %i, %j, %f32;", word) for half in ("lo", "hi") for a in ("s32", "u32")
              for b in ("s32", "u32")]  # fmt: skip
    lines += [(f"add.{kind}16x2 %d, %i, %j;", word) for kind in "us"]
    lines += [("mad.wide.u16 %d, %f16, %f16_, %i;", word), ("mad.wide.s32 %d, %i, %j, %f64;", np.uint64)]
    lines += [(f"cvt.pack.sat.{kind}16.s32 %d, %i, %j;", word) for kind in "us"]
    lines += [(f"cvt.pack.sat.{kind}8.s32.b32 %d, %i, %j, %f32;", word) for kind in "us"]
    lines += [("bfind.u64 %d, %f64;", word), ("bfind.shiftamt.s64 %d, %f64;", word)]
    yield from _in_parts("rare arithmetic", lines, inputs)


def _half_functions() -> Iterator[Family]:
    """Approximate functions of 16-bit floats: errors of up to 2^-9.9 (ex2.f16), 2^-10.987 (tanh.f16), 2^-7, 2^-8."""
    rng = np.random.default_rng(91)
    near = rng.uniform(-8, 8, VALUES).astype(np.float32)
    half, brain = near.astype(np.float16).view(np.uint16), (near.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    for name, values, kind, ulps in (
        ("ex2.approx.f16", half, "f16", 2), ("tanh.approx.f16", half, "f16", 2),
        ("ex2.approx.ftz.bf16", brain, "bf16", 2), ("tanh.approx.bf16", brain, "bf16", 2),
    ):  # fmt: skip
        yield Family(name, ((f"{name} %d, %a;", np.uint16),), {"a": values}, ulps, kind)
    double = np.random.default_rng(92).uniform(0.001, 1000, VALUES).view(np.uint64)
    # about 20 bits, from the upper half of the operand alone
    lines = (("rcp.approx.ftz.f64 %d, %a;", np.uint64), ("rsqrt.approx.ftz.f64 %d, %a;", np.uint64))
    yield Family("approximate f64", lines, {"a": double}, 1 << 34, "f64")


def _lanes() -> Iterator[Family]:
    a, n = bits(32, 61), np.random.default_rng(62).integers(0, 32, VALUES).astype(np.uint32)
    p = n < 9
    lines: list[tuple[str, Any]] = [
        (f"shfl.sync.{mode}.b32 %d, %a, %n, {clamp}, -1;", np.uint32)
        for mode, clamps in (("idx", (31, 6175)), ("bfly", (31, 6175)), ("down", (31, 6175)), ("up", (0, 6144)))
        for clamp in clamps
    ]
    lines += [(f"{{.reg .b32 t; shfl.sync.{mode}.b32 t|%d, %a, %n, {clamp}, -1;}}", np.bool_)
              for mode, clamp in (("idx", 6175), ("bfly", 31), ("down", 31), ("up", 0))]  # fmt: skip
    lines += [("vote.sync.ballot.b32 %d, %p, -1;", np.uint32)]
    lines += [(f"vote.sync.{mode}.pred %d, %p, -1;", np.bool_) for mode in ("all", "any", "uni")]
    lines += [("match.any.sync.b32 %d, %n, -1;", np.uint32), ("match.all.sync.b32 %d, %n, -1;", np.uint32)]
    reductions = ("add.u32", "min.u32", "max.u32", "min.s32", "max.s32", "and.b32", "or.b32", "xor.b32")
    lines += [(f"redux.sync.{op} %d, %a, -1;", np.uint32) for op in reductions]
    yield Family("lanes", tuple(lines), {"a": a, "n": n, "p": p})
