"""`tw.jit_cache`: what is compiled here runs where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tilewright as tw

PROGRAM = """
import sys
import numpy as np

class NoCompiler:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mlir", "llvm", "llvmlite", "lark", "nvidia"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

if sys.argv[2] == "without":
    sys.meta_path.insert(0, NoCompiler())

import tilewright as tw

@tw.kernel
def scaled(x: tw.Tensor, y: tw.Tensor, factor: tw.float32, *, BN: tw.constexpr = 32):
    i = tw.program_id(0)
    tw.store(y, i, tw.load(x, i, BN) * factor)

x, y = np.arange(40, dtype=np.float32), np.full(40, np.nan, np.float32)
with tw.jit_cache(sys.argv[1]):
    tw.device("emulate:sm_90a").launch(scaled, (2,), x, y, 3.0, BN=int(sys.argv[3]))
    np.testing.assert_array_equal(y, 3 * x)
compilers = [name for name in sys.modules if name.partition(".")[0] in ("mlir", "llvmlite")]
print("compilers:", compilers)
"""


@pytest.fixture
def run(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(folder: Path, compiler: str, width: int = 32, program: Path = program) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(tmp_path / compiler)}
        root = Path(tw.__file__).parents[1]
        environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
        command = [sys.executable, str(program), str(folder), compiler, str(width)]
        return subprocess.run(command, check=False, env=environment, capture_output=True, text=True)

    return run


def test_a_machine_without_a_compiler_takes_what_was_shipped(run, tmp_path: Path) -> None:
    folder = tmp_path / "shipped"
    made = run(folder, "with")
    assert made.returncode == 0, made.stderr
    folder.chmod(0o555)
    taken = run(folder, "without")
    assert taken.returncode == 0, taken.stderr
    assert "compilers: []" in taken.stdout
    other = run(folder, "without", 64)
    assert other.returncode != 0
    assert f"kernel 'scaled' for sm_90a is not in {folder}, and no compiler is installed here" in other.stderr
    assert "copy the folder" in other.stderr


def test_sources_may_lie_elsewhere(run, tmp_path: Path) -> None:
    assert run(tmp_path / "shipped", "with").returncode == 0
    moved = tmp_path / "elsewhere" / "renamed.py"
    moved.parent.mkdir()
    moved.write_text("# a line more\n" + PROGRAM)
    taken = run(tmp_path / "shipped", "without", program=moved)
    assert taken.returncode == 0, taken.stderr
    moved.write_text(PROGRAM.replace("* factor", "* factor * 1.0"))
    assert "no compiler is installed here" in run(tmp_path / "shipped", "without", program=moved).stderr


def test_what_the_disk_cache_has_is_shipped_too(run, tmp_path: Path) -> None:
    assert run(tmp_path / "first", "with").returncode == 0
    assert run(tmp_path / "second", "with").returncode == 0
    assert run(tmp_path / "second", "without").returncode == 0


def test_a_closed_folder_gets_nothing(tmp_path: Path) -> None:
    from tilewright.compiler import shipping

    first, second = tmp_path / "first", tmp_path / "second"
    with tw.jit_cache(first) as outer:
        with tw.jit_cache(second):
            assert shipping._open[-1].directory == second
        assert shipping._open[-1].directory == first
        outer.close()
        assert not shipping.is_open()
    assert not first.exists()
