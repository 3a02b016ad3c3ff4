"""Data across lanes: DPP and SDWA encodings, readlane/writelane, permutes of registers.

ISA chapter 6, "Sub-Dword Addressing (SDWA)" and "Data Parallel Processing (DPP)"; CDNA4 adds
v_permlane16_swap and v_permlane32_swap.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.operands import Array, Operand, Where
from tilewright.runtime.emulator.amd.registry import Handler, instruction
from tilewright.runtime.emulator.amd.state import LANES, WaveState

_U32 = np.uint32
_LANE = np.arange(LANES)
_ROW, _IN_ROW = _LANE // 16, _LANE % 16

#: DPP control -> the lane each lane reads; a negative lane is invalid
_DPP_SOURCES: dict[str, Callable[[list[int]], Array]] = {
    "quad_perm": lambda n: _LANE // 4 * 4 + np.array(n)[_LANE % 4],
    "row_shl": lambda n: np.where(_IN_ROW + n[0] < 16, _LANE + n[0], -1),
    "row_shr": lambda n: np.where(n[0] <= _IN_ROW, _LANE - n[0], -1),
    "row_ror": lambda n: _ROW * 16 + (_IN_ROW - n[0]) % 16,
    "wave_shl": lambda n: np.where(_LANE < 63, _LANE + 1, -1),
    "wave_rol": lambda n: (_LANE + 1) % LANES,
    "wave_shr": lambda n: _LANE - 1,
    "wave_ror": lambda n: (_LANE - 1) % LANES,
    "row_mirror": lambda n: _ROW * 16 + 15 - _IN_ROW,
    "row_half_mirror": lambda n: _LANE // 8 * 8 + 7 - _LANE % 8,
    "row_bcast": lambda n: np.where(n[0] < _LANE, _LANE // (n[0] + 1) * (n[0] + 1) - 1, -1),
    "row_newbcast": lambda n: _ROW * 16 + n[0],
}


def _first_source(inst: Instruction) -> int:
    """Position of src0: after the destination, and after the carry mask of v_add_co and its like."""
    return 2 if re.match(r"^v_(add|sub|subrev)c?_co_|^v_(addc|subb|subbrev)_co_", inst.name) else 1


def wrap_dpp(inst: Instruction) -> str | None:
    """Replace the handler by one that moves src0 across lanes first. Returns a problem, or None."""
    control = next((key for key in _DPP_SOURCES if key in inst.modifiers), None)
    if control is None or inst.handler is None:
        return "unknown DPP control"
    numbers = [int(part, 0) for part in re.findall(r"\w+", inst.modifiers[control])]
    lanes = _DPP_SOURCES[control](numbers)
    valid = lanes >= 0
    lanes = lanes.clip(0)
    rows, banks = inst.number("row_mask", 15), inst.number("bank_mask", 15)
    enabled = ((rows >> _ROW) & (banks >> (_IN_ROW // 4)) & 1).astype(np.bool_)
    zero_fill = "bound_ctrl" in inst.modifiers
    position = _first_source(inst)
    source = inst.operands[position]
    inst.handler = _dpp_handler(inst.handler, source, position, lanes, valid, enabled, zero_fill)
    return None


def _dpp_handler(
    inner: Handler, source: Operand, position: int, lanes: Array, valid: Array, enabled: Array, zero_fill: bool
) -> Handler:
    def moved(state: WaveState, part: int, usable: Array) -> Array:
        value = np.broadcast_to(state.raw(source, part), state.lanes.shape)[:, lanes]
        return np.where(usable, value, _U32(0))

    def execute(state: WaveState, inst: Instruction) -> None:
        usable = valid & state.lanes[:, lanes]  # reading a disabled lane is reading out of bounds
        value = moved(state, 0, usable)
        upper = moved(state, 1, usable) if source.count > 1 else None
        operand = replace(source, where=Where.VALUE, value=(value, upper))
        operands = list(inst.operands)
        operands[position] = operand
        written = enabled[None] & (np.ones_like(usable) if zero_fill else usable)
        with state.restricted(written):
            inner(state, replace(inst, operands=tuple(operands)))

    return execute


_SELECTORS = {
    **{f"BYTE_{n}": (8 * n, 8) for n in range(4)},
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
    "DWORD": (0, 32),
}


def wrap_sdwa(inst: Instruction) -> str | None:
    """Replace the handler by one that selects bytes or words of the sources and of the destination."""
    inner = inst.handler
    if inner is None:
        return "no handler"
    first = _first_source(inst)
    selects = []
    for number in (0, 1):
        name = inst.modifiers.get(f"src{number}_sel", "DWORD")
        if name not in _SELECTORS:
            return f"unknown SDWA selector {name}"
        selects.append(_SELECTORS[name])
    destination = inst.modifiers.get("dst_sel", "DWORD")
    unused = inst.modifiers.get("dst_unused", "UNUSED_PRESERVE")
    if destination not in _SELECTORS or unused not in ("UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"):
        return "unknown SDWA destination"

    def execute(state: WaveState, inst: Instruction) -> None:
        operands = list(inst.operands)
        for number, (shift, bits) in enumerate(selects):
            position = first + number
            if position >= len(operands) or operands[position].where is Where.CONSTANT:
                continue
            source = operands[position]
            value = _select(state.raw(source), shift, bits, source.sign_extend)
            operands[position] = replace(source, where=Where.VALUE, value=(value, None))
        target = operands[0]
        merges = target.where is Where.VECTOR and destination != "DWORD"
        old = state.vgprs[target.index][state.w].copy() if merges else None
        inner(state, replace(inst, operands=tuple(operands)))
        if old is not None:
            merged = _merge(old, state.vgprs[target.index][state.w], _SELECTORS[destination], unused)
            state.write_vgpr(target.index, merged)

    inst.handler = execute
    return None


def _select(raw: Array, shift: int, bits: int, signed: bool) -> Array:
    up = _U32(32 - shift - bits)
    if signed:
        return ((raw << up).view(np.int32) >> np.int32(32 - bits)).view(_U32)
    return (raw << up) >> _U32(32 - bits)


def _merge(old: Array, new: Array, selector: tuple[int, int], unused: str) -> Array:
    shift, bits = selector
    field = _U32(((1 << bits) - 1) << shift)
    placed = (new << _U32(shift)) & field
    if unused == "UNUSED_PRESERVE":
        return placed | (old & ~field)
    if unused == "UNUSED_SEXT":
        return (_select(new, 0, bits, True) << _U32(shift)) & _U32((0xFFFFFFFF << shift) & 0xFFFFFFFF)
    return placed


@instruction("v_readfirstlane_b32")
def _read_first_lane(state: WaveState, inst: Instruction) -> None:
    """The first active lane, lane 0 if none is (ISA chapter 12)."""
    value = np.broadcast_to(state.raw(inst.operands[1]), state.lanes.shape)
    state.write_sgpr(inst.operands[0].index, value[np.arange(state.count), state.lanes.argmax(axis=1)])


@instruction("v_readlane_b32")
def _read_lane(state: WaveState, inst: Instruction) -> None:
    value = np.broadcast_to(state.raw(inst.operands[1]), state.lanes.shape)
    lane = np.broadcast_to(state.raw(inst.operands[2])[:, 0] & _U32(63), (state.count,))
    state.write_sgpr(inst.operands[0].index, value[np.arange(state.count), lane])


@instruction("v_writelane_b32")
def _write_lane(state: WaveState, inst: Instruction) -> None:
    """Writes one lane whatever EXEC says."""
    destination, source, select = inst.operands
    lane = np.broadcast_to(state.raw(select)[:, 0] & _U32(63), (state.count,))
    old = state.vgprs[destination.index][state.w].copy()
    old[np.arange(state.count), lane] = np.broadcast_to(state.raw(source)[:, 0], (state.count,))
    with state.all_lanes():
        state.write_vgpr(destination.index, old)


def _swap_rows(width: int) -> Handler:
    """CDNA4: the odd rows of the first register change places with the even rows of the second."""
    odd = (_LANE // width) % 2 == 1

    def execute(state: WaveState, inst: Instruction) -> None:
        first, second = inst.operands
        a, b = state.raw(first).copy(), state.raw(second).copy()
        kept = a[:, odd].copy()
        a[:, odd] = b[:, ~odd]
        b[:, ~odd] = kept
        state.write_vgpr(first.index, a)
        state.write_vgpr(second.index, b)

    return execute


instruction("v_permlane32_swap_b32", archs=("gfx950",))(_swap_rows(32))
instruction("v_permlane16_swap_b32", archs=("gfx950",))(_swap_rows(16))


@lru_cache(maxsize=1024)
def swizzle_lanes(pattern: str) -> tuple[int, ...]:
    """The lane that each lane reads under ds_swizzle_b32 (ISA chapter 11, "DS_SWIZZLE_B32").

    ``pattern`` is a number or LLVM's ``swizzle(MODE,...)`` notation.
    """
    if match := re.match(r"^swizzle\((\w+),(.*)\)$", pattern.replace(" ", "").replace('"', "")):
        mode, arguments = match[1], match[2].split(",")
        if mode == "QUAD_PERM":
            return tuple(int(lane // 4 * 4 + int(arguments[lane % 4])) for lane in range(LANES))
        if mode == "BITMASK_PERM":
            masks = {"0": (0, 0, 0), "1": (0, 1, 0), "p": (1, 0, 0), "i": (1, 0, 1)}
            and_mask = or_mask = xor_mask = 0
            for letter in arguments[0]:
                a, o, x = masks[letter]
                and_mask, or_mask, xor_mask = and_mask * 2 + a, or_mask * 2 + o, xor_mask * 2 + x
            return _bitmask_lanes(and_mask, or_mask, xor_mask)
        size = int(arguments[0], 0)
        if mode == "SWAP":
            return _bitmask_lanes(0x1F, 0, size)
        if mode == "REVERSE":
            return _bitmask_lanes(0x1F, 0, size - 1)
        if mode == "BROADCAST":
            return _bitmask_lanes(0x1F & ~(size - 1), int(arguments[1], 0), 0)
        raise ValueError(f"unknown swizzle mode {mode}")
    number = int(pattern, 0)
    if number & 0x8000:
        return tuple(lane // 4 * 4 + (number >> 2 * (lane % 4) & 3) for lane in range(LANES))
    return _bitmask_lanes(number & 31, number >> 5 & 31, number >> 10 & 31)


def _bitmask_lanes(and_mask: int, or_mask: int, xor_mask: int) -> tuple[int, ...]:
    return tuple(lane & 32 | (((lane & and_mask) | or_mask) ^ xor_mask) & 31 for lane in range(LANES))
