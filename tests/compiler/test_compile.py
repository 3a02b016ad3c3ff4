"""`tw.compile`: what an artifact holds for each target, entries by alignment, dumps, and errors with their place."""

from __future__ import annotations

import pickle
import re

import pytest
from compiler_programs import add, double_exponential, gemm, scale
from fake_driver import FakeDriver

import tilewright as tw
from tilewright.compiler.driver import alignment_variants, compile_text, run_passes
from tilewright.compiler.errors import BackendFailure, PassFailure
from tilewright.compiler.options import CompileOptions
from tilewright.ir.core import IRError
from tilewright.ir.parser import parse_module
from tilewright.runtime.cuda import CudaDevice, DevicePointer

TARGETS = {"sm_90a": "ptx", "gfx942": "amdgcn", "gfx950": "amdgcn"}


def gemm_spec(align=None, m="M", n="N", k="K"):
    return {
        "a": tw.spec("bf16", (m, k), align=align),
        "b": tw.spec("bf16", (k, n), align=align),
        "c": tw.spec("bf16", (m, n), align=align),
    }


def scale_spec(dtype="f32", align=16):
    return {"x": tw.spec(dtype, ("N",), align=align), "y": tw.spec(dtype, ("N",), align=align)}


@pytest.fixture(scope="module")
def artifacts():
    return {target: tw.compile(gemm, target, gemm_spec()) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_artifact(artifacts, target, tmp_path):
    artifact = artifacts[target]
    assert (artifact.name, artifact.target) == ("gemm", target)
    assert artifact.binary[:4] == b"\x7fELF"
    assert artifact.save(tmp_path / "out").read_bytes() == artifact.binary
    assert list(artifact.asm) == ["llvm", TARGETS[target]]
    assert "gemm" in artifact.asm[TARGETS[target]]
    assert artifact.seconds > 0
    assert artifact.resources.registers > 0
    assert artifact.resources.spills == 0
    assert artifact.abi.shared_bytes > 0
    assert artifact.abi.threads % 64 == 0
    assert [p.name for p in artifact.abi.params] == ["a", "b", "c"]


@pytest.mark.parametrize("target", TARGETS)
def test_unknown_alignment_gives_two_entries(artifacts, target):
    entries = artifacts[target].entries
    assert [e.abi.name for e in entries] == ["gemm", "gemm_unaligned"]
    assert [{p.alignment for p in e.abi.params} for e in entries] == [{16}, {2}]


@pytest.mark.parametrize("target", TARGETS)
def test_declared_alignment_gives_one_entry(target):
    artifact = tw.compile(add, target, {n: tw.spec("f32", ("M", "N"), align=16) for n in ("x", "y", "out")})
    assert [e.abi.name for e in artifact.entries] == ["add"]
    assert {p.alignment for p in artifact.abi.params} == {16}


def test_variants_keep_what_is_declared():
    fast, general = alignment_variants({"x": tw.spec("f32", ("N",), align=8), "y": tw.spec("f16", ("N",)), "B": 3})
    assert (fast["x"].align, fast["y"].align, fast["B"]) == (8, 16, 3)
    assert (general["x"].align, general["y"].align, general["B"]) == (8, 2, 3)


@pytest.mark.parametrize("target", TARGETS)
def test_ir_of_every_pass_reads_back(artifacts, target):
    ir = artifacts[target].ir
    assert next(iter(ir)) == "input"
    assert {"canonicalize", "placement", "layouts", "shared-plan"} <= set(ir)
    for text in ir.values():
        assert [f.name for f in parse_module(text).functions] == ["gemm"]
    assert "async.copy" not in ir["input"]
    assert re.search(r"async\.|prefetch", list(ir.values())[-1])


def test_static_sizes_are_part_of_the_type():
    artifact = tw.compile(gemm, "sm_90a", gemm_spec(16, m=256, k=512))
    assert [p.shape for p in artifact.abi.params] == [(256, 512), (512, None), (256, None)]
    assert artifact.abi.params[0].strides == (512, 1)
    assert "view<256x512xbf16" in artifact.ir["input"]


def test_scalars_by_annotation_name_or_dtype():
    texts = set()
    for given in ({}, {"factor": "f32"}, {"factor": tw.float32}):
        artifact = tw.compile(scale, "sm_90a", scale_spec() | given)
        texts.add(artifact.asm["ptx"])
        assert [p.name for p in artifact.abi.params] == ["x", "y", "factor"]
    assert len(texts) == 1


def test_options_and_name():
    artifact = tw.compile(scale, "sm_90a", scale_spec(), name="twice_as_wide", num_warps=8)
    assert artifact.name == artifact.abi.name == "twice_as_wide"
    assert artifact.abi.threads == 256
    assert ".entry twice_as_wide" in artifact.asm["ptx"]


def test_constexprs_reach_the_code():
    tiles = [tw.compile(scale, "sm_90a", scale_spec() | {"B": b}).ir["input"] for b in (64, 256)]
    assert "tile<64xf32>" in tiles[0]
    assert "tile<256xf32>" in tiles[1]


# --- dumps ------------------------------------------------------------------------------------------


def test_dumps_are_numbered_and_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_DUMP_DIR", str(tmp_path))
    spec = scale_spec(align=None)
    artifact = tw.compile(scale, "sm_90a", spec, name="dumped")
    first = sorted(p.name for p in (tmp_path / f"dumped-sm_90a-{artifact.variant}").iterdir())
    passes = list(artifact.ir)
    assert first[: len(passes)] == [f"{i:02d}-{name.partition('.')[0]}.tw" for i, name in enumerate(passes)]
    assert first[len(passes) :] == ["dumped.ll", "dumped.ptx"]
    assert len(list((tmp_path / f"dumped_unaligned-sm_90a-{artifact.variant}").glob("*.tw"))) == len(passes)


def test_dumps_of_specialisations_lie_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_DUMP_DIR", str(tmp_path))
    tw.compile(scale, "sm_90a", scale_spec() | {"B": 64})
    tw.compile(scale, "sm_90a", scale_spec() | {"B": 256})
    tw.compile(scale, "sm_90a", scale_spec() | {"B": 256}, num_warps=8)
    tw.compile(scale, "sm_90a", scale_spec() | {"B": 256})
    texts = [(folder / "00-input.tw").read_text() for folder in tmp_path.iterdir()]
    assert sorted("tile<64xf32>" in text for text in texts) == [False, False, True]


def test_dump_of_a_failing_pass_leaves_its_predecessors(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_DUMP_DIR", str(tmp_path))
    with pytest.raises(tw.CompileError):
        tw.compile(gemm, "sm_90a", gemm_spec(16) | {"BK": 1024}, name="failing")
    (folder,) = tmp_path.glob("failing-sm_90a-*")
    assert (folder / "00-input.tw").exists()
    assert list(folder.glob("*-fences.tw"))


def test_too_much_shared_memory_lists_the_buffers():
    with pytest.raises(PassFailure, match=r"needs \d+ bytes of shared memory(.|\n)*buffer: \d+ bytes(.|\n)*num_stages"):
        tw.compile(gemm, "sm_90a", gemm_spec(16) | {"BK": 1024})


@pytest.mark.parametrize(
    ("kernel", "spec", "target", "warps", "message"),
    [
        (scale, scale_spec() | {"B": 1 << 19}, "sm_90a", 4, r"has 524288 elements, a block holds at most 262144"),
        (scale, scale_spec(), "gfx942", 32, r"num_warps=32: a block has at most 1024 threads(.|\n)*num_warps=16"),
        (scale, scale_spec(), "sm_90a", 3, r"num_warps=3 is not a power of two(.|\n)*num_warps=2 or num_warps=4"),
        (gemm, gemm_spec(16), "gfx942", 12, r"num_warps=12 is not a power of two(.|\n)*num_warps=8 or num_warps=16"),
        (
            gemm,
            gemm_spec(16),
            "sm_90a",
            16,
            r"num_warps=16: \d+ rows do not divide among 4 groups of 4 warps(.|\n)*64 r",
        ),
    ],
)
def test_warps_that_tiles_do_not_divide_among(kernel, spec, target, warps, message):
    with pytest.raises(PassFailure, match=message) as caught:
        tw.compile(kernel, target, spec, num_warps=warps)
    assert caught.value.reproducer is None, "the user is to blame"
    assert caught.value.loc.line > 0


def test_passes_without_a_backend():
    texts = run_passes(gemm.definition, "sm_90a", gemm_spec(), CompileOptions(num_stages=2))
    assert list(texts) == list(tw.compile(gemm, "sm_90a", gemm_spec()).ir)


# --- IR text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90a", "gfx950"])
def test_scheduled_text_compiles_to_the_same_code(target):
    artifact = tw.compile(scale, target, scale_spec())
    text = list(artifact.ir.values())[-1].replace("module {", f'module {{target = "{target}"}} {{', 1)
    again = compile_text(text)
    assert again.target == target
    assert instructions(again.asm[TARGETS[target]]) == instructions(artifact.asm[TARGETS[target]])


def instructions(assembly):
    """The text but for where its lines come from, which differs."""
    return [line for line in assembly.splitlines() if not re.match(r"\s*(\.loc|\.file|\$L__(tmp|func)|//|$)", line)]


SCHEDULED = "func @f(%x: view<?xf32, strides=[1], align=4>) {num_warps = 4, threads = 128} {}"


def test_text_errors():
    with pytest.raises(IRError, match="names no target"):
        compile_text(f"module {{ {SCHEDULED} }}", None, "f.tw")
    with pytest.raises(IRError, match="scheduled for gfx942, not for sm_90a"):
        compile_text(f'module {{target = "gfx942"}} {{ {SCHEDULED} }}', "sm_90a")
    with pytest.raises(IRError, match="has no function"):
        compile_text('module {target = "gfx942"} {}')
    with pytest.raises(IRError, match=r"k\.tw:1:1: unexpected"):
        compile_text("?", "sm_90a", "k.tw")
    unscheduled = (
        "func @g(%x: view<?xf32, strides=[1], align=4>) {threads = 128} {\n  %i = tile.program_id {axis = 0} : i32\n"
    )
    unscheduled += "  %t = tile.load %x, [%i] : tile<64xf32>\n  tile.store %x, [%i], %t\n}"
    with pytest.raises(BackendFailure, match=r"k\.tw:3:\d+: error"):
        compile_text(unscheduled, "sm_90a", "k.tw")


# --- errors -----------------------------------------------------------------------------------------


def line_of(kernel, text):
    lines = kernel.definition.source.splitlines()
    return kernel.definition.first_line + next(i for i, line in enumerate(lines) if text in line)


def test_frontend_errors_have_place_caret_and_advice():
    with pytest.raises(tw.CompileError) as caught:
        tw.compile(
            add, "sm_90a", {"x": tw.spec("f32", ("N",)), "y": tw.spec("f32", ("N",)), "out": tw.spec("f32", ("N",))}
        )
    error = caught.value
    assert error.loc.file.endswith("compiler_programs.py")
    assert error.loc.line == line_of(add, "tw.store")
    assert re.search(r"\n\s*\d+ \| .*tw\.store.*\n\s*\| +\^", str(error))


def test_backend_errors_have_place_caret_inlined_calls_and_stage():
    with pytest.raises(BackendFailure) as caught:
        tw.compile(double_exponential, "sm_90a", scale_spec("f64"))
    error = caught.value
    text = str(error)
    assert (error.stage, error.kernel, error.target) == ("lowering", "double_exponential", "sm_90a")
    assert "return tw.exp(x)" in text
    assert "^" in text
    assert f"called from {error.loc.caller.file}:{line_of(double_exponential, 'tw.store')}" in text
    assert error.reproducer is None, "the program is to blame: the message is enough"
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.stage) == (text, "lowering")


def test_pass_errors_have_place_and_name_the_pass():
    with pytest.raises(PassFailure) as caught:
        tw.compile(gemm, "sm_90a", {name: tw.spec("f64", ("M", "N"), align=16) for name in "abc"})
    error = caught.value
    assert error.loc.line == line_of(gemm, "tw.dot")
    assert "acc = tw.dot" in str(error)
    assert f"pass '{error.stage}' on kernel 'gemm' for sm_90a" in str(error)


def test_a_pass_that_breaks_leaves_a_reproducer(tmp_path, monkeypatch):
    from tilewright.passes.dce import DeadCodeElimination

    def broken(self, module, context):
        raise KeyError("oh")

    monkeypatch.setenv("TILEWRIGHT_CACHE_SIZE", "0")
    monkeypatch.setenv("TILEWRIGHT_DUMP_DIR", str(tmp_path))
    monkeypatch.setattr(DeadCodeElimination, "run", broken)
    with pytest.raises(PassFailure, match="pass 'dce' failed on kernel 'scale': KeyError: 'oh'") as caught:
        tw.compile(scale, "sm_90a", scale_spec(), num_warps=8)
    error = caught.value
    assert error.reproducer.parent == tmp_path
    assert parse_module(error.reproducer.read_text()).functions[0].name == "scale"
    assert f"tilewright opt {error.reproducer} --target sm_90a --num-warps=8 -p dce" in str(error)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ({}, {}, "parameter 'x' is missing"),
        ({"x": 3}, {}, "'x' is a tensor, got 3(.|\n)*tw.spec"),
        (scale_spec() | {"factor": "f99"}, {}, "'factor': unknown dtype 'f99'"),
        (scale_spec() | {"factor": "f64"}, {}, "'factor' is tw.float32"),
        (scale_spec() | {"z": 1}, {}, "no parameter 'z'"),
        (scale_spec(), {"num_wraps": 3}, "no option 'num_wraps'(.|\n)*did you mean 'num_warps'"),
        (scale_spec(), {"num_warps": True}, "num_warps must be a positive integer"),
        (scale_spec(), {"name": "a b"}, "name='a b' cannot name"),
    ],
)
def test_wrong_arguments(args, options, message):
    with pytest.raises(tw.ArgumentError, match=message):
        tw.compile(scale, "sm_90a", args, **options)


def test_wrong_target_and_wrong_kernel():
    with pytest.raises(tw.ArgumentError, match="unknown target 'sm_90'; did you mean 'sm_90a'"):
        tw.compile(scale, "sm_90", scale_spec())
    with pytest.raises(TypeError, match=r"function under @tw\.kernel, got function"):
        tw.compile(lambda x: x, "sm_90a", {})


@pytest.mark.parametrize("overlap", ["0", "1", None])
def test_launches_overlap_unless_told_otherwise(monkeypatch, overlap):
    if overlap is not None:
        monkeypatch.setenv("TILEWRIGHT_LAUNCH_OVERLAP", overlap)
    artifact = tw.compile(scale, "sm_90a", scale_spec())
    driver = FakeDriver()
    x, y = (DevicePointer(0x1000 * i, (256,), (1,), "f32") for i in (1, 2))
    artifact.launch(CudaDevice(0, driver), 2, [x, y, 1.0], stream=5)
    assert len(driver.named("cuLaunchKernel")) == 1
    assert len(driver.named("cuLaunchKernelEx")) == (overlap != "0")
    assert artifact.abi.awaits_grid, "the artifact is the same"
