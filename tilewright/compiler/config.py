"""A configuration: values of a kernel's compile-time parameters with compile options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tilewright.compiler.options import CompileOptions


@dataclass(frozen=True, eq=False)
class Config:
    """One candidate of `tw.autotune`: ``Config({"BM": 64, "BN": 128}, num_warps=8, num_stages=3)``.

    ``meta`` gives compile-time parameters by name; the rest are compile options, None where the
    compiler chooses.
    """

    meta: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int | None = None
    num_stages: int | None = None
    num_ctas: int | None = None
    schedule: str | None = None
    persistent: bool | None = None
    maxnreg: int | None = None

    def options(self) -> dict[str, Any]:
        """The compile options that are given."""
        names = [f.name for f in fields(CompileOptions)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def arguments(self) -> dict[str, Any]:
        """Everything as keyword arguments of a launch."""
        return {**self.meta, **self.options()}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments().items()) or "defaults"
