"""Faults of AMD kernels, which are those of waves."""

from __future__ import annotations

from tilewright.runtime.emulator import errors
from tilewright.runtime.emulator.errors import DecodeError, EmulatorError

__all__ = ["DecodeError", "EmulatorError", "EmulatorFault"]


class EmulatorFault(errors.EmulatorFault):
    """A fault of a wave: ``wave`` is (workgroup number, wave number inside it) of the first offender, where known."""

    def __init__(
        self,
        message: str,
        *,
        instruction: str = "",
        line: int = 0,
        wave: tuple[int, int] | None = None,
        source: str = "",
    ) -> None:
        self.wave = wave
        place = f"workgroup {wave[0]}, wave {wave[1]}" if wave is not None else ""
        super().__init__(message, instruction=instruction, line=line, place=place, source=source)
