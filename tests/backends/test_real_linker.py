"""Our HSACO against LLVM's linker: the same code, descriptors, metadata and symbols, loaded the same way.

Uses ``ld.lld`` from the path or from the wheel ``ziglang`` (the extra ``linker``, which ``make test`` installs).
"""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from amd_programs import matrix, module_of, scheduled

from tilewright.backends.amd.codeobject import read_code_object
from tilewright.backends.amd.compile import lower_function
from tilewright.backends.amd.link import ElfFile, link, read_elf
from tilewright.backends.llvm import TargetMachineSpec, emit_object, merge, optimize
from tilewright.ir.target import get_target
from tilewright.kernels.gemm import gemm
from tilewright.kernels.softmax import softmax

LOAD, NOTE, DYNAMIC = 1, 4, 2
#: what the loader needs of the dynamic section; LLD adds tags of its own
HASH, STRTAB, SYMTAB, STRSZ, SYMENT = 4, 5, 6, 10, 11


def linker() -> list[str] | None:
    """The command of a linker of LLVM 17 or later (older ones refuse code objects of version 6)."""
    for name in ("ld.lld", *(f"ld.lld-{version}" for version in range(30, 16, -1))):
        found = shutil.which(name)
        if found is not None and not (name == "ld.lld" and _major(found) < 17):
            return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ld.lld"]
    return None


def _major(command: str) -> int:
    text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    digits = text.split("LLD ")[-1].split(".")[0]
    return int(digits) if digits.isdigit() else 0


pytestmark = pytest.mark.skipif(linker() is None, reason="no ld.lld: pip install 'tilewright[linker]'")


def kernels_object(target: str) -> bytes:
    """Two kernels, one with shared memory, as one relocatable object."""
    functions = [
        scheduled(module_of(gemm, a=matrix(), b=matrix(), c=matrix(), BM=64, BN=64, BK=32), target),
        scheduled(module_of(softmax, x=matrix(), y=matrix(), BN=1024), target),
    ]
    described = get_target(target)
    spec = TargetMachineSpec(described.triple, described.cpu, described.llvm_features)
    entries = [lower_function(function, described) for function in functions]
    return emit_object(merge([optimize(entry.module.finish(), spec) for entry in entries]))


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def images(request, tmp_path_factory) -> tuple[bytes, bytes]:
    """Ours and LLD's."""
    data, folder = kernels_object(request.param), tmp_path_factory.mktemp("lld")
    source, image = folder / "kernels.o", folder / "kernels.hsaco"
    source.write_bytes(data)
    command = [*linker(), "-shared", "--no-undefined", str(source), "-o", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return link(data), Path(image).read_bytes()


def segments(image: bytes) -> list[tuple[int, ...]]:
    offset, count = struct.unpack_from("<Q", image, 32)[0], struct.unpack_from("<H", image, 56)[0]
    return [struct.unpack_from("<IIQQQQQQ", image, offset + 56 * i) for i in range(count)]


def permissions(image: bytes, address: int) -> int:
    """Those of the one loaded segment at an address."""
    (found,) = [s for s in segments(image) if s[0] == LOAD and s[3] <= address < s[3] + s[6]]
    return found[1]


def dynamic(image: bytes) -> dict[int, int]:
    data = read_elf(image).section(".dynamic").data
    return dict(struct.iter_unpack("<QQ", data))


def exported(elf: ElfFile) -> dict[str, tuple[int, int, int]]:
    """Names in the dynamic symbol table, which the loader reads -> info, visibility, size."""
    table, names = elf.section(".dynsym").data, elf.section(".dynstr").data
    found = {}
    for name, info, other, _, _, size in struct.iter_unpack("<IBBHQQ", table):
        if name:
            found[names[name : names.index(0, name)].decode()] = (info, other, size)
    return found


def test_code_and_metadata_are_the_same(images: tuple[bytes, bytes]):
    ours, theirs = map(read_elf, images)
    for name in (".text", ".note"):
        assert ours.section(name).data == theirs.section(name).data
    assert (ours.flags, ours.identification, ours.type) == (theirs.flags, theirs.identification, theirs.type)


def test_the_loader_finds_the_same_symbols(images: tuple[bytes, bytes]):
    ours, theirs = map(read_elf, images)
    assert exported(ours) == exported(theirs)
    assert {"gemm", "gemm.kd", "softmax", "softmax.kd"} == set(exported(ours))
    for name in exported(ours):
        (mine,) = [s for s in ours.symbols if s.name == name]
        (other,) = [s for s in theirs.symbols if s.name == name]
        assert (mine.info, mine.other, mine.size) == (other.info, other.other, other.size)


def test_every_descriptor_points_at_its_kernel(images: tuple[bytes, bytes]):
    ours, theirs = map(read_code_object, images)
    assert ours.target == theirs.target and list(ours.kernels) == list(theirs.kernels)
    for image in images:
        symbols = {s.name: s.value for s in read_elf(image).symbols}
        for name, kernel in read_code_object(image).kernels.items():
            assert symbols[f"{name}.kd"] + kernel.descriptor.entry_offset == symbols[name]
            assert symbols[name] % 256 == 0 and symbols[f"{name}.kd"] % 64 == 0
    for name in ours.kernels:
        mine, other = (read_elf(image) for image in images)
        descriptors = [next(elf.contents(s) for s in elf.symbols if s.name == f"{name}.kd") for elf in (mine, other)]
        assert len(descriptors[0]) == 64
        without_entry = [data[:16] + data[24:] for data in descriptors]
        assert without_entry[0] == without_entry[1]


def test_memory_has_the_same_permissions(images: tuple[bytes, bytes]):
    for name in (".text", ".rodata", ".note", ".dynsym", ".dynamic"):
        rights = [permissions(image, read_elf(image).section(name).address) for image in images]
        assert rights[0] == rights[1], name
    for image in images:
        kinds = [s[0] for s in segments(image)]
        assert NOTE in kinds and DYNAMIC in kinds


def test_the_dynamic_section_names_the_tables(images: tuple[bytes, bytes]):
    for image in images:
        tags, elf = dynamic(image), read_elf(image)
        assert tags[SYMTAB] == elf.section(".dynsym").address and tags[SYMENT] == 24
        assert tags[STRTAB] == elf.section(".dynstr").address and tags[STRSZ] == len(elf.section(".dynstr").data)
        assert tags[HASH] == elf.section(".hash").address
