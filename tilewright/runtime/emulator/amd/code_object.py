"""The code object that a GPU would load, checked against the assembly text that is executed in its place.

Of each kernel its descriptor is compared field by field (LLVM AMDGPU usage, "Kernel Descriptor"), and its code by the
number of instructions, whose lengths the first word tells (CDNA3 and CDNA4 ISA chapter 13, "Microcode Formats").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tilewright.runtime.emulator.amd.decode import Kernel
from tilewright.runtime.emulator.amd.errors import DecodeError

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_TABLE = 2
_DESCRIPTOR_BYTES = 64
#: of the fields by their ``.amdhsa_`` names: byte offset of the word, lowest bit, bits
_FIELDS = {
    "group_segment_fixed_size": (0, 0, 32), "private_segment_fixed_size": (4, 0, 32), "kernarg_size": (8, 0, 32),
    "float_round_mode_32": (48, 12, 2), "float_round_mode_16_64": (48, 14, 2), "float_denorm_mode_32": (48, 16, 2),
    "float_denorm_mode_16_64": (48, 18, 2), "dx10_clamp": (48, 21, 1), "ieee_mode": (48, 23, 1),
    "fp16_overflow": (48, 26, 1), "user_sgpr_count": (52, 1, 5), "system_sgpr_workgroup_id_x": (52, 7, 1),
    "system_sgpr_workgroup_id_y": (52, 8, 1), "system_sgpr_workgroup_id_z": (52, 9, 1),
    "system_vgpr_workitem_id": (52, 11, 2), "user_sgpr_dispatch_ptr": (56, 1, 1), "user_sgpr_queue_ptr": (56, 2, 1),
    "user_sgpr_kernarg_segment_ptr": (56, 3, 1), "user_sgpr_dispatch_id": (56, 4, 1),
}  # fmt: skip
_RSRC1, _RSRC3, _VGPR_GRANULE, _ACCUM_GRANULE = 48, 44, 8, 4


@dataclass(frozen=True)
class _Symbol:
    section: int
    value: int
    size: int


class _Elf:
    """The sections and symbols of a 64-bit little-endian ELF file."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01" or len(data) < _ELF_HEADER.size:
            raise DecodeError("the code object is no 64-bit little-endian ELF file")
        header = _ELF_HEADER.unpack_from(data)
        offset, size, count = header[6], header[11], header[12]
        self._data = data
        self._sections = [_SECTION.unpack_from(data, offset + size * i) for i in range(count)]
        self._symbols = dict(self._read_symbols())

    def _read_symbols(self) -> Iterator[tuple[str, _Symbol]]:
        for section in self._sections:
            if section[1] != _SYMBOL_TABLE:
                continue
            names = self._sections[section[6]][4]
            for place in range(section[4], section[4] + section[5], _SYMBOL.size):
                name, _, _, index, value, size = _SYMBOL.unpack_from(self._data, place)
                end = self._data.index(b"\0", names + name)
                yield self._data[names + name : end].decode(), _Symbol(index, value, size)

    def contents(self, name: str) -> bytes:
        """The bytes that a symbol names."""
        symbol = self._symbols.get(name)
        if symbol is None or symbol.section >= len(self._sections):
            raise DecodeError(f"the code object has no symbol {name}")
        section = self._sections[symbol.section]
        start = section[4] + symbol.value - section[3]
        return self._data[start : start + symbol.size]


def check_code_object(kernel: Kernel, data: bytes) -> None:
    """DecodeError names what the code object ``data`` says otherwise than the assembly of ``kernel``."""
    elf = _Elf(data)
    descriptor = elf.contents(f"{kernel.name}.kd")
    if len(descriptor) != _DESCRIPTOR_BYTES:
        raise DecodeError(f"{kernel.name}.kd has {len(descriptor)} bytes, a kernel descriptor {_DESCRIPTOR_BYTES}")
    found = {name: _bits(descriptor, *place) for name, place in _FIELDS.items()}
    found["accum_offset"] = (_bits(descriptor, _RSRC3, 0, 6) + 1) * _ACCUM_GRANULE
    problems = [
        f"{name} is {value} in the code object, {kernel.get(name)} in the assembly"
        for name, value in found.items()
        if name in kernel.fields and kernel.get(name) != value
    ]
    registers = (_bits(descriptor, _RSRC1, 0, 6) + 1) * _VGPR_GRANULE
    if registers != kernel.vector_registers:
        problems.append(
            f"{registers} vector registers are allocated by the code object, {kernel.vector_registers} by the assembly"
        )
    count = sum(1 for _ in _instructions(elf.contents(kernel.name)))
    if count != len(kernel.instructions):
        problems.append(f"{count} instructions are in the code object, {len(kernel.instructions)} in the assembly")
    if problems:
        raise DecodeError(f"the code object of kernel {kernel.name} is not its assembly:\n  " + "\n  ".join(problems))


def _bits(descriptor: bytes, offset: int, lowest: int, count: int) -> int:
    word = int.from_bytes(descriptor[offset : offset + 4], "little")
    return word >> lowest & (1 << count) - 1


# --- lengths of instructions ---------------------------------------------------------------------------

_LITERAL = 255
_SDWA_DPP = (249, 250)
#: v_fmamk and v_fmaak, of f32 and f16, which always have a literal
_VOP2_LITERAL = (0x17, 0x18, 0x24, 0x25)
#: s_setreg_imm32_b32
_SOPK_LITERAL = 20
#: the first half of a scaled matrix instruction (CDNA4 ISA section 7.2.1)
_LOAD_SCALE = 0xD3AC


def _instructions(code: bytes) -> Iterator[int]:
    """The offset of each instruction."""
    at = 0
    while at + 4 <= len(code):
        yield at
        at += _length(int.from_bytes(code[at : at + 4], "little"))


def _length(word: int) -> int:
    """Bytes of the instruction that begins with ``word``."""
    if word >> 30 == 0b10:
        return 4 + 4 * _scalar_literal(word)
    if word >> 31:
        return 16 if word >> 16 == _LOAD_SCALE else 8
    always = word >> 25 in _VOP2_LITERAL
    return 8 if always or word & 0x1FF in (_LITERAL, *_SDWA_DPP) else 4


def _scalar_literal(word: int) -> bool:
    """SOP2, SOPK, SOP1, SOPC and SOPP differ in their highest bits."""
    first, second = word & 0xFF, word >> 8 & 0xFF
    nine = word >> 23
    if nine == 0b101111111:  # SOPP
        return False
    if nine == 0b101111101:  # SOP1
        return first == _LITERAL
    if word >> 28 == 0b1011 and nine != 0b101111110:  # SOPK
        return word >> 23 & 31 == _SOPK_LITERAL
    return _LITERAL in (first, second)
