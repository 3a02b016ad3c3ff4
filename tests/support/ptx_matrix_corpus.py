"""Matrix instructions on random operands, one product per block, for comparing the emulator with a real GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from ptx_snippets import wrap

NUMPY: dict[str, Any] = {
    "bf16": ml_dtypes.bfloat16, "f16": np.float16, "tf32": np.float32, "f32": np.float32, "f64": np.float64,
    "s8": np.int8, "u8": np.uint8, "s32": np.int32, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
#: (shape, type of C and D, type of A and B)
MMA = (
    ("m16n8k8", "f32", "bf16"), ("m16n8k16", "f32", "bf16"), ("m16n8k8", "f32", "f16"), ("m16n8k16", "f32", "f16"),
    ("m16n8k16", "f16", "f16"), ("m16n8k4", "f32", "tf32"), ("m16n8k8", "f32", "tf32"), ("m16n8k16", "s32", "s8"),
    ("m16n8k32", "s32", "s8"), ("m16n8k32", "s32", "u8"), ("m16n8k32", "f32", "e4m3"), ("m16n8k32", "f32", "e5m2"),
    ("m8n8k4", "f64", "f64"), ("m16n8k4", "f64", "f64"), ("m16n8k8", "f64", "f64"), ("m16n8k16", "f64", "f64"),
)  # fmt: skip
#: (type of D, type of A and B)
WGMMA = (
    ("f32", "bf16"), ("f32", "f16"), ("f16", "f16"), ("f32", "tf32"), ("f32", "e4m3"), ("f32", "e5m2"), ("s32", "s8"),
    ("s32", "u8"),
)  # fmt: skip
#: N of the wgmma cases, and the instructions of one accumulation
COLUMNS, STEPS = 16, 3
BLOCKS = 24


@dataclass(frozen=True)
class Product:
    """``blocks`` times D = A B + C: the text, its arrays (the last one is D), and the operands as matrices.

    ``a`` [blocks, m, k], ``b`` [blocks, k, n], ``c`` and the result of `unpack` [blocks, m, n]. A wgmma case adds up
    ``steps`` instructions of k / steps each.
    """

    name: str
    ptx: str
    arrays: list[np.ndarray]
    threads: int
    shared_bytes: int
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    steps: int
    kind: str

    def unpack(self, out: np.ndarray) -> np.ndarray:
        """The matrices of D from its fragments [blocks, threads, values] (PTX ISA, "Matrix Fragments")."""
        result = np.zeros((len(out), *self.c.shape[1:]), out.dtype)
        thread = np.arange(self.threads)
        warp, lane = thread // 32, thread % 32
        for i in range(out.shape[2]):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            result[:, row, 8 * (i // 4) + lane % 4 * 2 + i % 2] = out[:, :, i]
        return result


def values(name: str, shape: tuple[int, ...], seed: int, operands: str) -> np.ndarray:
    """ "integers": small ones, whose sums are exact in every type; "normal": random normal over some binades;
    "extreme": every finite bit pattern, subnormal and large ones among them.
    """
    rng = np.random.default_rng(seed)
    dtype = np.dtype(NUMPY[name])
    if name in ("s8", "u8", "s32"):
        return rng.integers(0 if name == "u8" else -100, 100, shape).astype(dtype)
    if operands == "integers":
        return rng.integers(-4, 5, shape).astype(dtype)
    if operands == "extreme":
        data = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]
        with np.errstate(invalid="ignore"):
            data = np.where(np.isfinite(data.astype(np.float64)), data, dtype.type(1))
    else:
        data = (rng.standard_normal(shape) * np.exp2(rng.integers(-3, 4, shape))).astype(dtype)
    return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) if name == "tf32" else data


def mma(shape: str, result: str, kind: str, operands: str) -> Product:
    """mma.sync, operands from global memory."""
    m, n, k = (int(part) for part in re.findall(r"\d+", shape))
    a = values(kind, (BLOCKS, m, k), 1, operands)
    b, c = values(kind, (BLOCKS, k, n), 2, operands), values(result, (BLOCKS, m, n), 3, operands)
    width = 64 if kind == "f64" else 32
    per = width // 8 // a.itemsize
    fragments = [_fragment(a, per, "a"), _fragment(b, per, "b"), _fragment(c, 2, "c")]
    out = np.zeros_like(fragments[2])
    size = width // 8
    words = [f[0, 0].nbytes // size for f in fragments]
    names = [[f"%{letter}{i}" for i in range(count)] for letter, count in zip("abc", words, strict=True)]
    results = [f"%d{i}" for i in range(words[2])]
    body = [f".reg .b{width} {', '.join(part)};" for part in [*names, results]]
    body.append(".reg .b64 %at, %off; .reg .b32 %who; mov.u32 %who, %ctaid.x; mad.lo.u32 %who, %who, 32, %lane;")
    for number, part in enumerate(names):
        body.append(f"mul.wide.u32 %off, %who, {len(part) * size}; add.u64 %at, %ptr{number}, %off;")
        body += [f"ld.global.b{width} {register}, [%at+{i * size}];" for i, register in enumerate(part)]
    lists = ", ".join("{" + ", ".join(part) + "}" for part in (results, *names))
    body.append(f"mma.sync.aligned.{shape}.row.col.{result}.{kind}.{kind}.{result} {lists};")
    body.append(f"mul.wide.u32 %off, %who, {words[2] * size}; add.u64 %at, %ptr3, %off;")
    body += [f"st.global.b{width} [%at+{i * size}], {register};" for i, register in enumerate(results)]
    name = f"mma.sync.{shape}.{result}.{kind}"
    return Product(name, wrap("\n".join(body), 4), [*fragments, out], 32, 0, a, b, c, 1, kind)


def _fragment(matrix: np.ndarray, per: int, which: str) -> np.ndarray:
    """[blocks, 32, values]: what each lane holds of A [m, k], B [k, n] or C [m, n]."""
    _blocks, rows, columns = matrix.shape
    count = rows * columns // 32
    lane, i = np.meshgrid(np.arange(32), np.arange(count), indexing="ij")
    group, thread, register, part = lane // 4, lane % 4, i // per, i % per
    if which == "b":
        row, column = thread * per + part + 4 * per * register, group
    elif which == "a":
        row = group + 8 * (register % 2) if rows == 16 else group
        column = thread * per + part + 4 * per * (register // 2)
    else:
        row, column = group + 8 * (i // 2), thread * 2 + i % 2
    return np.ascontiguousarray(matrix[:, row, column])


def wgmma(result: str, kind: str, operands: str) -> Product:
    """wgmma with both operands in shared memory, K-major without a swizzle, ``STEPS`` instructions onto zero."""
    item = np.dtype(NUMPY[kind]).itemsize
    k = 32 // item
    length = k * STEPS
    a, b = values(kind, (BLOCKS, 64, length), 1, operands), values(kind, (BLOCKS, COLUMNS, length), 2, operands)
    image = np.concatenate([_cores(a), _cores(b)], axis=1)
    registers = COLUMNS // 2 if np.dtype(NUMPY[result]).itemsize == 4 else COLUMNS // 4
    body = [copy_in(image.shape[1], image.shape[1])]
    vector = [f"%d{i}" for i in range(registers)]
    body.append(f".reg .b32 {', '.join(vector)}; wgmma.fence.sync.aligned;")
    # grains of 8 rows x 16 bytes: the next 16 bytes of k 128 further, the next 8 rows a whole line of grains
    line = length * item // 16 * 128
    for step in range(STEPS):
        for name, base in (("%adesc", 0), ("%bdesc", 64 * length * item)):
            constant = (base + step * 256) >> 4 | 128 >> 4 << 16 | line >> 4 << 32
            body.append("{ .reg .b32 s; .reg .b64 t; shr.u32 s, %sm, 4; cvt.u64.u32 t, s; "
                        f"add.u64 {name}, t, {constant}; }}")  # fmt: skip
        scales = "" if result == "s32" else ", 1, 1" + (", 0, 0" if item == 2 else "")
        body.append(
            f"wgmma.mma_async.sync.aligned.m64n{COLUMNS}k{k}.{result}.{kind}.{kind} {{{', '.join(vector)}}}, %adesc, "
            f"%bdesc, {'%no' if step == 0 else '%yes'}{scales};"
        )
    body.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;")
    body.append(f"mad.lo.u32 %step, %block, 128, %thread; mul.wide.u32 %wide, %step, {4 * registers};")
    body.append("add.u64 %from, %ptr1, %wide;")
    body += [f"st.global.b32 [%from+{4 * i}], {register};" for i, register in enumerate(vector)]
    out = np.zeros((BLOCKS, 128, COLUMNS // 2), NUMPY[result])
    c = np.zeros((BLOCKS, 64, COLUMNS), NUMPY[result])
    name = f"wgmma.m64n{COLUMNS}k{k}.{result}.{kind}"
    ptx = wrap("\n".join(body), 2)
    return Product(name, ptx, [image, out], 128, image.shape[1], a, b.transpose(0, 2, 1), c, STEPS, kind)


def _cores(matrix: np.ndarray) -> np.ndarray:
    """[blocks, rows, k] as core matrices of 8 rows x 16 bytes, those along k next to each other: [blocks, bytes]."""
    blocks, rows, _ = matrix.shape
    octets = np.ascontiguousarray(matrix).view(np.uint8).reshape(blocks, rows // 8, 8, -1, 16)
    return np.ascontiguousarray(octets.transpose(0, 1, 3, 2, 4)).reshape(blocks, -1)


def copy_in(size: int, apart: int = 0) -> str:
    """PTX: the block's image of ``size`` bytes, at %ptr0 and ``apart`` bytes for each block, to shared memory.

    Declares %yes and %no (predicates of that value), %adesc and %bdesc, and scratch.
    """
    return _COPY_IN.replace("WORDS", str(size // 4)).replace("BYTES", str(apart))


_COPY_IN = """
    .reg .b32 %at, %w, %step, %block; .reg .b64 %from, %wide, %image; .reg .pred %more, %yes, %no;
    .reg .b64 %adesc, %bdesc;
    setp.eq.u32 %yes, 0, 0; setp.ne.u32 %no, 0, 0;
    mov.u32 %block, %ctaid.x; mul.wide.u32 %wide, %block, BYTES; add.u64 %image, %ptr0, %wide;
    mov.b32 %step, %thread;
copy:
    setp.lt.u32 %more, %step, WORDS;
    @!%more bra copied;
    mul.wide.u32 %wide, %step, 4; add.u64 %from, %image, %wide; ld.global.b32 %w, [%from];
    shl.b32 %at, %step, 2; add.u32 %at, %at, %sm; st.shared.b32 [%at], %w;
    add.u32 %step, %step, 128;
    bra copy;
copied:
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""


def products(operands: str) -> list[Product]:
    """All of them, on operands as `values` names them."""
    return [mma(*case, operands) for case in MMA] + [wgmma(*case, operands) for case in WGMMA]
