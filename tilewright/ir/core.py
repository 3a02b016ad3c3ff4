"""Values, operations, regions, functions and modules of the Tile IR.

An operation class declares its operands, attributes and regions with the field functions below;
construction, printing, parsing, cloning and verification all read that declaration::

    @operation("tile.load", effect=Effect.READ)
    class Load(Operation):
        view: Value = operand()
        index: list[Value] = operands()
        pad: float = attribute(default=0.0)

Control flow is structured: a region holds one block, and the last operation of a block that
passes values on is a terminator (``tile.yield``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, ClassVar

from tilewright.ir.types import Type


@dataclass(frozen=True)
class Location:
    """A place in the user's source; ``caller`` is where the enclosing helper was called from."""

    file: str = "<unknown>"
    line: int = 0
    column: int = 0
    caller: Location | None = None

    def __str__(self) -> str:
        here = f'"{self.file}":{self.line}:{self.column}'
        return here if self.caller is None else f"{here} at {self.caller}"


UNKNOWN = Location()


class IRError(Exception):
    """The IR breaks one of its rules. Carries the source location of the operation."""

    def __init__(self, message: str, loc: Location = UNKNOWN, hint: str = ""):
        self.message, self.loc, self.hint = message, loc, hint
        place = "" if loc == UNKNOWN else f"{loc.file}:{loc.line}:{loc.column}: "
        super().__init__(place + message + (f"\n  hint: {hint}" if hint else ""))


class Effect(Flag):
    """What an operation does besides computing its results."""

    PURE = 0
    READ = auto()  # reads global or shared memory
    WRITE = auto()  # writes global or shared memory
    SYNC = auto()  # orders other operations: barriers, waits, asynchronous issue
    CHECK = auto()  # tells the user or the compiler something about values: stays where it stands


class Value:
    """The single definition of a value. ``owner`` is the defining operation or block."""

    __slots__ = ("hint", "owner", "type")

    def __init__(self, type_: Type, owner: Operation | Block | None = None, hint: str = ""):
        self.type, self.owner, self.hint = type_, owner, hint

    @property
    def op(self) -> Operation | None:
        """The defining operation, None for block arguments and parameters."""
        return self.owner if isinstance(self.owner, Operation) else None

    def __repr__(self) -> str:
        return f"<%{self.hint or '?'} : {self.type}>"


# --- declarations ---------------------------------------------------------------------------

_REQUIRED: Any = object()


@dataclass
class Field:
    """One declared operand group, attribute or region of an operation class."""

    kind: str  # "operand", "operands", "named", "optional", "attribute", "region"
    default: Any = _REQUIRED
    name: str = ""
    position: int = 0

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, op: Operation | None, owner: type) -> Any:
        if op is None:
            return self
        if self.kind == "attribute":
            return op.attributes.get(self.name, None if self.required else self.default)
        if self.kind == "region":
            return op.regions[self.position] if self.position < len(op.regions) else None
        group = op.groups[self.position]
        if self.kind in ("operands", "named"):
            return group
        return group[0] if group else None

    def __set__(self, op: Operation, value: Any) -> None:
        if self.kind == "attribute":
            op.attributes[self.name] = value
        elif self.kind == "region":
            op.regions[self.position] = value
            value.parent = op
        elif self.kind in ("operands", "named"):
            op.groups[self.position] = list(value)
        else:
            op.groups[self.position] = [] if value is None else [value]


def operand() -> Any:
    """Exactly one operand, printed ``%x``."""
    return Field("operand")


def operands() -> Any:
    """Any number of operands, printed ``[%x, %y]``."""
    return Field("operands")


def named_operands() -> Any:
    """Any number of operands, printed ``name(%x, %y)``, or not at all where there are none."""
    return Field("named")


def optional() -> Any:
    """One operand or none, printed ``name(%x)``."""
    return Field("optional")


def attribute(default: Any = _REQUIRED) -> Any:
    """A compile-time value; printed unless it equals its default."""
    return Field("attribute", default)


def region() -> Any:
    """A nested region of one block."""
    return Field("region")


#: mnemonic -> (class, fn); ``fn`` is set for families such as tile.add, tile.mul
REGISTRY: dict[str, tuple[type[Operation], str | None]] = {}


def operation(
    name: str, effect: Effect = Effect.PURE, terminator: bool = False, family: Sequence[str] = ()
) -> Callable[[type[Operation]], type[Operation]]:
    """Register an operation class. With ``family``, one mnemonic ``<name>.<fn>`` per function."""

    def register(cls: type[Operation]) -> type[Operation]:
        cls.base_name, cls.effect, cls.terminator = name, effect, terminator
        fields = [f for c in reversed(cls.__mro__) for f in vars(c).values() if isinstance(f, Field)]
        cls.operand_fields = [f for f in fields if f.kind in ("operand", "operands", "named", "optional")]
        cls.attribute_fields = [f for f in fields if f.kind == "attribute" and not (family and f.name == "fn")]
        cls.region_fields = [f for f in fields if f.kind == "region"]
        for group in (cls.operand_fields, cls.region_fields):
            for position, f in enumerate(group):
                f.position = position
        cls.family = tuple(family)
        for fn in family or (None,):
            REGISTRY[name if fn is None else f"{name}.{fn}"] = (cls, fn)
        return cls

    return register


class Operation:
    """One operation: operand groups, attributes, regions and typed results.

    Positional arguments fill the declared operand groups in order (a value, a list for
    ``operands``, None for an absent ``optional``); keyword arguments are attributes.
    """

    base_name: ClassVar[str] = ""
    effect: ClassVar[Effect] = Effect.PURE
    terminator: ClassVar[bool] = False
    family: ClassVar[tuple[str, ...]] = ()
    operand_fields: ClassVar[list[Field]] = []
    attribute_fields: ClassVar[list[Field]] = []
    region_fields: ClassVar[list[Field]] = []

    def __init__(
        self,
        *groups: Value | Sequence[Value] | None,
        types: Sequence[Type] = (),
        regions: Sequence[Region] = (),
        loc: Location = UNKNOWN,
        hints: Sequence[str] = (),
        **attributes: Any,
    ):
        self.groups: list[list[Value]] = [[] if g is None else [g] if isinstance(g, Value) else list(g) for g in groups]
        while len(self.groups) < len(self.operand_fields):
            self.groups.append([])
        self.attributes: dict[str, Any] = attributes
        self.regions: list[Region] = list(regions)
        for r in self.regions:
            r.parent = self
        self.results = [Value(t, self, hints[i] if i < len(hints) else "") for i, t in enumerate(types)]
        self.loc = loc
        self.parent: Block | None = None

    @property
    def name(self) -> str:
        """The mnemonic, for example ``tile.add``."""
        return f"{self.base_name}.{self.attributes['fn']}" if self.family else self.base_name

    @property
    def operands(self) -> list[Value]:
        """All operands in order, flattened."""
        return [v for group in self.groups for v in group]

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    @property
    def is_pure(self) -> bool:
        """No effect of its own nor in its regions: removable when unused, movable."""
        return not self.effect and all(op.is_pure or op.terminator for r in self.regions for op in r.block.ops)

    def verify(self) -> None:
        """Raise `IRError` where an operation-specific rule is broken; see `tilewright.ir.verifier`."""

    def require(self, condition: bool, message: str) -> None:
        """Raise `IRError` with this operation's name and location unless ``condition`` holds."""
        if not condition:
            raise IRError(f"'{self.name}': {message}", self.loc)

    def replace_operands(self, mapping: dict[Value, Value]) -> None:
        """Substitute operands of this operation (not of operations nested in it)."""
        self.groups = [[mapping.get(v, v) for v in group] for group in self.groups]

    def walk(self) -> Iterator[Operation]:
        """This operation and all nested ones, in program order."""
        yield self
        for r in self.regions:
            yield from r.walk()

    def clone(self, mapping: dict[Value, Value]) -> Operation:
        """A deep copy with operands mapped; ``mapping`` gains the results and block arguments."""
        copy = object.__new__(type(self))
        copy.groups = [[mapping.get(v, v) for v in group] for group in self.groups]
        copy.attributes = dict(self.attributes)
        copy.loc, copy.parent = self.loc, None
        copy.results = [Value(v.type, copy, v.hint) for v in self.results]
        mapping.update(zip(self.results, copy.results, strict=True))
        copy.regions = [r.clone(mapping) for r in self.regions]
        for r in copy.regions:
            r.parent = copy
        return copy

    def __repr__(self) -> str:
        return f"<{self.name} at {self.loc}>"


class Block:
    """Arguments and a list of operations, the last of which may be a terminator."""

    def __init__(self, args: Sequence[tuple[str, Type]] = ()):
        self.args = [Value(t, self, hint) for hint, t in args]
        self.ops: list[Operation] = []
        self.parent: Region | None = None

    def append(self, op: Operation) -> Operation:
        op.parent = self
        self.ops.append(op)
        return op

    def insert(self, position: int, op: Operation) -> Operation:
        op.parent = self
        self.ops.insert(position, op)
        return op

    def set_ops(self, ops: Sequence[Operation]) -> None:
        """Replace all operations."""
        self.ops = list(ops)
        for op in self.ops:
            op.parent = self

    @property
    def terminator(self) -> Operation | None:
        return self.ops[-1] if self.ops and self.ops[-1].terminator else None


class Region:
    """One block owned by an operation or a function."""

    def __init__(self, block: Block | None = None):
        self.block = block or Block()
        self.block.parent = self
        self.parent: Operation | Function | None = None

    def walk(self) -> Iterator[Operation]:
        """All operations in program order, outer before inner."""
        for op in list(self.block.ops):
            yield from op.walk()

    def clone(self, mapping: dict[Value, Value]) -> Region:
        block = Block([(a.hint, a.type) for a in self.block.args])
        mapping.update(zip(self.block.args, block.args, strict=True))
        for op in self.block.ops:
            block.append(op.clone(mapping))
        return Region(block)


@dataclass
class Function:
    """A kernel. Parameters are the arguments of the body's block.

    Attributes set by passes: ``num_warps``, ``threads``, ``persistent``, ``shared_bytes``, ...
    """

    name: str
    body: Region
    attributes: dict[str, Any] = field(default_factory=dict)
    loc: Location = UNKNOWN

    def __post_init__(self) -> None:
        self.body.parent = self

    @property
    def params(self) -> list[Value]:
        return self.body.block.args

    def walk(self) -> Iterator[Operation]:
        return self.body.walk()

    def clone(self) -> Function:
        return Function(self.name, self.body.clone({}), dict(self.attributes), self.loc)


@dataclass
class Module:
    """Functions and module attributes (``target``)."""

    functions: list[Function] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)

    def walk(self) -> Iterator[Operation]:
        for function in self.functions:
            yield from function.walk()

    def clone(self) -> Module:
        return Module([f.clone() for f in self.functions], dict(self.attributes))

    def function(self, name: str) -> Function:
        """The function of that name; KeyError when there is none."""
        for f in self.functions:
            if f.name == name:
                return f
        raise KeyError(name)


def replace_uses(root: Region, mapping: dict[Value, Value]) -> None:
    """Replace every use inside ``root``; chains in ``mapping`` are followed."""

    def final(value: Value) -> Value:
        while value in mapping:
            value = mapping[value]
        return value

    resolved = {v: final(v) for v in mapping}
    for op in root.walk():
        op.replace_operands(resolved)


def uses_of(root: Region) -> dict[Value, list[Operation]]:
    """Map each value to the operations in ``root`` that use it, in program order."""
    uses: dict[Value, list[Operation]] = {}
    for op in root.walk():
        for value in op.operands:
            uses.setdefault(value, []).append(op)
    return uses
