"""Matrix products on MFMA: operands and accumulators in registers, one instruction a tile and step of K.

AMD CDNA3 and CDNA4 ISA guides, "Matrix Arithmetic Instructions". The hardware interlocks accumulators; what
limits a dot is how soon its operands arrive and how many registers they take. So an operand that only this dot
reads from shared memory is not loaded as a whole: the dot reads it step by step along K, right where the
instructions need it (`lower_local_load` defers it, `OperandTiles` reads it), which also leaves LLVM's scheduler
an order to start from in which reads and instructions alternate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tilewright.backends.amd.mfma_operands import multiply, split_operand
from tilewright.backends.lower.context import Lowering, Table, lowers
from tilewright.backends.lower.deferred import is_deferrable
from tilewright.backends.lower.elements import join_vector, memory_type
from tilewright.backends.lower.shared import SharedAccess, lower_local_load
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.async_ops import LocalLoad
from tilewright.ir.core import Value
from tilewright.ir.layout import LinearLayout, mfma_accumulator, mfma_operand
from tilewright.ir.mfma import ACCUMULATOR_RUN, MfmaProduct, accumulator_dtype, mfma_products, tile_sizes
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import DType, TileType

MFMA_LOWERINGS: Table = {}

Origin = tuple[int, int]

#: classes of instructions that `llvm.amdgcn.sched.group.barrier` names
SCHEDULE_MFMA, SCHEDULE_DS_READ = 0x8, 0x100
#: bytes per lane of the widest read: LLVM makes one ds_read2 of two narrower ones
PAIRED_BYTES = 16


@dataclass(frozen=True)
class Fragments:
    """Instructions for a dot, and whether they compute the transposed product (B given first)."""

    product: MfmaProduct
    transposed: bool


def find_fragments(
    target: Target, dtype: DType, precision: str, acc: LinearLayout, a: LinearLayout, b: LinearLayout
) -> Fragments | None:
    """The instructions whose fragments, dealt to the waves alike, the three layouts are; the longest."""
    out = accumulator_dtype(dtype)
    if out is None:
        return None
    runs = (None, ACCUMULATOR_RUN, 1)
    found = [
        p for m in tile_sizes(target, dtype) for run in runs for p in mfma_products(target, dtype, precision, m, run)
    ]
    for product in sorted(found, key=lambda p: (-p.instruction_k, -p.k)):
        operands = [mfma_operand((product.m, product.k), "a", product.mnk, product.run)]
        operands.append(mfma_operand((product.k, product.m), "b", product.mnk, product.run))
        for transposed in (True, False):
            tile = (product.m, product.m)
            result = mfma_accumulator(tile, tile, (1, 1), out.bits, transposed)
            fragments = ((acc, result, (0, 1)), (a, operands[0], (0,)), (b, operands[1], (1,)))
            if all(_begins_with(layout, fragment) for layout, fragment, _ in fragments) and all(
                [v[axis] for v in layout.basis("warp")] == [v[axis] for v in acc.basis("warp")]
                for layout, _, axes in fragments
                for axis in axes
            ):
                return Fragments(product, transposed)
    return None


def _begins_with(layout: LinearLayout, fragment: LinearLayout) -> bool:
    """Lanes and innermost registers are those of the fragment."""
    inner = fragment.basis("register")
    return layout.basis("register")[: len(inner)] == inner and layout.basis("lane") == fragment.basis("lane")


@dataclass
class OperandTiles:
    """The instruction operands of one tile: those of one product for each origin, (row, k) of A or (k, column) of B."""

    layout: LinearLayout
    width: int
    #: the operands of the instructions that spend the ``width`` elements from a register on
    read: Callable[[int], list[mlir.Value]]
    #: reads of shared memory that they take
    cost: float = 0
    #: reads so far
    reads: float = 0
    _first: dict[Origin, int] = field(default_factory=dict)
    _known: dict[int, list[mlir.Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._first = chunk_origins(self.layout, self.width)

    def at(self, origin: Origin) -> list[mlir.Value]:
        first = self._first[origin]
        if first not in self._known:
            self._known[first] = self.read(first)
            self.reads += self.cost
        return self._known[first]


def chunk_origins(layout: LinearLayout, width: int) -> dict[Origin, int]:
    """Coordinates (as thread 0 holds them) of every run of ``width`` registers -> its first register."""
    table = layout.table("register")
    firsts = range(0, layout.num_registers, width)
    return {(int(table[first][0]), int(table[first][1])): first for first in firsts}


# --- operands that stay in shared memory until the dot ------------------------------------------


@lowers(LocalLoad, table=MFMA_LOWERINGS)
def lower_operand_load(lw: Lowering, op: LocalLoad) -> None:
    if op.at is not None or not is_deferrable(op):
        lower_local_load(lw, op)
        return
    slot = lw.slot(op.slot)
    access = SharedAccess(lw, slot.base, slot.layout, lw.layout(op.result), slot.dtype)
    deferred(lw)[op.result] = access


def deferred(lw: Lowering) -> dict[Value, SharedAccess]:
    """The tiles that wait in shared memory for their dot."""
    return _state(lw).deferred


@dataclass
class _State:
    """What the lowering of one function remembers (`Lowering.backend`)."""

    deferred: dict[Value, SharedAccess] = field(default_factory=dict)
    groups: int = 0


def _state(lw: Lowering) -> _State:
    if lw.backend is None:
        lw.backend = _State()
    assert isinstance(lw.backend, _State)
    return lw.backend


def _next_group(lw: Lowering) -> int:
    """A number for a sequence of scheduling groups that is independent of the others."""
    _state(lw).groups += 1
    return _state(lw).groups


# --- the dot ------------------------------------------------------------------------------------


@lowers(Dot, table=MFMA_LOWERINGS)
def lower_dot(lw: Lowering, op: Dot) -> None:
    layouts = [lw.layout(v) for v in (op.acc, op.a, op.b)]
    tile, right, acc = op.a.type, op.b.type, op.acc.type
    assert isinstance(tile, TileType) and isinstance(right, TileType) and isinstance(acc, TileType)
    if acc.dtype != accumulator_dtype(tile.dtype):
        raise lw.error(f"{lw.target.name} has no dot of {tile.dtype} into {acc.dtype}")
    fragments = find_fragments(lw.target, tile.dtype, op.precision, *layouts)
    if fragments is None:
        texts = ", ".join(f"{name} {layout}" for name, layout in zip(("acc", "a", "b"), layouts, strict=True))
        raise lw.error(f"the operands' layouts belong to no matrix instruction: {texts}")
    product = fragments.product
    a, b = _operand(lw, op.a, product, tile.dtype), _operand(lw, op.b, product, right.dtype)
    dtypes = (right.dtype, tile.dtype) if fragments.transposed else (tile.dtype, right.dtype)
    size, held = product.accumulators, lw.registers(op.acc)
    tiles = chunk_origins(layouts[0], size)
    values = {origin: lw.fb.pack_vector(held[first : first + size]) for origin, first in tiles.items()}
    order, reads = snake(list(tiles)), []
    for k in range(0, tile.shape[1], product.k):
        before = a.reads + b.reads
        for row, column in order:
            for first, second in zip(a.at((row, k)), b.at((k, column)), strict=True):
                operands = (second, first) if fragments.transposed else (first, second)
                values[row, column] = multiply(lw, product, dtypes, *operands, values[row, column])
        reads.append(a.reads + b.reads - before)
    _interleave(lw, reads, len(order) * product.steps)
    result = list(held)
    for origin, start in tiles.items():
        result[start : start + size] = lw.fb.unpack_vector(values[origin])
    lw.define(op.result, result)


def _interleave(lw: Lowering, reads: Sequence[float], products: int) -> None:
    """Ask LLVM's scheduler to spread the reads of each step of K over the ``products`` of the step before.

    Left alone it places them right before their use, where their latency shows: nothing else runs on the SIMD.
    "Scheduling group barriers", https://llvm.org/docs/AMDGPUUsage.html (llvm.amdgcn.sched.group.barrier).
    """
    if len(reads) < 2 or not reads[1]:
        return
    fb, number = lw.fb, _next_group(lw)

    def group(mask: int, size: int) -> None:
        arguments = [fb.i32(mask), fb.i32(size), fb.i32(number)]
        fb.intrinsic("llvm.amdgcn.sched.group.barrier", None, arguments)

    group(SCHEDULE_DS_READ, round(reads[0]))
    for following in [*reads[1:], 0]:
        placed = 0
        for product in range(products):
            group(SCHEDULE_MFMA, 1)
            due = min(round(following), -(-round(following) * (product + 1) // products))
            if due > placed:
                group(SCHEDULE_DS_READ, due - placed)
                placed = due


def snake(origins: Sequence[Origin]) -> list[Origin]:
    """Rows in order, columns back and forth: neighbours share an operand."""
    rows = sorted({row for row, _ in origins})
    ordered: list[Origin] = []
    for number, row in enumerate(rows):
        ordered += sorted((o for o in origins if o[0] == row), reverse=bool(number % 2))
    return ordered


def _operand(lw: Lowering, value: Value, product: MfmaProduct, dtype: DType) -> OperandTiles:
    width, layout, waiting = product.width, lw.layout(value), deferred(lw).get(value)
    if waiting is not None:
        bytes_ = min(width, waiting.width) * dtype.bytes
        cost = width * dtype.bytes / min(PAIRED_BYTES, 2 * bytes_)
        return OperandTiles(
            layout, width, lambda first: split_operand(lw, _load_vector(waiting, first, width), product, dtype), cost
        )
    registers = lw.registers(value)
    return OperandTiles(
        layout,
        width,
        lambda first: split_operand(lw, join_vector(lw, registers[first : first + width]), product, dtype),
    )


def _load_vector(access: SharedAccess, first: int, width: int) -> mlir.Value:
    """``width`` registers from ``first`` on, by the widest accesses that the slot's layout allows."""
    lw, dtype, step = access.lw, access.dtype, min(width, access.width)
    parts = [
        lw.fb.load(access.pointer(register), memory_type(lw, dtype, step), step * dtype.bytes)
        for register in range(first, first + width, step)
    ]
    if step == 1:
        return join_vector(lw, parts)
    while len(parts) > 1:
        together = range(2 * parts[0].type.shape[0])
        parts = [lw.fb.shuffle(x, y, together) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
