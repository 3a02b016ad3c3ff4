"""Value-semantic operations on tiles, scalars and views of global memory (``tile.*``).

Elementwise operations take scalars or tiles of one shape; broadcasting is explicit
(`Splat`, `ExpandDims`, `Broadcast`). Integer ``floordiv`` and ``mod`` round towards minus
infinity, as Python does.
"""

from __future__ import annotations

from tilewright.ir.core import (
    Effect,
    Operation,
    Region,
    Value,
    attribute,
    named_operands,
    operand,
    operands,
    operation,
    optional,
    region,
)
from tilewright.ir.layout import SharedLayout
from tilewright.ir.types import (
    ScalarType,
    SlotType,
    TileType,
    ViewType,
    element_type,
    i1,
    i32,
    like,
    multipliable,
)

UNARY = (
    "neg", "abs", "not", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf",
    "floor", "ceil",
)  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "floordiv", "mod", "max", "min", "and", "or", "xor", "shl", "shr")
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
REDUCTIONS = ("sum", "max", "min", "prod")
SCANS = ("sum",)
FLOAT_ONLY = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "erf", "floor", "ceil")
INT_ONLY = ("and", "or", "xor", "shl", "shr")


# --- values ---------------------------------------------------------------------------------


@operation("tile.constant")
class Constant(Operation):
    """A scalar, or a tile with ``value`` in every element."""

    value: int | float | bool = attribute()


@operation("tile.iota")
class Iota(Operation):
    """The rank-one integer tile ``start, start + 1, ...``."""

    start: int = attribute(default=0)

    def verify(self) -> None:
        type_ = self.result.type
        self.require(isinstance(type_, TileType) and type_.rank == 1 and type_.dtype.is_int, "makes a rank-1 int tile")


@operation("tile.splat")
class Splat(Operation):
    """A tile with the scalar in every element."""

    source: Value = operand()

    def verify(self) -> None:
        self.require(isinstance(self.source.type, ScalarType), "takes a scalar")
        self.require(isinstance(self.result.type, TileType), "gives a tile")
        self.require(_same_dtype(self.source, self.result), "keeps the dtype")


@operation("tile.expand_dims")
class ExpandDims(Operation):
    """Insert a dimension of size one at ``axis``."""

    source: Value = operand()
    axis: int = attribute()

    def verify(self) -> None:
        shape = _shape(self.source)
        self.require(0 <= self.axis <= len(shape), f"axis {self.axis} is out of range for shape {shape}")
        self.require(_shape(self.result) == (*shape[: self.axis], 1, *shape[self.axis :]), "result shape is wrong")


@operation("tile.broadcast")
class Broadcast(Operation):
    """Repeat dimensions of size one up to the result's shape (same rank)."""

    source: Value = operand()

    def verify(self) -> None:
        pairs = list(zip(_shape(self.source), _shape(self.result), strict=True))
        self.require(all(a in (b, 1) for a, b in pairs), "only dimensions of size 1 broadcast")


@operation("tile.reshape")
class Reshape(Operation):
    """The same elements in row-major order under another shape.

    ``scratch`` (bytes, set by the shared-memory plan) is where threads pass elements on between layouts of which
    neither follows from the other.
    """

    source: Value = operand()
    scratch: int | None = attribute(default=None)

    def verify(self) -> None:
        self.require(tile_of(self.source).size == tile_of(self.result).size, "keeps the number of elements")


@operation("tile.transpose")
class Transpose(Operation):
    """Permute dimensions: result dimension i is source dimension ``perm[i]``."""

    source: Value = operand()
    perm: tuple[int, ...] = attribute()

    def verify(self) -> None:
        shape = _shape(self.source)
        self.require(sorted(self.perm) == list(range(len(shape))), f"{self.perm} is not a permutation")
        self.require(_shape(self.result) == tuple(shape[p] for p in self.perm), "result shape is wrong")


@operation("tile.extract")
class Extract(Operation):
    """The sub-tile that starts at ``offsets``; its size is the result's shape."""

    source: Value = operand()
    offsets: tuple[int, ...] = attribute()

    def verify(self) -> None:
        ends = [o + n for o, n in zip(self.offsets, _shape(self.result), strict=True)]
        self.require(all(e <= n for e, n in zip(ends, _shape(self.source), strict=True)), "reaches outside the source")


@operation("tile", family=UNARY)
class Unary(Operation):
    """An elementwise function of one operand, for example ``tile.exp``."""

    fn: str = attribute()
    source: Value = operand()

    def verify(self) -> None:
        self.require(self.source.type == self.result.type, "keeps the type")
        dtype = element_type(self.source.type)
        self.require(self.fn not in FLOAT_ONLY or dtype.is_float, f"needs a float, got {dtype}")
        self.require(self.fn != "not" or not dtype.is_float, "needs an integer or bool")


@operation("tile", family=BINARY)
class Binary(Operation):
    """An elementwise function of two operands of one type, for example ``tile.add``.

    ``max``/``min`` on floats propagate NaN (NumPy's maximum and minimum).
    """

    fn: str = attribute()
    lhs: Value = operand()
    rhs: Value = operand()

    def verify(self) -> None:
        self.require(self.lhs.type == self.rhs.type, f"operand types differ: {self.lhs.type} and {self.rhs.type}")
        self.require(self.lhs.type == self.result.type, "keeps the type")
        dtype = element_type(self.lhs.type)
        self.require(self.fn not in INT_ONLY or not dtype.is_float, f"needs integers, got {dtype}")
        self.require(self.fn != "div" or dtype.is_float, f"needs floats, got {dtype}")


@operation("tile", family=COMPARE)
class Compare(Operation):
    """An elementwise comparison, giving i1."""

    fn: str = attribute()
    lhs: Value = operand()
    rhs: Value = operand()

    def verify(self) -> None:
        self.require(self.lhs.type == self.rhs.type, f"operand types differ: {self.lhs.type} and {self.rhs.type}")
        self.require(self.result.type == like(self.lhs.type, i1), "gives i1 of the operands' shape")


@operation("tile.select")
class Select(Operation):
    """``on_true`` where the condition holds, else ``on_false``."""

    condition: Value = operand()
    on_true: Value = operand()
    on_false: Value = operand()

    def verify(self) -> None:
        self.require(self.on_true.type == self.on_false.type == self.result.type, "both choices have the result's type")
        self.require(self.condition.type == like(self.result.type, i1), "the condition is i1 of the same shape")


@operation("tile.cast")
class Cast(Operation):
    """Convert the element type: round to nearest even to floats, truncate to integers."""

    source: Value = operand()

    def verify(self) -> None:
        self.require(like(self.source.type, element_type(self.result.type)) == self.result.type, "keeps the shape")


@operation("tile.bitcast")
class Bitcast(Operation):
    """Reinterpret the bits as another element type of the same width."""

    source: Value = operand()

    def verify(self) -> None:
        source, result = element_type(self.source.type), element_type(self.result.type)
        self.require(source.bits == result.bits, f"{source} and {result} differ in width")


@operation("tile.reduce", family=REDUCTIONS)
class Reduce(Operation):
    """Reduce over ``axis``. A rank-one tile gives a scalar. The order of additions is fixed by the layout.

    ``scratch`` (bytes, set by the shared-memory plan) is where warps exchange partial results. With ``turn``, an i32
    that counts the exchanges, there are two such places, for even and odd turns: threads that meet in between need not
    meet before they write.
    """

    fn: str = attribute()
    source: Value = operand()
    turn: Value | None = optional()
    axis: int = attribute()
    scratch: int | None = attribute(default=None)

    def verify(self) -> None:
        shape = _shape(self.source)
        self.require(0 <= self.axis < len(shape), f"axis {self.axis} is out of range for shape {shape}")
        left = shape[: self.axis] + shape[self.axis + 1 :]
        self.require(_shape(self.result) == left, "result shape is wrong")


@operation("tile.scan", family=SCANS)
class Scan(Operation):
    """Running totals along ``axis``, each element included in its own. The order of additions is fixed by the layout.

    ``scratch`` (bytes, set by the shared-memory plan) is where warps exchange totals.
    """

    fn: str = attribute()
    source: Value = operand()
    axis: int = attribute()
    scratch: int | None = attribute(default=None)

    def verify(self) -> None:
        shape = _shape(self.source)
        self.require(0 <= self.axis < len(shape), f"axis {self.axis} is out of range for shape {shape}")
        self.require(self.source.type == self.result.type, "keeps the type")


@operation("tile.cat")
class Cat(Operation):
    """Tiles one behind the other along ``axis``."""

    sources: list[Value] = operands()
    axis: int = attribute()

    def verify(self) -> None:
        self.require(len(self.sources) > 0, "needs a tile")
        result = tile_of(self.result)
        self.require(0 <= self.axis < result.rank, f"axis {self.axis} is out of range for shape {result.shape}")
        for value in self.sources:
            tile = tile_of(value)
            self.require(tile.dtype == result.dtype, "all tiles have one dtype")
            pairs = zip(_without(tile.shape, self.axis), _without(result.shape, self.axis), strict=True)
            self.require(all(a == b for a, b in pairs), f"sizes differ along an axis other than {self.axis}")
        total = sum(tile_of(value).shape[self.axis] for value in self.sources)
        self.require(total == result.shape[self.axis], f"sizes along axis {self.axis} do not add up")


@operation("tile.dot")
class Dot(Operation):
    """``acc + a @ b`` with a (M, K), b (K, N), acc (M, N). Accumulates in the accumulator's dtype.

    After placement the operands may be slots of shared memory.
    """

    a: Value = operand()
    b: Value = operand()
    acc: Value = operand()
    precision: str = attribute(default="default")

    def verify(self) -> None:
        a, b, acc = (_operand_shape(v) for v in (self.a, self.b, self.acc))
        self.require(len(a) == len(b) == len(acc) == 2, "operands are matrices")
        self.require(a[1] == b[0] and acc == (a[0], b[1]), f"shapes {list(a)} @ {list(b)} + {list(acc)} do not agree")
        self.require(
            multipliable(element_type(self.a.type), element_type(self.b.type)),
            "a and b have one dtype, or 8-bit floats",
        )
        self.require(self.acc.type == self.result.type, "the result has the accumulator's type")


@operation("tile.convert")
class Convert(Operation):
    """The same tile in another layout: a register move, shuffles, or a round trip through shared memory.

    ``scratch`` (bytes, set by the shared-memory plan) is the place of that round trip.
    """

    source: Value = operand()
    scratch: int | None = attribute(default=None)

    def verify(self) -> None:
        source, result = tile_of(self.source), tile_of(self.result)
        self.require(source.with_layout(None) == result.with_layout(None), "keeps shape and dtype")
        self.require(result.layout is not None, "names a layout")


# --- views of global memory -------------------------------------------------------------------


@operation("tile.dim")
class Dim(Operation):
    """The size of a view along ``axis`` (i32)."""

    view: Value = operand()
    axis: int = attribute()

    def verify(self) -> None:
        self.require(0 <= self.axis < view_of(self.view).rank, f"axis {self.axis} is out of range")
        self.require(self.result.type == ScalarType(i32), "gives i32")


@operation("tile.subview")
class Subview(Operation):
    """``view[i, j]``: fix the leading dimensions."""

    view: Value = operand()
    index: list[Value] = operands()

    def verify(self) -> None:
        view = view_of(self.view)
        is_flag = view.symmetric and view.dtype == i32 and len(self.index) == view.rank
        self.require(len(self.index) < view.rank or is_flag, "leaves at least one dimension, but for a flag")


@operation("tile.permute_view")
class PermuteView(Operation):
    """Reorder the dimensions of a view: result dimension i is source dimension ``perm[i]``."""

    view: Value = operand()
    perm: tuple[int, ...] = attribute()


@operation("tile.offset_view")
class OffsetView(Operation):
    """Move the origin of a view by elements; its bounds stay those of the tensor."""

    view: Value = operand()
    offsets: list[Value] = operands()


#: when lines of the caches leave them: before all others (nobody reads them again), or after
EVICTION = ("evict_first", "evict_last")


def require_eviction(op: Operation, policy: str | None) -> None:
    op.require(policy in (None, *EVICTION), f"evict is one of {', '.join(EVICTION)}")


@operation("tile.load", effect=Effect.READ)
class Load(Operation):
    """Read the tile at ``index`` (counted in tiles); parts outside the view read as ``pad``.

    ``after``: tokens of comm.wait, which tell that what is read has arrived.

    Placement sets ``shared``, the shared-memory layout through which the tile travels to its
    consumer, and ``engine``, who copies it: ``tma`` (bulk copy engine), ``cp_async`` or ``threads``.
    ``evict``: what becomes of its lines in the caches, one of `EVICTION`; None leaves it to them.
    """

    view: Value = operand()
    index: list[Value] = operands()
    after: list[Value] = named_operands()
    pad: float = attribute(default=0)
    shared: SharedLayout | None = attribute(default=None)
    engine: str = attribute(default="threads")
    evict: str | None = attribute(default=None)

    def verify(self) -> None:
        view, tile = view_of(self.view), tile_of(self.result)
        require_eviction(self, self.evict)
        self.require(len(self.index) == view.rank == tile.rank, "index, view and tile have one rank")
        self.require(view.dtype == tile.dtype, "view and tile have one dtype")


@operation("tile.element", effect=Effect.READ)
class Element(Operation):
    """Read the element at ``index`` as a scalar, ``pad`` outside the view: indices and bounds that lie in memory."""

    view: Value = operand()
    index: list[Value] = operands()
    after: list[Value] = named_operands()
    pad: float = attribute(default=0)

    def verify(self) -> None:
        view = view_of(self.view)
        self.require(len(self.index) == view.rank, "index and view have one rank")
        self.require(self.result.type == ScalarType(view.dtype), "gives a scalar of the view's dtype")


@operation("tile.pick")
class Pick(Operation):
    """The element of a vector at ``index``, which lies inside. Passes make and remove it: no backend knows it."""

    source: Value = operand()
    index: Value = operand()

    def verify(self) -> None:
        tile = tile_of(self.source)
        self.require(tile.rank == 1, "takes a vector")
        self.require(self.result.type == ScalarType(tile.dtype), "gives a scalar of the vector's dtype")


@operation("tile.store", effect=Effect.WRITE)
class Store(Operation):
    """Write the tile at ``index`` (counted in tiles); parts outside the view are dropped. ``evict`` as of `Load`."""

    view: Value = operand()
    index: list[Value] = operands()
    value: Value = operand()
    evict: str | None = attribute(default=None)

    def verify(self) -> None:
        view, tile = view_of(self.view), tile_of(self.value)
        require_eviction(self, self.evict)
        self.require(len(self.index) == view.rank == tile.rank, "index, view and tile have one rank")
        self.require(view.dtype == tile.dtype, f"cannot store {tile.dtype} to a view of {view.dtype}")


# --- program and control flow -----------------------------------------------------------------


@operation("tile.program_id")
class ProgramId(Operation):
    """The index of this program along a grid axis (i32)."""

    axis: int = attribute()


@operation("tile.num_programs")
class NumPrograms(Operation):
    """The size of the grid along an axis (i32)."""

    axis: int = attribute()


@operation("tile.block_id")
class BlockId(Operation):
    """The index of this hardware block among those launched (i32); differs from the program in a persistent kernel."""


@operation("tile.num_blocks")
class NumBlocks(Operation):
    """The number of hardware blocks launched (i32)."""


@operation("tile.for")
class For(Operation):
    """``for i in range(lo, hi, step)`` with loop-carried values; ``step`` is positive.

    The body's arguments are the index and the carried values; it ends in ``tile.yield``.
    """

    lo: Value = operand()
    hi: Value = operand()
    step: Value = operand()
    inits: list[Value] = operands()
    body: Region = region()

    @property
    def index(self) -> Value:
        return self.body.block.args[0]

    @property
    def carried(self) -> list[Value]:
        """The body's arguments that carry values from one iteration to the next."""
        return self.body.block.args[1:]

    def verify(self) -> None:
        self.require(self.lo.type == self.hi.type == self.step.type == self.index.type, "bounds have the index's type")
        inits = [v.type for v in self.inits]
        self.require(inits == [v.type for v in self.carried], "initial and carried values have the same types")
        self.require(inits == [v.type for v in self.results], "results have the carried values' types")
        self.require(inits == [v.type for v in yielded(self.body)], "yielded values have the carried values' types")


@operation("tile.if")
class If(Operation):
    """Run one of two regions; the results are what it yields. ``else_body`` is always present."""

    condition: Value = operand()
    then_body: Region = region()
    else_body: Region = region()

    def verify(self) -> None:
        self.require(self.condition.type == ScalarType(i1), "the condition is a scalar i1")
        types = [v.type for v in self.results]
        for body in (self.then_body, self.else_body):
            self.require([v.type for v in yielded(body)] == types, "both branches yield the results' types")


@operation("tile.while")
class While(Operation):
    """``while condition``. The condition region yields i1; both regions take the carried values."""

    inits: list[Value] = operands()
    condition: Region = region()
    body: Region = region()

    def verify(self) -> None:
        types = [v.type for v in self.inits]
        self.require([v.type for v in self.results] == types, "results have the carried values' types")
        for part in (self.condition, self.body):
            self.require([v.type for v in part.block.args] == types, "regions take the carried values")
        self.require([v.type for v in yielded(self.condition)] == [ScalarType(i1)], "the condition yields i1")
        self.require([v.type for v in yielded(self.body)] == types, "the body yields the carried values' types")


@operation("tile.yield", terminator=True)
class Yield(Operation):
    """Ends a region and passes values to the operation around it."""

    values: list[Value] = operands()


# --- helpers ------------------------------------------------------------------------------------


def tile_of(value: Value) -> TileType:
    """The type of a tile. TypeError for other values."""
    if not isinstance(value.type, TileType):
        raise TypeError(f"expected a tile, got {value.type}")
    return value.type


def view_of(value: Value) -> ViewType:
    """The type of a view. TypeError for other values."""
    if not isinstance(value.type, ViewType):
        raise TypeError(f"expected a view, got {value.type}")
    return value.type


def _shape(value: Value) -> tuple[int, ...]:
    return value.type.shape if isinstance(value.type, TileType) else ()


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _operand_shape(value: Value) -> tuple[int, ...]:
    return value.type.shape if isinstance(value.type, TileType | SlotType) else ()


def _same_dtype(a: Value, b: Value) -> bool:
    return element_type(a.type) == element_type(b.type)


def yielded(body: Region) -> list[Value]:
    """What a body hands on."""
    terminator = body.block.terminator
    return terminator.values if isinstance(terminator, Yield) else []
