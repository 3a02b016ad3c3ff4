"""Which variables are read later: decides what loops carry and what branches merge.

Control flow is structured (no break or continue; nothing follows a return, see `returns`), so one
backward walk over the syntax tree suffices; loops are iterated to a fixed point.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence

Names = frozenset[str]


class Liveness:
    """``after[s]``: names read after an ``if`` or loop; ``head[s]``: names read at the top of a loop's iteration."""

    def __init__(self, tree: ast.FunctionDef):
        self.after: dict[ast.stmt, Names] = {}
        self.head: dict[ast.stmt, Names] = {}
        self._block(tree.body, frozenset())

    def _block(self, statements: Sequence[ast.stmt], live: Names) -> Names:
        for statement in reversed(statements):
            live = self._statement(statement, live)
        return live

    def _statement(self, node: ast.stmt, live: Names) -> Names:
        if isinstance(node, ast.If):
            self.after[node] = live
            return reads(node.test) | self._block(node.body, live) | self._block(node.orelse, live)
        if isinstance(node, ast.For):
            self.after[node] = live
            return reads(node.iter) | self._loop(node, live, frozenset(), frozenset(stores([node.target])))
        if isinstance(node, ast.While):
            self.after[node] = live
            return self._loop(node, live, reads(node.test), frozenset())
        if isinstance(node, ast.Return):
            return reads(node)
        return (live - frozenset(stores([node]))) | reads(node)

    def _loop(self, node: ast.For | ast.While, live: Names, test: Names, target: Names) -> Names:
        head = live | test
        while True:
            grown = head | (self._block(node.body, head) - target)
            if grown == head:
                self.head[node] = head
                return head
            head = grown


def reads(node: ast.AST) -> Names:
    """Names that an expression or simple statement reads. The target of ``x += 1`` is read too."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        found.add(node.target.id)
    return frozenset(found)


def stores(nodes: Iterable[ast.AST]) -> list[str]:
    """Names assigned anywhere inside, in order of first appearance."""
    found: dict[str, None] = {}
    for node in nodes:
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        for name in sorted(names, key=lambda n: (n.lineno, n.col_offset)):
            found.setdefault(name.id)
    return list(found)


__all__ = ["Liveness", "reads", "stores"]
