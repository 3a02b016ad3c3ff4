"""What can go wrong: text that cannot be decoded, and faults of a running kernel."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Any failure of an emulator; the two subclasses say on whose side the fault lies."""


class DecodeError(EmulatorError):
    """The assembly text holds something the emulator does not implement. Lists every such line."""


class EmulatorFault(EmulatorError):
    """The kernel did something a GPU would fault on, or that has no defined result.

    Attributes: ``instruction`` (source text) and ``line`` (1-based line of the assembly text) of the
    first offender, where known. ``place`` says in the message which threads those are, ``source``
    the line of the tile program.
    """

    def __init__(
        self, message: str, *, instruction: str = "", line: int = 0, place: str = "", source: str = ""
    ) -> None:
        self.message, self.instruction, self.line, self.source = message, instruction, line, source
        where = f" [{place}]" if place else ""
        text = f"\n  line {line}: {instruction}" if instruction else ""
        origin = f"\n  from {source}" if source else ""
        super().__init__(f"{message}{where}{text}{origin}")
