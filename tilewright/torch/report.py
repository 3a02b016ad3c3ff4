"""What the backend did with a graph, for ``options={"explain": True}``."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Decision:
    """About one call: ``reason`` says why it was left to the rest of the pipeline, None where ours took it."""

    name: str
    place: str
    reason: str | None


@dataclass
class Report:
    """Decisions in the order of the graph; ``calls`` names the nodes that no kernel of ours was sought for."""

    decisions: list[Decision] = field(default_factory=list)
    calls: dict[Any, str] = field(default_factory=dict)

    @property
    def others(self) -> Counter[str]:
        """How often which function is called that no kernel of ours stands for."""
        return Counter(name for node, name in self.calls.items() if not node._erased)

    @property
    def taken(self) -> list[str]:
        """Names of the functional operators that now stand in the graph."""
        return [d.name for d in self.decisions if d.reason is None]

    def text(self, fallback: str, what: str = "calls") -> str:
        """A table: one line a decision, one for the rest."""
        lines = [f"tilewright: {len(self.taken)} of {len(self.decisions)} {what} taken, the rest to {fallback}"]
        for decision in self.decisions:
            verdict = "taken" if decision.reason is None else f"left: {decision.reason}"
            lines.append(f"  {decision.name:<21} {decision.place:<24} {verdict}")
        if self.others:
            listed = ", ".join(f"{name} x{count}" for name, count in self.others.most_common())
            lines.append(f"  no kernel for: {listed}")
        return "\n".join(lines)


def place(node: Any) -> str:
    """File and line of the code outside of torch that a node of the graph comes from; "" if unknown."""
    frames = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    users = [(Path(file), line) for file, line in frames if not Path(file).is_relative_to(_TORCH)]
    return f"{users[-1][0].name}:{users[-1][1]}" if users else ""


__all__ = ["Decision", "Report", "place"]
