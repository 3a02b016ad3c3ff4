"""Errors of the compiler driver."""

from __future__ import annotations

from pathlib import Path

from tilewright.ir.core import UNKNOWN, IRError, Location


class BackendFailure(IRError):
    """The backend refused a kernel. ``stage``: lowering, mlir, llvm, ptxas, link or internal."""

    def __init__(self, stage: str, message: str, loc: Location = UNKNOWN, hint: str = ""):
        self.stage = stage
        super().__init__(message if stage == "lowering" else f"{stage}: {message}", loc, hint)


class CompilerCrash(Exception):
    """The backend process died. ``reproducer`` holds the scheduled IR that killed it."""

    def __init__(self, exit_code: int, stderr: str, reproducer: Path, target: str):
        self.exit_code, self.stderr, self.reproducer = exit_code, stderr, reproducer
        super().__init__(
            f"the backend for {target} died (exit code {exit_code}).\n{stderr.strip()}\n"
            f"  reproducer: {reproducer}\n"
            f"  run it again with: tilewright compile {reproducer} --target {target}"
        )
