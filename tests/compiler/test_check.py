"""``tilewright check`` and ``tilewright bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from tilewright.compiler.checking import difference, grid_function, parse_grid_expression
from tilewright.compiler.cli import main

SOURCE = """
import numpy as np
import tilewright as tw

@tw.kernel
def scale(x: tw.Tensor, y: tw.Tensor, s: tw.float32, *, BM: tw.constexpr = 8, BN: tw.constexpr = 64):
    i, j = tw.program_id(0), tw.program_id(1)
    tw.store(y, (i, j), tw.load(x, (i, j), (BM, BN)) * s)

@tw.kernel
def split(x: tw.Tensor, low: tw.Tensor, high: tw.Tensor):
    i = tw.program_id(0)
    value = tw.load(x, (i,), (64,))
    tw.store(low, (i,), tw.minimum(value, 0))
    tw.store(high, (i,), tw.maximum(value, 0))

@tw.autotune(configs=[tw.Config({"BN": 32}), tw.Config({"BN": 64})], key=["x.shape[0]"])
@tw.kernel
def tuned(x: tw.Tensor, y: tw.Tensor, s: tw.float32, *, BM: tw.constexpr = 8, BN: tw.constexpr):
    i, j = tw.program_id(0), tw.program_id(1)
    tw.store(y, (i, j), tw.load(x, (i, j), (BM, BN)) * s)

def reference(x, s):
    return x.astype(np.float64) * s

def wrong(x, s):
    return x * s + (np.arange(x.shape[1]) == x.shape[1] - 1)

def zeros(x):
    return np.zeros_like(x)

def both(x):
    return np.minimum(x, 0), np.maximum(x, 0)

def named(x):
    return {"high": np.maximum(x, 0), "low": np.minimum(x, 0)}

def rival(x, y, s):
    np.multiply(x, s, out=y)

def unknown(z):
    return z

def broken(x):
    raise KeyError("oh")
"""
ARGUMENTS = ["--arg", "x=f32[M,N]", "--arg", "y=f32[M,N]"]
GRID = ["--grid", "cdiv(M,BM),cdiv(N,BN)"]
VECTORS = ["--arg", "x=i32[N]", "--arg", "low=i32[N]", "--arg", "high=i32[N]", "--grid", "cdiv(N,64)"]


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(SOURCE)
    return str(path)


def call(command: str, kernel: str, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, [command, kernel, *arguments])
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done.output


def report(command: str, kernel: str, *arguments: str, code: int = 0) -> Any:
    return json.loads(call(command, kernel, *arguments, "--json", code=code))


def test_random_sizes_against_the_reference_of_the_file(program: str) -> None:
    found = report("check", f"{program}:scale", *ARGUMENTS, *GRID, "--trials", "8")
    assert (found["kernel"], found["against"], found["ok"]) == ("scale", "reference", True)
    sizes = [tuple(trial["sizes"].values()) for trial in found["trials"]]
    assert len({*sizes}) > 4 and all(1 <= n <= 300 for pair in sizes for n in pair)
    assert all(trial["tensors"]["y"]["ok"] for trial in found["trials"])
    assert report("check", f"{program}:scale", *ARGUMENTS, *GRID, "--trials", "8") == found


def test_a_wrong_element_is_named(program: str) -> None:
    arguments = [
        *ARGUMENTS,
        *GRID,
        "--reference",
        f"{program}:wrong",
        "--trials",
        "1",
        "--size",
        "M=5",
        "--size",
        "N=70",
    ]
    found = report("check", f"{program}:scale", *arguments, code=1)
    (trial,) = found["trials"]
    assert not found["ok"] and trial["sizes"] == {"M": 5, "N": 70} and trial["tensors"]["y"]["index"][1] == 69
    text = call("check", f"{program}:scale", *arguments, code=1)
    assert text.startswith("DIFFER seed 0  M=5, N=70") and ", 69] is " in text
    call("check", f"{program}:scale", *arguments, "--tolerance", "100")


def test_what_the_kernel_leaves_out_is_noticed(program: str) -> None:
    grid = ["--grid", "1", "--size", "M=20", "--size", "N=64", "--trials", "1"]
    found = report("check", f"{program}:scale", *ARGUMENTS, *grid, code=1)
    assert found["trials"][0]["tensors"]["y"] == {
        "error": "inf",
        "tolerance": 1e-3,
        "index": [8, 0],
        "got": "nan",
        "expected": pytest.approx(found["trials"][0]["tensors"]["y"]["expected"]),
        "ok": False,
    }
    call("check", f"{program}:scale", *ARGUMENTS, *GRID, "--reference", f"{program}:zeros", code=1)


@pytest.mark.parametrize("reference", ["both", "named"])
def test_several_outputs(program: str, reference: str) -> None:
    found = report("check", f"{program}:split", *VECTORS, "--reference", f"{program}:{reference}")
    assert found["ok"] and {*found["trials"][0]["tensors"]} == {"low", "high"}
    assert found["trials"][0]["tensors"]["low"]["tolerance"] == 0


def test_the_device_against_the_interpreter(program: str, tmp_path: Path) -> None:
    alone = tmp_path / "alone.py"
    alone.write_text(SOURCE.partition("def reference")[0])
    found = report("check", f"{alone}:scale", *ARGUMENTS, *GRID, "--device", "emulate:gfx942", "--trials", "2")
    assert (found["against"], found["device"], found["ok"]) == ("interpreter", "emulate:gfx942", True)
    text = call("check", f"{alone}:scale", *ARGUMENTS, *GRID, code=2)
    assert "nothing to compare with" in text


def test_tuned_kernels(program: str) -> None:
    assert report("check", f"{program}:tuned", *ARGUMENTS, *GRID, "--trials", "2")["ok"]


def test_references_that_do_not_fit(program: str) -> None:
    base = ["check", f"{program}:scale", *ARGUMENTS, *GRID, "--reference"]
    assert "takes 'z'" in call(*base, f"{program}:unknown", code=2)
    assert "the reference failed: KeyError: 'oh'" in call(*base, f"{program}:broken", code=1)
    assert "has no function 'nothing'" in call(*base, f"{program}:nothing", code=2)
    assert "existing file" in call(*base, "nowhere.py:f", code=2)
    text = call("check", f"{program}:split", *VECTORS, "--reference", f"{program}:zeros", code=1)
    assert "writes low, high, and the reference returns nothing for 'high'" in text
    shapes = ["--arg", "x=f32[N,1]", "--arg", "y=f32[2,N]", "--grid", "1", "--reference", f"{program}:zeros"]
    assert "of shape (" in call("check", f"{program}:scale", *shapes, "--size", "N=3", code=1)


def test_usage(program: str) -> None:
    base = ["check", f"{program}:scale", *ARGUMENTS]
    for grid in ("M;N", "open('x')", "M.real", "[1]", "(lambda: 1)()", "'a'*9 if M else 1"):
        assert "--grid" in call(*base, "--grid", grid, code=2)
    assert "name 'K' is not defined" in call(*base, "--grid", "K", code=1)
    assert "--size M" in call(*base, *GRID, "--size", "M", code=2)


def test_grids() -> None:
    assert grid_function("cdiv(M, BM), 2 * N", {"M": 9, "N": 3})({"BM": 8}) == (2, 6)
    assert grid_function("8", {})({}) == 8
    with pytest.raises(click.UsageError, match="a grid may call cdiv"):
        parse_grid_expression("exit(1)")


def test_differences() -> None:
    exact = np.array([1.0, -4.0, np.inf, np.nan])
    same = difference(exact.astype("f4"), exact, 0.0)
    assert same.ok and same.error == 0
    off = difference(np.array([1.0, -4.5, np.inf, np.nan]), exact, 0.1)
    assert not off.ok and off.error == pytest.approx(0.125) and off.index == (1,)
    for wrong in ([1, -4, np.nan, np.nan], [1, -4, np.inf, 0], [np.nan, -4, np.inf, np.nan]):
        assert difference(np.array(wrong, float), exact, 1e9).error == np.inf
    assert difference(np.zeros(3), np.ones(3), 0.5).error == 1  # all zeros never pass
    assert difference(np.zeros((0, 3)), np.zeros((0, 3)), 0.0).ok


def test_bench(program: str) -> None:
    arguments = [*ARGUMENTS, "--arg", "s=2.0", *GRID, "--size", "M=16", "--size", "N=64", "--device", "cpu"]
    arguments += ["--repeats", "3", "--warmup", "1", "--flops", "M*N", "--rival", f"{program}:rival"]
    found = report("bench", f"{program}:scale", *arguments)
    assert (found["kernel"], found["bytes"], found["flops"]) == ("scale", 2 * 16 * 64 * 4, 1024)
    ours, rival = found["results"]
    assert (ours["name"], ours["repeats"], ours["speedup"]) == ("scale", 3, None)
    assert ours["p20_us"] <= ours["median_us"] <= ours["p80_us"] and rival["speedup"] > 0
    assert ours["tb_per_s"] == pytest.approx(found["bytes"] / ours["median_us"] / 1e6)
    text = call("bench", f"{program}:scale", *arguments)
    assert "scale " in text and "TB/s" in text and "times as fast" in text


def test_bench_usage(program: str) -> None:
    base = ["bench", f"{program}:scale", *ARGUMENTS, *GRID, "--device", "cpu"]
    assert "--size M=" in call(*base, code=2)
    sized = [*base, "--size", "M=8", "--size", "N=8"]
    assert "takes 'z'" in call(*sized, "--rival", f"{program}:unknown", code=2)
    assert "--device" in call("bench", "--help")
