"""Reads the text form of the Tile IR: the exact inverse of `tilewright.ir.printer`.

Lark (grammar.lark) turns text into small syntax nodes; `_Reader` then walks them from the top, because an
operation's regions need the values defined above it. Checks here are those that name a place in the text:
syntax, names, operand counts, attributes, result types. Everything else is `tilewright.ir.verifier`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lark import Token
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from tilewright.ir import (  # noqa: F401  (importing them fills the registry)
    async_ops,
    check_ops,
    cluster_ops,
    collectives,
    comm_ops,
    indexed_ops,
    packet_ops,
    tile_ops,
)
from tilewright.ir.async_ops import Role
from tilewright.ir.core import (
    REGISTRY,
    UNKNOWN,
    Block,
    Field,
    Function,
    IRError,
    Location,
    Module,
    Operation,
    Region,
    Value,
)
from tilewright.ir.layout import LinearLayout
from tilewright.ir.parser_syntax import (
    AttributeNode,
    FileNode,
    FunctionNode,
    HeadNode,
    NamedNode,
    OpNode,
    PlaceNode,
    RegionNode,
    did_you_mean,
    lark_parser,
    linear_layout,
    shared_layout,
    type_of,
)
from tilewright.ir.tile_ops import For, If, While
from tilewright.ir.types import (
    ScalarType,
    Type,
)

_NAME = re.compile(r"%[\w.$]+")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None, "inf": float("inf"), "nan": float("nan")}


class ParseError(IRError):
    """The text is not Tile IR. ``loc`` is the place in the text, ``source_line`` that line of it."""

    def __init__(self, message: str, loc: Location, source_line: str = "", hint: str = ""):
        super().__init__(message, loc, hint)
        self.source_line = source_line
        # Tabs must stay tabs under the caret, else it points beside the column.
        margin = "".join("\t" if c == "\t" else " " for c in source_line[: loc.column - 1])
        text = f"{loc.file}:{loc.line}:{loc.column}: {message}\n  {source_line}\n  {margin}^"
        self.args = (text + (f"\n  hint: {hint}" if hint else ""),)


def parse_module(text: str, filename: str = "<text>", *, text_locations: bool = False) -> Module:
    """The module that ``text`` describes; bare functions make a module without attributes.

    Operations get the locations written in the text (``loc(...)``). With ``text_locations``, those without one
    get their place in this text, so that later errors point into it. Raises `ParseError` alone.
    """
    reader = _Reader(text, filename, text_locations)
    try:
        file: Any = lark_parser().parse(text, start="file")
        return reader.file(file)
    except UnexpectedInput as error:
        raise _syntax_error(error, text, filename) from None
    except RecursionError:
        raise ParseError("nested too deeply", Location(filename, 1, 1), text.split("\n", 1)[0]) from None


def parse_type(text: str) -> Type:
    """The type of that text, with layouts written out in full. Raises `ParseError`."""
    try:
        type_ = type_of(text)
    except UnexpectedInput as error:
        raise _syntax_error(error, text, "<type>") from None
    except (ValueError, TypeError) as error:
        raise ParseError(f"bad type: {error}", Location("<type>", 1, 1), text) from None
    if not isinstance(type_, Type):
        raise ParseError(f"unknown layout {type_.alias}", Location("<type>", 1, 1), text)
    return type_


# --- from syntax to operations --------------------------------------------------------------


class _Reader:
    """Turns syntax nodes into a module; knows the text, for errors."""

    def __init__(self, text: str, filename: str, text_locations: bool):
        self.text, self.filename, self.text_locations = text, filename, text_locations
        self.layouts: dict[str, LinearLayout] = {}
        self.values: dict[str, Value] = {}
        self.scope: list[str] = []  # names in order of definition, to be forgotten at the end of their region
        self.ended: set[str] = set()  # names of regions that have ended, for the hint

    def error(self, message: str, at: Token, hint: str = "") -> ParseError:
        return _error_at(self.text, self.filename, at.line or 1, at.column or 1, message, hint)

    def file(self, file: FileNode) -> Module:
        for alias, text in file.aliases:
            if alias in self.layouts:
                raise self.error(f"layout {alias} is defined twice", alias)
            self.layouts[alias] = self.layout(text, linear_layout)
        module = Module([], self.attributes(file.attributes))
        for func in file.functions:
            if any(f.name == func.symbol[1:] for f in module.functions):
                raise self.error(f"function {func.symbol} is defined twice", func.symbol)
            module.functions.append(self.function(func))
        return module

    def function(self, func: FunctionNode) -> Function:
        self.values, self.scope, self.ended = {}, [], set()
        block = Block([(_hint(name), self.type(type_)) for name, type_ in func.params])
        for (name, _), value in zip(func.params, block.args, strict=True):
            self.define(name, value)
        self.block(block, func.ops)
        place = self.location(func.place, func.symbol)
        return Function(func.symbol[1:], Region(block), self.attributes(func.attributes), place)

    def block(self, block: Block, ops: list[OpNode]) -> Block:
        for op in ops:
            block.append(self.operation(op))
        return block

    # --- operations -------------------------------------------------------------------------

    def operation(self, node: OpNode) -> Operation:
        head = node.head
        cls, fn = self.lookup(head.mnemonic)
        op = cls(*self.groups(head, cls), loc=self.location(node.place, head.mnemonic))
        op.attributes = self.op_attributes(node, cls, fn)
        op.regions = self.regions(node, cls, op)
        for region in op.regions:
            region.parent = op
        self.results(node, op)
        return op

    def lookup(self, mnemonic: Token) -> tuple[type[Operation], str | None]:
        if mnemonic not in REGISTRY:
            raise self.error(f"unknown operation '{mnemonic}'", mnemonic, did_you_mean(mnemonic, REGISTRY))
        return REGISTRY[mnemonic]

    def groups(self, head: HeadNode, cls: type[Operation]) -> list[list[Value]]:
        """The operand groups of the declaration, filled from the operands as written."""
        written = list(head.operands)
        if cls in (For, While):
            written.append([init for _, init in head.carried])
        groups: list[list[Value]] = []
        for f in cls.operand_fields:
            item = written[0] if written else None
            if not _fits(f, item):
                if f.kind not in ("optional", "named"):
                    raise self.operand_error(head, cls)
                groups.append([])
                continue
            written.pop(0)
            tokens = item if isinstance(item, list) else item.values if isinstance(item, NamedNode) else [item]
            groups.append([self.use(token) for token in tokens])  # type: ignore[arg-type]
        if written:
            raise self.operand_error(head, cls)
        return groups

    def operand_error(self, head: HeadNode, cls: type[Operation]) -> ParseError:
        return self.error(f"wrong operands: expected {_signature(cls, head.mnemonic)}", head.mnemonic)

    def op_attributes(self, node: OpNode, cls: type[Operation], fn: str | None) -> dict[str, Any]:
        attributes = self.attributes(node.attributes)
        if node.head.symbol is not None:
            attributes = {"kind": str(node.head.symbol[1:]), **attributes}
        declared = {f.name: f for f in cls.attribute_fields}
        for written in node.attributes:
            if written.name not in declared or (cls is Role and written.name == "kind"):
                hint = did_you_mean(written.name, declared) or (f"it has {', '.join(declared)}" if declared else "")
                raise self.error(f"'{node.head.mnemonic}' has no attribute '{written.name}'", written.name, hint)
        for f in cls.attribute_fields:
            if f.required and f.name not in attributes:
                raise self.error(f"'{node.head.mnemonic}' needs the attribute '{f.name}'", node.head.mnemonic)
        return attributes if fn is None else {"fn": fn, **attributes}

    def results(self, node: OpNode, op: Operation) -> None:
        names = self.result_names(node.results)
        if names and not node.types:
            hint = f"write ': type' after '{node.head.mnemonic}'"
            raise self.error(f"the type of {', '.join(names)} is missing", node.head.mnemonic, hint)
        if len(names) != len(node.types):
            raise self.error(f"{len(names)} results but {len(node.types)} types", node.types[0])
        for name, type_ in zip(names, node.types, strict=True):
            value = Value(self.type(type_), op, _hint(name))
            op.results.append(value)
            self.define(name, value)

    def result_names(self, token: Token | None) -> list[Token]:
        """The names in a RESULTS token (``%a, %b =``), each with its own place."""
        if token is None:
            return []
        return [_part(token, match.start(), match.group()) for match in _NAME.finditer(token)]

    def regions(self, node: OpNode, cls: type[Operation], op: Operation) -> list[Region]:
        keywords = _keywords(cls)
        if [r.keyword for r in node.regions] != keywords:
            shape = " ".join(f"{k} {{...}}".strip() for k in keywords) or "no region"
            raise self.error(f"'{node.head.mnemonic}' takes {shape}", node.head.mnemonic)
        return [self.region(r, self.region_args(node, r, op)) for r in node.regions]

    def region_args(self, node: OpNode, region: RegionNode, op: Operation) -> list[tuple[Token, Type]]:
        """Names and types of a region's arguments; the text gives types only by what they carry."""
        if not isinstance(op, For | While):
            return []
        names = list(region.args) if region.keyword else [name for name, _ in node.head.carried]
        if len(names) != len(op.inits):
            message = f"{len(names)} names for {len(op.inits)} carried values"
            raise self.error(message, names[0] if names else node.head.mnemonic)
        args = [(name, init.type) for name, init in zip(names, op.inits, strict=True)]
        if node.head.index is not None and isinstance(op, For):
            args.insert(0, (node.head.index, op.lo.type))
        return args

    def region(self, node: RegionNode, args: list[tuple[Token, Type]]) -> Region:
        with self.nested():
            block = Block([(_hint(name), type_) for name, type_ in args])
            for (name, _), value in zip(args, block.args, strict=True):
                self.define(name, value)
            return Region(self.block(block, node.ops))

    # --- names ------------------------------------------------------------------------------

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Names defined inside are forgotten at the end."""
        mark = len(self.scope)
        yield
        for name in self.scope[mark:]:
            del self.values[name]
            self.ended.add(name)
        del self.scope[mark:]

    def define(self, name: Token, value: Value) -> None:
        if name in self.values:
            raise self.error(f"{name} is already defined", name)
        self.values[str(name)] = value
        self.scope.append(str(name))

    def use(self, name: Token) -> Value:
        value = self.values.get(name)
        if value is None:
            hint = did_you_mean(name, self.values)
            if name in self.ended:
                hint = "it is defined in a region that has ended; yield it from there"
            raise self.error(f"unknown value {name}", name, hint)
        return value

    # --- types, attributes, locations ---------------------------------------------------------

    def type(self, token: Token) -> Type:
        try:
            type_ = type_of(str(token))
        except UnexpectedInput as error:
            raise self.inside(token, error) from None
        except (ValueError, TypeError) as error:
            raise self.error(f"bad type: {error}", token) from None
        if isinstance(type_, Type):
            return type_
        if type_.alias not in self.layouts:
            raise self.error(f"unknown layout {type_.alias}", token, did_you_mean(type_.alias, self.layouts))
        return type_.tile.with_layout(self.layouts[type_.alias])

    def inside(self, token: Token, error: UnexpectedInput) -> ParseError:
        """A syntax error inside a TYPE token, placed in the whole text."""
        offset = len(token) if _at_end(error) else error.pos_in_stream or 0
        return self.error(_syntax_message(error), _part(token, offset, ""), _expected(error))

    def layout(self, token: Token, parse: Any) -> Any:
        try:
            return parse(str(token))
        except (ValueError, TypeError) as error:
            raise self.error(f"bad layout: {error}", token) from None

    def attributes(self, written: list[AttributeNode]) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        for attribute in written:
            if attribute.name in attributes:
                raise self.error(f"attribute '{attribute.name}' is given twice", attribute.name)
            attributes[str(attribute.name)] = self.attribute(attribute.value)
        return attributes

    def attribute(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(self.attribute(v) for v in value)
        return getattr(self, f"attribute_{value.type.lower()}")(value)

    def attribute_name(self, token: Token) -> Any:
        if token not in _WORDS:
            raise self.error(f"unknown attribute value '{token}'", token, "strings are written in double quotes")
        return _WORDS[token]

    def attribute_number(self, token: Token) -> int | float:
        try:
            return float(token) if any(c in token for c in ".en") else int(token)
        except ValueError as error:
            raise self.error(f"bad number: {error}", token) from None

    def attribute_string(self, token: Token) -> str:
        return _unquote(token)

    def attribute_type(self, token: Token) -> Any:
        type_ = self.type(token)
        return type_.dtype if isinstance(type_, ScalarType) else type_

    def attribute_layout(self, token: Token) -> Any:
        return self.layout(token, linear_layout if token.startswith("linear") else shared_layout)

    def location(self, place: PlaceNode | None, token: Token) -> Location:
        if place is not None:
            return self.place(place)
        return Location(self.filename, token.line or 0, token.column or 0) if self.text_locations else UNKNOWN

    def place(self, place: PlaceNode) -> Location:
        caller = None if place.caller is None else self.place(place.caller)
        line, column = self.attribute_number(place.line), self.attribute_number(place.column)
        return Location(_unquote(place.file), int(line), int(column), caller)


def _fits(f: Field, item: Any) -> bool:
    """Whether an operand as written is of the kind that a declared group takes."""
    if f.kind == "operands":
        return isinstance(item, list)
    if f.kind in ("optional", "named"):
        return isinstance(item, NamedNode) and item.name == f.name and (f.kind == "named" or len(item.values) == 1)
    return isinstance(item, Token)


def _keywords(cls: type[Operation]) -> list[str]:
    """The words before an operation's regions."""
    if cls is If:
        return ["", "else"]
    return ["", "do"] if cls is While else [""] * len(cls.region_fields)


def _signature(cls: type[Operation], name: str) -> str:
    """How the operands are written, for example ``tile.store %view, [%index, ...], %value``."""
    if cls is For:
        return f"{name} %index = %lo to %hi step %step iter(%carried = %init, ...)"
    if cls is While:
        return f"{name} iter(%carried = %init, ...)"
    if cls is Role:
        return f"{name} @kind"
    forms = {"operand": "%{0}", "operands": "[%{0}, ...]", "optional": "{0}(%...)", "named": "{0}(%..., ...)"}
    parts = [forms[f.kind].format(f.name) for f in cls.operand_fields]
    return f"'{name} {', '.join(parts)}'" if parts else f"'{name}' without operands"


def _hint(name: str) -> str:
    """The name as the hint of its value; numbers are the printer's own."""
    return "" if name[1:].isdigit() else name[1:]


def _part(token: Token, offset: int, text: str) -> Token:
    """A token for a part of another one."""
    before = token[:offset]
    lines = before.count("\n")
    column = len(before) - before.rfind("\n") if lines else (token.column or 1) + offset
    return Token(token.type, text, line=(token.line or 1) + lines, column=column)


def _unquote(token: str) -> str:
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m.group(1), m.group(1)), token[1:-1])


# --- errors ---------------------------------------------------------------------------------


def _error_at(text: str, filename: str, line: int, column: int, message: str, hint: str) -> ParseError:
    lines = text.split("\n")
    source = lines[line - 1] if 0 < line <= len(lines) else ""
    return ParseError(message, Location(filename, line, column), source, hint)


def _at_end(error: UnexpectedInput) -> bool:
    return isinstance(error, UnexpectedToken) and error.token.type == "$END"


def _syntax_error(error: UnexpectedInput, text: str, filename: str) -> ParseError:
    line, column = error.line, error.column
    if _at_end(error) or line < 1:
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    return _error_at(text, filename, line, column, _syntax_message(error), _expected(error))


def _syntax_message(error: UnexpectedInput) -> str:
    if _at_end(error):
        return "the text ends too early"
    if isinstance(error, UnexpectedCharacters):
        return f"unexpected {error.char!r}"
    token = getattr(error, "token", "")
    return f"unexpected {str(token)[:60]!r}"


_TERMINALS = {
    "RESULTS": "%result =", "VALUE": "%value", "MNEMONIC": "an operation", "TYPE": "a type", "LAYOUT": "a layout",
    "SYMBOL": "@name", "ALIAS": "#alias", "NAME": "a name", "NUMBER": "a number", "INT": "an integer",
    "STRING": "a string", "DIMS": "dimensions and element type", "STRIDE": "a stride", "$END": "the end",
}  # fmt: skip


def _expected(error: UnexpectedInput) -> str:
    """What could stand at the place of a syntax error, as a hint."""
    names = getattr(error, "accepts", None) or getattr(error, "expected", None) or getattr(error, "allowed", None) or ()
    patterns = {t.name: str(t.pattern.value) for t in lark_parser().terminals}
    words = sorted({_TERMINALS.get(n) or repr(patterns.get(n, n)) for n in names if not n.startswith("__IGNORE")})
    return f"expected {', '.join(words)}" if words else ""


__all__ = ["ParseError", "parse_module", "parse_type"]
