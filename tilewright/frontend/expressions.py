"""Expressions: Python syntax -> values."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from tilewright.frontend import builtins
from tilewright.frontend.emitter import fold
from tilewright.frontend.errors import CompileError, suggestion
from tilewright.frontend.methods import attribute
from tilewright.frontend.scope import VisitorBase, host_value
from tilewright.frontend.subscripts import Slice, subscript
from tilewright.frontend.values import contains_value, describe, is_number, is_tile
from tilewright.ir.core import Value

BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.LShift: "shl",
    ast.RShift: "shr",
}
COMPARE: dict[type[ast.cmpop], str] = {
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
}


class Expressions(VisitorBase):
    """Literals, names, operators, attributes and subscripts."""

    def visit_Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bytes | complex):
            raise CompileError(f"{type(node.value).__name__} literals are not supported")
        return node.value

    def visit_Name(self, node: ast.Name) -> Any:
        return self.lookup(node.id)

    def visit_Tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        items: list[Any] = []
        for item in node.elts:
            if isinstance(item, ast.Starred):
                items += self.unpack(item.value)
            else:
                items.append(self.visit(item))
        return tuple(items)

    def visit_List(self, node: ast.List) -> tuple[Any, ...]:
        return tuple(self.visit(item) for item in node.elts)

    def unpack(self, node: ast.expr) -> tuple[Any, ...]:
        """The items of a tuple or shape expression."""
        value = self.emit.plain(self.visit(node))
        if not isinstance(value, tuple):
            raise self.error_at(node, f"cannot unpack {describe(value)}")
        return value

    # --- operators ----------------------------------------------------------------------------------

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        return self.binary(node.op, self.visit(node.left), self.visit(node.right))

    def binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        """An operator by its syntax node; ``@`` is `tw.dot`."""
        if isinstance(op, ast.MatMult):
            return builtins.dot(self.emit, left, right, None, "default")
        return self.emit.binary(BINARY[type(op)], left, right)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return self.emit.logical_not(value)
        if isinstance(node.op, ast.Invert):
            return self.emit.invert(value)
        if isinstance(node.op, ast.USub):
            return self.emit.negate(value)
        return value if isinstance(value, Value) else fold("+", lambda x, _: +x, value, 0)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        """Stops at the first compile-time value that decides; run-time conditions are all evaluated."""
        fn = "and" if isinstance(node.op, ast.And) else "or"
        result: bool | Value = fn == "and"
        for item in node.values:
            value = self.visit(item)
            if is_tile(value):
                symbol = "&" if fn == "and" else "|"
                raise self.error_at(
                    item, f"'{fn}' applies to scalars, got {describe(value)}", f"use '{symbol}' on tiles"
                )
            result = self.emit.logical(fn, result, self.emit.truth(value, f"an operand of '{fn}'"))
            if isinstance(result, bool) and result == (fn == "or"):
                return result
        return result

    def visit_Compare(self, node: ast.Compare) -> Any:
        left, result = self.visit(node.left), None
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.visit(comparator)
            outcome = self._compare(op, left, right)
            result = outcome if result is None else self._both(result, outcome)
            if result is False:
                return False
            left = right
        return result

    def _compare(self, op: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(op, ast.Is | ast.IsNot):
            same = left is right or (is_number(left) and type(left) is type(right) and left == right)
            return same == isinstance(op, ast.Is)
        if isinstance(op, ast.In | ast.NotIn):
            if contains_value(left) or contains_value(right):
                raise CompileError("'in' works on compile-time values only")
            return fold("in", lambda a, b: a in b, left, right) == isinstance(op, ast.In)
        if left is None or right is None:
            raise CompileError("None is compared with 'is'", hint="write 'x is None'")
        return self.emit.compare(COMPARE[type(op)], left, right)

    def _both(self, a: Any, b: Any) -> Any:
        """The conjunction of two links of a chained comparison, scalars or tiles."""
        if isinstance(a, bool):
            return b if a else False
        if isinstance(b, bool):
            return a if b else False
        return self.emit.binary("and", a, b)

    # --- parts ----------------------------------------------------------------------------------------

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        owner = self.visit(node.value)
        if isinstance(owner, Value):
            return attribute(self.emit, owner, node.attr)
        if is_number(owner) and node.attr in ("to", "dtype", "shape"):
            hint = "write tw.cast(x, dtype) for a typed scalar, or tw.full(shape, x, dtype) for a tile"
            raise CompileError(f"{describe(owner)} has no .{node.attr}", hint=hint)
        try:
            return host_value(getattr(owner, node.attr), f"'{ast.unparse(node)}'")
        except AttributeError:
            hint = suggestion(node.attr, [n for n in dir(owner) if not n.startswith("_")])
            raise CompileError(f"{describe(owner)} has no attribute '{node.attr}'", hint=hint) from None

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        return subscript(self.emit, self.visit(node.value), self.visit(node.slice))

    def visit_Slice(self, node: ast.Slice) -> Slice:
        return Slice(*(None if part is None else self.visit(part) for part in (node.lower, node.upper, node.step)))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> str:
        return "".join(str(self.visit(part)) for part in node.values)

    def visit_FormattedValue(self, node: ast.FormattedValue) -> str:
        value = self.visit(node.value)
        if contains_value(value):
            return f"<{describe(value)}>"
        conversions: dict[int, Callable[[Any], Any]] = {97: ascii, 114: repr, 115: str}
        value = conversions[node.conversion](value) if node.conversion in conversions else value
        return format(value, self.visit(node.format_spec) if node.format_spec else "")

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        condition = self.emit.truth(self.visit(node.test), "the condition of a conditional expression")
        if isinstance(condition, bool):
            return self.visit(node.body if condition else node.orelse)
        return self.choose(condition, node.body, node.orelse)

    def choose(self, condition: Value, on_true: ast.expr, on_false: ast.expr) -> Any:
        """A run-time conditional expression; see `Control`."""
        raise NotImplementedError


__all__ = ["Expressions"]
