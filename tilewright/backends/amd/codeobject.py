"""What an AMDGPU object or HSACO says about its kernels: registers, LDS, scratch, arguments.

Two places say it: the metadata note (MessagePack) and each kernel's descriptor, the 64 bytes that
the hardware's command processor reads. Source: "User Guide for AMDGPU Backend",
https://llvm.org/docs/AMDGPUUsage.html, "Code Object V5 Metadata" and "Kernel Descriptor".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from tilewright.backends.amd.link import SECTION_NOTE, ElfFile, read_elf
from tilewright.backends.errors import BackendError

NOTE_METADATA = 32  # NT_AMDGPU_METADATA
DESCRIPTOR_BYTES = 64
_NOTE_HEADER = struct.Struct("<III")


@dataclass(frozen=True)
class KernelDescriptor:
    """The fields of the kernel descriptor, sizes in bytes."""

    lds_bytes: int
    scratch_bytes: int
    kernarg_bytes: int
    entry_offset: int  # from the descriptor to the first instruction
    rsrc1: int
    rsrc2: int
    rsrc3: int
    properties: int
    kernarg_preload: int

    @property
    def allocated_vgprs(self) -> int:
        """Vector registers per work item that the hardware sets aside, on gfx90a and later."""
        return ((self.rsrc1 & 0x3F) + 1) * 8

    @property
    def accum_offset(self) -> int:
        """Where the accumulation registers start in the unified file of gfx90a and later."""
        return ((self.rsrc3 & 0x3F) + 1) * 4


@dataclass(frozen=True)
class KernelArgument:
    """One kernel argument: ``kind`` is the metadata's value kind ("global_buffer", "by_value", ...)."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class KernelInfo:
    """One kernel of a code object. Sizes in bytes, registers per work item (SGPRs per wave)."""

    name: str
    vgprs: int  # all vector registers, accumulation registers included
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    lds_bytes: int
    scratch_bytes: int
    kernarg_bytes: int
    kernarg_align: int
    max_workgroup_size: int
    workgroup_size: tuple[int, ...] | None  # where the kernel requires one
    wavefront_size: int
    arguments: tuple[KernelArgument, ...]
    descriptor: KernelDescriptor


@dataclass(frozen=True)
class CodeObject:
    """``target`` is the full identifier, e.g. "amdgcn-amd-amdhsa--gfx942:sramecc+:xnack-"."""

    target: str
    metadata_version: tuple[int, ...]
    kernels: dict[str, KernelInfo]


def read_code_object(data: bytes) -> CodeObject:
    """Read a relocatable object or an HSACO."""
    elf = read_elf(data)
    metadata = _metadata(elf)
    try:
        kernels = {k[".name"]: _kernel(elf, k) for k in metadata.get("amdhsa.kernels", [])}
        return CodeObject(metadata["amdhsa.target"], tuple(metadata["amdhsa.version"]), kernels)
    except KeyError as error:
        raise BackendError("codeobject", f"the kernel metadata lacks {error}") from error


def _kernel(elf: ElfFile, metadata: dict[str, Any]) -> KernelInfo:
    required = metadata.get(".reqd_workgroup_size")
    arguments = (KernelArgument(a[".offset"], a[".size"], a[".value_kind"]) for a in metadata.get(".args", []))
    return KernelInfo(
        name=metadata[".name"],
        vgprs=metadata[".vgpr_count"],
        agprs=metadata.get(".agpr_count", 0),
        sgprs=metadata[".sgpr_count"],
        vgpr_spills=metadata.get(".vgpr_spill_count", 0),
        sgpr_spills=metadata.get(".sgpr_spill_count", 0),
        lds_bytes=metadata[".group_segment_fixed_size"],
        scratch_bytes=metadata[".private_segment_fixed_size"],
        kernarg_bytes=metadata[".kernarg_segment_size"],
        kernarg_align=metadata[".kernarg_segment_align"],
        max_workgroup_size=metadata[".max_flat_workgroup_size"],
        workgroup_size=tuple(required) if required else None,
        wavefront_size=metadata[".wavefront_size"],
        arguments=tuple(arguments),
        descriptor=_descriptor(elf, metadata[".symbol"]),
    )


def _descriptor(elf: ElfFile, symbol_name: str) -> KernelDescriptor:
    symbol = next((s for s in elf.symbols if s.name == symbol_name), None)
    if symbol is None:
        raise BackendError("codeobject", f"no symbol {symbol_name!r} for the kernel's descriptor")
    data = elf.contents(symbol)
    if len(data) != DESCRIPTOR_BYTES:
        raise BackendError("codeobject", f"{symbol_name!r} is {len(data)} bytes, a descriptor has {DESCRIPTOR_BYTES}")
    lds, scratch, kernarg = struct.unpack_from("<III", data, 0)
    (entry,) = struct.unpack_from("<q", data, 16)
    rsrc3, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", data, 44)
    return KernelDescriptor(lds, scratch, kernarg, entry, rsrc1, rsrc2, rsrc3, properties, preload)


# --- the metadata note ----------------------------------------------------------------------


def _metadata(elf: ElfFile) -> dict[str, Any]:
    for section in elf.sections:
        if section.type == SECTION_NOTE:
            for name, type_, contents in _notes(section.data):
                if name == b"AMDGPU" and type_ == NOTE_METADATA:
                    return unpack_msgpack(contents)
    raise BackendError("codeobject", "no AMDGPU metadata note: not a code object of version 3 or later")


def _notes(data: bytes) -> list[tuple[bytes, int, bytes]]:
    """(name, type, contents) of each note; name and contents are padded to four bytes."""
    notes, offset = [], 0
    while offset + _NOTE_HEADER.size <= len(data):
        name_size, size, type_ = _NOTE_HEADER.unpack_from(data, offset)
        name_start = offset + _NOTE_HEADER.size
        start = name_start + (name_size + 3) // 4 * 4
        notes.append((data[name_start : name_start + name_size].rstrip(b"\0"), type_, data[start : start + size]))
        offset = start + (size + 3) // 4 * 4
    return notes


# --- MessagePack ----------------------------------------------------------------------------

#: fixed-size values: float 32 and 64, unsigned and signed integers of 8 to 64 bits
_NUMBERS = dict(zip((*range(0xCA, 0xD4),), "f d B H I Q b h i q".split(), strict=True))
#: values with a length of 8, 16 or 32 bits before them: (kind, format of the length)
_SIZED = {
    **dict(zip((0xC4, 0xC5, 0xC6), (("bytes", f) for f in "BHI"), strict=True)),
    **dict(zip((0xD9, 0xDA, 0xDB), (("str", f) for f in "BHI"), strict=True)),
    **dict(zip((0xDC, 0xDD), (("list", f) for f in "HI"), strict=True)),
    **dict(zip((0xDE, 0xDF), (("dict", f) for f in "HI"), strict=True)),
}
_SINGLETONS = {0xC0: None, 0xC2: False, 0xC3: True}


class _Reader:
    """Reads MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md), no extension types."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        chunk = self.data[self.position : self.position + size]
        if len(chunk) < size:
            raise BackendError("codeobject", "the metadata note ends early")
        self.position += size
        return chunk

    def number(self, layout: str) -> Any:
        return struct.unpack(f">{layout}", self.take(struct.calcsize(layout)))[0]

    def value(self) -> Any:
        tag = self.take(1)[0]
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag < 0xC0:  # the length is in the tag: 16 entries at most, 32 characters at most
            if tag >= 0xA0:
                return self.sized("str", tag & 0x1F)
            return self.sized("list" if tag >= 0x90 else "dict", tag & 0x0F)
        if tag in _SINGLETONS:
            return _SINGLETONS[tag]
        if tag in _NUMBERS:
            return self.number(_NUMBERS[tag])
        if tag in _SIZED:
            kind, layout = _SIZED[tag]
            return self.sized(kind, self.number(layout))
        raise BackendError("codeobject", f"MessagePack type {tag:#x} in the metadata note is not supported")

    def sized(self, kind: str, size: int) -> Any:
        if kind == "list":
            return [self.value() for _ in range(size)]
        if kind == "dict":
            return {self.value(): self.value() for _ in range(size)}
        chunk = self.take(size)
        return chunk.decode() if kind == "str" else chunk


def unpack_msgpack(data: bytes) -> Any:
    """The value that ``data`` encodes."""
    return _Reader(data).value()
