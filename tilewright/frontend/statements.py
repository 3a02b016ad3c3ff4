"""Simple statements: assignment, return, assert."""

from __future__ import annotations

import ast
from typing import Any

from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.errors import CompileError
from tilewright.frontend.expressions import Expressions
from tilewright.frontend.markers import constexpr
from tilewright.frontend.values import contains_value, describe, dtype_name, dtype_of, is_number
from tilewright.ir.core import Value
from tilewright.ir.types import DType


class Statements(Expressions):
    """Everything but control flow."""

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # docstrings
            self.visit(node.value)

    def visit_Pass(self, node: ast.Pass) -> None:
        pass

    # --- assignment -----------------------------------------------------------------------------------

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.visit(node.value)
        for target in node.targets:
            self.bind(target, value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if not isinstance(node.target, ast.Name):
            raise self._bad_target(node.target)
        self.assign(node.target.id, self.binary(node.op, self.lookup(node.target.id), self.visit(node.value)))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is None:
            return
        value, annotation = self.visit(node.value), self.visit(node.annotation)
        self.bind(node.target, self._annotated(node, value, annotation))

    def _annotated(self, node: ast.AnnAssign, value: Any, annotation: Any) -> Any:
        """``x: tw.constexpr = ...`` must be known at compile time; ``x: tw.float32 = 0`` is a typed scalar."""
        if annotation is constexpr and contains_value(value):
            raise self.error_at(
                node.value or node,
                f"a tw.constexpr variable needs a compile-time value, got {describe(value)}",
                "drop the annotation, or compute it from constants and tw.constexpr parameters",
            )
        if isinstance(annotation, DType):
            if is_number(value):
                return self.emit.constant(value, annotation)
            if isinstance(value, Value) and dtype_of(value) != annotation:
                message = f"the annotation says {dtype_name(annotation)}, the value is {describe(value)}"
                raise self.error_at(node.annotation, message, f"convert it: .to({dtype_name(annotation)})")
        return value

    def bind(self, target: ast.expr, value: Any) -> None:
        """Assign to a name, or unpack into a tuple of targets."""
        if isinstance(target, ast.Name):
            self.assign(target.id, value)
        elif isinstance(target, ast.Tuple | ast.List):
            items = self.emit.plain(value)
            if not isinstance(items, tuple):
                raise self.error_at(target, f"cannot unpack {describe(value)}", "only tuples and shapes unpack")
            if len(items) != len(target.elts):
                raise self.error_at(target, f"cannot unpack {len(items)} values into {len(target.elts)} names")
            for part, item in zip(target.elts, items, strict=True):
                self.bind(part, item)
        else:
            raise self._bad_target(target)

    def _bad_target(self, target: ast.expr) -> CompileError:
        if isinstance(target, ast.Subscript):
            hint = "write memory with tw.store(view, index, value); build a changed tile with tw.where"
            return self.error_at(target, "tiles and tensors are not assigned by element", hint)
        if isinstance(target, ast.Starred):
            return self.error_at(target, "'*' unpacking is not supported", "name every item")
        return self.error_at(target, "only variables can be assigned")

    # --- the rest -------------------------------------------------------------------------------------

    def visit_Return(self, node: ast.Return) -> None:
        value = None if node.value is None else self.visit(node.value)
        if self.frame.depth and node not in self.frame.definition.last_returns:
            raise CompileError(
                "'return' out of a loop at run time is not supported",
                hint="put the condition into a 'while', and return behind it",
            )
        if value is not None and isinstance(self.frame.definition, KernelDefinition):
            raise CompileError("a kernel returns nothing", hint="write results with tw.store(view, index, value)")
        self.frame.returned, self.frame.result = True, value

    def visit_Assert(self, node: ast.Assert) -> None:
        condition = self.emit.truth(self.visit(node.test), "the condition of 'assert'")
        message = str(self.visit(node.msg)) if node.msg else ""
        if isinstance(condition, Value):
            self.emit.builder.check(condition, message or ast.unparse(node.test))
        elif not condition:
            raise self.error_at(node.test, "assertion failed" + (f": {message}" if message else ""))


__all__ = ["Statements"]
