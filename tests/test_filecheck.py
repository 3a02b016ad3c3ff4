"""Runs the FileCheck tests: tests/filecheck/**/*.tw.

Each ``// RUN: opt -p PIPELINE [options]`` line of a file runs a pipeline on its IR; the ``// CHECK`` lines
describe the text that comes out. Options: ``--target NAME``, ``--num-warps/--num-stages/--num-ctas N``,
``--schedule NAME``, ``--locations``, ``--check-prefix P`` and ``--expect-error`` (the error message is
checked instead of the IR).
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import Options
from filecheck.parser import Parser

import tilewright.passes  # noqa: F401  (registers all passes)
from tilewright.ir.core import IRError
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.target import get_target
from tilewright.ir.verifier import verify
from tilewright.passes.manager import PassContext, PassManager, PassOptions, PipelineError

ROOT = Path(__file__).parent / "filecheck"
RUN = "// RUN: opt "


def run_lines(path: Path) -> list[str]:
    return [line.removeprefix(RUN) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(RUN)]


def options_of(run: str) -> Namespace:
    parser = ArgumentParser("opt")
    parser.add_argument("-p", dest="pipeline", required=True)
    parser.add_argument("--target", default="sm_90a")
    for name in ("--num-warps", "--num-stages", "--num-ctas"):
        parser.add_argument(name, type=int)
    for name in ("--schedule", "--check-prefix"):
        parser.add_argument(name)
    for name in ("--locations", "--expect-error"):
        parser.add_argument(name, action="store_true")
    return parser.parse_args(shlex.split(run))


def output_of(path: Path, options: Namespace) -> str:
    """The text that the pipeline makes of the file, or its error message with ``--expect-error``."""
    try:
        module = parse_module(path.read_text(encoding="utf-8"), path.name, text_locations=options.expect_error)
        verify(module)
        settings = PassOptions(options.num_warps, options.num_stages, options.num_ctas, options.schedule)
        PassManager(options.pipeline, PassContext(get_target(options.target), settings)).run(module)
    except (IRError, PipelineError) as error:
        if not options.expect_error:
            raise
        return f"{error}\n"
    assert not options.expect_error, "the pipeline was expected to fail"
    text = print_module(module, locations=True)
    assert print_module(parse_module(text), locations=True) == text, "the text does not read back to the same module"
    return print_module(module, options.locations)


CASES = [
    pytest.param(path, run, id=f"{path.relative_to(ROOT)}-{i}")
    for path in sorted(ROOT.rglob("*.tw"))
    for i, run in enumerate(run_lines(path))
]


@pytest.mark.parametrize(("path", "run"), CASES)
def test_filecheck(path: Path, run: str) -> None:
    options = options_of(run)
    text = output_of(path, options)
    messages = StringIO()
    with redirect_stderr(messages):
        settings = Options(str(path), check_prefixes=[options.check_prefix or "CHECK"])
        status = Matcher(settings, FInput("<output>", text), Parser.from_opts(settings)).run()
    assert status == 0, f"{messages.getvalue()}\n--- output of opt {run}\n{text}"


def test_every_file_has_a_run_line() -> None:
    files = list(ROOT.rglob("*.tw"))
    assert files and all(run_lines(f) for f in files)
