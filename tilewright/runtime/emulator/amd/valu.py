"""The frame of vector ALU instructions: read sources in their kinds, compute, write under EXEC.

The tables of the modules `valu_...` fill it in
(ISA chapter 6, "Vector ALU Operations").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.mode import DX10_CLAMP, Exactly
from tilewright.runtime.emulator.amd.mode import compute as compute_in_mode
from tilewright.runtime.emulator.amd.operands import KINDS, Array, Kind
from tilewright.runtime.emulator.amd.registry import ARCHITECTURES, define
from tilewright.runtime.emulator.amd.state import WaveState

Function = Callable[..., Any]

_OUTPUT_SCALE = {"mul:2": 2.0, "mul:4": 4.0, "div:2": 0.5}


def output_modifiers(state: WaveState, inst: Instruction, value: Array) -> Array:
    """OMOD and CLAMP of a float result (ISA chapter 6, "Output modifiers"). NaN becomes 0 if MODE.DX10_CLAMP is set."""
    for key in ("mul", "div"):
        if key in inst.modifiers:
            value = value * value.dtype.type(_OUTPUT_SCALE[f"{key}:{inst.modifiers[key]}"])
    if inst.flag("clamp"):
        value = clamped(state, value)
    return value


def clamped(state: WaveState, value: Array) -> Array:
    """To [0, 1]."""
    zero = value.dtype.type(0)
    return np.where(np.isnan(value), np.where(state.mode_bit(DX10_CLAMP), zero, value), np.clip(value, 0, 1))


def saturating(operation: Function, dtype: Any) -> Function:
    """The CLAMP form of an integer add or subtract."""
    info = np.iinfo(dtype)

    def compute(a: Array, b: Array) -> Array:
        wide = operation(a.astype(np.int64), b.astype(np.int64))
        return np.clip(wide, int(info.min), int(info.max)).astype(dtype)

    return compute


def valu(
    name: str,
    signature: str,
    function: Function,
    *,
    archs: tuple[str, ...] = ARCHITECTURES,
    preserves_high: bool = False,
    clamp: Function | None = None,
    halves: str = "mixed",
    exactly: Exactly | None = None,
) -> None:
    """Enter ``name`` with a signature such as "u32 u32 -> u32".

    A source ``old`` is the destination before the instruction, ``vcc`` the VCC mask; every other
    takes the next operand. ``preserves_high``: a 16-bit result leaves the other half of the register
    (and OP_SEL[3] picks the half). ``clamp`` is what an integer instruction computes instead under
    CLAMP. ``halves``: which halves of 64-bit sources those of the result depend on (`WaveState`).
    ``exactly``: how a float result is rounded in other modes than to nearest.
    """
    sources, _, result = (part.strip() for part in signature.partition("->"))
    kinds = sources.split()
    result_kind = KINDS[result]
    plain: tuple[Kind, ...] = tuple(KINDS[kind] for kind in kinds if kind in KINDS)
    only_plain = len(plain) == len(kinds)
    numbers = [KINDS.get(result if kind == "old" else kind) for kind in kinds]
    on_floats = any(kind.is_float for kind in (*numbers, result_kind) if kind is not None)
    selects_halves = any(kind.bits == 16 for kind in (*plain, result_kind))

    def execute(state: WaveState, inst: Instruction) -> None:
        operands = inst.operands
        selects = inst.bits("op_sel", 4, 0) if selects_halves and "op_sel" in inst.modifiers else None
        if only_plain and selects is None:
            arguments = [state.vector(operands[i + 1], kind) for i, kind in enumerate(plain)]
        else:
            arguments = _special_sources(state, inst, kinds, result_kind, selects)
        compute = clamp if clamp is not None and "clamp" in inst.modifiers else function
        if on_floats and not state.plain_mode:
            value = compute_in_mode(state, numbers, result_kind, compute, exactly, arguments)
        else:
            value = np.asarray(compute(*arguments))
        if inst.modifiers and result_kind.is_float:
            value = output_modifiers(state, inst, value.astype(result_kind.dtype, copy=False))
        high = None
        if result_kind.bits == 16 and (preserves_high or selects is not None):
            high = bool(selects[len(plain)]) if selects is not None and len(selects) > len(plain) else False
        state.write_vector(operands[0], result_kind, value, high, halves)

    define(name, execute, archs=archs)


def _special_sources(
    state: WaveState, inst: Instruction, kinds: list[str], result_kind: Kind, selects: list[int] | None
) -> list[Array]:
    arguments = []
    position = 1
    for kind in kinds:
        if kind == "old":
            arguments.append(state.vector(inst.operands[0], result_kind))
        elif kind == "vcc":
            arguments.append(state.vcc_mask())
        else:
            high = bool(selects[position - 1]) if selects is not None else False
            arguments.append(state.vector(inst.operands[position], KINDS[kind], high))
            position += 1
    return arguments
