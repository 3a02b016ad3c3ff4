"""Matrix fragments: which lane and register holds which element (PTX ISA 9.7.14.5, 9.7.15.5).

A register of 32 (or 64) bits holds ``per`` elements side by side. With g = lane / 4 and t = lane % 4,
- A (16 rows): register r, element e: row g + 8 (r % 2), column per t + e + 4 per (r / 2);
- B (8 columns): register r, element e: row per t + e + 4 per r, column g;
- C and D (n columns, 32-bit): value i: row g + 8 (i / 2 % 2), column 2 t + i % 2 + 8 (i / 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tilewright.runtime.emulator.nvidia.numerics import bf16_to_f32, fp8_to_f32
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import LANES, Array, Type

_LANE = np.arange(LANES)


def a_places(per: int, registers: int) -> tuple[Array, Array]:
    """Rows and columns of A's elements, each [32, registers * per]."""
    r, e = np.divmod(np.arange(registers * per), per)
    row = (_LANE // 4)[:, None] + 8 * (r % 2)
    column = per * (_LANE % 4)[:, None] + e + 4 * per * (r // 2)
    return np.broadcast_to(row, column.shape), column


def b_places(per: int, registers: int) -> tuple[Array, Array]:
    """Rows (k) and columns (n) of B's elements, each [32, registers * per]."""
    r, e = np.divmod(np.arange(registers * per), per)
    row = per * (_LANE % 4)[:, None] + e + 4 * per * r
    return row, np.broadcast_to((_LANE // 4)[:, None], row.shape)


def c_places(values: int) -> tuple[Array, Array]:
    """Rows and columns of C's and D's values, each [32, values]."""
    i = np.arange(values)
    row = (_LANE // 4)[:, None] + 8 * (i // 2 % 2)
    column = 2 * (_LANE % 4)[:, None] + i % 2 + 8 * (i // 4)
    return row, column


def read_registers(state: State, registers: Sequence[int]) -> tuple[Array, Array | None]:
    """Bits [selected, 32, registers], and where they are undefined (None: nowhere). Clears the taint."""
    values, undefined = [], None
    for position, register in enumerate(registers):
        state.take_taint()
        values.append(state.read(register))
        taint = state.take_taint()
        if taint is not None:
            if undefined is None:
                undefined = np.zeros((state.count, LANES, len(registers)), np.bool_)
            undefined[..., position] = taint
    return np.stack(values, axis=-1), undefined


def elements(bits: Array, type_: Type) -> Array:
    """[..., registers] of 32 or 64 bits -> [..., elements] of an element type, still as bits."""
    return np.ascontiguousarray(bits).view(type_.unsigned)


def as_float64(bits: Array, type_: Type) -> Array:
    """Element bits as float64. tf32 ignores the low 13 bits of its float32."""
    if type_.name == "bf16":
        return bf16_to_f32(bits).astype(np.float64)
    if type_.name in ("e4m3", "e5m2"):
        return fp8_to_f32(bits, type_.name).astype(np.float64)
    if type_.name == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return bits.view(type_.dtype).astype(np.float64)


def scatter(values: Array, places: tuple[Array, Array], shape: tuple[int, int]) -> Array:
    """[warps, 32, n] -> matrices [warps, rows, columns]."""
    matrix = np.zeros((values.shape[0], *shape), values.dtype)
    matrix[:, places[0], places[1]] = values
    return matrix


def saturated(value: Array, clamps: bool) -> Array:
    """float64 integers -> int32 patterns (uint32): wrapped, or clamped by .satfinite."""
    whole = value.astype(np.int64)
    if clamps:
        whole = np.clip(whole, -(1 << 31), (1 << 31) - 1)
    return (whole & 0xFFFFFFFF).astype(np.uint32)
