"""AMD code objects: linked by our own linker, read back, held against what LLVM's linker and loaders expect."""

from __future__ import annotations

import struct

import pytest

from tilewright.backends import llvm
from tilewright.backends.amd.codeobject import read_code_object, unpack_msgpack
from tilewright.backends.amd.link import SECTION_RELA, link, read_elf
from tilewright.backends.errors import BackendError
from tilewright.backends.llvm import TargetMachineSpec
from tilewright.backends.mlir_builder import Module

AMD_TRIPLE = "amdgcn-amd-amdhsa"


def amd_module(arch: str, inline_asm: str = "") -> llvm.OptimizedModule:
    """A product of 16x16x16 bf16 tiles that passes its operand through LDS."""
    module = Module(AMD_TRIPLE, "kernel.py", 10)
    t = module.types
    lds = module.shared_global("lds", 4096)
    f = module.function(
        "multiply",
        [t.ptr(1), t.ptr(1), t.i32],
        {
            "rocdl.kernel": "unit",
            "rocdl.flat_work_group_size": '"256,256"',
            "rocdl.reqd_work_group_size": "array<i32: 256, 1, 1>",
            "passthrough": '[["amdgpu-waves-per-eu", "1,1"]]',
        },
    )
    source, target, count = f.arguments
    thread = f.intrinsic("llvm.amdgcn.workitem.id.x", t.i32)
    resource = f.intrinsic(
        "llvm.amdgcn.make.buffer.rsrc", t.ptr(8), [source, f.const(0, t.i16), f.i64(65536), f.i32(0x27000)]
    )
    offset = f.mul(thread, 8, "nsw, nuw")
    loaded = f.intrinsic("llvm.amdgcn.raw.ptr.buffer.load", t.vec(2, t.i32), [resource, offset, f.i32(0), f.i32(0)])
    shared = f.address_of(lds)
    f.store(loaded, f.gep(shared, offset, inbounds=True), 8)
    f.fence("release", "workgroup")
    f.intrinsic("llvm.amdgcn.s.barrier", None)
    f.fence("acquire", "workgroup")
    operand = f.load(f.gep(shared, f.mul(f.xor(thread, 1), 8)), t.vec(4, t.i16), 8)
    f.inline_asm(None, inline_asm, "v", [thread])
    accumulator = t.vec(4, t.f32)
    with f.for_loop(0, count, 1, [f.zero(accumulator)]) as loop:
        zero = f.i32(0)
        operands = [operand, operand, loop.values[0], zero, zero, zero]
        loop.yields([f.intrinsic("llvm.amdgcn.mfma.f32.16x16x16bf16.1k", accumulator, operands)])
    f.store(loop.results[0], f.gep(target, f.mul(thread, 16)), 16)
    f.ret()
    return llvm.optimize(module.finish(), TargetMachineSpec(AMD_TRIPLE, arch))


@pytest.fixture(scope="module", params=["gfx942", "gfx950"])
def amd_object(request: pytest.FixtureRequest) -> tuple[str, bytes]:
    return request.param, llvm.emit_object(amd_module(request.param))


def test_emission_leaves_the_module_alone() -> None:
    optimized = amd_module("gfx942")
    before = optimized.text()
    assert llvm.emit_assembly(optimized) == llvm.emit_assembly(optimized)
    assert llvm.emit_object(optimized) == llvm.emit_object(optimized)
    assert optimized.text() == before


def test_the_linked_code_object_is_the_object(amd_object: tuple[str, bytes]) -> None:
    arch, data = amd_object
    image = link(data)
    before, after = read_elf(data), read_elf(image)
    assert after.section(".text").data == before.section(".text").data
    assert after.section(".note").data == before.section(".note").data
    assert after.flags == before.flags and after.identification == before.identification
    old, new = before.section(".rodata").data, after.section(".rodata").data
    assert old[:16] == new[:16] and old[24:] == new[24:], "only the entry offset may change"
    linked, unlinked = read_code_object(image), read_code_object(data)
    assert linked.target == unlinked.target and linked.target.startswith(f"amdgcn-amd-amdhsa--{arch}")
    symbols = {s.name: s for s in after.symbols}
    entry = symbols["multiply"].value - symbols["multiply.kd"].value
    assert linked.kernels["multiply"].descriptor.entry_offset == entry
    assert symbols["multiply"].value % 256 == 0 and symbols["multiply.kd"].value % 64 == 0


def test_segments_load_every_section_once_with_its_permission(amd_object: tuple[str, bytes]) -> None:
    image = link(amd_object[1])
    offset, count = struct.unpack_from("<Q", image, 32)[0], struct.unpack_from("<H", image, 56)[0]
    segments = [struct.unpack_from("<IIQQQQQQ", image, offset + 56 * i) for i in range(count)]
    loads = [s for s in segments if s[0] == 1]
    for section in read_elf(image).sections:
        if not section.loaded:
            continue
        inside = [s for s in loads if s[3] <= section.address < s[3] + s[5]]
        assert len(inside) == 1
        _, permissions, start, address, *_ = inside[0]
        assert section.address - address == section.offset - start
        assert bool(permissions & 1) == bool(section.flags & 4), f"{section.name}: executable"
        assert bool(permissions & 2) == bool(section.flags & 1), f"{section.name}: writable"
    pages = [set(range(s[3] // 4096, (s[3] + s[6] - 1) // 4096 + 1)) for s in loads]
    assert not pages[0] & pages[1] and not pages[1] & pages[2]
    assert all(s[2] % 4096 == s[3] % 4096 for s in loads)


def test_the_dynamic_hash_table_finds_the_kernel(amd_object: tuple[str, bytes]) -> None:
    elf = read_elf(link(amd_object[1]))
    names, table = elf.section(".dynstr").data, elf.section(".hash").data
    buckets, chains = struct.unpack_from("<II", table)
    words = struct.unpack_from(f"<{buckets + chains}I", table, 8)

    def name(number: int) -> str:
        start = struct.unpack_from("<I", elf.section(".dynsym").data, 24 * number)[0]
        return names[start : names.index(0, start)].decode()

    reachable = set()
    for number in words[:buckets]:
        while number:
            reachable.add(name(number))
            number = words[buckets + number]
    assert reachable == {"multiply", "multiply.kd"}


def test_resources_of_a_code_object(amd_object: tuple[str, bytes]) -> None:
    kernel = read_code_object(link(amd_object[1])).kernels["multiply"]
    assert kernel.lds_bytes == kernel.descriptor.lds_bytes == 4096
    assert kernel.scratch_bytes == kernel.vgpr_spills == kernel.sgpr_spills == 0
    assert kernel.workgroup_size == (256, 1, 1) and kernel.max_workgroup_size == 256
    assert kernel.wavefront_size == 64
    assert kernel.kernarg_bytes == kernel.descriptor.kernarg_bytes and kernel.kernarg_align == 8
    assert [(a.offset, a.size, a.kind) for a in kernel.arguments[:3]] == [
        (0, 8, "global_buffer"),
        (8, 8, "global_buffer"),
        (16, 4, "by_value"),
    ]
    assert 4 <= kernel.vgprs <= 64
    assert kernel.descriptor.allocated_vgprs > 256, "one wave per unit was asked for: two must not fit in 512"
    assert kernel.descriptor.accum_offset >= kernel.vgprs - kernel.agprs


#: A table that the code addresses relative to the program counter.
TABLE = """
@table = internal addrspace(4) constant [64 x i32] [i32 17, {zeros}, i32 99]
define amdgpu_kernel void @k(ptr addrspace(1) %p, i32 %i) {{
  %q = getelementptr i32, ptr addrspace(4) @table, i32 %i
  %v = load i32, ptr addrspace(4) %q
  store i32 %v, ptr addrspace(1) %p
  ret void
}}
""".format(zeros=", ".join(["i32 5"] * 62))


def compile_amd(text: str) -> bytes:
    return llvm.emit_object(llvm.optimize(text, TargetMachineSpec(AMD_TRIPLE, "gfx942")))


def test_relocations_in_the_code_reach_constant_tables() -> None:
    data = compile_amd(TABLE)
    before, image = read_elf(data), read_elf(link(data))
    rela = next(s for s in before.sections if s.type == SECTION_RELA and before.sections[s.info].name == ".text")
    by_kind = {info & 0xFFFFFFFF: (offset, addend) for offset, info, addend in struct.iter_unpack("<QQq", rela.data)}
    assert set(by_kind) == {10, 11}, "expected the low and high half of one address"
    text = image.section(".text")
    (low_at, low_addend), (high_at, high_addend) = by_kind[10], by_kind[11]
    (low,), (high,) = (struct.unpack_from("<I", text.data, at) for at in (low_at, high_at))
    distance = struct.unpack("<q", struct.pack("<II", low, high))[0]
    # The code is s_getpc, s_add_u32 with the low half as its second word: the counter is at the first.
    target = text.address + low_at - 4 + distance
    assert high_at - low_at == high_addend - low_addend, "both halves are of the same distance"
    table = next(s for s in image.symbols if s.name == "table")
    assert target == table.value
    assert struct.unpack("<64i", image.contents(table)) == (17, *[5] * 62, 99)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("@g = external addrspace(1) global i32", "undefined symbols.*\n  g"),
        ("@g = internal addrspace(1) global i32 7", r"writable data.*\n  \.data: 4 bytes"),
        ("@g = internal addrspace(1) global i32 0", "writable data"),
    ],
)
def test_objects_that_need_a_real_linker_are_refused(declaration: str, message: str) -> None:
    body = "define amdgpu_kernel void @k() { %v = atomicrmw add ptr addrspace(1) @g, i32 1 monotonic\n ret void }"
    with pytest.raises(BackendError, match=message):
        link(compile_amd(f"{declaration}\n{body}"))


def test_files_that_are_no_objects_are_refused(amd_object: tuple[str, bytes]) -> None:
    _, data = amd_object
    with pytest.raises(BackendError, match="not a 64-bit"):
        link(b"GIF89a" + bytes(100))
    with pytest.raises(BackendError, match="machine 62"):
        link(data[:18] + struct.pack("<H", 62) + data[20:])
    with pytest.raises(BackendError, match="cut off"):
        link(data[: len(data) // 2])
    with pytest.raises(BackendError, match="linked already"):
        link(link(data))
    with pytest.raises(BackendError, match="no kernel"):
        link(compile_amd("").replace(b".text\0", b".tExt\0"))


def test_inline_assembly_is_refused_before_llvm_aborts() -> None:
    optimized = amd_module("gfx942", inline_asm="v_nop")
    assert "v_nop" in llvm.emit_assembly(optimized)
    with pytest.raises(BackendError, match="cannot become an object") as caught:
        llvm.emit_object(optimized)
    assert "v_nop" in caught.value.diagnostics[0]


def test_msgpack_reader() -> None:
    encoded = (
        bytes.fromhex("86 a1 61 01 a1 62 ff a1 63 93 c0 c2 c3 a1 64 cd 01 00 a1 65 d2 ff ff ff 00 a1 66 d9 03") + b"xyz"
    )
    assert unpack_msgpack(encoded) == {"a": 1, "b": -1, "c": [None, False, True], "d": 256, "e": -256, "f": "xyz"}
    many = b"\xdc\x00\x14" + bytes(range(20))
    assert unpack_msgpack(many) == list(range(20))
    assert unpack_msgpack(b"\xcb" + struct.pack(">d", 1.5)) == 1.5
    assert unpack_msgpack(b"\xc4\x02\x00\xff") == b"\x00\xff"
    with pytest.raises(BackendError, match="ends early"):
        unpack_msgpack(many[:-1])
    with pytest.raises(BackendError, match="0xd4"):
        unpack_msgpack(b"\xd4\x01\x00")
