"""CDNA4 f8f6f4 matrix instructions, with and without block scales (CDNA4 ISA chapter 7).

CBSZ and BLGP name the formats of A and B. Each lane holds 32 elements of a row. In 6- and 4-bit
formats they are consecutive in K; in 8-bit formats they are two runs of 16, in the two halves of K.
(Where both operands have one format and no scales, the result does not depend on that.) A scale is
an E8M0 octet for 32 consecutive elements of K of one row: lane ``row + rows * b`` has that of block b.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.mfma import Shape, accumulate, multiply
from tilewright.runtime.emulator.amd.operands import Array, Operand
from tilewright.runtime.emulator.amd.registry import Handler, define
from tilewright.runtime.emulator.amd.state import WaveState

_U32, _F32 = np.uint32, np.float32
_ITEMS = 32

#: CBSZ/BLGP code -> (bits, format)
_FORMATS: tuple[tuple[int, Any], ...] = (
    (8, ml_dtypes.float8_e4m3fn),
    (8, ml_dtypes.float8_e5m2),
    (6, ml_dtypes.float6_e2m3fn),
    (6, ml_dtypes.float6_e3m2fn),
    (4, ml_dtypes.float4_e2m1fn),
)
_TABLES = [np.arange(1 << bits, dtype=np.uint8).view(dtype).astype(_F32) for bits, dtype in _FORMATS]


def unpack_elements(words: Array, code: int) -> Array:
    """uint32 words [..., 8, 6 or 4] -> 32 float32, by the format ``code``; the first in the lowest bits."""
    bits, _ = _FORMATS[code]
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    groups = stream.reshape(*words.shape[:-1], _ITEMS, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    value: Array = _TABLES[code][(groups * weights).sum(axis=-1, dtype=np.uint8)]
    return value


def _matrix(state: WaveState, operand: Operand, code: int, rows: int, k: int) -> Array:
    """A, or B transposed: float32 [waves, 1, rows, K]."""
    bits, _ = _FORMATS[code]
    words = np.stack([np.broadcast_to(state.raw(operand, part), (state.count, 64)) for part in range(bits)], axis=-1)
    elements = unpack_elements(words, code)
    lane_groups = k // _ITEMS
    if bits == 8:
        split = elements.reshape(state.count, lane_groups, rows, 2, 16).transpose(0, 2, 3, 1, 4)
    else:
        split = elements.reshape(state.count, lane_groups, rows, _ITEMS).transpose(0, 2, 1, 3)
    return split.reshape(state.count, 1, rows, k)


def _scales(state: WaveState, operand: Operand, octet: int, rows: int, k: int) -> Array:
    """The factors of each element: float32 [waves, 1, rows, K]."""
    raw = np.broadcast_to(state.raw(operand), (state.count, 64))
    exponent = ((raw >> _U32(8 * octet)) & _U32(255)).astype(np.int32)
    factor = np.where(exponent == 255, np.nan, np.ldexp(1.0, exponent - 127)).astype(_F32)
    by_block = factor.reshape(state.count, k // _ITEMS, rows).transpose(0, 2, 1)
    return np.repeat(by_block, _ITEMS, axis=2)[:, None]


def _handler(m: int, k: int, scaled: bool) -> Handler:
    shape = Shape(m, m, k, 1, "f8f6f4", "f8f6f4", "f32")

    def execute(state: WaveState, inst: Instruction) -> None:
        a = _matrix(state, inst.operands[1], inst.number("cbsz"), m, k)
        b = _matrix(state, inst.operands[2], inst.number("blgp"), m, k)
        if scaled:
            low, high = inst.bits("op_sel", 2, 0), inst.bits("op_sel_hi", 2, 0)
            a = a * _scales(state, inst.operands[4], low[0] + 2 * high[0], m, k)
            b = b * _scales(state, inst.operands[5], low[1] + 2 * high[1], m, k)
        accumulate(state, inst.operands[0], inst.operands[3], multiply(a, b), shape)

    return execute


for _m, _k in ((16, 128), (32, 64)):
    define(f"v_mfma_f32_{_m}x{_m}x{_k}_f8f6f4", _handler(_m, _k, False), archs=("gfx950",))
    define(f"v_mfma_scale_f32_{_m}x{_m}x{_k}_f8f6f4", _handler(_m, _k, True), archs=("gfx950",))
