"""The lowering context: what every operation's lowering sees, and the table of lowerings.

A lowering is a small function ``(Lowering, Operation) -> None`` registered with `lowers`. It reads its operands
with `Lowering.registers`, `scalar`, `view`, `slot` and gives its results to `Lowering.define`. What a value lowers to:

========================  ==================================================================================
type                      lowered to
========================  ==================================================================================
scalar                    one MLIR value, the same in all threads
tile                      a list of MLIR values, one per register of its layout (`TileType.layout`)
view                      `ViewRef`
buffer, slot              `BufferRef`, `SlotRef`
token                     `TokenRef`
ring                      whatever the backend defines (`Lowering.define` and `Lowering.lowered` take any object)
========================  ==================================================================================

A backend extends or overrides the shared `LOWERINGS` with its own table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Any, TypeVar

from tilewright.backends.errors import BackendError
from tilewright.backends.lower.index import IndexMath, IntLike
from tilewright.backends.mlir_builder import FunctionBuilder
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.core import UNKNOWN, Block, Function, IRError, Operation, Value
from tilewright.ir.layout import LinearLayout, SharedLayout
from tilewright.ir.target import Target
from tilewright.ir.types import DType, ScalarType, SlotType, TileType, TokenType

if TYPE_CHECKING:
    from tilewright.backends.lower.entry import KernelEntry
    from tilewright.backends.lower.target_ops import TargetOps

Registers = list[mlir.Value]
Handler = Callable[["Lowering", Any], None]
Table = dict[type[Operation], Handler]
Ref = TypeVar("Ref")

#: the shared lowerings; filled by the modules of this package, see `lowers`
LOWERINGS: Table = {}


def lowers(*classes: type[Operation], table: Table = LOWERINGS) -> Callable[[Handler], Handler]:
    """Register a function as the lowering of operation classes, in the shared table or a backend's own."""

    def register(handler: Handler) -> Handler:
        for cls in classes:
            table[cls] = handler
        return handler

    return register


# --- what values lower to -----------------------------------------------------------------------


@dataclass(frozen=True)
class ViewRef:
    """A strided window into a tensor parameter.

    The element at coordinates c of the view lies at ``base + (offset + sum((origin[i] + c[i]) * strides[i]))``
    elements, and is inside when ``0 <= origin[i] + c[i] < shape[i]`` for every i.
    Sizes and origins are Python ints or i32 values; strides and offset are Python ints or i64 values.
    """

    base: mlir.Value  # !llvm.ptr<1>, element 0 of the root tensor
    dtype: DType
    shape: tuple[IntLike, ...]
    strides: tuple[IntLike, ...]
    offset: IntLike = 0
    origin: tuple[IntLike, ...] = ()
    #: bytes that divide the address of the view's element 0 (origin included), and every run-time stride
    align: int = 1
    stride_align: int = 1
    #: the kernel parameter, and which of its dims each dim of the view is
    root: str = ""
    root_dims: tuple[int, ...] = ()
    #: dims of the root that `tile.subview` fixed, with their index (int or i32)
    fixed: Mapping[int, IntLike] = field(default_factory=dict)
    #: of a symmetric tensor: where the address of each rank's lies (!llvm.ptr<1>)
    table: mlir.Value | None = None
    #: the rank whose tensor this is (i32); None for the own one
    peer: mlir.Value | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class SlotRef:
    """One tile in shared memory; ``base`` is its byte address (int or i32, address space 3)."""

    base: IntLike
    type: SlotType

    @property
    def layout(self) -> SharedLayout:
        return self.type.layout

    @property
    def dtype(self) -> DType:
        return self.type.dtype


@dataclass(frozen=True)
class BufferRef:
    """``stages`` slots; ``base`` is the byte address of the first (int or i32, address space 3)."""

    base: IntLike
    slot: SlotType
    stages: int


@dataclass(frozen=True)
class TokenRef:
    """A token: what completes the work. Waits count groups, so nothing of it exists at run time."""

    kind: str


@dataclass(frozen=True)
class ThreadScope:
    """The threads that run the current code: the whole block or one role. Values are i32."""

    first_warp: int
    num_warps: int
    thread: mlir.Value  # index in the scope
    lane: mlir.Value
    warp: mlir.Value  # index in the scope
    #: hardware barrier of the scope; 0 is the whole block's
    barrier_id: int = 0
    single_thread: bool = False

    def num_threads(self, warp_size: int) -> int:
        return self.num_warps * warp_size


# --- the context ----------------------------------------------------------------------------------


class Lowering:
    """State of lowering one function. ``fb`` appends MLIR operations to the function being built."""

    def __init__(
        self,
        function: Function,
        target: Target,
        ops: TargetOps,
        entry: KernelEntry,
        table: Mapping[type[Operation], Handler],
    ):
        self.function, self.target, self.ops, self.entry = function, target, ops, entry
        self.fb: FunctionBuilder = entry.fb
        self.table = table
        self.index = IndexMath(self.fb)
        self.current: Operation | None = None
        self._values: dict[Value, Any] = {}
        self._scope: ThreadScope | None = None
        #: what is known to divide run-time integers
        self._multiples: dict[mlir.Value, int] = {}
        #: free for a backend's own bookkeeping
        self.backend: Any = None

    # --- values -------------------------------------------------------------------------------

    def define(self, value: Value, lowered: Any) -> None:
        """Record what a value lowers to (see the module's table). Tiles are checked for their register count."""
        if isinstance(value.type, TileType):
            expected = self.layout(value).num_registers
            if len(lowered) != expected:
                raise self.error(f"lowered to {len(lowered)} registers, the layout has {expected}")
            lowered = list(lowered)
        self._values[value] = lowered

    def lowered(self, value: Value) -> Any:
        """What `define` recorded."""
        try:
            return self._values[value]
        except KeyError:
            raise self.error(f"uses {value}, which has not been lowered") from None

    def registers(self, value: Value) -> Registers:
        """A tile's registers; a scalar as a list of one."""
        lowered = self.lowered(value)
        return lowered if isinstance(lowered, list) else [lowered]

    def scalar(self, value: Value) -> mlir.Value:
        return self._expect(value, mlir.Value)

    def view(self, value: Value) -> ViewRef:
        return self._expect(value, ViewRef)

    def slot(self, value: Value) -> SlotRef:
        return self._expect(value, SlotRef)

    def buffer(self, value: Value) -> BufferRef:
        return self._expect(value, BufferRef)

    def _expect(self, value: Value, kind: type[Ref]) -> Ref:
        lowered = self.lowered(value)
        if not isinstance(lowered, kind):
            raise self.error(f"{value} lowered to {type(lowered).__name__}, expected {kind.__name__}")
        return lowered

    def layout(self, value: Value) -> LinearLayout:
        """The layout of a tile value; an error where the layout pass left none."""
        type_ = value.type
        if not isinstance(type_, TileType) or type_.layout is None:
            raise self.error(f"{value} has no layout: the layout pass must run before lowering")
        return type_.layout

    # --- what the user promised -----------------------------------------------------------------

    def assume_multiple(self, value: mlir.Value, divisor: int) -> None:
        """From here on ``divisor`` is known to divide an integer."""
        self._multiples[value] = lcm(self._multiples.get(value, 1), divisor)

    def is_multiple(self, value: IntLike, divisor: int) -> bool:
        """Whether ``divisor`` is known to divide a number."""
        known = value if isinstance(value, int) else self._multiples.get(value, 1)
        return known % divisor == 0

    # --- threads ------------------------------------------------------------------------------

    @property
    def scope(self) -> ThreadScope:
        if self._scope is None:
            raise self.error("no thread scope has been entered")
        return self._scope

    @contextmanager
    def in_scope(
        self, first_warp: int, num_warps: int, barrier_id: int = 0, single_thread: bool = False
    ) -> Iterator[ThreadScope]:
        """Lower for ``num_warps`` warps from ``first_warp``: thread, lane and warp are computed here, once."""
        thread = self.ops.thread_id(self)
        if first_warp:
            thread = self.fb.sub(thread, self.fb.i32(first_warp * self.target.warp_size))
        lane = self.fb.and_(thread, self.fb.i32(self.target.warp_size - 1))
        warp = self.fb.i32(0) if num_warps == 1 or single_thread else self.ops.warp_index(self, thread)
        with self.as_scope(ThreadScope(first_warp, num_warps, thread, lane, warp, barrier_id, single_thread)) as scope:
            yield scope

    @contextmanager
    def as_scope(self, scope: ThreadScope) -> Iterator[ThreadScope]:
        """Lower with these threads for the length of a ``with``."""
        saved, self._scope = self._scope, scope
        try:
            yield scope
        finally:
            self._scope = saved

    # --- operations ---------------------------------------------------------------------------

    def lower_block(self, block: Block) -> None:
        """Lower a block's operations, without its terminator: the caller asks `yielded` for its operands."""
        for op in block.ops:
            if not op.terminator:
                self.lower(op)

    def yielded(self, block: Block) -> list[Value]:
        """The operands of a block's terminator (none without one)."""
        return block.terminator.operands if block.terminator is not None else []

    def lower(self, op: Operation) -> None:
        """Lower one operation; MLIR operations get its source location, and errors too."""
        handler = self.table.get(type(op))
        previous, self.current = self.current, op
        try:
            if handler is None:
                raise self.error(f"no lowering for {self.target.name}")
            self._locate(op)
            handler(self, op)
        except (IRError, BackendError):
            raise
        except ValueError as error:
            raise self.error(str(error)) from error
        finally:
            self.current = previous
            self._locate(previous)

    def _locate(self, op: Operation | None) -> None:
        """MLIR operations from here on carry the location of ``op``."""
        if op is None or op.loc == UNKNOWN:
            self.fb.set_location(None)
        else:
            self.fb.set_location(op.loc.file, op.loc.line, op.loc.column)

    def error(self, message: str, hint: str = "") -> IRError:
        """An `IRError` at the current operation (to be raised by the caller)."""
        if self.current is None:
            return IRError(message, self.function.loc, hint)
        return IRError(f"'{self.current.name}': {message}", self.current.loc, hint)

    # --- flattening, for control flow ---------------------------------------------------------

    def register_types(self, value: Value) -> list[Any]:
        """The MLIR types of a value that control flow carries: one per register or pair, none for a token."""
        type_ = value.type
        if isinstance(type_, TileType):
            element, count = self.fb.types.dtype(type_.dtype.name), self.layout(value).num_registers
            return [self.fb.types.vec(2, element)] * (count // 2) if self._in_pairs(type_) else [element] * count
        if isinstance(type_, ScalarType):
            return [self.fb.types.dtype(type_.dtype.name)]
        if isinstance(type_, SlotType):
            return [self.fb.types.i32]
        if isinstance(type_, TokenType):
            return []
        raise self.error(f"control flow cannot carry {value}")

    def _in_pairs(self, type_: TileType) -> bool:
        """16-bit elements travel in pairs, a hardware register each, so that conversions of two stay whole."""
        assert type_.layout is not None
        return type_.dtype.bits == 16 and type_.layout.num_registers % 2 == 0

    def flatten(self, values: Sequence[Value]) -> list[mlir.Value]:
        """All MLIR values behind scalars, tiles and slots, in order."""
        flat: list[mlir.Value] = []
        for value in values:
            lowered = self.lowered(value)
            if isinstance(lowered, SlotRef):
                flat.append(self.index.value(lowered.base))
            elif isinstance(value.type, TileType) and self._in_pairs(value.type):
                registers = self.registers(value)
                flat += [self.fb.pack_vector(pair) for pair in zip(registers[::2], registers[1::2], strict=True)]
            elif not isinstance(lowered, TokenRef):
                flat += self.registers(value)
        return flat

    def define_flat(self, values: Sequence[Value], flat: Sequence[mlir.Value]) -> None:
        """The inverse of `flatten`: define values from a flat list."""
        position = 0
        for value in values:
            count = len(self.register_types(value))
            self._define_part(value, list(flat[position : position + count]))
            position += count
        if position != len(flat):
            raise self.error(f"{len(flat)} values for {position} registers")

    def _define_part(self, value: Value, part: Registers) -> None:
        type_ = value.type
        if isinstance(type_, TileType) and self._in_pairs(type_):
            self.define(value, [element for pair in part for element in self.fb.unpack_vector(pair)])
        elif isinstance(type_, TileType):
            self.define(value, part)
        elif isinstance(type_, SlotType):
            self.define(value, SlotRef(part[0], type_))
        elif isinstance(type_, TokenType):
            self.define(value, TokenRef(type_.kind))
        else:
            self.define(value, part[0])
