"""What can go wrong: text that cannot be decoded, and faults of a running kernel."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Any failure of the emulator; the two subclasses say on whose side the fault lies."""


class DecodeError(EmulatorError):
    """The assembly text holds something the emulator does not implement. Lists every such line."""


class EmulatorFault(EmulatorError):
    """The kernel did something a GPU would fault on, or that has no defined result.

    Attributes: ``instruction`` (source text), ``line`` (1-based line of the assembly text) and
    ``wave`` (workgroup number, wave number inside it) of the first offender, where known.
    """

    def __init__(
        self, message: str, *, instruction: str = "", line: int = 0, wave: tuple[int, int] | None = None
    ) -> None:
        self.message, self.instruction, self.line, self.wave = message, instruction, line, wave
        where = f" [workgroup {wave[0]}, wave {wave[1]}]" if wave is not None else ""
        text = f"\n  line {line}: {instruction}" if instruction else ""
        super().__init__(f"{message}{where}{text}")
