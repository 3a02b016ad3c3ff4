"""The error that every step between Tile IR and a GPU binary raises."""

from __future__ import annotations

from collections.abc import Sequence


class BackendError(Exception):
    """A step of code generation failed.

    ``stage`` names the step ("mlir", "llvm", "ptxas", "link", "codeobject"), ``message`` says in
    one sentence what went wrong, ``diagnostics`` holds what the tool itself printed, one item each.
    """

    def __init__(self, stage: str, message: str, diagnostics: Sequence[str] = ()):
        # All three go to Exception: the error crosses from the worker process by pickle.
        super().__init__(stage, message, tuple(diagnostics))
        self.stage, self.message, self.diagnostics = stage, message, tuple(diagnostics)

    def __str__(self) -> str:
        return "\n  ".join([f"{self.stage}: {self.message}", *self.diagnostics])
