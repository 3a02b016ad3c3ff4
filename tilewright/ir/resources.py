"""What the tools report of a compiled kernel. It travels with the ABI, so it needs no backend."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Resources:
    """What one kernel uses. Registers and the rest per thread; sizes are bytes. None: the target has no such thing."""

    registers: int
    shared_bytes: int
    spill_stores: int = 0
    spill_loads: int = 0
    stack_bytes: int = 0
    barriers: int | None = None
    #: AMD: accumulation registers among ``registers``, and scalar registers
    accumulation_registers: int | None = None
    scalar_registers: int | None = None

    @property
    def spills(self) -> int:
        """Spilled bytes (NVIDIA) or registers (AMD), stores and loads together."""
        return self.spill_stores + self.spill_loads

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; ``Resources(**data)`` is its inverse."""
        return asdict(self)
