"""PTX text -> statements: a tokenizer and a recursive-descent parser (PTX ISA chapters 4 "Syntax" and 5).

Names are not resolved here but for scopes: registers, labels and variables of nested ``{}`` blocks
get names of their own, so that the body of a kernel comes out flat.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tilewright.runtime.emulator.errors import DecodeError

_TOKEN = re.compile(
    r'(?P<space>[ \t\r]+)|(?P<newline>\n)|(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<string>"(?:\\.|[^"\\])*")'
    r"|(?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?"
    r"|\d+\.\d*(?:[eE][+-]?\d+)?|\d+(?:[eE][+-]?\d+)?U?)"
    r"|(?P<word>[A-Za-z_$%.][\w$%.]*(?:::[\w.]+)*)|(?P<mark>[\[\]{}()<>,;:@!|+\-=])",
    re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    """``kind`` is string, number, word or mark; ``at`` is the offset in the text, ``line`` counts from 1."""

    kind: str
    text: str
    line: int
    at: int


# --- operands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A register, special register, variable or label, plus a byte offset for variables; ``_`` is the sink."""

    text: str
    offset: int = 0


@dataclass(frozen=True)
class Number:
    """An immediate: an int, or a float whose exact bits ``0f`` and ``0d`` gave."""

    value: int | float


@dataclass(frozen=True)
class Group:
    """``{a, b, ...}``, or ``(a, b)`` of a call."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Memory:
    """``[base + offset]``; ``extra`` holds what follows a comma: a tensor's coordinates."""

    base: Operand
    offset: int = 0
    extra: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Pair:
    """``a|b``: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """``!p``"""

    operand: Operand


Operand = Name | Number | Group | Memory | Pair | Negated


# --- statements -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """One instruction as written. ``guard``: (predicate's name, negated). ``used_bytes``: the pragma of a load."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str
    line: int
    #: (file number, line, column) of the last ``.loc``
    location: tuple[int, int, int] | None
    #: a bit for each loaded byte that matters, where not all do
    used_bytes: int | None = None


@dataclass(frozen=True)
class Variable:
    """A variable: bytes in a state space. ``initial`` has one entry per element: a number or a symbol."""

    name: str
    space: str
    size: int
    align: int
    element: str
    initial: tuple[int | float | str, ...] = ()
    #: declared without a size: dynamic shared memory
    unsized: bool = False


@dataclass
class Entry:
    """A kernel. ``registers``: (name, type); ``labels`` index ``statements``."""

    name: str
    params: list[Variable] = field(default_factory=list)
    directives: dict[str, list[int]] = field(default_factory=dict)
    registers: list[tuple[str, str]] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Text:
    """A module: its variables by name, its entries, the declared functions and the source files."""

    target: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)


SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def type_bytes(name: str) -> int:
    """Bytes of an element of type ``u32``, ``b8``, ... (no dot)."""
    return SIZES[name.lstrip("busf")] if name != "pred" else 1


class Parser:
    """Parses one text. Errors are DecodeErrors with the line."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.tokens = list(self._tokenize())
        self.position = 0
        self.module = Text()

    def _tokenize(self) -> Iterator[Token]:
        line, at = 1, 0
        source = self.source
        while at < len(source):
            match = _TOKEN.match(source, at)
            if match is None:
                raise DecodeError(f"line {line}: cannot read {source[at : at + 20]!r}")
            kind, text = match.lastgroup or "", match[0]
            if kind not in ("space", "newline", "comment"):
                yield Token(kind, text, line, at)
            if kind in ("newline", "comment"):
                line += text.count("\n")
            at = match.end()

    # ---- tokens ----------------------------------------------------------------------------------

    def _peek(self, ahead: int = 0) -> Token:
        if self.position + ahead < len(self.tokens):
            return self.tokens[self.position + ahead]
        return Token("end", "", self.tokens[-1].line if self.tokens else 1, len(self.source))

    def _next(self) -> Token:
        token = self._peek()
        self.position += 1
        return token

    def _accept(self, text: str) -> bool:
        if self._peek().text == text and self._peek().kind != "string":
            self.position += 1
            return True
        return False

    def _expect(self, text: str) -> Token:
        token = self._next()
        if token.text != text:
            raise DecodeError(f"line {token.line}: expected {text!r}, found {token.text!r}")
        return token

    def _rest_of_line(self, line: int) -> list[Token]:
        tokens = []
        while self._peek().line == line and self._peek().kind != "end":
            tokens.append(self._next())
        return tokens

    # ---- module ----------------------------------------------------------------------------------

    def parse(self) -> Text:
        """The whole module."""
        while self._peek().kind != "end":
            token = self._next()
            if token.text in (".version", ".target", ".address_size", ".file"):
                rest = self._rest_of_line(token.line)
                if token.text == ".target":
                    self.module.target = rest[0].text
                elif token.text == ".file":
                    self.module.files[int(rest[0].text)] = rest[1].text.strip('"')
            elif token.text in (".visible", ".extern", ".weak", ".common", ".alias", ";"):
                continue
            elif token.text == ".entry":
                self._entry()
            elif token.text == ".func":
                self._function()
            elif token.text == ".section":
                self._skip_block()
            elif token.text in (".global", ".const", ".shared"):
                variable = self._variable(token.text[1:])
                self.module.variables[variable.name] = variable
            elif token.text == ".pragma":
                self._skip_to(";")
            else:
                raise DecodeError(f"line {token.line}: unknown directive {token.text!r}")
        return self.module

    def _skip_to(self, text: str) -> None:
        while self._next().text != text:
            if self._peek().kind == "end":
                raise DecodeError(f"no {text!r} before the end of the text")

    def _skip_block(self) -> None:
        self._skip_to("{")
        depth = 1
        while depth:
            token = self._next()
            depth += {"{": 1, "}": -1}.get(token.text, 0)
            if token.kind == "end":
                raise DecodeError("a block does not end")

    def _function(self) -> None:
        """Declarations are skipped, and so are definitions: a call of one is an error at the call."""
        while True:
            token = self._peek()
            if token.text == ";":
                self._next()
                return
            if token.text == "{":
                self._skip_block()
                return
            if token.kind == "end":
                raise DecodeError(f"line {token.line}: a .func does not end")
            self._next()

    def _variable(self, space: str) -> Variable:
        """After the state space: attributes, type, name, extents, initialiser, semicolon."""
        align, element, vector = 0, "", 1
        while self._peek().text.startswith("."):
            word = self._next()
            if word.text == ".align":
                align = int(self._next().text, 0)
            elif word.text in (".v2", ".v4"):
                vector = int(word.text[2])
            elif word.text == ".attribute":
                self._skip_to(")")
            elif word.text == ".ptr":  # .ptr .global .align 16: what a parameter points to
                while self._peek().text.startswith("."):
                    if self._next().text == ".align":
                        self._next()
            else:
                element = word.text[1:]
        name = self._next()
        if element.lstrip("busf") not in SIZES:
            raise DecodeError(f"line {name.line}: variable {name.text} has the unknown type {element!r}")
        count, unsized = 1, False
        while self._accept("["):
            if self._accept("]"):
                unsized = True
            else:
                count *= int(self._next().text, 0)
                self._expect("]")
        initial: tuple[int | float | str, ...] = ()
        if self._accept("="):
            initial = self._initializer()
        self._accept(";")
        size = type_bytes(element) * vector
        if unsized and initial:
            count, unsized = len(initial), False
        return Variable(name.text, space, 0 if unsized else size * count, align or size, element, initial, unsized)

    def _initializer(self) -> tuple[int | float | str, ...]:
        if not self._accept("{"):
            operand = self._operand()
            return (operand.value if isinstance(operand, Number) else self._symbol(operand),)
        values: list[int | float | str] = []
        while not self._accept("}"):
            if self._peek().text == "{":
                values += self._initializer()
            else:
                operand = self._operand()
                values.append(operand.value if isinstance(operand, Number) else self._symbol(operand))
            self._accept(",")
        return tuple(values)

    def _symbol(self, operand: Operand) -> str:
        if not isinstance(operand, Name) or operand.offset:
            raise DecodeError(f"line {self._peek().line}: initialiser {operand} is not implemented")
        return operand.text

    # ---- entries ---------------------------------------------------------------------------------

    def _entry(self) -> None:
        entry = Entry(self._next().text)
        if self._accept("("):
            while not self._accept(")"):
                self._expect(".param")
                entry.params.append(self._variable("param"))
                self._accept(",")
        while self._peek().text.startswith("."):
            directive = self._next()
            numbers = []
            while self._peek().kind == "number" or self._peek().text == ",":
                token = self._next()
                if token.kind == "number":
                    numbers.append(int(token.text, 0))
            entry.directives[directive.text[1:]] = numbers
        self._expect("{")
        _Body(self, entry).parse()
        self.module.entries[entry.name] = entry

    # ---- operands --------------------------------------------------------------------------------

    def _operand(self) -> Operand:
        token = self._peek()
        if token.text == "!":
            self._next()
            return Negated(self._operand())
        if token.text in ("{", "("):
            return self._group()
        if token.text == "[":
            return self._memory()
        if token.text == "-" or token.kind == "number":
            return Number(self._number())
        if token.kind != "word":
            raise DecodeError(f"line {token.line}: an operand cannot start with {token.text!r}")
        self._next()
        operand: Operand = Name(token.text, self._offset())
        if self._accept("|"):
            return Pair(operand, self._operand())
        return operand

    def _offset(self) -> int:
        total = 0
        while self._peek().text in ("+", "-"):
            if self._accept("+"):
                total += int(self._number())
            else:
                total += int(self._number())  # the minus sign belongs to the number
        return total

    def _number(self) -> int | float:
        negative = False
        while self._accept("-"):
            negative = not negative
        token = self._next()
        if token.kind != "number":
            raise DecodeError(f"line {token.line}: expected a number, found {token.text!r}")
        value = parse_number(token.text)
        return -value if negative else value

    def _group(self) -> Group:
        close = {"{": "}", "(": ")"}[self._next().text]
        parts = []
        while not self._accept(close):
            parts.append(self._operand())
            self._accept(",")
        return Group(tuple(parts))

    def _memory(self) -> Memory:
        self._expect("[")
        base = self._operand()
        offset = 0
        if isinstance(base, Name):
            base, offset = Name(base.text), base.offset
        extra = []
        while self._accept(","):
            extra.append(self._operand())
        self._expect("]")
        return Memory(base, offset, tuple(extra))


class _Body:
    """Parses the body of an entry, giving names of inner scopes a suffix."""

    def __init__(self, parser: Parser, entry: Entry) -> None:
        self.parser, self.entry = parser, entry
        self.scopes: list[dict[str, str]] = [{}]
        self.location: tuple[int, int, int] | None = None
        self.used_bytes: int | None = None
        self.count = 0
        #: labels are seen after their uses: (scope chain) per statement
        self.chains: list[list[dict[str, str]]] = []

    def parse(self) -> None:
        parser = self.parser
        while self.scopes:
            token = parser._peek()
            if token.text == "{":
                parser._next()
                self.scopes = [*self.scopes, {}]
            elif token.text == "}":
                parser._next()
                self.scopes = self.scopes[:-1]
            elif token.kind == "end":
                raise DecodeError(f"the body of {self.entry.name} does not end")
            elif token.text.startswith("."):
                self._directive()
            elif token.kind == "word" and parser._peek(1).text == ":":
                parser._next()
                parser._next()
                self.entry.labels[self._declare(token.text)] = len(self.entry.statements)
            else:
                self._statement()
        self._rename()

    def _declare(self, name: str) -> str:
        unique = name
        if len(self.scopes) > 1:
            self.count += 1
            unique = f"{name}#{self.count}"
        self.scopes[-1][name] = unique
        return unique

    def _directive(self) -> None:
        parser = self.parser
        token = parser._next()
        if token.text == ".loc":
            numbers = [t for t in parser._rest_of_line(token.line) if t.kind == "number"]
            file, line, column = (int(t.text) for t in numbers[:3])
            self.location = (file, line, column)
        elif token.text == ".reg":
            self._registers()
        elif token.text in (".shared", ".local", ".param", ".const", ".global"):
            variable = parser._variable(token.text[1:])
            unique = self._declare(variable.name)
            space = "local" if variable.space == "param" else variable.space
            self.entry.variables.append(
                Variable(unique, space, variable.size, variable.align, variable.element, variable.initial)
            )
        elif token.text == ".pragma":
            self._pragma()
        elif token.text in (".branchtargets", ".callprototype", ".calltargets"):
            parser._skip_to(";")
        else:
            raise DecodeError(f"line {token.line}: unknown directive {token.text!r}")

    def _pragma(self) -> None:
        """Chapter 12: ``used_bytes_mask`` speaks of the load behind it; others tune the assembler."""
        parser = self.parser
        while (token := parser._next()).text != ";":
            words = token.text.strip('"').split()
            if len(words) == 2 and words[0] == "used_bytes_mask":
                self.used_bytes = int(words[1], 0)

    def _registers(self) -> None:
        parser = self.parser
        element = ""
        while parser._peek().text.startswith("."):
            element = parser._next().text[1:]
        while not parser._accept(";"):
            name = parser._next().text
            if parser._accept("<"):
                count = int(parser._next().text, 0)
                parser._expect(">")
                for index in range(count):
                    self.entry.registers.append((self._declare(f"{name}{index}"), element))
            else:
                self.entry.registers.append((self._declare(name), element))
            parser._accept(",")

    def _statement(self) -> None:
        parser = self.parser
        start = parser._peek()
        guard = None
        if parser._accept("@"):
            negated = parser._accept("!")
            guard = (parser._next().text, negated)
        opcode = parser._next()
        if opcode.kind != "word":
            raise DecodeError(f"line {opcode.line}: expected an instruction, found {opcode.text!r}")
        operands = []
        while parser._peek().text != ";":
            operands.append(parser._operand())
            if not parser._accept(",") and parser._peek().text != ";":
                token = parser._peek()
                raise DecodeError(f"line {token.line}: expected ',' or ';', found {token.text!r}")
        end = parser._expect(";")
        text = " ".join(parser.source[start.at : end.at + 1].split())
        self.entry.statements.append(
            Statement(opcode.text, tuple(operands), guard, text, opcode.line, self.location, self.used_bytes)
        )
        self.used_bytes = None
        self.chains.append(self.scopes)

    def _rename(self) -> None:
        """Replace names by those of their scope."""
        for index, (statement, chain) in enumerate(zip(self.entry.statements, self.chains, strict=True)):
            if len(chain) == 1:
                continue
            guard = statement.guard and (_lookup(chain, statement.guard[0]), statement.guard[1])
            operands = tuple(_renamed(operand, chain) for operand in statement.operands)
            self.entry.statements[index] = replace(statement, operands=operands, guard=guard)


def _lookup(chain: list[dict[str, str]], name: str) -> str:
    for scope in reversed(chain):
        if name in scope:
            return scope[name]
    return name


def _renamed(operand: Operand, chain: list[dict[str, str]]) -> Operand:
    if isinstance(operand, Name):
        return Name(_lookup(chain, operand.text), operand.offset)
    if isinstance(operand, Group):
        return Group(tuple(_renamed(part, chain) for part in operand.parts))
    if isinstance(operand, Memory):
        extra = tuple(_renamed(part, chain) for part in operand.extra)
        return Memory(_renamed(operand.base, chain), operand.offset, extra)
    if isinstance(operand, Pair):
        return Pair(_renamed(operand.first, chain), _renamed(operand.second, chain))
    if isinstance(operand, Negated):
        return Negated(_renamed(operand.operand, chain))
    return operand


def parse_number(text: str) -> int | float:
    """A PTX literal (chapter 4.5): ``0f`` and ``0d`` give the bits of a float."""
    lowered = text.lower()
    if lowered.startswith("0f") and len(text) == 10:
        return Single(struct.unpack(">f", bytes.fromhex(text[2:]))[0], int(text[2:], 16))
    if lowered.startswith("0d") and len(text) == 18:
        return float(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    digits = text.rstrip("uU")
    if lowered.startswith(("0x", "0b")):
        return int(digits, 0)
    if "." in text or "e" in lowered:
        return float(text)
    return int(digits, 8) if len(digits) > 1 and digits.startswith("0") else int(digits)


class Single(float):
    """A float given by the 32 bits of a float32, which a NaN would not keep."""

    bits: int

    def __new__(cls, value: float, bits: int) -> Single:
        made = super().__new__(cls, value)
        made.bits = bits
        return made


def parse_text(text: str) -> Text:
    """Parse a PTX module. DecodeError with the line where it cannot be read."""
    return Parser(text).parse()
