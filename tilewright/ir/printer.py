"""The text form of the Tile IR. `tilewright.ir.parser` reads it back to an equal module.

One operation a line::

    %results = mnemonic %operand, [%variadic], name(%optional) {attribute = value} : types loc(...)

``tile.for``, ``tile.if``, ``tile.while`` and ``async.role`` add their regions; see docs/ir.md.
"""

from __future__ import annotations

import math
import re
from typing import Any

from tilewright.ir.async_ops import Role
from tilewright.ir.core import UNKNOWN, Block, Function, Location, Module, Operation, Value
from tilewright.ir.layout import LinearLayout, SharedLayout
from tilewright.ir.tile_ops import For, If, While
from tilewright.ir.types import DType, SlotType, TileType, Type

_NOT_NAME = re.compile(r"[^\w.$]")
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def print_module(module: Module, locations: bool = False) -> str:
    """The module as text; with ``locations``, each operation ends in its source location."""
    return _Printer(locations).module(module)


def print_function(function: Function, locations: bool = False) -> str:
    """One function as text, layouts written out in full."""
    return "\n".join(_Printer(locations).function(function)) + "\n"


class _Printer:
    def __init__(self, locations: bool):
        self.locations = locations
        self.names: dict[Value, str] = {}
        self.taken: set[str] = set()
        self.numbered = -1  # the last number given as a name
        self.aliases: dict[LinearLayout, str] = {}

    def module(self, module: Module) -> str:
        self._alias_layouts(module)
        lines = [f"#{name} = {layout}" for layout, name in ((k, v) for k, v in self.aliases.items())]
        lines.append(f"module{self._attributes(module.attributes)} {{")
        for function in module.functions:
            lines += ["  " + line for line in self.function(function)]
        return "\n".join([*lines, "}"]) + "\n"

    def _alias_layouts(self, module: Module) -> None:
        for op in module.walk():
            blocks = [r.block for r in op.regions]
            for value in [*op.results, *(a for b in blocks for a in b.args)]:
                if isinstance(value.type, TileType) and value.type.layout is not None:
                    self.aliases.setdefault(value.type.layout, f"l{len(self.aliases)}")

    def function(self, function: Function) -> list[str]:
        self.names, self.taken, self.numbered = {}, set(), -1
        params = ", ".join(f"{self._define(p)}: {self.type(p.type)}" for p in function.params)
        head = f"func @{function.name}({params}){self._attributes(function.attributes)}{self._loc(function)} {{"
        return [head, *self._block(function.body.block), "}"]

    def _block(self, block: Block) -> list[str]:
        return ["  " + line for op in block.ops for line in self._operation(op)]

    def _operation(self, op: Operation) -> list[str]:
        head, regions = self._head(op), self._regions(op)
        if op.results:
            names = ", ".join(self._define(v) for v in op.results)
            head = f"{names} = {head} : {', '.join(self.type(v.type) for v in op.results)}"
        head += self._loc(op)
        if not regions:
            return [head]
        lines = [f"{head} {{"]
        for position, (keyword, block_lines) in enumerate(regions):
            lines += ["} " + keyword + " {"] if position else []
            lines += block_lines
        return [*lines, "}"]

    def _head(self, op: Operation) -> str:
        attributes = {f.name: op.attributes[f.name] for f in op.attribute_fields if f.name in op.attributes}
        for f in op.attribute_fields:
            if not f.required and f.name in attributes and _same(attributes[f.name], f.default):
                del attributes[f.name]
        if isinstance(op, For):
            lo, hi, step = (self.name(v) for v in (op.lo, op.hi, op.step))
            text = f"{op.name} {self._define(op.index)} = {lo} to {hi} step {step}"
            return text + self._carried(op.carried, op.inits) + self._attributes(attributes)
        if isinstance(op, While):
            return op.name + self._carried(op.condition.block.args, op.inits) + self._attributes(attributes)
        if isinstance(op, Role):
            kind = attributes.pop("kind")
            return f"{op.name} @{kind}{self._attributes(attributes)}"
        return op.name + self._operands(op) + self._attributes(attributes)

    def _operands(self, op: Operation) -> str:
        parts = []
        for f, group in zip(op.operand_fields, op.groups, strict=True):
            names = ", ".join(self.name(v) for v in group)
            if f.kind == "operand":
                parts.append(names)
            elif f.kind == "operands":
                parts.append(f"[{names}]")
            elif group:  # optional, named
                parts.append(f"{f.name}({names})")
        return " " + ", ".join(parts) if parts else ""

    def _carried(self, args: list[Value], inits: list[Value]) -> str:
        if not args:
            return ""
        pairs = (f"{self._define(a)} = {self.name(i)}" for a, i in zip(args, inits, strict=True))
        return " iter(" + ", ".join(pairs) + ")"

    def _regions(self, op: Operation) -> list[tuple[str, list[str]]]:
        if isinstance(op, If):
            return [("", self._block(op.then_body.block)), ("else", self._block(op.else_body.block))]
        if isinstance(op, While):
            condition = self._block(op.condition.block)
            names = ", ".join(self._define(a) for a in op.body.block.args)
            return [("", condition), (f"do({names})", self._block(op.body.block))]
        return [("", self._block(r.block)) for r in op.regions]

    # --- names, types, attributes -------------------------------------------------------------

    def _define(self, value: Value) -> str:
        if value not in self.names:
            hint = "" if value.hint.isdigit() else _NOT_NAME.sub("_", value.hint)
            name, n = hint or str(self._next_number()), 0
            while name in self.taken:
                n += 1
                name = f"{hint}_{n}"
            self.taken.add(name)
            self.names[value] = name
        return "%" + self.names[value]

    def _next_number(self) -> int:
        self.numbered += 1
        while str(self.numbered) in self.taken:
            self.numbered += 1
        return self.numbered

    def name(self, value: Value) -> str:
        """The name of a use; a value that is not defined above prints as %<undefined>."""
        return "%" + self.names.get(value, "<undefined>")

    def type(self, type_: Type) -> str:
        if isinstance(type_, TileType) and type_.layout in self.aliases:
            return str(type_.with_layout(None))[:-1] + f", #{self.aliases[type_.layout]}>"
        return str(type_)

    def _attributes(self, attributes: dict[str, Any]) -> str:
        if not attributes:
            return ""
        return " {" + ", ".join(f"{k} = {attribute_text(v)}" for k, v in attributes.items()) + "}"

    def _loc(self, op: Operation | Function) -> str:
        return f" loc({_place(op.loc)})" if self.locations and op.loc != UNKNOWN else ""


def attribute_text(value: Any) -> str:
    """The text of an attribute value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return '"' + value.translate(_ESCAPES) + '"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(attribute_text(v) for v in value) + "]"
    if isinstance(value, int | DType | LinearLayout | SharedLayout | SlotType):
        return str(value)
    raise TypeError(f"no text form for attribute {value!r}")


def _place(loc: Location) -> str:
    here = f"{attribute_text(loc.file)}:{loc.line}:{loc.column}"
    return here if loc.caller is None else f"{here} at {_place(loc.caller)}"


def _float(value: float) -> str:
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if math.isnan(value):
        return "nan"
    text = repr(value)
    return text if any(c in text for c in ".e") else text + ".0"


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


__all__ = ["attribute_text", "print_function", "print_module"]
