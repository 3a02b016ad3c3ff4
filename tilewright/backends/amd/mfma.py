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

from tilewright.backends.lower.context import Lowering, Registers, Table, lowers
from tilewright.backends.lower.elements import join_vector
from tilewright.backends.lower.shared import SharedAccess, lower_local_load
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.async_ops import LocalLoad
from tilewright.ir.core import Effect, Operation, Value
from tilewright.ir.layout import LinearLayout
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import DType, TileType, bf16, f16
from tilewright.passes.matrix_mfma import Instruction, Mfma

MFMA_LOWERINGS: Table = {}

Origin = tuple[int, int]


def intrinsic_name(instruction: Instruction, dtype: DType) -> str:
    """The LLVM intrinsic: gfx950 appended the type after a dot, gfx90a its K block after the type."""
    shape = f"{instruction.m}x{instruction.n}x{instruction.k}"
    if instruction.k_per_lane == 8:
        suffix = f".{dtype.name}"
    else:
        suffix = "bf16.1k" if dtype == bf16 else "f16"
    return f"llvm.amdgcn.mfma.f32.{shape}{suffix}"


@dataclass
class OperandTiles:
    """The instruction operands of one tile: k_per_lane elements for each (row or column, k) origin."""

    lw: Lowering
    layout: LinearLayout
    width: int
    read: Callable[[int], mlir.Value]  # first register -> the vector of `width` elements
    _first: dict[Origin, int] = field(default_factory=dict)
    _known: dict[int, mlir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._first = chunk_origins(self.layout, self.width)

    def at(self, origin: Origin) -> mlir.Value:
        first = self._first[origin]
        if first not in self._known:
            self._known[first] = self.read(first)
        return self._known[first]


def chunk_origins(layout: LinearLayout, width: int) -> dict[Origin, int]:
    """Coordinates (as thread 0 holds them) of every run of ``width`` registers -> its first register."""
    table = layout.table("register")
    firsts = range(0, layout.num_registers, width)
    return {(int(table[first][0]), int(table[first][1])): first for first in firsts}


# --- operands that stay in shared memory until the dot ------------------------------------------


class DeferredTile:
    """What a `LocalLoad` lowers to that only one dot behind it reads."""

    def __init__(self, access: SharedAccess):
        self.access = access


def is_deferrable(op: LocalLoad) -> bool:
    """One dot of the same block is the only user, and nothing between the two can overwrite the slot."""
    block = op.parent
    assert block is not None
    for other in block.ops[block.ops.index(op) + 1 :]:
        users = [inner for inner in other.walk() if op.result in inner.operands]
        if users:
            return users == [other] and isinstance(other, Dot) and other.acc is not op.result and _sole(op, other)
        if any(inner.effect & (Effect.WRITE | Effect.SYNC) for inner in other.walk()):
            return False
    return False


def _sole(op: LocalLoad, dot: Dot) -> bool:
    assert op.parent is not None
    behind = op.parent.ops[op.parent.ops.index(dot) + 1 :]
    return not any(op.result in inner.operands for other in behind for inner in other.walk())


@lowers(LocalLoad, table=MFMA_LOWERINGS)
def lower_operand_load(lw: Lowering, op: LocalLoad) -> None:
    if not is_deferrable(op):
        lower_local_load(lw, op)
        return
    slot = lw.slot(op.slot)
    access = SharedAccess(lw, slot.base, slot.layout, lw.layout(op.result), slot.dtype)
    deferred(lw)[op.result] = DeferredTile(access)


def deferred(lw: Lowering) -> dict[Value, DeferredTile]:
    """The tiles that wait for their dot."""
    if lw.backend is None:
        lw.backend = {}
    return lw.backend


# --- the dot ------------------------------------------------------------------------------------


@lowers(Dot, table=MFMA_LOWERINGS)
def lower_dot(lw: Lowering, op: Dot) -> None:
    unit, warps = Mfma(lw.target), lw.scope.num_warps
    unit.check(op)
    instruction = unit.instruction(op, warps)
    layout = lw.layout(op.acc)
    if layout != unit.accumulator(layout.tile_shape, warps):
        raise lw.error(f"the accumulator's layout {layout} is not the matrix unit's")
    a, b = (_operand(lw, op, unit, instruction, which) for which in "ab")
    size = instruction.m * instruction.n // lw.target.warp_size
    held = lw.registers(op.acc)
    tiles = chunk_origins(layout, size)
    values = {origin: lw.fb.pack_vector(held[first : first + size]) for origin, first in tiles.items()}
    assert isinstance(op.a.type, TileType)
    for k in range(0, op.a.type.shape[1], instruction.k):
        for row, column in snake(list(tiles)):
            values[row, column] = _mfma(lw, instruction, op, a.at((row, k)), b.at((k, column)), values[row, column])
    result: list[mlir.Value] = list(held)
    for origin, first in tiles.items():
        result[first : first + size] = lw.fb.unpack_vector(values[origin])
    lw.define(op.result, result)


def snake(origins: Sequence[Origin]) -> list[Origin]:
    """Rows in order, columns back and forth: neighbours share an operand."""
    rows = sorted({row for row, _ in origins})
    ordered: list[Origin] = []
    for number, row in enumerate(rows):
        ordered += sorted((o for o in origins if o[0] == row), reverse=bool(number % 2))
    return ordered


def _operand(lw: Lowering, op: Dot, unit: Mfma, instruction: Instruction, which: str) -> OperandTiles:
    value = op.a if which == "a" else op.b
    layout = lw.layout(value)
    if layout != unit.operand(which, op, lw.scope.num_warps):
        raise lw.error(f"operand {which} has layout {layout}, which is not the matrix unit's")
    width = instruction.k_per_lane
    waiting = deferred(lw).get(value)
    if waiting is None:
        registers = lw.registers(value)
        return OperandTiles(lw, layout, width, lambda first: join_vector(lw, registers[first : first + width]))
    access = waiting.access
    return OperandTiles(lw, layout, width, lambda first: access.load_vector(first, width))


def _mfma(
    lw: Lowering, instruction: Instruction, op: Dot, a: mlir.Value, b: mlir.Value, acc: mlir.Value
) -> mlir.Value:
    fb, dtype = lw.fb, op.a.type.dtype
    assert dtype in (bf16, f16)
    if instruction.k_per_lane == 4 and dtype == bf16:  # gfx90a's instructions take bits
        a, b = (fb.bitcast(v, fb.types.vec(4, fb.types.i16)) for v in (a, b))
    zero = fb.i32(0)
    return fb.intrinsic(intrinsic_name(instruction, dtype), acc.type, [a, b, acc, zero, zero, zero])


__all__ = ["MFMA_LOWERINGS", "DeferredTile", "OperandTiles", "Operation", "Registers", "chunk_origins"]
