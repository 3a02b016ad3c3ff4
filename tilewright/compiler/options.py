"""Compile options by name, as users give them on launch, compile and `tw.Config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tilewright.frontend.errors import ArgumentError

if TYPE_CHECKING:
    from tilewright.passes.manager import PassOptions

#: how copies and matrix products can be arranged (`tilewright.passes.schedule`)
SCHEDULES = ("roles", "turns", "alternate", "prefetch")
#: blocks of a cluster; all GPUs with clusters run 8
CLUSTERS = (1, 2, 4, 8)


@dataclass(frozen=True)
class CompileOptions:
    """What the user fixes; None leaves the choice to the passes.

    ``num_warps``: warps that compute (producer warps come on top). ``num_stages``: depth of the rings.
    ``schedule``: "roles" (copying and computing warps side by side), "turns" or "alternate" (the same; computing
    warpgroups issue their matrix products in turn, or work on different tiles in turn), or "prefetch" (each warp copies
    ahead for itself).
    ``num_ctas``: blocks of a cluster. Programs with matrix products share copies of common tiles in it (for tensors
    that the copy engine cannot read, blocks stay alone); each of the others is spread over its blocks.
    ``persistent``: whether each block walks over programs, one after the other, or the hardware hands them out.
    ``maxnreg``: most registers of a thread, so that more blocks share a multiprocessor; not for roles, which divide
    registers among themselves.
    """

    num_warps: int | None = None
    num_stages: int | None = None
    num_ctas: int | None = None
    schedule: str | None = None
    persistent: bool | None = None
    maxnreg: int | None = None

    def pass_options(self) -> PassOptions:
        """The same choices, for the pass manager."""
        from tilewright.passes.manager import PassOptions  # a cache hit needs the options, but no passes

        return PassOptions(**{f.name: getattr(self, f.name) for f in fields(PassOptions)})

    def __post_init__(self) -> None:
        for name in ("num_warps", "num_stages", "num_ctas", "maxnreg"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ArgumentError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.persistent, bool | None):
            raise ArgumentError(f"persistent must be True or False, got {self.persistent!r}")
        if self.num_ctas not in (None, *CLUSTERS):
            raise ArgumentError(f"num_ctas={self.num_ctas}: a cluster has 1, 2, 4 or 8 blocks")
        if self.schedule not in (None, *SCHEDULES):
            known = " and ".join(map(repr, SCHEDULES))
            raise ArgumentError(f"unknown schedule {self.schedule!r}", hint=f"schedules are {known}")

    @staticmethod
    def names() -> set[str]:
        """The names of all options."""
        return {f.name for f in fields(CompileOptions)}

    @staticmethod
    def split(arguments: Mapping[str, Any]) -> tuple[CompileOptions, dict[str, Any]]:
        """Separate option names from a kernel's own keyword arguments."""
        names = CompileOptions.names()
        options = CompileOptions(**{k: v for k, v in arguments.items() if k in names})
        return options, {k: v for k, v in arguments.items() if k not in names}
