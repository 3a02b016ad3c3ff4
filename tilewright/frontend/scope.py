"""The visitor's base: frames of inlined functions, source locations, lookup of names."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from tilewright.frontend.definition import Definition
from tilewright.frontend.emitter import Emitter
from tilewright.frontend.errors import CompileError, suggestion
from tilewright.frontend.liveness import stores
from tilewright.frontend.values import Undefined
from tilewright.ir.builder import Builder
from tilewright.ir.core import IRError, Location, Value


@dataclass
class Frame:
    """One function being built: its variables, where it was called, and how it ends."""

    definition: Definition
    caller: Location | None = None
    locals: dict[str, Any] = field(default_factory=dict)
    #: how many run-time loops and branches enclose the current statement
    depth: int = 0
    returned: bool = False
    result: Any = None

    @cached_property
    def local_names(self) -> set[str]:
        """Names that are local by Python's rule: parameters and all that is assigned."""
        return {p.name for p in self.definition.parameters} | set(stores(self.definition.tree.body))


class VisitorBase:
    """Dispatches on the syntax node's class; gives every operation and error its location."""

    def __init__(self, builder: Builder, frame: Frame):
        self.builder, self.frame = builder, frame
        self.emit = Emitter(builder)
        self.frames = [frame]

    # --- dispatch -------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> Any:
        """Evaluate an expression or run a statement at its own location."""
        handler: Callable[[Any], Any] | None = getattr(self, f"visit_{type(node).__name__}", None)
        saved, self.builder.loc = self.builder.loc, self.location(node)
        try:
            if handler is None:
                raise unsupported_syntax(node)
            return handler(node)
        except CompileError as error:
            error.locate(self.location(node), self.length(node))
            raise
        except IRError as error:
            raise CompileError(error.message, self.location(node), error.hint, self.length(node)) from error
        finally:
            self.builder.loc = saved

    def visit_block(self, statements: Sequence[ast.stmt]) -> None:
        """Run statements until one returns."""
        for statement in statements:
            if self.frame.returned:
                return
            self.visit(statement)

    # --- locations ------------------------------------------------------------------------------

    def location(self, node: ast.AST) -> Location:
        """Where a node starts; columns count characters from one."""
        line, column = getattr(node, "lineno", 0), getattr(node, "col_offset", 0)
        file = self.frame.definition.file
        return Location(file, line, _characters(file, line, column) + 1, self.frame.caller)

    def length(self, node: ast.AST) -> int:
        """How many characters of its first line a node takes."""
        line, end_line = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
        file = self.frame.definition.file
        if isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.FunctionDef | ast.ClassDef):
            return len(type(node).__name__.removesuffix("Def")) if not isinstance(node, ast.FunctionDef) else 3
        start = _characters(file, line, node.col_offset) if isinstance(node, ast.expr | ast.stmt) else 0
        if line != end_line:
            return max(1, len(linecache.getline(file, line).rstrip()) - start)
        return max(1, _characters(file, line, getattr(node, "end_col_offset", 0)) - start)

    def error_at(self, node: ast.AST, message: str, hint: str = "") -> CompileError:
        """An error that points at a particular node."""
        return CompileError(message, self.location(node), hint, self.length(node))

    # --- names ------------------------------------------------------------------------------------

    def lookup(self, name: str) -> Any:
        """A variable, a global or a Python builtin."""
        frame = self.frame
        if name in frame.locals:
            value = frame.locals[name]
            if isinstance(value, Undefined):
                raise CompileError(value.reason, hint=value.hint)
            return value
        if name in frame.local_names:
            raise CompileError(
                f"variable '{name}' is read before it is assigned", hint="assign it on every path that leads here"
            )
        try:
            return host_value(frame.definition.lookup(name), f"'{name}'")
        except KeyError:
            names = {*frame.locals, *frame.definition.visible_names()}
            raise CompileError(f"name '{name}' is not defined", hint=suggestion(name, names)) from None

    def assign(self, name: str, value: Any) -> None:
        """Bind a variable; a value without a name takes the variable's for the printed IR."""
        name_value(name, value)
        self.frame.locals[name] = value


def name_value(name: str, value: Any) -> None:
    """Give unnamed run-time values the variable's name."""
    if isinstance(value, Value) and not value.hint:
        value.hint = name
    elif isinstance(value, tuple):
        for position, item in enumerate(value):
            name_value(f"{name}_{position}", item)


def host_value(value: Any, what: str) -> Any:
    """A global or attribute as a compile-time value; NumPy scalars become Python numbers."""
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if isinstance(value, ModuleType):  # NumPy has functions `shape` and `dtype`
        return value
    if isinstance(value, np.ndarray) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise CompileError(
            f"{what} is an array: a kernel cannot capture arrays", hint="pass it as a tw.Tensor parameter"
        )
    return tuple(host_value(v, what) for v in value) if type(value) in (list, tuple) else value


def _characters(file: str, line: int, offset: int) -> int:
    """The character position of a UTF-8 offset, which is what syntax trees carry."""
    text = linecache.getline(file, line)
    return offset if text.isascii() else len(text.encode()[:offset].decode(errors="ignore"))


_SYNTAX: dict[type[ast.AST], tuple[str, str]] = {
    ast.Break: ("'break' is not supported", "put the condition into a 'while', or mask the remaining iterations"),
    ast.Continue: ("'continue' is not supported", "put the rest of the body under an 'if'"),
    ast.With: ("'with' is not supported", ""),
    ast.Try: ("'try' is not supported: kernels raise no exceptions", ""),
    ast.Raise: ("'raise' is not supported", "use tw.static_assert for compile-time conditions"),
    ast.FunctionDef: ("functions inside kernels are not supported", "define a @tw.function next to the kernel"),
    ast.ClassDef: ("classes inside kernels are not supported", ""),
    ast.Lambda: ("lambdas are not supported", "define a @tw.function next to the kernel"),
    ast.ListComp: ("comprehensions are not supported", "use a tw.static_range loop"),
    ast.GeneratorExp: ("comprehensions are not supported", "use a tw.static_range loop"),
    ast.DictComp: ("comprehensions are not supported", "use a tw.static_range loop"),
    ast.SetComp: ("comprehensions are not supported", "use a tw.static_range loop"),
    ast.Dict: ("dictionaries are not supported", "use separate variables or a tuple"),
    ast.Set: ("sets are not supported", "use a tuple"),
    ast.Import: ("imports inside kernels are not supported", "import at the top of the file"),
    ast.ImportFrom: ("imports inside kernels are not supported", "import at the top of the file"),
    ast.Global: ("'global' is not supported", "kernels cannot write Python variables; store to a tensor"),
    ast.Nonlocal: ("'nonlocal' is not supported", "kernels cannot write Python variables; store to a tensor"),
    ast.Delete: ("'del' is not supported", ""),
    ast.NamedExpr: ("':=' is not supported", "assign in a statement of its own"),
    ast.Yield: ("'yield' is not supported", ""),
    ast.Await: ("'await' is not supported", ""),
    ast.Match: ("'match' is not supported", "use 'if' and 'elif'"),
    ast.Starred: ("'*' unpacking is not supported here", "name the items"),
}


def unsupported_syntax(node: ast.AST) -> CompileError:
    message, hint = _SYNTAX.get(type(node), (f"this syntax ({type(node).__name__}) is not supported in a kernel", ""))
    return CompileError(message, hint=hint)


__all__ = ["Frame", "VisitorBase", "host_value", "name_value", "unsupported_syntax"]
