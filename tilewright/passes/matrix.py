"""Matrix units: which dots they take, and the layouts of their operands and accumulators.

Passes ask the unit of the target; they hold no knowledge of an instruction set themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import gcd

from tilewright.ir.async_ops import AsyncDot
from tilewright.ir.core import Function, IRError, Value
from tilewright.ir.layout import (
    LinearLayout,
    SharedLayout,
    bank_conflicts,
    choose_shared_layout,
    shared_candidates,
    shared_vector_bytes,
    wgmma_accumulator,
    wgmma_operand_a,
)
from tilewright.ir.layout_shared import Access
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, Load
from tilewright.ir.types import DType, SlotType, TileType, ViewType, bf16, f8e4m3, f8e5m2, f16, f32, f64, i8, i32
from tilewright.passes.analysis import trace_load


class MatrixUnit(ABC):
    """What scheduling and layout passes must know of a matrix instruction."""

    #: operands that the instruction reads from shared memory itself
    reads_slots: bool
    #: issued work runs on while the warps go on; results need a wait
    asynchronous: bool

    def __init__(self, target: Target):
        self.target = target

    @abstractmethod
    def check(self, dot: Dot) -> None:
        """Raise `IRError` where the unit cannot compute this dot."""

    @abstractmethod
    def warps(self, dots: Sequence[Dot]) -> int:
        """How many warps should share these dots."""

    @abstractmethod
    def accumulator(self, shape: tuple[int, ...], warps: int) -> LinearLayout:
        """Registers of an accumulator (M, N)."""

    def result(self, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        """Registers of one dot's accumulator, where they depend on more than its shape."""
        return self.accumulator(result_type(dot).shape, warps)

    @abstractmethod
    def operand(self, which: str, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        """Registers of operand ``a`` (M, K) or ``b`` (K, N)."""

    def reader(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> Access:
        """How an operand is read from the slot of `shared`: the layout, and the bytes of one access."""
        return self.operand(which, dot, warps), operand_dtype(dot).bytes

    @abstractmethod
    def shared(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> SharedLayout | None:
        """Shared memory of operand ``a`` or ``b`` whose global memory runs along axis ``contiguous``.

        None where the operand cannot travel through shared memory.
        """


def operand_shape(dot: Dot | AsyncDot, which: str) -> tuple[int, ...]:
    """The shape of operand ``a`` or ``b``, tile or slot."""
    type_ = (dot.a if which == "a" else dot.b).type
    assert isinstance(type_, TileType | SlotType)
    return type_.shape


def operand_dtype(dot: Dot | AsyncDot, which: str = "a") -> DType:
    """The dtype of operand ``a`` or ``b``: they differ only between the two formats of 8-bit floats."""
    type_ = (dot.a if which == "a" else dot.b).type
    assert isinstance(type_, TileType | SlotType)
    return type_.dtype


def result_type(dot: Dot | AsyncDot) -> TileType:
    """The type of the accumulator and the result."""
    assert isinstance(dot.acc.type, TileType)
    return dot.acc.type


#: what wgmma multiplies, and what it accumulates in; float32 operands are read as tf32
WGMMA_ACCUMULATES: dict[DType, DType] = {bf16: f32, f16: f32, f32: f32, f8e4m3: f32, f8e5m2: f32, i8: i32}
#: K of one wgmma
WGMMA_K_BYTES = 32
#: columns of one wgmma: multiples of 8, of integers beyond 32 multiples of 16
WGMMA_COLUMNS, WGMMA_FEW_COLUMNS, WGMMA_INTEGER_COLUMNS = 8, 32, 16
#: the longest run of operand b's columns in shared memory: a line of the widest swizzle
WGMMA_LINE_BYTES = 128
#: rows of one wgmma, which a warpgroup issues
WGMMA_ROWS = 64
#: accumulators per thread of a product in parts (`tilewright.passes.split_products`), which needs them twice
SPLIT_ACCUMULATORS = 64


def contiguous_axis(load: Load, perm: tuple[int, ...] | None) -> int | None:
    """The axis of a dot's operand along which its global memory runs; ``perm``: of transpositions on the way."""
    assert isinstance(load.view.type, ViewType)
    axis = load.view.type.contiguous_axis
    return axis if axis is None or perm is None else perm.index(axis)


def _along(value: Value, axis: int) -> bool:
    """Whether an operand's memory runs along ``axis``, or it is made by threads, which may choose."""
    load, perm = trace_load(value)
    return load is None or contiguous_axis(load, perm) in (None, axis)


class Wgmma(MatrixUnit):
    """Hopper's warpgroup MMA: m64nNk16, k8 (tf32) and k32 (8 bits), operands in shared memory (A also in registers).

    It reads 16-bit operands in both directions, others along K only. PTX ISA, "Asynchronous Warpgroup Level Matrix
    Multiply-Accumulate Instructions".
    """

    reads_slots = True
    asynchronous = True

    def check(self, dot: Dot) -> None:
        (m, k), n = operand_shape(dot, "a"), operand_shape(dot, "b")[1]
        dtype = operand_dtype(dot)
        exact = dtype == f32 and dot.precision not in ("tf32", "3xtf32")
        if dtype not in WGMMA_ACCUMULATES or exact:
            raise IRError(
                f"{self.target.name} has no asynchronous dot of {dtype} with {dot.precision} precision",
                dot.loc,
                "leave out schedule=, or cast to bf16 or f16",
            )
        if result_type(dot).dtype != WGMMA_ACCUMULATES[dtype]:
            name = "int32" if dtype == i8 else "float32"
            raise IRError(
                f"dot of {dtype} accumulates in {name}",
                dot.loc,
                f"make the accumulator with tw.zeros(shape, tw.{name})",
            )
        step = WGMMA_K_BYTES // dtype.bytes
        columns = WGMMA_INTEGER_COLUMNS if dtype == i8 and n > WGMMA_FEW_COLUMNS else WGMMA_COLUMNS
        if m % 64 or k % step or n % columns:
            raise IRError(
                f"dot of ({m}, {k}) @ ({k}, {n}) does not fit {self.target.name}",
                dot.loc,
                f"M must be a multiple of 64, K of {step} and N of {columns}",
            )
        if dot.precision == "3xtf32" and m * n > SPLIT_ACCUMULATORS * 128 * self.warps([dot]) // 4:
            raise IRError(
                f"dot of ({m}, {k}) @ ({k}, {n}) in three parts takes too many registers on {self.target.name}",
                dot.loc,
                "leave out schedule=, or use a smaller tile, for example (128, 128)",
            )
        along_k = _along(dot.a, 1) and _along(dot.b, 0)
        if dtype.bits != 16 and dot.precision != "3xtf32" and not along_k:
            raise IRError(
                f"the asynchronous matrix unit takes {'tf32' if dtype == f32 else dtype} operands that are contiguous "
                "along K",
                dot.loc,
                "leave out schedule=, or store the operands so",
            )

    def warps(self, dots: Sequence[Dot]) -> int:
        """Two warpgroups where every dot's rows split evenly; more only if accumulators demand it.

        Dots of 64 rows follow the others: warpgroups divide their columns.
        """
        tall = [dot for dot in dots if operand_shape(dot, "a")[0] > WGMMA_ROWS]
        rows = gcd(*(operand_shape(dot, "a")[0] for dot in tall or dots))
        largest = max(operand_shape(d, "a")[0] * operand_shape(d, "b")[1] for d in dots)
        groups = 2 if rows % 128 == 0 else 1
        while groups * 128 * 160 < largest and rows % (groups * 2 * 64) == 0:
            groups *= 2
        return 4 * groups if all(divides(dot, groups) for dot in dots) else 4

    def accumulator(self, shape: tuple[int, ...], warps: int) -> LinearLayout:
        return wgmma_accumulator(shape, warps // 4)

    def operand(self, which: str, dot: Dot | AsyncDot, warps: int) -> LinearLayout:
        if which != "a":
            raise IRError("the matrix unit reads operand b from shared memory only", dot.loc)
        return wgmma_operand_a(operand_shape(dot, "a"), operand_dtype(dot).bits, warps // 4)

    def shared(self, which: str, dot: Dot, contiguous: int | None, warps: int) -> SharedLayout | None:
        """The widest TMA swizzle that divides a line: all are conflict free for the unit's 8 x 16-byte reads."""
        shape, bits = operand_shape(dot, which), operand_dtype(dot).bits
        depth = 1 if which == "a" else 0
        along_k = bits != 16 and dot.precision != "3xtf32"  # the unit itself reads wider elements along K only
        fastest = depth if contiguous is None or along_k else contiguous
        order = (fastest, 1 - fastest)
        swizzled = [c for c in shared_candidates(shape, bits, order, self.target.banks) if c.swizzle]
        if not swizzled:
            return None
        return choose_shared_layout(shape, bits, order, [], [], self.target.banks, swizzled)


def divides(dot: Dot, groups: int) -> bool:
    """Whether warpgroups can share a dot of wgmma: its rows in multiples of 64, or the columns of 64 rows."""
    rows, columns = result_type(dot).shape
    if rows != WGMMA_ROWS or groups == 1:
        return rows % (groups * WGMMA_ROWS) == 0
    own = columns // groups
    whole = columns % (groups * WGMMA_COLUMNS) == 0 and own & (own - 1) == 0
    return whole and own % _column_run(dot) == 0


def _column_run(dot: Dot) -> int:
    """Columns of operand b that lie in one block of shared memory, which warpgroups do not divide."""
    load, perm = trace_load(dot.b)
    if load is None or contiguous_axis(load, perm) != 1:
        return 1
    return min(operand_shape(dot, "b")[1], WGMMA_LINE_BYTES // operand_dtype(dot, "b").bytes)


ROLES, PREFETCH = "roles", "prefetch"
#: roles whose consumers work on different tiles in turn, or issue their matrix products in turn
ALTERNATE, TURNS = "alternate", "turns"
SCHEDULES = (ROLES, TURNS, ALTERNATE, PREFETCH)


#: roles compute by warpgroups
WARPGROUP = 4
#: 32-bit accumulators per lane, of all warps of a block together, from which on one block fills a multiprocessor
ROLE_ACCUMULATORS = 8 * 64


def schedule_of(function: Function, target: Target) -> str:
    """How a function's copies and dots are scheduled: ``roles`` or ``prefetch`` (`tilewright.passes.pipelines`).

    The `schedule` pass writes the choice down.
    """
    chosen = function.attributes.get("schedule")
    return default_schedule(function, target) if chosen is None else str(chosen)


def default_schedule(function: Function, target: Target, warps: int | None = None) -> str:
    """Roles where the hardware has them and they pay. ``warps``: how many are asked for.

    They pay for dots of the asynchronous matrix unit, and for others whose operands are in registers anyway if their
    accumulators fill those of one block: its two warpgroups, which no barrier ties together, take turns at reading
    operands and computing. Smaller tiles leave room for several blocks, which do the same for each other. The copy
    engine must have a swizzle that suits those operands; threads have more of them.
    """
    if role_obstacle(function, target, warps) is not None:
        return PREFETCH
    dots = [dot for dot in _dots(function) if from_registers(dot)]
    if not dots:
        return ROLES
    words = max(result_type(dot).size * result_type(dot).dtype.bits // 32 for dot in dots)
    if words < ROLE_ACCUMULATORS * target.warp_size:
        return PREFETCH
    unit = matrix_unit(target, function, by_roles=True)
    return ROLES if all(_reads_freely(unit, dot, warps or unit.warps(dots)) for dot in dots) else PREFETCH


def _reads_freely(unit: MatrixUnit, dot: Dot, warps: int) -> bool:
    """Whether the dot's operands are read from the unit's slots without meeting a bank twice."""
    for which, value in (("a", dot.a), ("b", dot.b)):
        load, perm = trace_load(value)
        if load is None:
            continue
        contiguous = contiguous_axis(load, perm)
        slot, (layout, wanted) = unit.shared(which, dot, contiguous, warps), unit.reader(which, dot, contiguous, warps)
        if slot is None:
            return False
        width, banks = shared_vector_bytes(layout, slot, wanted), unit.target.banks
        if bank_conflicts(layout, slot, width, banks) > 0:
            return False
    return True


def role_obstacle(function: Function, target: Target, warps: int | None = None) -> IRError | None:
    """Why a function cannot be scheduled with roles; None where it can."""
    if not target.has("setmaxnreg"):
        return IRError(f"{target.name} has no hardware for roles", function.loc)
    dots = _dots(function)
    if not dots:
        return None
    unit = matrix_unit(target, function, by_roles=True)
    for dot in dots:
        try:
            unit.check(dot)
        except IRError as error:
            return error
    warps = unit.warps(dots) if warps is None else warps
    if warps % WARPGROUP:
        hint = "leave out schedule=, or use larger tiles and a multiple of four warps"
        return IRError(f"roles compute by warpgroups of four warps, not with {warps}", dots[0].loc, hint)
    return None


def _dots(function: Function) -> list[Dot]:
    return [op for op in function.walk() if isinstance(op, Dot)]


def from_registers(dot: Dot) -> bool:
    """Whether a dot has operands in registers with any schedule: its dtype fits no asynchronous unit."""
    dtype = operand_dtype(dot)
    return dtype == f64 or (dtype == f32 and dot.precision in ("default", "ieee"))


def matrix_unit(target: Target, function: Function, by_roles: bool | None = None) -> MatrixUnit:
    """The matrix unit of a function's dots; how it divides tiles may depend on what the function does with them.

    ``by_roles``: for the schedule with roles or the other one; None: for the function's own.
    """
    if by_roles is None:
        by_roles = target.has("wgmma") and schedule_of(function, target) == ROLES
    dots = _dots(function)
    if by_roles and not (dots and all(from_registers(dot) for dot in dots)):
        return Wgmma(target)
    if target.has("mma_sync"):
        from tilewright.passes.matrix_mma_sync import SynchronousUnits
        from tilewright.passes.warp_grid import rows_stay_together

        return SynchronousUnits(target, rows_stay_together(function), by_roles)
    if target.has("mfma"):
        from tilewright.passes.matrix_mfma import Mfma
        from tilewright.passes.warp_grid import rows_stay_together

        return Mfma(target, rows_stay_together(function))
    raise IRError(f"{target.name} has no matrix unit that tilewright knows")
