"""Matrix instructions: D = A x B + C on one or more blocks held across the 64 lanes of a wave.

Register layout of an MxNxK instruction with B blocks (ISA chapter 7, "Matrix Arithmetic
Instructions", register mapping): with ``items`` consecutive elements of K in each lane,
A[i, k] of block b is item ``k % items`` of lane ``i + M * (b + B * (k // items))``, and B[k, j] alike
with j for i. Rows of D come in groups of H = 4 (1 for f64); group g of block b counts
``n = b * M / H + g``: its elements are items ``H * (n // L) ..`` of lane ``j + N * (n % L)``, with
L = 64 / N. EXEC is ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.mode import sources as sources_in_mode
from tilewright.runtime.emulator.amd.numerics import bf16_to_f32, fp8_to_f32
from tilewright.runtime.emulator.amd.operands import KINDS, Array, Operand, Where
from tilewright.runtime.emulator.amd.registry import ARCHITECTURES, Handler, define
from tilewright.runtime.emulator.amd.state import WaveState, join64, split64

_U16, _U32, _U64 = np.uint16, np.uint32, np.uint64
_ELEMENT_BYTES = {"f64": 8, "f32": 4, "xf32": 4, "f16": 2, "bf16": 2, "i8": 1, "fp8": 1, "bf8": 1}


@dataclass(frozen=True)
class Shape:
    """An instruction's shape, with its blocks, and the element formats of A, B and the result."""

    m: int
    n: int
    k: int
    blocks: int
    a: str
    b: str
    result: str

    @property
    def items(self) -> int:
        """Elements of A (or of B, as M = N) in each lane."""
        return self.m * self.k * self.blocks // 64

    @property
    def row_group(self) -> int:
        """Rows of D that lie together in a lane."""
        return 1 if self.result == "f64" else 4


def decode_elements(words: Array, name: str, fnuz: bool) -> Array:
    """uint32 words [..., n] -> elements [..., n * 4 / bytes] as float32, float64 or int32."""
    if name == "f32":
        return words.view(np.float32)
    if name == "xf32":
        return (words & _U32(0xFFFFE000)).view(np.float32)
    if name == "f64":
        return words.view(np.float64)
    if name == "f16":
        return words.view(np.float16).astype(np.float32)
    if name == "bf16":
        return bf16_to_f32(words.view(_U16))
    if name == "i8":
        return words.view(np.int8).astype(np.int32)
    return fp8_to_f32(words.view(np.uint8), name, fnuz)


def read_elements(state: WaveState, operand: Operand, name: str, items: int) -> Array:
    """What each lane holds of a source, [waves, 64, items], decoded."""
    registers = items * _ELEMENT_BYTES[name] // 4
    words = np.empty((state.count, 64, registers), _U32)
    for part in range(registers):
        words[..., part] = state.raw(operand, part)
    elements = decode_elements(words, name, state.memory.fnuz)
    # of narrower ones and of f64 no denormals are dropped (ISA section 7.4)
    return sources_in_mode(state, KINDS["f32"], elements)[0] if name in ("f32", "xf32") else elements


_LANE = np.arange(64)
#: BLGP -> the lane from which each lane's part of B is read (ISA section 7.1.6.3, "Permutations of BLGP values")
_LANES_OF_B: tuple[Array, ...] = (
    _LANE,
    _LANE % 32,
    _LANE % 32 + 32,
    (_LANE + 16) % 64,
    *(_LANE % 16 + 16 * group for group in range(4)),
)


def _matrix(state: WaveState, operand: Operand, name: str, rows: int, shape: Shape, pattern: int = 0) -> Array:
    """Source A (or B, transposed): [waves, blocks, rows, K]. ``pattern``: BLGP."""
    elements = read_elements(state, operand, name, shape.items)
    if pattern:
        elements = elements[:, _LANES_OF_B[pattern]]
    tiled = elements.reshape(state.count, shape.k // shape.items, shape.blocks, rows, shape.items)
    return tiled.transpose(0, 2, 3, 1, 4).reshape(state.count, shape.blocks, rows, shape.k)


def multiply(a: Array, b: Array) -> Array:
    """Batched A x B^T; integers exactly, through float64 where that is exact."""
    if a.dtype == np.int32:
        return np.matmul(a.astype(np.float64), b.astype(np.float64).swapaxes(-1, -2)).astype(np.int32)
    return np.matmul(a, b.swapaxes(-1, -2))


def accumulate(
    state: WaveState, destination: Operand, source: Operand, product: Array, shape: Shape, minus: bool = False
) -> None:
    """D = product + C (``source``), product [waves, blocks, M, N], in the register layout of D.

    ``minus``: product - C, of f64.
    """
    height = shape.row_group
    lane_groups = 64 // shape.n
    total_groups = shape.blocks * shape.m // height
    item_groups = total_groups // lane_groups
    # n = item_group * lane_groups + lane_group -> [items, waves, 64]
    ordered = product.reshape(state.count, item_groups, lane_groups, height, shape.n)
    ordered = ordered.transpose(1, 3, 0, 2, 4).reshape(item_groups * height, state.count, 64)
    results = []
    for item in range(item_groups * height):
        if shape.result == "f64":
            old64 = state.vector(source, KINDS["f64"]) if source.where is Where.CONSTANT else _pair(state, source, item)
            results += list(split64((ordered[item] - old64 if minus else ordered[item] + old64).view(_U64)))
        else:
            old = state.raw(source, item if source.where is Where.VECTOR else 0)
            dtype = np.int32 if shape.result == "i32" else np.float32
            results.append((old.view(dtype) + ordered[item].astype(dtype, copy=False)).view(_U32))
    with state.all_lanes():
        for part, value in enumerate(results):
            state.write_vgpr(destination.index + part, value)


def _pair(state: WaveState, operand: Operand, item: int) -> Array:
    return join64(state.raw(operand, 2 * item), state.raw(operand, 2 * item + 1)).view(np.float64)


def _broadcast_blocks(a: Array, inst: Instruction) -> Array:
    """CBSZ/ABID: groups of 2**cbsz blocks of A all use block ``abid`` of the group (ISA chapter 7)."""
    size = 1 << inst.number("cbsz")
    if size == 1:
        return a
    blocks = np.arange(a.shape[1])
    return a[:, blocks // size * size + inst.number("abid")]


def _mfma(shape: Shape) -> Handler:
    def execute(state: WaveState, inst: Instruction) -> None:
        a = _matrix(state, inst.operands[1], shape.a, shape.m, shape)
        b = _matrix(state, inst.operands[2], shape.b, shape.n, shape, inst.number("blgp"))
        # of f64, where BLGP's bits mean that (ISA section 7.1.6.4)
        sign_a, sign_b, sign_c = inst.bits("neg", 3, 0)
        a, b = (-a if sign_a else a), (-b if sign_b else b)
        if shape.blocks > 1:
            a = _broadcast_blocks(a, inst)
        accumulate(state, inst.operands[0], inst.operands[3], multiply(a, b), shape, bool(sign_c))

    return execute


#: mnemonic tail -> architectures. The tail is M x N x K [_blocksb] _types.
_CDNA3 = """
f32_32x32x1_2b_f32 f32_16x16x1_4b_f32 f32_4x4x1_16b_f32 f32_32x32x2_f32 f32_16x16x4_f32
f32_32x32x4_2b_f16 f32_16x16x4_4b_f16 f32_4x4x4_16b_f16 f32_32x32x8_f16 f32_16x16x16_f16
f32_32x32x4_2b_bf16 f32_16x16x4_4b_bf16 f32_4x4x4_16b_bf16 f32_32x32x8_bf16 f32_16x16x16_bf16
i32_32x32x4_2b_i8 i32_16x16x4_4b_i8 i32_4x4x4_16b_i8 i32_32x32x16_i8 i32_16x16x32_i8
f64_16x16x4_f64 f64_4x4x4_4b_f64
f32_16x16x32_fp8_fp8 f32_16x16x32_fp8_bf8 f32_16x16x32_bf8_fp8 f32_16x16x32_bf8_bf8
f32_32x32x16_fp8_fp8 f32_32x32x16_fp8_bf8 f32_32x32x16_bf8_fp8 f32_32x32x16_bf8_bf8
""".split()
_GFX942_ONLY = "f32_16x16x8_xf32 f32_32x32x4_xf32".split()
_CDNA4 = """
f32_16x16x32_f16 f32_32x32x16_f16 f32_16x16x32_bf16 f32_32x32x16_bf16 i32_16x16x64_i8 i32_32x32x32_i8
""".split()
_PATTERN = re.compile(r"^(f32|i32|f64)_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_(.+)$")


def parse_shape(tail: str) -> Shape:
    """The shape that a mnemonic names, without ``v_mfma_``."""
    match = _PATTERN.match(tail)
    if match is None:
        raise ValueError(f"no MFMA shape: {tail}")
    result, m, n, k, blocks, types = match.groups()
    first, _, second = types.partition("_")
    return Shape(int(m), int(n), int(k), int(blocks or 1), first, second or first, result)


def _enter(tail: str, archs: tuple[str, ...]) -> None:
    """Enter all spellings: CDNA3's, and the older ones without blocks and with the _1k of bf16."""
    shape = parse_shape(tail)
    handler = _mfma(shape)
    types = tail.split("_", 2)[2] if shape.blocks == 1 else tail.split("_", 3)[3]
    names = {f"v_mfma_{tail}"}
    dims = f"{shape.m}x{shape.n}x{shape.k}"
    blocks = f"_{shape.blocks}b" if shape.blocks > 1 else ""
    if types == "bf16":
        names |= {f"v_mfma_{shape.result}_{dims}{blocks}_bf16_1k", f"v_mfma_{shape.result}_{dims}bf16_1k"}
    names.add(f"v_mfma_{shape.result}_{dims}{types}")
    for name in names:
        define(name, handler, archs=archs)


for _tail in _CDNA3:
    _enter(_tail, ARCHITECTURES)
for _tail in _GFX942_ONLY:
    _enter(_tail, ("gfx942",))
for _tail in _CDNA4:
    _enter(_tail, ("gfx950",))
