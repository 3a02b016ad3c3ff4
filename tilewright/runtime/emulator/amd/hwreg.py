"""s_getreg and s_setreg: bit fields of hardware registers (CDNA3 and CDNA4 ISA chapter 12, SOPK).

Only MODE has contents here; the others, which say where a wave runs and how it fared, read as zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.mode import REFUSED
from tilewright.runtime.emulator.amd.operands import KINDS, Array, Operand, parse_operand
from tilewright.runtime.emulator.amd.registry import instruction
from tilewright.runtime.emulator.amd.state import WaveState

_U32 = np.uint32
_MODE = 1
_FIELD = re.compile(r"hwreg\(\s*(\w+)\s*(?:,\s*(\d+)\s*,\s*(\d+)\s*)?\)")


@dataclass(frozen=True)
class _Access:
    """``bits`` bits from ``offset`` on of a hardware register, and the operand that takes or gives them."""

    name: str
    is_mode: bool
    offset: int
    bits: int
    operand: Operand | None

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1


@lru_cache(maxsize=1024)
def _parse(settings: str) -> _Access:
    """The text behind the mnemonic: ``s4, hwreg(HW_REG_MODE, 4, 2)``, or with a number for all of hwreg."""
    if found := _FIELD.search(settings):
        name, offset, bits = found[1], int(found[2] or 0), int(found[3] or 32)
        rest = settings[: found.start()] + settings[found.end() :]
        is_mode = name == "HW_REG_MODE" or (name.isdigit() and int(name) == _MODE)
    else:
        first, _, second = (part.strip() for part in settings.partition(","))
        packed, rest = (second, first) if first.startswith("s") else (first, second)
        code = int(packed, 0)
        name, offset, bits = str(code & 63), code >> 6 & 31, (code >> 11 & 31) + 1
        is_mode = code & 63 == _MODE
    return _Access(name, is_mode, offset, bits, parse_operand(rest.strip(" ,"), 0))


def accesses_mode(inst: Instruction) -> bool:
    """Whether it reads or writes fields of MODE."""
    return inst.name.startswith(("s_getreg", "s_setreg")) and _parse(inst.settings).is_mode


@instruction("s_getreg_b32")
def _getreg(state: WaveState, inst: Instruction) -> None:
    access = _parse(inst.settings)
    assert access.operand is not None
    value: Array = np.zeros(1, _U32)
    if access.is_mode:
        value = state.mode[state.w] >> _U32(access.offset) & _U32(access.mask)
    state.write_scalar(access.operand, KINDS["u32"], value)


@instruction("s_setreg_b32", "s_setreg_imm32_b32")
def _setreg(state: WaveState, inst: Instruction) -> None:
    access = _parse(inst.settings)
    if not access.is_mode:
        state.fault(f"hardware register {access.name} cannot be written here: only MODE can")
    assert access.operand is not None
    value = state.scalar(access.operand, KINDS["u32"]) & _U32(access.mask)
    state.require_defined_scalar("MODE")
    kept = state.mode[state.w] & _U32(~(access.mask << access.offset) & 0xFFFFFFFF)
    mode = kept | value << _U32(access.offset)
    for name, bit in REFUSED.items():
        if (mode & _U32(bit)).any():
            state.fault(f"MODE.{name} is not emulated")
    state.write_mode(mode)
