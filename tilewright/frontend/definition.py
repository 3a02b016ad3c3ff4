"""Kernels and helper functions as the frontend sees them: source, syntax tree, parameters, names in scope."""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import CellType, FunctionType, ModuleType
from typing import Any, cast

from tilewright.frontend import markers
from tilewright.frontend.errors import CompileError
from tilewright.frontend.liveness import Liveness
from tilewright.frontend.returns import last_returns, with_structured_returns
from tilewright.frontend.source import source_lines
from tilewright.ir.core import Location
from tilewright.ir.types import DType, f32, i1

NO_DEFAULT: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel or helper.

    ``kind``: "tensor", "symmetric" (a tensor of each rank), "scalar" (of ``dtype``; None: from the argument),
    "constexpr", or "plain" (no annotation: a tensor or a scalar, whatever the argument is).
    """

    name: str
    kind: str
    dtype: DType | None
    default: Any
    keyword_only: bool
    loc: Location

    @property
    def required(self) -> bool:
        return self.default is NO_DEFAULT


class Definition:
    """A Python function captured for compilation. Parsing happens on first use."""

    what = "function"

    def __init__(self, fn: Callable[..., Any]):
        if not isinstance(fn, FunctionType):
            raise TypeError(f"expected a Python function, got {type(fn).__name__}")
        functools.update_wrapper(cast(Callable[..., Any], self), fn)
        self.fn = fn
        self.name: str = fn.__name__
        self.file: str = fn.__code__.co_filename
        self.globals: dict[str, Any] = fn.__globals__

    # --- source -------------------------------------------------------------------------------

    @cached_property
    def _lines(self) -> tuple[list[str], int]:
        try:
            return source_lines(self.fn)
        except (OSError, TypeError) as error:
            message = f"the source of {self.what} '{self.name}' is not available ({error})"
            raise CompileError(message, self._header, "define it in a file or a notebook cell") from None

    @property
    def _header(self) -> Location:
        return Location(self.file, self.fn.__code__.co_firstlineno, 1)

    @property
    def source(self) -> str:
        """The text of the definition, decorators included."""
        return "".join(self._lines[0])

    @property
    def first_line(self) -> int:
        """The line of the first decorator or the ``def``."""
        return max(1, self._lines[1])

    @cached_property
    def tree(self) -> ast.FunctionDef:
        """The syntax tree, with the file's own line and column numbers; nothing follows a return."""
        text, shift = self.source, self.first_line - 1
        if text[:1].isspace():  # nested definition: keep the columns
            text, shift = "if True:\n" + text, shift - 1
        body = ast.parse(text).body
        node: ast.AST = body[0].body[0] if isinstance(body[0], ast.If) else body[0]
        ast.increment_lineno(node, shift)
        if not isinstance(node, ast.FunctionDef):
            raise CompileError(f"{self.what} '{self.name}' is not a plain 'def'", self._header, "write it with def")
        node.body = with_structured_returns(node.body)
        return node

    @cached_property
    def last_returns(self) -> frozenset[ast.Return]:
        """The returns that end a branch of the function."""
        return frozenset(last_returns(self.tree.body))

    @cached_property
    def liveness(self) -> Liveness:
        return Liveness(self.tree)

    @property
    def loc(self) -> Location:
        return Location(self.file, self.tree.lineno, self.tree.col_offset + 1)

    # --- names --------------------------------------------------------------------------------

    @cached_property
    def _cells(self) -> dict[str, CellType]:
        return dict(zip(self.fn.__code__.co_freevars, self.fn.__closure__ or (), strict=True))

    def lookup(self, name: str) -> Any:
        """The value of a name that is not local: closure, globals, Python builtins. KeyError if unknown."""
        if name in self._cells:
            try:
                return self._cells[name].cell_contents
            except ValueError:
                raise KeyError(name) from None
        return self.globals[name] if name in self.globals else vars(builtins)[name]

    def visible_names(self) -> set[str]:
        """Every non-local name, for suggestions."""
        return {*self._cells, *self.globals, *(n for n in vars(builtins) if n.islower())}

    # --- parameters -----------------------------------------------------------------------------

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters in order."""
        arguments = self.tree.args
        for extra in (arguments.vararg, arguments.kwarg):
            if extra is not None:
                raise CompileError(
                    f"{self.what} '{self.name}' cannot take *{extra.arg}", self._at(extra), "list the parameters"
                )
        signature = inspect.signature(self.fn)
        nodes = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return tuple(self._parameter(node, signature.parameters[node.arg]) for node in nodes)

    @cached_property
    def parameter(self) -> dict[str, Parameter]:
        """The parameters by name."""
        return {p.name: p for p in self.parameters}

    def _at(self, node: ast.arg | ast.expr) -> Location:
        return Location(self.file, node.lineno, node.col_offset + 1)

    def _parameter(self, node: ast.arg, declared: inspect.Parameter) -> Parameter:
        kind, dtype = self._annotation(node, declared.annotation)
        keyword_only = declared.kind is inspect.Parameter.KEYWORD_ONLY
        return Parameter(node.arg, kind, dtype, declared.default, keyword_only, self._at(node))

    def _annotation(self, node: ast.arg, annotation: Any) -> tuple[str, DType | None]:
        annotation = self._evaluate_annotation(node, annotation)
        if isinstance(annotation, DType):
            return "scalar", annotation
        for known, meaning in _ANNOTATIONS:
            if annotation is known:
                return meaning
        raise CompileError(
            f"parameter '{node.arg}' has an annotation that means nothing here: {annotation!r}",
            self._at(node),
            "use tw.Tensor, tw.Symmetric, tw.constexpr, or a dtype such as tw.float32",
            len(node.arg),
        )

    def _evaluate_annotation(self, node: ast.arg, annotation: Any) -> Any:
        if not isinstance(annotation, str):
            return annotation
        cells = {name: cell.cell_contents for name, cell in self._cells.items() if _filled(cell)}
        try:
            return eval(annotation, self.globals, cells)
        except Exception as error:
            message = f"cannot evaluate the annotation of parameter '{node.arg}': {error}"
            raise CompileError(message, self._at(node), length=len(node.arg)) from None

    # --- identity -------------------------------------------------------------------------------

    def dependencies(self) -> Dependencies:
        """The helpers and constants that the program reaches through names, now."""
        found = Dependencies({}, {})
        _collect(self, found)
        return found

    def fingerprint(self, places: bool = True) -> str:
        """A digest of the text of this function and its helpers and of the constants they use: see `Dependencies`."""
        return self.dependencies().digest(places)

    def __repr__(self) -> str:
        return f"<{self.what} {self.name} at {self.file}:{self.fn.__code__.co_firstlineno}>"


class KernelDefinition(Definition):
    """A kernel: the unit of compilation and launch."""

    what = "kernel"


class FunctionDefinition(Definition):
    """A helper, inlined where it is called."""

    what = "function"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.name} is a @tw.function: it only works inside a @tw.kernel function")


def function(fn: Callable[..., Any]) -> FunctionDefinition:
    """Decorator of a helper that kernels call; it is inlined."""
    return FunctionDefinition(fn)


def as_kernel(value: Any) -> KernelDefinition | None:
    """The definition behind a kernel object (anything with a ``definition``), else None."""
    found = value if isinstance(value, KernelDefinition) else getattr(value, "definition", None)
    return found if isinstance(found, KernelDefinition) else None


_ANNOTATIONS: tuple[tuple[Any, tuple[str, DType | None]], ...] = (
    (NO_DEFAULT, ("plain", None)),
    (Any, ("plain", None)),
    (markers.Tensor, ("tensor", None)),
    (markers.Symmetric, ("symmetric", None)),
    (markers.constexpr, ("constexpr", None)),
    (int, ("scalar", None)),
    (float, ("scalar", f32)),
    (bool, ("scalar", i1)),
)


# --- dependencies -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dependencies:
    """What a compiled kernel depends on besides its arguments.

    ``functions``: id -> definition, the program itself included. ``constants``: "function.name" ->
    value of each global or closure constant read.
    """

    functions: dict[int, Definition]
    constants: dict[str, Any]

    def digest(self, places: bool = True) -> str:
        """Without ``places`` the same wherever the files lie, and whatever else is in them."""
        sha = hashlib.sha256()
        for definition in self.functions.values():
            if places:
                sha.update(f"{definition.file}:{definition.first_line}\n".encode())
            sha.update(f"{definition.source}\n".encode())
            for p in definition.parameters:
                sha.update(f"{p.name}: {p.kind} {p.dtype} = {constant_text(p.default, places)}\n".encode())
        for name in sorted(self.constants):
            sha.update(f"{name} = {constant_text(self.constants[name], places)}\n".encode())
        return sha.hexdigest()


def is_plain_constant(value: Any) -> bool:
    """A value whose text identifies it: number, string, dtype, None, or a tuple of such."""
    if isinstance(value, tuple):
        return all(is_plain_constant(v) for v in value)
    return value is None or isinstance(value, int | float | str | DType)


def constant_text(value: Any, places: bool = True) -> str:
    """A text that is equal exactly for equal compile-time values, for cache keys. ``places``: see `Dependencies`."""
    if isinstance(value, Definition):
        return f"{value.name}:{value.fingerprint(places)}"
    if isinstance(value, tuple):
        return "(" + ", ".join(constant_text(v, places) for v in value) + ")"
    return f"{type(value).__name__} {value!r}"


def _collect(definition: Definition, found: Dependencies) -> None:
    if id(definition) in found.functions:
        return
    found.functions[id(definition)] = definition
    for path in _paths(definition.tree):
        try:
            value = definition.lookup(path[0])
            names = list(path[1:])
            while names and not isinstance(value, Definition | markers.Builtin | DType):
                value = getattr(value, names.pop(0))
        except (KeyError, AttributeError):
            continue
        if isinstance(value, Definition):
            _collect(value, found)
        elif is_plain_constant(value):
            found.constants[f"{definition.name}.{'.'.join(path)}"] = value
        elif isinstance(value, tuple | list):
            found.constants[f"{definition.name}.{'.'.join(path)}"] = _collect_items(value, found)
        elif isinstance(value, markers.Builtin):
            found.constants[f"{definition.name}.{'.'.join(path)}"] = f"tw.{value.name}"
        elif callable(value):
            name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
            found.constants[f"{definition.name}.{'.'.join(path)}"] = name
        elif not isinstance(value, ModuleType | type):
            found.constants[f"{definition.name}.{'.'.join(path)}"] = value


def _collect_items(items: tuple[Any, ...] | list[Any], found: Dependencies) -> tuple[Any, ...]:
    """The constants in a sequence; each helper in it is collected, and named here."""
    constants: list[Any] = []
    for item in items:
        if isinstance(item, Definition):
            _collect(item, found)
            item = f"{item.name} of {item.file}:{item.first_line}"
        constants.append(_collect_items(item, found) if isinstance(item, tuple | list) else item)
    return tuple(constants)


def _paths(tree: ast.FunctionDef) -> Iterator[tuple[str, ...]]:
    """Dotted names read anywhere in a function, longest form only: ``a.b.c`` as ("a", "b", "c")."""
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        if node in inner:
            continue
        attributes: list[str] = []
        root: ast.AST = node
        while isinstance(root, ast.Attribute):
            attributes.append(root.attr)
            root = root.value
            inner.add(root)
        if isinstance(root, ast.Name) and isinstance(root.ctx, ast.Load):
            yield (root.id, *reversed(attributes))


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not NO_DEFAULT
    except ValueError:
        return False


__all__ = [
    "Definition",
    "Dependencies",
    "FunctionDefinition",
    "KernelDefinition",
    "Parameter",
    "as_kernel",
    "constant_text",
    "function",
]
