"""What a compiled kernel may not exceed, and what its users are warned of.

A kernel that keeps its tiles in memory is an error, one whose products the assembler serialises a slow kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from tilewright.compiler.errors import BackendFailure
from tilewright.ir.core import Location
from tilewright.ir.resources import Resources
from tilewright.ir.target import get_target

#: bytes per thread (NVIDIA) or registers (AMD) that may go to memory and back, stores and loads together
SPILL_LIMIT = {"nvidia": 4096, "amd": 1024}


def check_spills(entries: Iterable[tuple[Any, Resources]], target: str, loc: Location) -> None:
    """Raise `BackendFailure` where a kernel needs far more registers than a thread has.

    ``entries``: (ABI, resources) of each.
    """
    machine = get_target(target)
    limit, unit = SPILL_LIMIT[machine.vendor], "bytes" if machine.vendor == "nvidia" else "registers"
    for abi, used in entries:
        if used.spills > limit:
            raise BackendFailure(
                f"'{abi.name}' needs too many registers: a thread of {target} has {machine.registers_per_thread}, and "
                f"{used.spills} {unit} would go to memory and back (at most {limit})",
                loc,
                "use smaller tiles, more warps (num_warps=), or a larger maxnreg= where one is given",
                stage="registers",
                kernel=abi.name,
                target=target,
            )


class PerformanceWarning(UserWarning):
    """A kernel is right and will be slow."""


def warn_of(advisories: Iterable[str], kernel: str, loc: Location) -> None:
    """Warn, at the kernel, of what the assembler says. Only a compilation warns, no later use from a cache."""
    lines = [f"\n  {line}" for line in advisories]
    if lines:
        message = f"kernel '{kernel}' would run slowly, says the assembler:{''.join(lines)}"
        warnings.warn_explicit(message, PerformanceWarning, loc.file, loc.line)


__all__ = ["SPILL_LIMIT", "PerformanceWarning", "check_spills", "warn_of"]
