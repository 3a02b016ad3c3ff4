"""Matrix instructions of a warp (PTX ISA 9.7.14): mma.sync, ldmatrix, stmatrix, movmatrix.

Sums are rounded as in ``tensor_core``.
"""

from __future__ import annotations

import re
from contextlib import nullcontext

import numpy as np

from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.fragments import (
    a_places,
    as_float64,
    b_places,
    c_places,
    elements,
    read_registers,
    saturated,
    scatter,
)
from tilewright.runtime.emulator.nvidia.numerics import canonical_nan
from tilewright.runtime.emulator.nvidia.operands import address, registers
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.spaces import SHARED_WINDOW
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.tensor_core import multiply
from tilewright.runtime.emulator.nvidia.types import LANES, Array, Type

_LANE = np.arange(LANES)
#: k that m16n8 takes, by type of A
_SHAPES: dict[str, tuple[int, ...]] = {
    "f16": (8, 16),
    "bf16": (8, 16),
    "tf32": (4, 8),
    "s8": (16, 32),
    "u8": (16, 32),
    "e4m3": (16, 32),
    "e5m2": (16, 32),
    "f64": (4, 8, 16),
}
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")


def take_shape(inst: Instruction) -> tuple[int, int, int]:
    """Take the modifier m..n..k.. off."""
    for modifier in inst.modifiers:
        match = _SHAPE.fullmatch(modifier)
        if match:
            inst.modifiers.remove(modifier)
            return int(match[1]), int(match[2]), int(match[3])
    raise Problem("needs a shape")


@instruction("mma.sync", gathers="warp")
def _mma(inst: Instruction) -> Execute:
    """D = A B + C; A by rows, B by columns."""
    inst.flag("aligned")
    m, n, k = take_shape(inst)
    if inst.flag("row") and inst.flag("row"):
        raise Problem("a row-major B is not implemented")
    inst.flag("col")
    clamps = inst.flag("satfinite")
    d_type, a_type, b_type, c_type = inst.types()
    eight = (m, n, k) == (8, 8, 4) and a_type.name == "f64"
    if not eight and not ((m, n) == (16, 8) and k in _SHAPES.get(a_type.name, ())):
        raise Problem("this shape is not implemented for the type")
    if d_type.name not in ("f16", "f32", "f64", "s32") or d_type != c_type:
        raise Problem("C and D must both be f16, f32, f64 or s32")
    width = 64 if a_type.name == "f64" else 32
    per = width // a_type.bits
    a_count, b_count = m * k // per // LANES, n * k // per // LANES
    a_at, b_at = a_places(per, a_count), b_places(per, b_count)
    c_at = c_places(m * n // LANES)
    c_width = max(32, c_type.bits)
    lists = [
        registers(inst, operand, w) for operand, w in zip(inst.operands, (c_width, width, width, c_width), strict=True)
    ]
    d_registers, a_registers, b_registers, c_registers = lists
    sizes = [m * n * c_type.bits // c_width // LANES, a_count, b_count]
    if [len(d_registers), len(a_registers), len(b_registers)] != sizes or len(c_registers) != sizes[0]:
        raise Problem(f"takes {sizes[0]}, {sizes[1]}, {sizes[2]} and {sizes[0]} registers")

    def execute(state: State) -> None:
        if (np.any(state.lanes, axis=1) & ~np.all(state.lanes, axis=1)).any():
            state.fault("mma needs all lanes of a warp")
        a_bits, a_unknown = read_registers(state, a_registers)
        b_bits, b_unknown = read_registers(state, b_registers)
        c_bits, c_unknown = read_registers(state, c_registers)
        a = scatter(as_float64(elements(a_bits, a_type), a_type), a_at, (m, k))
        b = scatter(as_float64(elements(b_bits, b_type), b_type), b_at, (k, n))
        c = scatter(as_float64(elements(c_bits, c_type), c_type), c_at, (m, n))
        product = multiply(a, b, c, a_type.name, d_type.name, asynchronous=False)[:, c_at[0], c_at[1]]
        result = round_result(product, d_type, clamps)
        unknown = _unknown(a_unknown, a_at, b_unknown, b_at, c_unknown, c_at, per, m, n)
        step = c_width // d_type.bits
        packed = np.ascontiguousarray(result).view(np.uint64 if c_width == 64 else np.uint32)
        for i, register in enumerate(d_registers):
            state.taint = None
            if unknown is not None:
                state.add_taint(np.any(unknown[..., i * step : (i + 1) * step], axis=-1))
            state.write(register, packed[..., i])

    return execute


def round_result(value: Array, type_: Type, clamps: bool) -> Array:
    """float64 -> the type of D."""
    if type_.name == "s32":
        return saturated(value, clamps)
    return canonical_nan(value.astype(type_.dtype))


def _unknown(
    a_unknown: Array | None,
    a_at: tuple[Array, Array],
    b_unknown: Array | None,
    b_at: tuple[Array, Array],
    c_unknown: Array | None,
    c_at: tuple[Array, Array],
    per: int,
    m: int,
    n: int,
) -> Array | None:
    """Values of D [warps, 32, values] that depend on undefined elements: rows of A, columns of B, C itself."""
    if a_unknown is None and b_unknown is None and c_unknown is None:
        return None
    count = next(u.shape[0] for u in (a_unknown, b_unknown, c_unknown) if u is not None)
    rows, columns = np.zeros((count, m), np.bool_), np.zeros((count, n), np.bool_)
    for unknown, index, marked in ((a_unknown, a_at[0], rows), (b_unknown, b_at[1], columns)):
        if unknown is not None:
            warp, lane, element = np.nonzero(np.repeat(unknown, per, axis=-1))
            marked[warp, index[lane, element]] = True
    result = rows[:, c_at[0]] | columns[:, c_at[1]]
    if c_unknown is not None:
        result |= np.repeat(c_unknown, result.shape[-1] // c_unknown.shape[-1], axis=-1)
    return result


# --- matrices of 8 x 8 16-bit elements ---------------------------------------------------------------


def _count(inst: Instruction) -> int:
    for modifier in ("sync", "aligned"):
        inst.flag(modifier)
    inst.one_of("m8n8")
    inst.one_of("shared", "shared::cta", default="")
    inst.type("b16")
    return int(inst.one_of("x1", "x2", "x4")[1])


def _rows(inst: Instruction, position: int, count: int) -> tuple[object, Array]:
    return address(inst, inst.operands[position]), np.arange(LANES) < 8 * count


@instruction("ldmatrix", gathers="warp")
def _load_matrix(inst: Instruction) -> Execute:
    """Lane 8 j + i addresses row i of matrix j; lane l receives elements 2 (l % 4), +1 of row l / 4 (9.7.14.5.15)."""
    transposed, count = inst.flag("trans"), _count(inst)
    numbers, where = registers(inst, inst.operands[0]), address(inst, inst.operands[1])
    if len(numbers) != count:
        raise Problem(f"takes {count} registers")
    givers = np.arange(LANES) < 8 * count

    def execute(state: State) -> None:
        at = np.broadcast_to(where(state), state.lanes.shape)
        at = np.where(at >= SHARED_WINDOW, at - SHARED_WINDOW, at)
        if state.taint is not None:
            state.taint = state.taint & givers
        shared = state.launch.shared
        with state.restricted(state.lanes & givers):
            offsets = shared.offsets(state, at, 16, "load")
            bad = shared.check_read(state, offsets, 16)
        data = shared.grains[offsets // 16].view(np.uint16).reshape(state.count, count, 8, 8)
        unknown = None
        if bad is not None:
            octets = shared.written.reshape(-1, 16)[offsets // 16].reshape(state.count, count, 8, 8, 2)
            unknown = ~octets.all(axis=-1)
        row, column = (_LANE % 4 * 2)[:, None] + np.arange(2), np.broadcast_to((_LANE // 4)[:, None], (LANES, 2))
        if not transposed:
            row, column = column, row
        for j, number in enumerate(numbers):
            state.taint = None
            if unknown is not None:
                state.add_taint(unknown[:, j][:, row, column].any(axis=-1))
            words = np.ascontiguousarray(data[:, j][:, row, column]).view(np.uint32)[..., 0]
            state.write(number, words)

    return execute


@instruction("stmatrix", gathers="warp")
def _store_matrix(inst: Instruction) -> Execute:
    """The reverse of ldmatrix (9.7.14.5.16)."""
    transposed, count = inst.flag("trans"), _count(inst)
    numbers, where = registers(inst, inst.operands[1]), address(inst, inst.operands[0])
    if len(numbers) != count:
        raise Problem(f"takes {count} registers")
    takers = np.arange(LANES) < 8 * count
    row, column = np.broadcast_to((_LANE // 4)[:, None], (LANES, 2)), (_LANE % 4 * 2)[:, None] + np.arange(2)
    if transposed:
        row, column = column, row

    def execute(state: State) -> None:
        at = np.broadcast_to(where(state), state.lanes.shape)
        at = np.where(at >= SHARED_WINDOW, at - SHARED_WINDOW, at)
        state.taint = None if state.taint is None else state.taint & takers
        state.require_defined("an address")
        bits, unknown = read_registers(state, numbers)
        data = np.zeros((state.count, count, 8, 8), np.uint16)
        known = np.ones(data.shape, np.bool_)
        for j in range(count):
            halves = np.ascontiguousarray(bits[..., j : j + 1]).view(np.uint16)
            data[:, j, row, column] = halves
            if unknown is not None:
                known[:, j, row, column] = ~unknown[..., j : j + 1]
        shared = state.launch.shared
        with state.restricted(state.lanes & takers):
            offsets = shared.offsets(state, at, 16, "store")
            shared.check_write(state, offsets, 16)
            octets, ordering = data.reshape(-1, 8).view(np.uint8), state.launch.ordering
            with (
                nullcontext()
                if ordering is None
                else ordering.storing(state, "shared", shared.data.reshape(-1), offsets, octets)
            ):
                shared.grains[offsets // 16] = octets
        if unknown is not None:
            shared.written.reshape(-1, 16)[offsets // 16] = np.repeat(known.reshape(-1, 8), 2, axis=1)

    return execute


@instruction("movmatrix", gathers="warp")
def _transpose_matrix(inst: Instruction) -> Execute:
    inst.flag("sync"), inst.flag("aligned"), inst.flag("m8n8"), inst.flag("trans")
    inst.type("b16")
    (target,), (origin,) = registers(inst, inst.operands[0]), registers(inst, inst.operands[1])

    def execute(state: State) -> None:
        bits, unknown = read_registers(state, [origin])
        matrix = np.ascontiguousarray(bits).view(np.uint16).reshape(state.count, 8, 8)
        words = np.ascontiguousarray(matrix.transpose(0, 2, 1)).view(np.uint32).reshape(state.count, LANES)
        if unknown is not None:
            state.add_taint(np.broadcast_to(np.any(unknown, axis=(1, 2))[:, None], state.lanes.shape))
        state.write(target, words)

    return execute
