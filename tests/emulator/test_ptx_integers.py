"""Integers in the PTX emulator: every instruction family against those of Python, in PTX that ptxas accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ptx_snippets import check_table, ints, typed

RNG = np.random.default_rng(7)
U32, I32, U64, I64 = np.uint32, np.int32, np.uint64, np.int64


def python(function: Callable[..., int], dtype: Any, *arrays: np.ndarray) -> np.ndarray:
    """A function of Python ints on arrays, wrapped to the type."""
    return typed(np.array([function(*[int(v) for v in row]) for row in zip(*arrays, strict=True)], object), dtype)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("dtype", [U32, I32, U64, I64, np.uint16, np.int16])
def test_integers(dtype: Any) -> None:
    bits = np.dtype(dtype).itemsize * 8
    name = f"{'s' if np.dtype(dtype).kind == 'i' else 'u'}{bits}"
    a, b = typed(ints(bits, 1), dtype), typed(np.roll(ints(bits, 2), 5), dtype)
    c = typed(np.roll(ints(bits, 3), 11), dtype)
    b = np.where(b == 0, dtype(3), b)
    cases = [
        (f"add.{name} %d, %a, %b;", dtype, python(lambda x, y: x + y, dtype, a, b)),
        (f"sub.{name} %d, %a, %b;", dtype, python(lambda x, y: x - y, dtype, a, b)),
        (f"mul.lo.{name} %d, %a, %b;", dtype, python(lambda x, y: x * y, dtype, a, b)),
        (f"mul.hi.{name} %d, %a, %b;", dtype, python(lambda x, y: x * y >> bits, dtype, a, b)),
        (f"mad.lo.{name} %d, %a, %b, %c;", dtype, python(lambda x, y, z: x * y + z, dtype, a, b, c)),
        (f"div.{name} %d, %a, %b;", dtype, python(truncated, dtype, a, b)),
        (f"rem.{name} %d, %a, %b;", dtype, python(lambda x, y: x - truncated(x, y) * y, dtype, a, b)),
        (f"min.{name} %d, %a, %b;", dtype, np.minimum(a, b)),
        (f"max.{name} %d, %a, %b;", dtype, np.maximum(a, b)),
    ]
    if bits > 16:
        cases.append(
            (f"mad.hi.{name} %d, %a, %b, %c;", dtype, python(lambda x, y, z: (x * y >> bits) + z, dtype, a, b, c))
        )
    if bits < 64:
        wide = np.dtype(f"{np.dtype(dtype).kind}{bits // 4}")
        cases.append((f"mul.wide.{name} %d, %a, %b;", wide, python(lambda x, y: x * y, wide, a, b)))
    if name.startswith("s"):
        cases.append((f"neg.{name} %d, %a;", dtype, python(lambda x: -x, dtype, a)))
        cases.append((f"abs.{name} %d, %a;", dtype, python(abs, dtype, a)))
    for operator, function in {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal,
    }.items():  # fmt: skip
        cases.append((f"setp.{operator}.{name} %d, %a, %b;", np.bool_, function(a, b)))
    amount = np.minimum(typed(ints(32, 4), U32), 70)
    cases.append((f"shl.b{bits} %d, %a, %n;", dtype, python(lambda x, n: x << n, dtype, a, amount)))
    cases.append((f"shr.{name} %d, %a, %n;", dtype, python(lambda x, n: x >> n, dtype, a, amount)))
    check_table(cases, {"a": a, "b": b, "c": c, "n": amount})


def reference_bfe(value: int, position: int, length: int, bits: int, signed: bool) -> int:
    """The loop of PTX ISA 9.7.1.19."""
    position, length = position & 0xFF, length & 0xFF
    top = bits - 1
    sign = 0 if not signed or length == 0 else value >> min(position + length - 1, top) & 1
    result = 0
    for i in range(bits):
        result |= (value >> (position + i) & 1 if i < length and position + i <= top else sign) << i
    return result


def reference_bfi(a: int, b: int, position: int, length: int, bits: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    for i in range(length):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


def test_bits() -> None:
    a, b, c = (typed(np.roll(ints(32, s), s), U32) for s in (1, 2, 3))
    wide = typed(ints(64, 5), U64)
    n, m = (RNG.integers(0, 40, 32).astype(U32) for _ in range(2))
    selector = RNG.integers(0, 1 << 16, 32).astype(U32)

    def prmt(x: int, y: int, s: int) -> int:
        octets = (y << 32 | x).to_bytes(8, "little")
        result = 0
        for i in range(4):
            nibble = s >> 4 * i & 15
            octet = octets[nibble & 7]
            result |= (0xFF * (octet >> 7) if nibble & 8 else octet) << 8 * i
        return result

    cases = [
        ("and.b32 %d, %a, %b;", U32, a & b),
        ("or.b32 %d, %a, %b;", U32, a | b),
        ("xor.b32 %d, %a, %b;", U32, a ^ b),
        ("not.b32 %d, %a;", U32, ~a),
        ("cnot.b32 %d, %a;", U32, (a == 0).astype(U32)),
        ("lop3.b32 %d, %a, %b, %c, 0xE8;", U32, (a & b) | (a & c) | (b & c)),
        ("lop3.b32 %d, %a, %b, %c, 0x96;", U32, a ^ b ^ c),
        ("lop3.b32 %d, %a, %b, %c, 0xCA;", U32, (a & b) | (~a & c)),
        ("bfe.u32 %d, %a, %n, %m;", U32, python(lambda x, p, k: reference_bfe(x, p, k, 32, False), U32, a, n, m)),
        ("bfe.s32 %d, %a, %n, %m;", U32, python(lambda x, p, k: reference_bfe(x, p, k, 32, True), U32, a, n, m)),
        ("bfe.s64 %d, %w, %n, %m;", U64, python(lambda x, p, k: reference_bfe(x, p, k, 64, True), U64, wide, n, m)),
        ("bfi.b32 %d, %a, %b, %n, %m;", U32, python(lambda x, y, p, k: reference_bfi(x, y, p, k, 32), U32, a, b, n, m)),
        ("prmt.b32 %d, %a, %b, %s;", U32, python(prmt, U32, a, b, selector)),
        ("prmt.b32.rc8 %d, %a, %b, %m;", U32, python(lambda x, k: (x >> 8 * (k & 3) & 255) * 0x01010101, U32, a, m)),
        ("shf.l.wrap.b32 %d, %a, %b, %n;", U32,
         python(lambda x, y, k: ((y << 32 | x) << (k & 31)) >> 32, U32, a, b, n)),
        ("shf.r.wrap.b32 %d, %a, %b, %n;", U32, python(lambda x, y, k: (y << 32 | x) >> (k & 31), U32, a, b, n)),
        ("shf.l.clamp.b32 %d, %a, %b, %n;", U32,
         python(lambda x, y, k: ((y << 32 | x) << min(k, 32)) >> 32, U32, a, b, n)),
        ("shf.r.clamp.b32 %d, %a, %b, %n;", U32, python(lambda x, y, k: (y << 32 | x) >> min(k, 32), U32, a, b, n)),
        ("popc.b32 %d, %a;", U32, python(lambda x: x.bit_count(), U32, a)),
        ("popc.b64 %d, %w;", U32, python(lambda x: x.bit_count(), U32, wide)),
        ("clz.b32 %d, %a;", U32, python(lambda x: 32 - x.bit_length(), U32, a)),
        ("clz.b64 %d, %w;", U32, python(lambda x: 64 - x.bit_length(), U32, wide)),
        ("bfind.u32 %d, %a;", U32, python(lambda x: x.bit_length() - 1, U32, a)),
        ("bfind.s32 %d, %a;", U32,
         python(lambda x: (~x if x < 0 else x).bit_length() - 1, U32, a.view(I32))),
        ("brev.b32 %d, %a;", U32, python(lambda x: int(f"{x:032b}"[::-1], 2), U32, a)),
        ("bmsk.clamp.b32 %d, %n, %m;", U32, python(lambda p, k: ((1 << min(k, 32)) - 1) << p, U32, n, m)),
        ("sad.u32 %d, %a, %b, %c;", U32, python(lambda x, y, z: abs(x - y) + z, U32, a, b, c)),
        ("mul24.lo.u32 %d, %a, %b;", U32, python(lambda x, y: (x & 0xFFFFFF) * (y & 0xFFFFFF), U32, a, b)),
    ]  # fmt: skip
    check_table(cases, {"a": a, "b": b, "c": c, "n": n, "m": m, "s": selector, "w": wide})


def test_dot_products_of_bytes_and_carries() -> None:
    a, b, c = (typed(np.roll(ints(32, s), s), U32) for s in (1, 2, 3))
    octets = [v.astype("<u4")[:, None].view(np.uint8).astype(int) for v in (a, b)]
    signed = [v.astype("<u4")[:, None].view(np.int8).astype(int) for v in (a, b)]
    pairs = a[:, None].view(np.int16).astype(int)
    check_table(
        [
            ("dp4a.u32.u32 %d, %a, %b, %c;", U32, typed((octets[0] * octets[1]).sum(1) + c.astype(int), U32)),
            ("dp4a.s32.s32 %d, %a, %b, %c;", U32, typed((signed[0] * signed[1]).sum(1) + c.astype(int), U32)),
            ("dp2a.lo.s32.u32 %d, %a, %b, %c;", U32, typed((pairs * octets[1][:, :2]).sum(1) + c.astype(int), U32)),
            ("dp2a.hi.s32.s32 %d, %a, %b, %c;", U32, typed((pairs * signed[1][:, 2:]).sum(1) + c.astype(int), U32)),
            ("{.reg .u32 t; add.cc.u32 t, %a, %b; addc.u32 %d, %c, 0;}", U32,
             python(lambda x, y, z: z + (x + y >> 32), U32, a, b, c)),
            ("{.reg .u32 t; sub.cc.u32 t, %a, %b; subc.u32 %d, %c, 0;}", U32,
             python(lambda x, y, z: z - (x < y), U32, a, b, c)),
        ],
        {"a": a, "b": b, "c": c},
    )  # fmt: skip
