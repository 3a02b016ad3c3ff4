"""Links one AMDGPU relocatable object into an HSACO, the shared object that the HIP runtime loads.

A general linker is not needed: the compiler makes one object per kernel, self-contained, without
writable data. What remains is to place its sections, resolve the relocations between them, and
write the dynamic symbol table through which the loader finds the kernel.

Sources: the System V ABI, chapters 4 and 5 (ELF, dynamic linking); "User Guide for AMDGPU Backend",
https://llvm.org/docs/AMDGPUUsage.html, section "ELF Code Object" (header flags, relocations).

The image has three loaded segments with the permissions the loader expects::

    read            ELF header, program headers, .note, .dynsym, .hash, .dynstr, .rodata
    read, execute   .text
    read, write     .dynamic

Segment n is loaded n pages above its file offset, so that no page has two permissions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tilewright.backends.errors import BackendError

MACHINE_AMDGPU = 224
TYPE_RELOCATABLE, TYPE_SHARED = 1, 3

SECTION_PROGBITS, SECTION_SYMTAB, SECTION_STRTAB, SECTION_RELA = 1, 2, 3, 4
SECTION_HASH, SECTION_DYNAMIC, SECTION_NOTE, SECTION_NOBITS, SECTION_DYNSYM = 5, 6, 7, 8, 11
FLAG_WRITE, FLAG_ALLOC, FLAG_EXECUTE = 1, 2, 4

INDEX_UNDEFINED, INDEX_ABSOLUTE, INDEX_RESERVED = 0, 0xFFF1, 0xFF00
SYMBOL_SECTION, SYMBOL_FILE = 3, 4

SEGMENT_LOAD, SEGMENT_DYNAMIC, SEGMENT_NOTE, SEGMENT_HEADERS = 1, 2, 4, 6
SEGMENT_GNU_STACK, SEGMENT_GNU_RELRO = 0x6474E551, 0x6474E552
EXECUTE, WRITE, READ = 1, 2, 4

DYNAMIC_NULL, DYNAMIC_HASH, DYNAMIC_STRTAB, DYNAMIC_SYMTAB = 0, 4, 5, 6
DYNAMIC_STRSZ, DYNAMIC_SYMENT = 10, 11

PAGE = 0x1000
TEXT_ALIGN = 256  # a kernel's entry must be 256-byte aligned (AMDGPUUsage, "Kernel Descriptor")

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_DYNAMIC = struct.Struct("<QQ")


# --- reading --------------------------------------------------------------------------------


@dataclass
class Section:
    """A section. ``address`` and ``offset`` of a section to be written are set by the layout."""

    name: str
    type: int
    flags: int = 0
    data: bytes = b""
    align: int = 1
    entry_size: int = 0
    link: int = 0
    info: int = 0
    address: int = 0
    offset: int = 0

    @property
    def loaded(self) -> bool:
        return bool(self.flags & FLAG_ALLOC)


@dataclass(frozen=True)
class Symbol:
    name: str
    info: int  # binding in the high four bits, type in the low four
    other: int  # visibility
    section: int
    value: int
    size: int

    @property
    def is_local(self) -> bool:
        return self.info >> 4 == 0

    @property
    def type(self) -> int:
        return self.info & 15


@dataclass(frozen=True)
class ElfFile:
    """A 64-bit little-endian AMDGPU ELF file, read."""

    identification: bytes
    type: int
    flags: int
    sections: list[Section]
    symbols: list[Symbol]

    def section(self, name: str) -> Section | None:
        return next((s for s in self.sections if s.name == name), None)

    def contents(self, symbol: Symbol) -> bytes:
        """The bytes that a symbol names; its value is an address, in an object an offset."""
        section = self.sections[symbol.section]
        start = symbol.value - section.address
        return section.data[start : start + symbol.size]


def read_elf(data: bytes) -> ElfFile:
    """Read an AMDGPU object or HSACO. Raises BackendError for anything else."""
    if len(data) < _HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        raise BackendError("link", "not a 64-bit little-endian ELF file")
    header = _HEADER.unpack_from(data)
    identification, type_, machine = header[:3]
    if machine != MACHINE_AMDGPU:
        raise BackendError("link", f"the ELF file is for machine {machine}, not AMDGPU ({MACHINE_AMDGPU})")
    try:
        sections = _read_sections(data, offset=header[6], count=header[12], names_index=header[13])
        symbols = _read_symbols(sections)
    except (struct.error, IndexError, ValueError) as error:
        raise BackendError("link", "the ELF file is cut off or damaged", [str(error)]) from error
    return ElfFile(identification, type_, header[7], sections, symbols)


def _read_sections(data: bytes, offset: int, count: int, names_index: int) -> list[Section]:
    headers = [_SECTION.unpack_from(data, offset + i * _SECTION.size) for i in range(count)]
    names_offset = headers[names_index][4]
    sections = []
    for name, type_, flags, address, start, size, link, info, align, entry_size in headers:
        contents = b"" if type_ == SECTION_NOBITS else data[start : start + size]
        text = _string(data, names_offset + name)
        sections.append(Section(text, type_, flags, contents, align, entry_size, link, info, address, start))
    return sections


def _read_symbols(sections: Sequence[Section]) -> list[Symbol]:
    for table in sections:
        if table.type == SECTION_SYMTAB:
            strings = sections[table.link].data
            return [Symbol(_string(strings, name), *rest) for name, *rest in _SYMBOL.iter_unpack(table.data)]
    return []


def _string(table: bytes, start: int) -> str:
    return table[start : table.index(0, start)].decode()


# --- checks ---------------------------------------------------------------------------------


def _check(elf: ElfFile) -> None:
    """Refuse what this linker does not do rather than write an image that fails on the device."""
    if elf.type != TYPE_RELOCATABLE:
        raise BackendError("link", "expected a relocatable object; this file is linked already")
    undefined = [s.name for s in elf.symbols[1:] if s.section == INDEX_UNDEFINED and s.name]
    if undefined:
        raise BackendError("link", "undefined symbols (a GPU kernel has no library to take them from)", undefined)
    writable = [
        f"{s.name}: {len(s.data)} bytes"
        for s in elf.sections
        if s.loaded and s.flags & FLAG_WRITE and (s.data or s.type == SECTION_NOBITS)
    ]
    if writable:
        raise BackendError("link", "writable data is not supported: pass memory as a kernel argument", writable)
    for name in (".note", ".text"):
        if elf.section(name) is None:
            raise BackendError("link", f"the object has no {name} section: it holds no kernel")


# --- layout ---------------------------------------------------------------------------------


@dataclass
class StringTable:
    """Null-terminated strings; offset 0 is the empty one."""

    data: bytearray = field(default_factory=lambda: bytearray(1))

    def add(self, text: str) -> int:
        if not text:
            return 0
        offset = len(self.data)
        self.data += text.encode() + b"\0"
        return offset


@dataclass(frozen=True)
class Segment:
    type: int
    permissions: int
    offset: int = 0
    address: int = 0
    file_size: int = 0
    memory_size: int = 0
    align: int = 0

    def pack(self) -> bytes:
        return _SEGMENT.pack(
            self.type,
            self.permissions,
            self.offset,
            self.address,
            self.address,
            self.file_size,
            self.memory_size,
            self.align,
        )


#: program headers: their own, three loaded ones, dynamic, relro, stack, note
_SEGMENT_COUNT = 8


def _align(value: int, align: int) -> int:
    return -(-value // max(align, 1)) * max(align, 1)


def _place(sections: Iterable[Section], offset: int, pages_above: int = 0) -> int:
    """Give sections their file offset and address, in order; returns the end offset."""
    for section in sections:
        section.offset = _align(offset, section.align)
        section.address = section.offset + pages_above * PAGE if section.loaded else 0
        offset = section.offset + len(section.data)
    return offset


def _span(type_: int, permissions: int, sections: Sequence[Section], align: int) -> Segment:
    """The segment from the first to the last of ``sections``."""
    first, last = sections[0], sections[-1]
    size = last.offset + len(last.data) - first.offset
    return Segment(type_, permissions, first.offset, first.address, size, size, align)


# --- linking --------------------------------------------------------------------------------


def link(object_file: bytes) -> bytes:
    """Link one relocatable object to an HSACO.

    Raises BackendError for undefined symbols, writable data, and relocations that need a run-time
    linker. Debug sections are left out.
    """
    elf = read_elf(object_file)
    _check(elf)
    loaded = {i: s for i, s in enumerate(elf.sections) if s.loaded and s.data}
    notes = [s for s in loaded.values() if s.type == SECTION_NOTE]
    constants = [s for s in loaded.values() if s.type == SECTION_PROGBITS and not s.flags & FLAG_EXECUTE]
    texts = [s for s in loaded.values() if s.flags & FLAG_EXECUTE]
    for text in texts:
        text.align = max(text.align, TEXT_ALIGN)
    exported = [s for s in elf.symbols[1:] if not s.is_local]
    dynamic_symbols, strings = _dynamic_tables(exported)
    hashes = Section(".hash", SECTION_HASH, FLAG_ALLOC, _hash_table(exported), 4, entry_size=4)
    dynamic = Section(".dynamic", SECTION_DYNAMIC, FLAG_ALLOC | FLAG_WRITE, bytes(6 * _DYNAMIC.size), 8, _DYNAMIC.size)

    readable = [*notes, dynamic_symbols, hashes, strings, *constants]
    end = _place(readable, _HEADER.size + _SEGMENT_COUNT * _SEGMENT.size)
    end = _place(texts, end, pages_above=1)
    end = _place([dynamic], end, pages_above=2)

    output = [Section("", 0, align=0), *readable, *texts, dynamic]
    numbers = {id(section): number for number, section in enumerate(output)}
    new_index = {old: numbers[id(section)] for old, section in loaded.items()}
    dynamic_symbols.link = dynamic.link = numbers[id(strings)]
    hashes.link = numbers[id(dynamic_symbols)]
    for old in elf.sections:
        old.link = old.info = 0 if old.loaded else old.info  # object section numbers mean nothing any more
    _relocate(elf, loaded)
    dynamic_symbols.data = _pack_symbols(elf, exported, new_index, StringTable())
    dynamic.data = _dynamic_section(dynamic_symbols, strings, hashes)
    output += _symbol_table(elf, new_index, len(output))
    return _write(elf, output, readable, texts, dynamic, end)


def _dynamic_tables(exported: Sequence[Symbol]) -> tuple[Section, Section]:
    """.dynsym, blank until addresses are known, and .dynstr. Symbol 0 is null; all others are global."""
    names = StringTable()
    for symbol in exported:
        names.add(symbol.name)
    blank = bytes(_SYMBOL.size * (len(exported) + 1))
    symbols = Section(".dynsym", SECTION_DYNSYM, FLAG_ALLOC, blank, 8, _SYMBOL.size, info=1)
    return symbols, Section(".dynstr", SECTION_STRTAB, FLAG_ALLOC, bytes(names.data))


def _elf_hash(name: str) -> int:
    """The hash function of System V ABI, figure 5-13."""
    value = 0
    for byte in name.encode():
        value = ((value << 4) + byte) & 0xFFFFFFFF
        high = value & 0xF0000000
        value = (value ^ (high >> 24)) & ~high
    return value


def _hash_table(exported: Sequence[Symbol]) -> bytes:
    """One bucket per symbol; a bucket holds the number of its first symbol, a chain entry the next's."""
    buckets = [0] * max(1, len(exported))
    chains = [0] * (len(exported) + 1)
    for number, symbol in enumerate(exported, 1):
        bucket = _elf_hash(symbol.name) % len(buckets)
        chains[number], buckets[bucket] = buckets[bucket], number
    return struct.pack(f"<{2 + len(buckets) + len(chains)}I", len(buckets), len(chains), *buckets, *chains)


def _address(elf: ElfFile, symbol: Symbol) -> int:
    if symbol.section >= INDEX_RESERVED:
        return symbol.value
    return elf.sections[symbol.section].address + symbol.value


def _pack_symbols(elf: ElfFile, symbols: Sequence[Symbol], new_index: dict[int, int], strings: StringTable) -> bytes:
    """A symbol table of ``symbols`` after the null one; their names go to ``strings`` in order."""
    table = bytearray(_SYMBOL.size)
    for symbol in symbols:
        index = symbol.section if symbol.section >= INDEX_RESERVED else new_index[symbol.section]
        name = strings.add(symbol.name)
        table += _SYMBOL.pack(name, symbol.info, symbol.other, index, _address(elf, symbol), symbol.size)
    return bytes(table)


def _symbol_table(elf: ElfFile, new_index: dict[int, int], number: int) -> list[Section]:
    """.symtab and .strtab; ``number`` is the first's section number. ROCR's loader reads this table too."""
    kept = [
        s
        for s in elf.symbols[1:]
        if s.type not in (SYMBOL_SECTION, SYMBOL_FILE) and (s.section >= INDEX_RESERVED or s.section in new_index)
    ]
    kept.sort(key=lambda s: not s.is_local)  # locals come first, and `info` is the first that is not
    strings = StringTable()
    data = _pack_symbols(elf, kept, new_index, strings)
    first_global = 1 + sum(s.is_local for s in kept)
    table = Section(".symtab", SECTION_SYMTAB, 0, data, 8, _SYMBOL.size, link=number + 1, info=first_global)
    return [table, Section(".strtab", SECTION_STRTAB, data=bytes(strings.data))]


def _dynamic_section(symbols: Section, strings: Section, hashes: Section) -> bytes:
    entries = [
        (DYNAMIC_SYMTAB, symbols.address),
        (DYNAMIC_SYMENT, _SYMBOL.size),
        (DYNAMIC_STRTAB, strings.address),
        (DYNAMIC_STRSZ, len(strings.data)),
        (DYNAMIC_HASH, hashes.address),
        (DYNAMIC_NULL, 0),
    ]
    return b"".join(_DYNAMIC.pack(*entry) for entry in entries)


# --- relocations ----------------------------------------------------------------------------

#: Number, format and right shift of the position-relative relocations S + A - P. Absolute ones and
#: those through a global offset table would need a run-time linker.
_RELOCATIONS = {
    4: ("<I", 0),  # R_AMDGPU_REL32
    5: ("<Q", 0),  # R_AMDGPU_REL64: from the kernel descriptor to the kernel
    10: ("<I", 0),  # R_AMDGPU_REL32_LO
    11: ("<I", 32),  # R_AMDGPU_REL32_HI
}


def _relocate(elf: ElfFile, loaded: dict[int, Section]) -> None:
    """Apply the relocations of every loaded section to its data."""
    for table in elf.sections:
        if table.type == SECTION_RELA and table.info in loaded:
            target = loaded[table.info]
            data = bytearray(target.data)
            for offset, info, addend in _RELOCATION.iter_unpack(table.data):
                _apply(elf, target, data, offset, info, addend)
            target.data = bytes(data)


def _apply(elf: ElfFile, target: Section, data: bytearray, offset: int, info: int, addend: int) -> None:
    symbol, kind = elf.symbols[info >> 32], info & 0xFFFFFFFF
    if kind not in _RELOCATIONS:
        raise BackendError("link", f"relocation type {kind} in {target.name} against {symbol.name!r} is not supported")
    layout, shift = _RELOCATIONS[kind]
    distance = _address(elf, symbol) + addend - (target.address + offset)
    mask = (1 << 8 * struct.calcsize(layout)) - 1
    struct.pack_into(layout, data, offset, distance >> shift & mask)


# --- writing --------------------------------------------------------------------------------


def _segments(readable: Sequence[Section], texts: Sequence[Section], dynamic: Section) -> list[Segment]:
    headers_size = _SEGMENT_COUNT * _SEGMENT.size
    read_end = readable[-1].offset + len(readable[-1].data)
    dynamic_size = len(dynamic.data)
    # Relocation read-only protection works on whole pages.
    protected = _align(dynamic.address + dynamic_size, PAGE) - dynamic.address
    place = (dynamic.offset, dynamic.address, dynamic_size)
    notes = [s for s in readable if s.type == SECTION_NOTE]
    return [
        Segment(SEGMENT_HEADERS, READ, _HEADER.size, _HEADER.size, headers_size, headers_size, 8),
        Segment(SEGMENT_LOAD, READ, 0, 0, read_end, read_end, PAGE),
        _span(SEGMENT_LOAD, READ | EXECUTE, texts, PAGE),
        Segment(SEGMENT_LOAD, READ | WRITE, *place, protected, PAGE),
        Segment(SEGMENT_DYNAMIC, READ | WRITE, *place, dynamic_size, 8),
        Segment(SEGMENT_GNU_RELRO, READ, *place, protected, 1),
        Segment(SEGMENT_GNU_STACK, READ | WRITE),
        _span(SEGMENT_NOTE, READ, notes, 4),
    ]


def _write(
    elf: ElfFile,
    output: list[Section],
    readable: Sequence[Section],
    texts: Sequence[Section],
    dynamic: Section,
    end: int,
) -> bytes:
    """The file: headers, sections at their offsets, then the unloaded ones and the section headers."""
    names = StringTable()
    name_offsets = [names.add(section.name) for section in output]
    name_offsets.append(names.add(".shstrtab"))
    output.append(Section(".shstrtab", SECTION_STRTAB, data=bytes(names.data)))
    end = _place((s for s in output[1:] if not s.loaded), end)
    headers_offset = _align(end, 8)

    image = bytearray(headers_offset)
    for section in output:
        image[section.offset : section.offset + len(section.data)] = section.data
    header = _HEADER.pack(
        elf.identification,
        TYPE_SHARED,
        MACHINE_AMDGPU,
        1,  # version
        0,  # no entry point
        _HEADER.size,
        headers_offset,
        elf.flags,
        _HEADER.size,
        _SEGMENT.size,
        _SEGMENT_COUNT,
        _SECTION.size,
        len(output),
        len(output) - 1,
    )
    program = b"".join(segment.pack() for segment in _segments(readable, texts, dynamic))
    image[: len(header) + len(program)] = header + program
    for name, s in zip(name_offsets, output, strict=True):
        image += _SECTION.pack(
            name, s.type, s.flags, s.address, s.offset, len(s.data), s.link, s.info, s.align, s.entry_size
        )
    return bytes(image)
