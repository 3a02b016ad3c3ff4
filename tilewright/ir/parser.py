"""Reads the text form of the Tile IR: the exact inverse of `tilewright.ir.printer`.

Lark (grammar.lark) turns text into small syntax nodes; `_Reader` then walks them from the top, because an
operation's regions need the values defined above it. Checks here are those that name a place in the text:
syntax, names, operand counts, attributes, result types. Everything else is `tilewright.ir.verifier`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from tilewright.ir import async_ops, tile_ops  # noqa: F401  (importing them fills the registry)
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
from tilewright.ir.layout import LinearLayout, SharedLayout
from tilewright.ir.tile_ops import For, If, While
from tilewright.ir.types import (
    DTYPES,
    BufferType,
    DType,
    RingType,
    ScalarType,
    SlotType,
    TileType,
    TokenType,
    Type,
    ViewType,
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
        file: Any = _lark().parse(text, start="file")
        return reader.file(file)
    except UnexpectedInput as error:
        raise _syntax_error(error, text, filename) from None
    except RecursionError:
        raise ParseError("nested too deeply", Location(filename, 1, 1), text.split("\n", 1)[0]) from None


def parse_type(text: str) -> Type:
    """The type of that text, with layouts written out in full. Raises `ParseError`."""
    try:
        type_ = _type(text)
    except UnexpectedInput as error:
        raise _syntax_error(error, text, "<type>") from None
    except (ValueError, TypeError) as error:
        raise ParseError(f"bad type: {error}", Location("<type>", 1, 1), text) from None
    if isinstance(type_, _Aliased):
        raise ParseError(f"unknown layout {type_.alias}", Location("<type>", 1, 1), text)
    return type_


# --- syntax nodes ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Attribute:
    name: Token
    value: Any  # a token, or a list of these


@dataclass(slots=True)
class _Place:
    file: Token
    line: Token
    column: Token
    caller: _Place | None


@dataclass(slots=True)
class _Named:
    """``name(%value)``: an optional operand."""

    name: Token
    value: Token


@dataclass(slots=True)
class _Head:
    """A mnemonic with its operands, and what tile.for, tile.while and async.role write instead of them."""

    mnemonic: Token
    operands: list[Token | list[Token] | _Named]
    index: Token | None = None
    carried: Sequence[tuple[Token, Token]] = ()
    symbol: Token | None = None


@dataclass(slots=True)
class _Region:
    keyword: str
    args: Sequence[Token]
    ops: list[_Op]


@dataclass(slots=True)
class _Op:
    results: Token | None
    head: _Head
    attributes: list[_Attribute]
    types: list[Token]
    place: _Place | None
    regions: list[_Region]


@dataclass(slots=True)
class _Func:
    symbol: Token
    params: list[tuple[Token, Token]]
    attributes: list[_Attribute]
    place: _Place | None
    ops: list[_Op]


@dataclass(slots=True)
class _File:
    aliases: list[tuple[Token, Token]]
    attributes: list[_Attribute]
    functions: list[_Func]


@dataclass(frozen=True)
class _Aliased:
    """A tile type whose layout is an alias of the file that it stands in."""

    tile: TileType
    alias: str


@v_args(inline=True)
class _Syntax(Transformer):
    """Called by the parser as rules complete; builds nodes and looks nothing up, so it cannot fail."""

    def file(self, *parts: Any) -> _File:
        aliases = [p for p in parts if isinstance(p, tuple)]
        functions = [p for p in parts if isinstance(p, _Func)]
        for part in parts:
            if isinstance(part, _File):
                return _File(aliases, part.attributes, part.functions)
        return _File(aliases, [], functions)

    def module(self, attributes: list[_Attribute] | None, *functions: _Func) -> _File:
        return _File([], attributes or [], list(functions))

    def func(self, symbol: Token, params: Any, attributes: Any, place: _Place | None, ops: list[_Op]) -> _Func:
        return _Func(symbol, params or [], attributes or [], place, ops)

    def op(self, results: Token | None, head: _Head, attributes: Any, types: Any, place: Any, *regions: _Region) -> _Op:
        return _Op(results, head, attributes or [], types or [], place, list(regions))

    def head(self, mnemonic: Token, operands: Any) -> _Head:
        return _Head(mnemonic, operands or [])

    def for_head(self, mnemonic: Token, index: Token, lo: Token, hi: Token, step: Token, carried: Any) -> _Head:
        return _Head(mnemonic, [lo, hi, step], index=index, carried=carried or ())

    def while_head(self, mnemonic: Token, carried: Any) -> _Head:
        return _Head(mnemonic, [], carried=carried or ())

    def role_head(self, mnemonic: Token, symbol: Token) -> _Head:
        return _Head(mnemonic, [], symbol=symbol)

    def region(self, ops: list[_Op]) -> _Region:
        return _Region("", (), ops)

    def else_region(self, keyword: Token, ops: list[_Op]) -> _Region:
        return _Region("else", (), ops)

    def do_region(self, keyword: Token, args: Any, ops: list[_Op]) -> _Region:
        return _Region("do", args or (), ops)

    def variadic(self, values: Any) -> list[Token]:
        return values or []

    def sequence(self, *values: Any) -> list[Any]:
        return [v for v in values if v is not None]

    def place(self, file: Token, line: Token, column: Token, caller: _Place | None) -> _Place:
        return _Place(file, line, column, caller)

    def location(self, place: _Place) -> _Place:
        return place

    def _items(self, *items: Any) -> list[Any]:
        return list(items)

    def _pair(self, *items: Any) -> tuple[Any, ...]:
        return items

    named, attribute = _Named, _Attribute
    alias = pair = param = _pair
    block = operands = values = carried = types = attributes = params = _items

    # Types: these do fail, on text that `_type` reports.

    def scalar_type(self, dims: Token) -> Type:
        shape, dtype = _dims(dims)
        if shape:
            raise ValueError(f"{dims} is not a type; a tile is written tile<{dims}>")
        return ScalarType(dtype)

    def tile_type(self, dims: Token, layout: Token | None) -> Type | _Aliased:
        tile = TileType(*_static_dims(dims))
        if layout is None:
            return tile
        return _Aliased(tile, str(layout)) if layout.type == "ALIAS" else tile.with_layout(_linear(layout))

    def view_type(self, dims: Token, strides: tuple[int | None, ...], align: Token) -> Type:
        shape, dtype = _dims(dims)
        if len(shape) != len(strides):
            raise ValueError(f"a view of rank {len(shape)} needs as many strides, got {len(strides)}")
        return ViewType(shape, dtype, strides, int(align))

    def strides(self, *strides: Token | None) -> tuple[int | None, ...]:
        return tuple(None if s == "?" else int(s) for s in strides if s is not None)

    def slot_type(self, dims: Token, layout: Token) -> Type:
        return SlotType(*_static_dims(dims), _shared(layout))

    def buffer_type(self, stages: Token, slot: Type) -> Type:
        if not isinstance(slot, SlotType):
            raise ValueError(f"a buffer holds slots, not {slot}")
        return BufferType(int(stages), slot)

    def ring_type(self, stages: Token) -> Type:
        return RingType(int(stages))

    def token_type(self, kind: Token) -> Type:
        return TokenType(str(kind))


@lru_cache(maxsize=1)
def _lark() -> Lark:
    """The parser, built once: the tables take far longer than a parse."""
    return Lark.open(
        "grammar.lark", rel_to=__file__, parser="lalr", start=["file", "type"], transformer=_Syntax(),
        maybe_placeholders=True,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _type(text: str) -> Type | _Aliased:
    result = _lark().parse(text, start="type")
    assert isinstance(result, Type | _Aliased)
    return result


def _dims(token: str) -> tuple[tuple[int | None, ...], DType]:
    *sizes, dtype = token.split("x")
    if dtype not in DTYPES:
        raise ValueError(f"unknown element type {dtype}{_did_you_mean(dtype, DTYPES)}")
    return tuple(None if n == "?" else int(n) for n in sizes), DTYPES[dtype]


def _static_dims(token: str) -> tuple[tuple[int, ...], DType]:
    shape, dtype = _dims(token)
    static = tuple(n for n in shape if n is not None)
    if len(static) != len(shape):
        raise ValueError(f"the dimensions of {token} must be known")
    return static, dtype


@lru_cache(maxsize=1024)
def _linear(text: str) -> LinearLayout:
    return LinearLayout.parse(text)


@lru_cache(maxsize=1024)
def _shared(text: str) -> SharedLayout:
    return SharedLayout.parse(text)


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

    def file(self, file: _File) -> Module:
        for alias, text in file.aliases:
            if alias in self.layouts:
                raise self.error(f"layout {alias} is defined twice", alias)
            self.layouts[alias] = self.layout(text, _linear)
        module = Module([], self.attributes(file.attributes))
        for func in file.functions:
            if any(f.name == func.symbol[1:] for f in module.functions):
                raise self.error(f"function {func.symbol} is defined twice", func.symbol)
            module.functions.append(self.function(func))
        return module

    def function(self, func: _Func) -> Function:
        self.values, self.scope, self.ended = {}, [], set()
        block = Block([(_hint(name), self.type(type_)) for name, type_ in func.params])
        for (name, _), value in zip(func.params, block.args, strict=True):
            self.define(name, value)
        self.block(block, func.ops)
        place = self.location(func.place, func.symbol)
        return Function(func.symbol[1:], Region(block), self.attributes(func.attributes), place)

    def block(self, block: Block, ops: list[_Op]) -> Block:
        for op in ops:
            block.append(self.operation(op))
        return block

    # --- operations -------------------------------------------------------------------------

    def operation(self, node: _Op) -> Operation:
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
            raise self.error(f"unknown operation '{mnemonic}'", mnemonic, _did_you_mean(mnemonic, REGISTRY))
        return REGISTRY[mnemonic]

    def groups(self, head: _Head, cls: type[Operation]) -> list[list[Value]]:
        """The operand groups of the declaration, filled from the operands as written."""
        written = list(head.operands)
        if cls in (For, While):
            written.append([init for _, init in head.carried])
        groups: list[list[Value]] = []
        for f in cls.operand_fields:
            item = written[0] if written else None
            if not _fits(f, item):
                if f.kind != "optional":
                    raise self.operand_error(head, cls)
                groups.append([])
                continue
            written.pop(0)
            tokens = item if isinstance(item, list) else [item.value if isinstance(item, _Named) else item]
            groups.append([self.use(token) for token in tokens])  # type: ignore[arg-type]
        if written:
            raise self.operand_error(head, cls)
        return groups

    def operand_error(self, head: _Head, cls: type[Operation]) -> ParseError:
        return self.error(f"wrong operands: expected {_signature(cls, head.mnemonic)}", head.mnemonic)

    def op_attributes(self, node: _Op, cls: type[Operation], fn: str | None) -> dict[str, Any]:
        attributes = self.attributes(node.attributes)
        if node.head.symbol is not None:
            attributes = {"kind": str(node.head.symbol[1:]), **attributes}
        declared = {f.name: f for f in cls.attribute_fields}
        for written in node.attributes:
            if written.name not in declared or (cls is Role and written.name == "kind"):
                hint = _did_you_mean(written.name, declared) or (f"it has {', '.join(declared)}" if declared else "")
                raise self.error(f"'{node.head.mnemonic}' has no attribute '{written.name}'", written.name, hint)
        for f in cls.attribute_fields:
            if f.required and f.name not in attributes:
                raise self.error(f"'{node.head.mnemonic}' needs the attribute '{f.name}'", node.head.mnemonic)
        return attributes if fn is None else {"fn": fn, **attributes}

    def results(self, node: _Op, op: Operation) -> None:
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

    def regions(self, node: _Op, cls: type[Operation], op: Operation) -> list[Region]:
        keywords = _keywords(cls)
        if [r.keyword for r in node.regions] != keywords:
            shape = " ".join(f"{k} {{...}}".strip() for k in keywords) or "no region"
            raise self.error(f"'{node.head.mnemonic}' takes {shape}", node.head.mnemonic)
        return [self.region(r, self.region_args(node, r, op)) for r in node.regions]

    def region_args(self, node: _Op, region: _Region, op: Operation) -> list[tuple[Token, Type]]:
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

    def region(self, node: _Region, args: list[tuple[Token, Type]]) -> Region:
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
            hint = _did_you_mean(name, self.values)
            if name in self.ended:
                hint = "it is defined in a region that has ended; yield it from there"
            raise self.error(f"unknown value {name}", name, hint)
        return value

    # --- types, attributes, locations ---------------------------------------------------------

    def type(self, token: Token) -> Type:
        try:
            type_ = _type(str(token))
        except UnexpectedInput as error:
            raise self.inside(token, error) from None
        except (ValueError, TypeError) as error:
            raise self.error(f"bad type: {error}", token) from None
        if isinstance(type_, Type):
            return type_
        if type_.alias not in self.layouts:
            raise self.error(f"unknown layout {type_.alias}", token, _did_you_mean(type_.alias, self.layouts))
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

    def attributes(self, written: list[_Attribute]) -> dict[str, Any]:
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
        return self.layout(token, _linear if token.startswith("linear") else _shared)

    def location(self, place: _Place | None, token: Token) -> Location:
        if place is not None:
            return self.place(place)
        return Location(self.filename, token.line or 0, token.column or 0) if self.text_locations else UNKNOWN

    def place(self, place: _Place) -> Location:
        caller = None if place.caller is None else self.place(place.caller)
        line, column = self.attribute_number(place.line), self.attribute_number(place.column)
        return Location(_unquote(place.file), int(line), int(column), caller)


def _fits(f: Field, item: Any) -> bool:
    """Whether an operand as written is of the kind that a declared group takes."""
    if f.kind == "operands":
        return isinstance(item, list)
    if f.kind == "optional":
        return isinstance(item, _Named) and item.name == f.name
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
    forms = {"operand": "%{0}", "operands": "[%{0}, ...]", "optional": "{0}(%...)"}
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
    patterns = {t.name: str(t.pattern.value) for t in _lark().terminals}
    words = sorted({_TERMINALS.get(n) or repr(patterns.get(n, n)) for n in names if not n.startswith("__IGNORE")})
    return f"expected {', '.join(words)}" if words else ""


def _did_you_mean(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), 3, 0.7)
    return f"did you mean {' or '.join(close)}?" if close else ""


__all__ = ["ParseError", "parse_module", "parse_type"]
