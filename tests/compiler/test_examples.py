"""The examples run, and the commands and the program that README.md and docs/ show are real."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tilewright.compiler.cli import main

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(path):
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout


def test_readme_program_runs(tmp_path, monkeypatch):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.S)
    path = tmp_path / "readme.py"
    path.write_text(program)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path))
    exact = names["a"].astype("f8") @ names["b"].astype("f8")
    assert abs(names["c"] - exact).max() < 1e-3
    assert (tmp_path / "gemm.hsaco").read_bytes()[:4] == b"\x7fELF"


def commands(text):
    """The shell commands that a text shows: lines of code blocks and spans in backquotes."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    for span in [*re.findall(r"`([^`\n]+)`", without_code(text)), *shell.splitlines()]:
        words = shlex.split(re.split("[|>]", span)[0], comments=True)
        if len(words) > 1 and words[0] == "tilewright":
            yield words[1:]


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_documented_commands_and_options_exist(path):
    for words in commands(path.read_text()):
        command = main.commands.get(words[0])
        assert command is not None, words
        options = {name for p in command.params if isinstance(p, click.Option) for name in p.opts}
        assert {w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)} <= options, words


def test_readme_commands_run(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in commands(README):
        if "..." in words or not any("examples/" in w for w in words):
            continue
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (words, result.output)
        ran.append(words[0])
    assert set(ran) == {"compile", "run", "dump", "check"}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for path in TEXTS:
        for target in re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", path.read_text(), re.M):
            assert re.search(rf"^{''.join(target)}:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_documented_variables_exist():
    from tilewright.compiler.environment import VARIABLES

    known = {v.full_name for v in VARIABLES}
    for path in TEXTS:
        assert set(re.findall(r"TILEWRIGHT_[A-Z_]+", path.read_text())) <= known, path.name


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    prose = re.sub(r"`[^`]*`", "", without_code(path.read_text()))
    for link in re.findall(r"\]\(([^)#]+)\)", prose):
        assert link.startswith("http") or (path.parent / link).exists(), link
