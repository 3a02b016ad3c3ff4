"""The pass that Inductor runs over the graphs of AOTAutograd before it lowers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from tilewright.torch import gate, parallel


class GraphPass(CustomGraphPass):
    """``rewrite(graph)``, and then the pass that was there before, if any.

    ``key`` says what the rewrite depends on, for Inductor's cache of compiled graphs; None: nothing is taken from it.
    """

    def __init__(self, rewrite: Callable[[Any], Any], key: Any, before: Any) -> None:
        self.rewrite, self.key, self.before = rewrite, key, before

    def __call__(self, graph: Any) -> None:
        self.rewrite(graph)
        for each in self.before if isinstance(self.before, list | tuple) else (self.before,):
            if each is not None:
                each(graph)

    def uuid(self) -> Any:
        if self.key is None or self.before:
            return None
        return get_hash_for_files((gate.__file__, parallel.__file__), repr(self.key))


__all__ = ["GraphPass"]
