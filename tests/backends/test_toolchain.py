"""Small kernels through the whole tool chain: MLIR, LLVM, then ptxas."""

from __future__ import annotations

import ctypes
import pickle
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as binding
import pytest

from tilewright.backends import llvm
from tilewright.backends.errors import BackendError
from tilewright.backends.llvm import TargetMachineSpec
from tilewright.backends.mlir_builder import Module
from tilewright.backends.nvidia import ptxas

NVIDIA = TargetMachineSpec("nvptx64-nvidia-cuda", "sm_90a", "+ptx80")
HOST = "x86_64-unknown-linux-gnu"


def ptxas_missing() -> str:
    try:
        ptxas.find_ptxas()
    except BackendError as error:
        return error.message
    return ""


needs_ptxas = pytest.mark.skipif(bool(ptxas_missing()), reason=ptxas_missing())


# --- kernels --------------------------------------------------------------------------------


def nvidia_module() -> Module:
    """Copies through shared memory behind an mbarrier and a barrier; takes a tensor map by value."""
    module = Module(NVIDIA.triple, "kernel.py", 10)
    t = module.types
    smem = module.shared_global()
    f = module.function(
        "copy",
        [t.ptr(), t.ptr(1), t.ptr(1), t.i32],
        {"nvvm.kernel": "unit", "nvvm.maxntid": "array<i32: 128, 1, 1>", "nvvm.minctasm": "1 : i32"},
        [{"llvm.byval": "!llvm.array<128 x i8>", "llvm.align": "64 : i64", "nvvm.grid_constant": "unit"}, {}, {}, {}],
    )
    tensor_map, source, target, count = f.arguments
    thread = f.intrinsic("llvm.nvvm.read.ptx.sreg.tid.x", t.i32)
    shared = f.address_of(smem)
    with f.location("kernel.py", 12, 4):
        f.inline_asm(None, "prefetch.tensormap [$0];", "l,~{memory}", [tensor_map])
        with f.if_then(f.icmp("eq", thread, 0)):
            f.inline_asm(None, "mbarrier.init.shared::cta.b64 [$0], 1;", "r,~{memory}", [f.ptrtoint(shared, t.i32)])
    mine = f.gep(shared, f.add(f.mul(thread, 4, "nsw"), 1024))
    with f.location("kernel.py", 13):
        f.store(f.load(f.gep(source, thread, t.f32), t.f32, 4, invariant=True), mine, 4)
        f.inline_asm(None, "bar.sync 0;", "~{memory}")
    with f.for_loop(0, count, 1, [f.load(mine, t.f32, 4)], unroll=False) as loop:
        loop.yields([f.exp2(f.fma(loop.values[0], 2.0, 1.0), "afn")])
    low, high = f.inline_asm([t.f32, t.f32], "mov.b32 $0, $2; mov.b32 $1, $2;", "=f,=f,f", loop.results)
    f.store(f.fadd(low, high), f.gep(target, thread, t.f32, inbounds=True), 4)
    f.ret()
    return module


# --- the builder, run on the CPU ------------------------------------------------------------


def compile_for_host(module: Module) -> Any:
    optimized = llvm.optimize(module.finish(), TargetMachineSpec(HOST, "x86-64-v3"))
    engine = binding.create_mcjit_compiler(optimized.module.clone(), optimized.machine)
    engine.finalize_object()
    return engine


def test_control_flow_computes_what_it_says() -> None:
    module = Module(HOST)
    t = module.types
    f = module.function("f", [t.i32, t.f32], result=t.f32)
    count, x = f.arguments
    slot = f.alloca(t.f32, align=4)
    f.store(f.f32(0.0), slot, 4)
    with f.for_loop(2, count, 3, [x, f.f32(1.0)]) as loop:
        total, product = loop.values
        index = f.sitofp(loop.index, t.f32)
        with f.if_then(f.icmp("eq", f.and_(loop.index, 1), 0)):
            f.store(f.fadd(f.load(slot, t.f32, 4), index), slot, 4)
        (step,) = f.if_else(
            f.icmp("sgt", loop.index, 6), [t.f32], lambda: [f.fmul(index, 0.5)], lambda: [f.fneg(index)]
        )
        loop.yields([f.fadd(total, step), f.fma(product, 1.5, -0.25)])
    total, product = loop.results
    f.ret(f.fadd(f.fadd(total, f.fmul(product, 1024.0)), f.load(slot, t.f32, 4)))

    def reference(count: int, x: float) -> float:
        product, evens = 1.0, 0.0
        for i in range(2, count, 3):
            evens += i if i % 2 == 0 else 0
            x += i * 0.5 if i > 6 else -i
            product = product * 1.5 - 0.25
        return x + product * 1024 + evens

    engine = compile_for_host(module)
    function = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int, ctypes.c_float)(engine.get_function_address("f"))
    for count in (0, 2, 3, 6, 20):
        assert function(count, 0.5) == reference(count, 0.5)


def test_aggregates_casts_and_memory() -> None:
    module = Module(HOST)
    t = module.types
    f = module.function("f", [t.ptr(), t.i64], argument_attributes=[{"llvm.noalias": "unit"}, {}])
    memory, wide = f.arguments
    narrow = f.trunc(wide, t.i16)
    f.store(f.sext(narrow, t.i64), memory, 8)
    f.store(f.zext(narrow, t.i64), f.gep(memory, 8), 8)
    vector = f.pack_vector([f.uitofp(narrow, t.f32), f.f32(2.0), f.sqrt(f.f32(9.0)), f.f32(-0.0)])
    f.store(f.shuffle(vector, vector, [3, 2, 1, 0]), f.gep(memory, [1], t.vec(4, t.f32)), 16)
    first, second = f.unpack_struct(f.pack_struct([wide, narrow]), [t.i64, t.i16])
    f.store(f.xor(first, f.zext(second, t.i64)), f.gep(memory, 32), 8)
    old = f.atomicrmw("add", f.gep(memory, 40), f.i64(5), "seq_cst")
    f.store(f.smin(f.umax(old, 100), -1), f.gep(memory, f.i64(48)), 8)
    f.store(f.fptosi_sat(f.f32(float("nan")), t.i32), f.gep(memory, 56, inbounds=True), 4)
    f.store(f.maximum(f.f32(1.0), f.f32(float("nan"))), f.gep(memory, 60), 4)
    f.ret()
    engine = compile_for_host(module)
    buffer = (ctypes.c_int64 * 10)()
    base = (ctypes.addressof(buffer) + 15) // 16 * 16  # the vector store is aligned
    ctypes.c_int64.from_address(base + 40).value = 7
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(engine.get_function_address("f"))(base, 0x12345FFFE)
    data = ctypes.string_at(base, 64)
    assert struct.unpack_from("<qq", data) == (-2, 0xFFFE)
    assert struct.unpack_from("<4f", data, 16) == (-0.0, 3.0, 2.0, 65534.0)
    assert data[16:20] == b"\0\0\0\x80"
    assert struct.unpack_from("<qqqi", data, 32) == (0x12345FFFE ^ 0xFFFE, 12, -1, 0)
    assert struct.unpack_from("<I", data, 60)[0] & 0x7FFFFFFF > 0x7F800000, "maximum lost the NaN"


def test_folded_integers_are_what_llvm_computes() -> None:
    """Fold, and let LLVM fold the same operation; both must give the same number."""
    operations = "add sub mul and or xor shl lshr ashr sdiv srem udiv urem".split()
    predicates = "eq ne slt sle sgt sge ult ule ugt uge".split()
    rng = random.Random(1)
    module = Module(HOST)
    f = module.function("f", [])
    ours: dict[str, int | None] = {}
    functions = []
    edges = [0, 1, -1, 2, 7, 31, -(2**31), 2**31 - 1]
    for case in range(400):
        name, bits = rng.choice(operations), rng.choice([32, 64])
        predicate = rng.choice(predicates)
        x, y = (rng.choice([*edges, rng.getrandbits(bits) - 2 ** (bits - 1)]) for _ in range(2))
        type_ = module.types.int(bits)
        a, b = f.const(x, type_), f.const(y, type_)
        ours[f"op{case}"] = f.const_value(getattr(f, {"and": "and_", "or": "or_"}.get(name, name))(a, b))
        ours[f"cmp{case}"] = f.const_value(f.icmp(predicate, a, b))
        functions.append(f"define i{bits} @op{case}() {{ %r = {name} i{bits} {x}, {y}\n ret i{bits} %r }}")
        functions.append(f"define i1 @cmp{case}() {{ %r = icmp {predicate} i{bits} {x}, {y}\n ret i1 %r }}")
    optimized = llvm.optimize("\n".join(functions), TargetMachineSpec(HOST, "x86-64")).text()
    theirs = dict(re.findall(r"@(\w+)\(\)[^{]*\{\n\s*ret \w+ (\S+)", optimized))
    folded = {name: value for name, value in ours.items() if value is not None}
    assert len(folded) > 700
    words = {"true": "-1", "false": "0"}
    numbers = {name: int(words.get(text, text)) for name, text in theirs.items() if text != "poison"}
    assert {name: numbers[name] for name in folded} == folded
    # What we leave alone is what LLVM calls poison: nothing else.
    assert all(theirs.get(name, "poison") == "poison" for name in ours if name not in folded)


def test_neutral_operands_make_no_operations() -> None:
    module = Module(NVIDIA.triple)
    t = module.types
    f = module.function("f", [t.i32, t.ptr(3)])
    x, pointer = f.arguments
    assert f.add(x, 0) == x and f.add(0, x) == x and f.mul(1, x) == x and f.and_(x, -1) == x
    assert f.const_value(f.mul(x, 0)) == 0 and f.const_value(f.urem(x, 1)) == 0
    assert f.gep(pointer, 0) == pointer and f.bitcast(x, t.i32) == x
    assert f.select(f.i1(True), x, 3) == x
    assert f.sub(0, x) != x and f.shl(0, x) != x
    assert f.i32(5) == f.i32(5) and f.f32(0.0) != f.f32(-0.0)


def test_invalid_mlir_names_the_source_line() -> None:
    module = Module(NVIDIA.triple)
    f = module.function("f", [module.types.i32])
    with f.location("kernel.py", 42, 7):
        f.fneg(f.arguments[0])
    f.ret()
    with pytest.raises(BackendError, match=r'"kernel\.py":42:7.*floating point') as caught:
        module.finish()
    assert caught.value.stage == "mlir"


def test_overflow_and_inbounds_flags_reach_llvm() -> None:
    text = nvidia_module().finish()
    assert "mul nsw i32" in text and "getelementptr inbounds float" in text
    assert "add nsw i32" in text  # the loop counter
    assert "!invariant.load" in text and "llvm.loop.unroll.disable" in text


# --- convergence ----------------------------------------------------------------------------

CALLS = r"""
define void @f(i32 %x) #3 {
  call void asm sideeffect "bar.sync 0;", "~{memory}"(), !dbg !5
  %1 = call { i32, i32 } asm sideeffect "q(\22$0\22);", "=r,=r,r,r"(i32 %x, i32 ptrtoint (ptr @g to i32)) #1, !dbg !5
  %2 = tail call i32 asm sideeffect alignstack "a", "=r,0"(i32 %x) #2
  %3 = call i32 asm "mov.b32 $0, $1;", "=r,r"(i32 %x)
  ret void
}
attributes #1 = { nounwind }
attributes #2 = { convergent nounwind }
attributes #3 = { "nvvm.maxntid"="128" }
"""


def test_every_side_effecting_asm_call_becomes_convergent() -> None:
    assert len(llvm.unmarked_calls(CALLS)) == 2
    with pytest.raises(BackendError, match="2 inline assembly calls are not convergent"):
        llvm.check_convergent(CALLS)
    marked = llvm.mark_convergent(CALLS)
    llvm.check_convergent(marked)
    lines = marked.splitlines()
    assert lines[2].endswith('"~{memory}"() #4, !dbg !5')
    assert lines[3].endswith("(i32 %x, i32 ptrtoint (ptr @g to i32)) #4 #1, !dbg !5")
    assert lines[4:6] == CALLS.splitlines()[4:6], "marked already, or pure"
    assert lines[-1] == "attributes #4 = { convergent nounwind }"
    assert llvm.mark_convergent(marked) == marked


def test_the_checker_sees_calls_that_the_marker_cannot_parse() -> None:
    odd = 'call void asm sideeffect inteldialect unwind "bar", "~{memory}"()'
    assert llvm.unmarked_calls("  fastcc " + odd)


DUPLICABLE = """
define ptx_kernel void @f(ptr addrspace(1) %p, i1 %c) {
  br i1 %c, label %a, label %b
a:
  store volatile i32 1, ptr addrspace(1) %p
  br label %b
b:
  call void asm sideeffect "bar.sync 0;", "~{memory}"()
  br i1 %c, label %d, label %e
d:
  store volatile i32 2, ptr addrspace(1) %p
  br label %e
e:
  ret void
}
"""


def test_a_barrier_is_not_duplicated_into_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert llvm.emit_assembly(llvm.optimize(DUPLICABLE, NVIDIA)).count("bar.sync 0;") == 1
    # Without the mark LLVM does duplicate it, so this test tests something.
    monkeypatch.setattr(llvm, "mark_convergent", lambda text: text)
    monkeypatch.setattr(llvm, "check_convergent", lambda text: None)
    assert llvm.emit_assembly(llvm.optimize(DUPLICABLE, NVIDIA)).count("bar.sync 0;") == 2


# --- LLVM -----------------------------------------------------------------------------------


LOOP = """
define ptx_kernel void @f(ptr addrspace(1) %p, i32 %n) {
entry:
  br label %loop
loop:
  %i = phi i32 [ 0, %entry ], [ %j, %loop ]
  %q = getelementptr float, ptr addrspace(1) %p, i32 %i
  %v = load float, ptr addrspace(1) %q
  %w = fadd float %v, 1.0
  store float %w, ptr addrspace(1) %q
  %j = add i32 %i, 1
  %c = icmp slt i32 %j, %n
  br i1 %c, label %loop, label %done
done:
  ret void
}
"""


def test_runtime_unrolling_can_be_switched_off() -> None:
    loads = [llvm.optimize(LOOP, NVIDIA, unroll=unroll).text().count("load float") for unroll in (True, False)]
    assert loads[0] > 1 and loads[1] == 1


def test_bad_ir_and_unknown_targets_are_backend_errors() -> None:
    with pytest.raises(BackendError, match="not valid") as caught:
        llvm.optimize("define void @f() { ret i32 0 }", NVIDIA)
    assert "value doesn't match function result type" in caught.value.diagnostics[0]
    with pytest.raises(BackendError, match="no target machine"):
        llvm.optimize("", TargetMachineSpec("nonsense-triple", "x"))
    with pytest.raises(BackendError, match="no object format"):
        llvm.emit_object(llvm.optimize("", NVIDIA))


def test_errors_survive_the_trip_from_the_worker() -> None:
    error = BackendError("ptxas", "message", ["one", "two"])
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.stage, copy.message, copy.diagnostics) == ("ptxas", "message", ("one", "two"))
    assert str(copy) == "ptxas: message\n  one\n  two"


# --- NVIDIA ---------------------------------------------------------------------------------


def nvidia_ptx(debug_info: bool = False) -> str:
    return llvm.emit_assembly(llvm.optimize(nvidia_module().finish(debug_info), NVIDIA))


def test_ptx_keeps_the_kernel_attributes() -> None:
    text = nvidia_ptx()
    assert ".maxntid 128, 1, 1" in text and ".minnctapersm 1" in text
    assert ".extern .shared .align 1024 .b8 smem[]" in text
    assert ".param .align 64 .b8 copy_param_0[128]" in text
    assert "ld.global.nc" in text and '.pragma "nounroll"' in text


def test_source_lines_reach_the_ptx_without_debug_code() -> None:
    text = nvidia_ptx(debug_info=True)
    assert re.search(r"\.loc\s+\d+ 12 4", text) and re.search(r"\.loc\s+\d+ 13 ", text) and '"kernel.py"' in text
    assert not re.search(r"\.target.*debug", text), "ptxas would not optimise"


@needs_ptxas
def test_ptx_assembles() -> None:
    assembled = ptxas.assemble(nvidia_ptx(), "sm_90a")
    assert assembled.cubin[:4] == b"\x7fELF"
    resources = assembled.resources["copy"]
    assert 4 < resources.registers < 64 and resources.barriers == 1
    assert resources.spill_stores == resources.spill_loads == resources.stack_bytes == 0
    ptxas.assemble(nvidia_ptx(debug_info=True), "sm_90a", options=["-lineinfo"])


#: Reads an accumulator before the wait: ptxas inserts a wait of its own (C7517).
TOUCHED_TOO_EARLY = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 p)
.maxntid 128, 1, 1
{
 .reg .f32 %f<4>;
 .reg .b64 %d<3>;
 mov.b64 %d1, 4611686293305294848;
 ld.param.u64 %d2, [p];
 wgmma.fence.sync.aligned;
 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0,%f1,%f2,%f3}, %d1, %d1, 1, 1, 1, 0, 0;
 wgmma.commit_group.sync.aligned;
 st.global.f32 [%d2], %f0;
 wgmma.wait_group.sync.aligned 0;
 ret;
}
"""


@needs_ptxas
def test_performance_advice_of_ptxas_is_kept() -> None:
    found = ptxas.assemble(TOUCHED_TOO_EARLY, "sm_90a")
    assert found.cubin and len(found.advisories) == 1 and "C7517" in found.advisories[0]


@needs_ptxas
def test_ptxas_errors_quote_the_ptx_line() -> None:
    with pytest.raises(BackendError) as caught:
        ptxas.assemble(TOUCHED_TOO_EARLY.replace("st.global.f32", "st.nonsense.f32"), "sm_90a")
    assert "14 | st.nonsense.f32 [%d2], %f0;" in caught.value.diagnostics
    assert any("Unknown modifier '.nonsense'" in line for line in caught.value.diagnostics)


def test_resources_of_several_entries() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    64 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 4 barriers, 64 bytes cumulative stack size, 128 bytes smem, 96 bytes cmem[0]
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers
"""
    assert ptxas.parse_resources(log) == {
        "a": ptxas.Resources(255, 12, 16, 64, 128, 4),
        "b": ptxas.Resources(4, 0, 0, 0, 0, 0),
    }


def test_the_environment_names_ptxas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ptxas.PTXAS_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(BackendError, match="not an executable"):
        ptxas.find_ptxas()
    tool = tmp_path / "ptxas"
    tool.write_text("#!/bin/sh\nkill -SEGV $$\n")
    tool.chmod(0o755)
    monkeypatch.setenv(ptxas.PTXAS_VARIABLE, str(tool))
    with pytest.raises(BackendError, match="status -11"):
        ptxas.assemble("", "sm_90a")


def test_symbols_of_our_llvm_stay_to_themselves() -> None:
    """Another library with an LLVM in it, as Triton's, must not bind to them: both would register their options."""
    program = "import ctypes, tilewright.backends.mlir_builder; ctypes.CDLL(None).LLVMContextCreate"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "undefined symbol: LLVMContextCreate" in run.stderr
