"""The ``tilewright`` command: what it prints, its JSON, and its exit codes (0 ok, 1 the program, 2 usage)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tilewright.compiler.cli import main

PROGRAMS = Path(__file__).parents[1] / "support" / "compiler_programs.py"
SCALE, ADD, GEMM = (f"{PROGRAMS}:{name}" for name in ("scale", "add", "gemm"))
ADD_STORE = 1 + next(i for i, line in enumerate(PROGRAMS.read_text().splitlines()) if "tw.store(out, (m, n)" in line)
NAMED = ["--arg", "x=f32[N]", "--arg", "y=f32[N]"]
SIZED = ["--arg", "x=f32[300]", "--arg", "y=f32[300]", "--arg", "factor=2.0", "--grid", "3"]


def invoke(*args, **options):
    """Run the command in this process; an exception that is no exit is a failure of the test."""
    result = CliRunner().invoke(main, [str(a) for a in args], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.stderr
    return result


def ok(*args, **options):
    result = invoke(*args, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def wrong(*args, **options):
    """The message of an error of the program."""
    result = invoke(*args, **options)
    assert result.exit_code == 1, result.output
    return result.stderr


def misused(*args, **options):
    """The message of a usage error."""
    result = invoke(*args, **options)
    assert result.exit_code == 2, result.output
    assert "Usage: " in result.stderr
    return result.stderr


# --- compile ----------------------------------------------------------------------------------------


def test_compile(tmp_path):
    out = tmp_path / "out.cubin"
    text = ok("compile", SCALE, *NAMED, "-o", out)
    assert text.startswith(f"{out}: ")
    assert "for sm_90a in " in text
    assert "scale: 128 threads" in text
    assert "scale_unaligned: 128 threads" in text
    assert out.read_bytes()[:4] == b"\x7fELF"
    assert "from the cache" in ok("compile", SCALE, *NAMED, "-o", out)


@pytest.mark.parametrize(("target", "suffix"), [("sm_90a", "cubin"), ("gfx942", "hsaco"), ("gfx950", "hsaco")])
def test_compile_json(tmp_path, monkeypatch, target, suffix):
    monkeypatch.chdir(tmp_path)
    report = json.loads(ok("compile", SCALE, *NAMED, "--target", target, "--json", "--arg", "B=256"))
    assert set(report) == {"kernel", "target", "binary", "bytes", "seconds", "cached", "entries"}
    assert (report["kernel"], report["target"], report["binary"]) == ("scale", target, f"scale.{suffix}")
    assert report["bytes"] == (tmp_path / report["binary"]).stat().st_size
    assert {"name", "threads", "shared_bytes", "registers", "spill_stores"} <= set(report["entries"][0])


def test_compile_needs_no_name_where_there_is_one_kernel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.py").write_text(
        "import tilewright as tw\n@tw.kernel\ndef k(x: tw.Tensor): tw.store(x, (0,), tw.zeros((64,), tw.float32))\n"
    )
    ok("compile", "one.py", "--arg", "x=f32[N]")
    assert Path("k.cubin").exists()


def test_compile_takes_values_of_scalars_for_their_dtype(tmp_path):
    ok("compile", SCALE, *NAMED, "--arg", "factor=2.0", "-o", tmp_path / "o")


# --- run --------------------------------------------------------------------------------------------


def test_run():
    text = ok("run", SCALE, *SIZED)
    assert text.startswith("scale on cpu, grid 3: ")
    assert "  y float32 300: mean " in text
    assert "all finite" in text
    assert "  x " not in text, "only what was written"


def test_run_json_and_seed():
    reports = [json.loads(ok("run", SCALE, *SIZED, "--json", "--seed", seed)) for seed in (1, 1, 2)]
    assert set(reports[0]) == {"kernel", "device", "grid", "seconds", "written"}
    assert (reports[0]["device"], reports[0]["grid"]) == ("cpu", [3])
    written = [r["written"]["y"] for r in reports]
    assert set(written[0]) == {"dtype", "shape", "mean", "min", "max", "nan", "inf"}
    assert (written[0]["shape"], written[0]["nan"]) == ([300], 0)
    assert written[0] == written[1] != written[2]


def test_run_on_an_emulated_device():
    assert "scale on emulate:gfx942" in ok("run", SCALE, *SIZED, "--device", "emulate:gfx942")


def test_run_says_when_nothing_is_written():
    assert "no tensor changed" in ok("run", SCALE, *SIZED[:-1], "0")


# --- opt --------------------------------------------------------------------------------------------


def test_opt_reads_what_dump_prints():
    text = ok("dump", SCALE, *NAMED, "--after", "input")
    assert ok("opt", "-p", "canonicalize", input=text).startswith("module {")
    scheduled = ok("dump", SCALE, *NAMED)
    assert ok("opt", input=text) == scheduled


def test_options_of_passes():
    matrices = [part for name in "abc" for part in ("--arg", f"{name}=bf16[M,N]")]
    text = ok("dump", GEMM, *matrices, "--num-ctas", 2, "--num-stages", 3, "--after", "pipeline")
    assert "ctas = 2} : ring<3>" in text and "{multicast = 1}" in text
    source = ok("dump", GEMM, *matrices, "--after", "input")
    assert "num_ctas = 4" in ok("opt", "--num-ctas", 4, "-p", "tile-order", input=source)
    for walks in ("true", "false"):
        found = "persistent = true" in ok("opt", "--persistent", walks, "-p", "tile-order", input=source)
        assert found == (walks == "true")
    assert "maxnreg = 40" in ok("opt", "--maxnreg", 40, "-p", "register-limit", input=source)
    assert "'3' is not one of" in misused("dump", SCALE, *NAMED, "--num-ctas", 3)


def test_opt_errors_point_into_the_text(tmp_path):
    file = tmp_path / "bad.tw"
    file.write_text("func @f(%x: i32) {\n  %y = tile.add %x, %z : i32\n}\n")
    assert "bad.tw:2:21: unknown value %z\n" in wrong("opt", file)
    file.write_text("func @f(%x: i32, %b: i1) {\n  %y = tile.add %x, %b : i32\n}\n")
    assert "bad.tw:2:8: error: " in wrong("opt", file)
    assert "|        ^" in wrong("opt", file)


def test_opt_usage(tmp_path):
    assert "did you mean 'canonicalize'" in misused("opt", "-p", "canonicalise", input="")
    assert "no argument 'num-stage'" in misused("opt", "-p", "pipeline{num-stage=3}", input="")
    assert "No such file" in misused("opt", tmp_path / "none.tw")
    (tmp_path / "binary.tw").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in misused("opt", tmp_path / "binary.tw")


# --- dump -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "kind"), [("sm_90a", "ptx"), ("gfx942", "amdgcn")])
def test_dump(target, kind):
    args = [SCALE, *NAMED, "--target", target]
    lines = ok("dump", *args, "--list").split("\n")
    assert lines[:2] == ["input", "collectives"]
    assert lines[-3:] == ["--asm llvm", f"--asm {kind}", ""]
    listing = json.loads(ok("dump", *args, "--list", "--json"))
    assert listing == {"passes": lines[:-3], "asm": ["llvm", kind]}
    assert "linear<" in ok("dump", *args, "--after", "layouts")
    assert "scale" in ok("dump", *args, "--asm", kind)
    assert json.loads(ok("dump", *args, "--after", "input", "--json"))["name"] == "input"


def test_dump_usage():
    assert "there is no 'layout' for sm_90a; there are: input, collectives, canon" in misused(
        "dump", SCALE, *NAMED, "--after", "layout"
    )
    assert "there are: llvm, ptx" in misused("dump", SCALE, *NAMED, "--asm", "amdgcn")
    assert "exclude each other" in misused("dump", SCALE, *NAMED, "--asm", "ptx", "--after", "cse")


# --- devices, env -----------------------------------------------------------------------------------


def test_devices():
    names = [line.split()[0] for line in ok("devices").splitlines()]
    rows = json.loads(ok("devices", "--json"))
    assert [row["name"] for row in rows] == names
    assert "cpu" in names
    assert set(rows[0]) == {"name", "target", "description", "units", "memory"}


def test_env(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_DUMP_DIR", str(tmp_path))
    assert f"TILEWRIGHT_DUMP_DIR={tmp_path}\n" in ok("env")
    rows = {row["name"]: row for row in json.loads(ok("env", "--json"))}
    assert rows["TILEWRIGHT_DUMP_DIR"]["value"] == str(tmp_path)
    assert rows["TILEWRIGHT_INTERPRET"]["value"] is False
    assert all(row["help"] for row in rows.values())
    monkeypatch.setenv("TILEWRIGHT_INTERPRET", "perhaps")
    assert "TILEWRIGHT_INTERPRET='perhaps': expected 0 or 1" in misused("env")
    assert "TILEWRIGHT_INTERPRET" in misused("run", SCALE, *SIZED)


def test_dump_dir_is_filled_on_a_cache_hit_too(monkeypatch, tmp_path):
    ok("compile", SCALE, *NAMED, "-o", tmp_path / "o")
    monkeypatch.setenv("TILEWRIGHT_DUMP_DIR", str(tmp_path / "dump"))
    ok("compile", SCALE, *NAMED, "-o", tmp_path / "o")
    (folder,) = (tmp_path / "dump").glob("scale-sm_90a-*")
    files = sorted(p.name for p in folder.iterdir())
    assert files[0] == "00-input.tw"
    assert files[-1] == "scale.ptx"


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compile", "none.py:k"], "there is no file 'none.py'"),
        (["compile", "none.tw"], "cannot read none.tw"),
        (["compile", f"{PROGRAMS}:scall"], "has no kernel 'scall' (kernels: scale, add"),
        (["compile", f"{PROGRAMS}"], "write FILE.py:NAME (kernels: scale, add"),
        (["compile", SCALE, "--target", "sm_90"], "unknown target 'sm_90'; did you mean 'sm_90a'?"),
        (["compile", SCALE], "kernel 'scale' needs --arg x=DTYPE[SIZES] --arg y=DTYPE[SIZES]"),
        (
            ["compile", SCALE, *NAMED, "--arg", "z=3"],
            "expected NAME=SPEC with a parameter of the kernel (x, y, factor, B)",
        ),
        (["compile", SCALE, *NAMED, "--arg", "B"], "expected NAME=SPEC"),
        (["compile", SCALE, *NAMED, "--arg", "x=f32[N]"], "x is given twice"),
        (["compile", SCALE, "--arg", "x=f33[N]"], "unknown dtype 'f33' (known: "),
        (["compile", SCALE, "--arg", "x=f32[N,]"], "'' is no size"),
        (["compile", SCALE, "--arg", "x=f32[-1]"], "'-1' is no size"),
        (["compile", SCALE, "--arg", "x=3"], "x is a tensor: write x=f32[M,64]"),
        (["compile", SCALE, "--arg", "factor=f32[3]"], "factor is a scalar, not a tensor"),
        (["compile", SCALE, "--arg", "factor=fast"], "neither a number nor a dtype"),
        (["compile", SCALE, *NAMED, "--num-warps", "0"], "0 is not in the range"),
        (["run", SCALE, *NAMED, "--grid", "3"], "running needs a number for N"),
        (["run", SCALE, *SIZED[:4], "--grid", "3"], "needs --arg factor=VALUE"),
        (["run", SCALE, *SIZED[:4], "--arg", "factor=f32", "--grid", "3"], "needs the value of factor"),
        (["run", SCALE, *SIZED, "--grid", "3x1"], "expected one to three numbers"),
        (["run", SCALE, *SIZED[:-2]], "Missing option '--grid'"),
        (["devices", "--nope"], "No such option"),
        (["conpile"], "No such command"),
    ],
)
def test_usage_errors(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in " ".join(misused(*args).split())


def test_compile_errors_show_the_line():
    message = wrong("compile", ADD, "--arg", "x=f32[M,N]", "--arg", "y=f32[M,N]", "--arg", "out=f16[M,N]")
    assert f"{PROGRAMS}:{ADD_STORE}:27: error: cannot store a f32 tile to a tensor of f16" in message
    assert "^^^" in message
    assert "hint: convert it" in message


def test_compile_errors_as_json():
    args = ["compile", ADD, "--arg", "x=f32[M,N]", "--arg", "y=f32[M,N]", "--arg", "out=f16[M,N]", "--json"]
    result = invoke(*args)
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert set(error) == {"type", "message", "file", "line", "column", "hint", "stage", "reproducer"}
    assert (error["type"], error["file"], error["line"]) == ("CompileError", str(PROGRAMS), ADD_STORE)


def test_backend_errors_name_the_stage():
    result = invoke("compile", f"{PROGRAMS}:double_exponential", "--arg", "x=f64[N]", "--arg", "y=f64[N]", "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["stage"]) == (1, "lowering")
    assert "called from" in result.stderr


def test_output_that_cannot_be_written(tmp_path):
    assert "No such file or directory" in wrong("compile", SCALE, *NAMED, "-o", tmp_path / "none" / "o.cubin")


@pytest.mark.parametrize("device", ["cuda:7", "moon"])
def test_devices_that_are_not_there(device):
    assert wrong("run", SCALE, *SIZED, "--device", device).startswith("error: ")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", 'broken.py", line 1\n    def f(:\n          ^'),
        (
            "import tilewright as tw\n\ndef g():\n    return 1 / 0\n\ng()\n",
            'broken.py", line 4, in g\n    return 1 / 0',
        ),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys\nsys.exit(5)\n", "exit code 5"),
        ("x = '\0'\n", "null bytes"),
    ],
)
def test_errors_of_the_file_are_the_users(tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(source)
    result = CliRunner().invoke(main, ["compile", f"{path}:f"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "tilewright/compiler" not in result.stderr, "no frame of ours"


def test_files_may_use_dataclasses_and_their_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 64\n")
    (tmp_path / "program.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport tilewright as tw\n"
        "from neighbour import WIDTH\n@dataclass\nclass Settings:\n    width: int = WIDTH\n"
        "@tw.kernel\ndef k(x: tw.Tensor):\n    tw.store(x, (0,), tw.zeros((WIDTH,), tw.float32))\n"
        "if __name__ == '__main__':\n    raise SystemExit('the script part does not run')\n"
    )
    assert "mean 0" in ok("run", f"{tmp_path / 'program.py'}:k", "--arg", "x=f32[64]", "--grid", "1")


# --- as a process -----------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "tilewright.compiler.cli"]


def test_exit_codes_and_streams_of_the_process(tmp_path):
    def call(*args):
        return subprocess.run([*COMMAND, *args], capture_output=True, text=True, cwd=tmp_path, check=False)

    good = call("run", SCALE, *SIZED, "--json")
    assert (good.returncode, good.stderr) == (0, "")
    json.loads(good.stdout)
    bad = call("compile", ADD, "--arg", "x=f32[M,N]", "--arg", "y=f32[M,N]", "--arg", "out=f16[M,N]")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert call("compile").returncode == 2


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "env"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""


def test_help_loads_no_backend():
    script = "import sys, tilewright.compiler.cli as c\ntry: c.main(['--help'])\nfinally: print(sorted({m.partition('.')[0] for m in sys.modules} & {'mlir', 'llvmlite', 'cuda', 'torch', 'lark'}))"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert {"compile", "run", "opt", "dump", "devices", "env"} <= set(done.stdout.split())
