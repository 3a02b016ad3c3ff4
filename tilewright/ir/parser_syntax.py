"""From text to syntax nodes: the Lark parser of grammar.lark, and types, which need no context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from lark import Lark, Token, Transformer, v_args

from tilewright.ir.layout import LinearLayout, SharedLayout
from tilewright.ir.types import (
    DTYPES,
    BufferType,
    DType,
    MailboxType,
    RingType,
    ScalarType,
    SlotType,
    TileType,
    TokenType,
    Type,
    ViewType,
)

# --- syntax nodes ---------------------------------------------------------------------------


@dataclass(slots=True)
class AttributeNode:
    name: Token
    value: Any  # a token, or a list of these


@dataclass(slots=True)
class PlaceNode:
    file: Token
    line: Token
    column: Token
    caller: PlaceNode | None


@dataclass(slots=True)
class NamedNode:
    """``name(%value)``: an optional operand, or several of one name."""

    name: Token
    values: list[Token]


@dataclass(slots=True)
class HeadNode:
    """A mnemonic with its operands, and what tile.for, tile.while and async.role write instead of them."""

    mnemonic: Token
    operands: list[Token | list[Token] | NamedNode]
    index: Token | None = None
    carried: Sequence[tuple[Token, Token]] = ()
    symbol: Token | None = None


@dataclass(slots=True)
class RegionNode:
    keyword: str
    args: Sequence[Token]
    ops: list[OpNode]


@dataclass(slots=True)
class OpNode:
    results: Token | None
    head: HeadNode
    attributes: list[AttributeNode]
    types: list[Token]
    place: PlaceNode | None
    regions: list[RegionNode]


@dataclass(slots=True)
class FunctionNode:
    symbol: Token
    params: list[tuple[Token, Token]]
    attributes: list[AttributeNode]
    place: PlaceNode | None
    ops: list[OpNode]


@dataclass(slots=True)
class FileNode:
    aliases: list[tuple[Token, Token]]
    attributes: list[AttributeNode]
    functions: list[FunctionNode]


@dataclass(frozen=True)
class AliasedTile:
    """A tile type whose layout is an alias of the file that it stands in."""

    tile: TileType
    alias: str


@v_args(inline=True)
class _Syntax(Transformer):
    """Called by the parser as rules complete; builds nodes and looks nothing up, so it cannot fail."""

    def file(self, *parts: Any) -> FileNode:
        aliases = [p for p in parts if isinstance(p, tuple)]
        functions = [p for p in parts if isinstance(p, FunctionNode)]
        for part in parts:
            if isinstance(part, FileNode):
                return FileNode(aliases, part.attributes, part.functions)
        return FileNode(aliases, [], functions)

    def module(self, attributes: list[AttributeNode] | None, *functions: FunctionNode) -> FileNode:
        return FileNode([], attributes or [], list(functions))

    def func(
        self, symbol: Token, params: Any, attributes: Any, place: PlaceNode | None, ops: list[OpNode]
    ) -> FunctionNode:
        return FunctionNode(symbol, params or [], attributes or [], place, ops)

    def op(
        self, results: Token | None, head: HeadNode, attributes: Any, types: Any, place: Any, *regions: RegionNode
    ) -> OpNode:
        return OpNode(results, head, attributes or [], types or [], place, list(regions))

    def head(self, mnemonic: Token, operands: Any) -> HeadNode:
        return HeadNode(mnemonic, operands or [])

    def for_head(self, mnemonic: Token, index: Token, lo: Token, hi: Token, step: Token, carried: Any) -> HeadNode:
        return HeadNode(mnemonic, [lo, hi, step], index=index, carried=carried or ())

    def while_head(self, mnemonic: Token, carried: Any) -> HeadNode:
        return HeadNode(mnemonic, [], carried=carried or ())

    def role_head(self, mnemonic: Token, symbol: Token) -> HeadNode:
        return HeadNode(mnemonic, [], symbol=symbol)

    def region(self, ops: list[OpNode]) -> RegionNode:
        return RegionNode("", (), ops)

    def else_region(self, keyword: Token, ops: list[OpNode]) -> RegionNode:
        return RegionNode("else", (), ops)

    def do_region(self, keyword: Token, args: Any, ops: list[OpNode]) -> RegionNode:
        return RegionNode("do", args or (), ops)

    def variadic(self, values: Any) -> list[Token]:
        return values or []

    def sequence(self, *values: Any) -> list[Any]:
        return [v for v in values if v is not None]

    def place(self, file: Token, line: Token, column: Token, caller: PlaceNode | None) -> PlaceNode:
        return PlaceNode(file, line, column, caller)

    def location(self, place: PlaceNode) -> PlaceNode:
        return place

    def _items(self, *items: Any) -> list[Any]:
        return list(items)

    def _pair(self, *items: Any) -> tuple[Any, ...]:
        return items

    def named(self, name: Token, *values: Token) -> NamedNode:
        return NamedNode(name, list(values))

    attribute = AttributeNode
    alias = pair = param = _pair
    block = operands = values = carried = types = attributes = params = _items

    # Types: these do fail, on text that `_type` reports.

    def scalar_type(self, dims: Token) -> Type:
        shape, dtype = _dims(dims)
        if shape:
            raise ValueError(f"{dims} is not a type; a tile is written tile<{dims}>")
        return ScalarType(dtype)

    def tile_type(self, dims: Token, layout: Token | None) -> Type | AliasedTile:
        tile = TileType(*_static_dims(dims))
        if layout is None:
            return tile
        return AliasedTile(tile, str(layout)) if layout.type == "ALIAS" else tile.with_layout(linear_layout(layout))

    def view_type(self, dims: Token, strides: tuple[int | None, ...], align: Token, symmetric: Token | None) -> Type:
        shape, dtype = _dims(dims)
        if len(shape) != len(strides):
            raise ValueError(f"a view of rank {len(shape)} needs as many strides, got {len(strides)}")
        return ViewType(shape, dtype, strides, int(align), symmetric is not None)

    def strides(self, *strides: Token | None) -> tuple[int | None, ...]:
        return tuple(None if s == "?" else int(s) for s in strides if s is not None)

    def slot_type(self, dims: Token, layout: Token) -> Type:
        return SlotType(*_static_dims(dims), shared_layout(layout))

    def buffer_type(self, stages: Token, slot: Type) -> Type:
        if not isinstance(slot, SlotType):
            raise ValueError(f"a buffer holds slots, not {slot}")
        return BufferType(int(stages), slot)

    def ring_type(self, stages: Token) -> Type:
        return RingType(int(stages))

    def token_type(self, kind: Token) -> Type:
        return TokenType(str(kind))

    def mailbox_type(self, blocks: Token, message: Type) -> Type:
        if not isinstance(message, ScalarType | TileType) or (isinstance(message, TileType) and message.layout):
            raise ValueError(f"a mailbox takes scalars or tiles without a layout, not {message}")
        return MailboxType(int(blocks), message)


@lru_cache(maxsize=1)
def lark_parser() -> Lark:
    """The parser, built once: the tables take far longer than a parse."""
    return Lark.open(
        "grammar.lark", rel_to=__file__, parser="lalr", start=["file", "type"], transformer=_Syntax(),
        maybe_placeholders=True,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def type_of(text: str) -> Type | AliasedTile:
    result = lark_parser().parse(text, start="type")
    assert isinstance(result, Type | AliasedTile)
    return result


def _dims(token: str) -> tuple[tuple[int | None, ...], DType]:
    *sizes, dtype = token.split("x")
    if dtype not in DTYPES:
        raise ValueError(f"unknown element type {dtype}{did_you_mean(dtype, DTYPES)}")
    return tuple(None if n == "?" else int(n) for n in sizes), DTYPES[dtype]


def _static_dims(token: str) -> tuple[tuple[int, ...], DType]:
    shape, dtype = _dims(token)
    static = tuple(n for n in shape if n is not None)
    if len(static) != len(shape):
        raise ValueError(f"the dimensions of {token} must be known")
    return static, dtype


@lru_cache(maxsize=1024)
def linear_layout(text: str) -> LinearLayout:
    return LinearLayout.parse(text)


@lru_cache(maxsize=1024)
def shared_layout(text: str) -> SharedLayout:
    return SharedLayout.parse(text)


def did_you_mean(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), 3, 0.7)
    return f"did you mean {' or '.join(close)}?" if close else ""
