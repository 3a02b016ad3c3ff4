"""Errors of the compiler driver. All of them are `tilewright.CompileError`: place, source line, advice."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Any

from tilewright.compiler.environment import DUMP_DIR
from tilewright.frontend.errors import CompileError
from tilewright.ir.core import UNKNOWN, Location


class ExecutionError(CompileError):
    """The interpreter stopped a kernel that broke a rule while it ran; shown as other errors are."""


class StageError(CompileError):
    """A step after the frontend failed.

    ``stage``: the pass, or lowering, mlir, llvm, ptxas, link. ``reproducer``: a file with the IR that
    the stage was given, and ``rerun`` the command that gives it to the stage again; both are empty
    where the message alone says what to change in the program. ``details``: what the tools printed.
    """

    def __init__(
        self,
        message: str,
        loc: Location = UNKNOWN,
        hint: str = "",
        length: int = 1,
        argument: str | None = None,
        *,
        stage: str = "",
        kernel: str = "",
        target: str = "",
        details: str = "",
        reproducer: Path | None = None,
        rerun: str = "",
    ):
        super().__init__(message, loc, hint, length, argument)
        self.stage, self.kernel, self.target, self.details = stage, kernel, target, details
        self.reproducer, self.rerun = reproducer, rerun

    def __str__(self) -> str:
        lines = [super().__str__()]
        lines += [f"  {line}" for line in self.details.rstrip().splitlines()]
        if self.reproducer is not None:
            lines += [f"  reproducer: {self.reproducer}", f"  run it again with: {self.rerun}"]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.loc, self.hint, self.length, self.argument), dict(vars(self))


class PassFailure(StageError):
    """A pass refused the kernel, failed, or left invalid IR behind."""


class BackendFailure(StageError):
    """The backend refused the kernel, a tool reported an error, or the backend itself failed."""


class CompilerCrash(BackendFailure):
    """The backend's process died. ``exit_code`` is negative where a signal killed it."""

    exit_code: int = 0


def write_reproducer(text: str, kernel: str) -> Path:
    """A new file with ``text``, in ``TILEWRIGHT_DUMP_DIR`` if set, else among the temporary files."""
    directory = DUMP_DIR.get()
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"tilewright-{kernel}-", suffix=".tw", dir=directory, delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return Path(file.name)


def how_it_ended(exit_code: int) -> str:
    """``killed by SIGSEGV`` or ``exit code 1``."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"
