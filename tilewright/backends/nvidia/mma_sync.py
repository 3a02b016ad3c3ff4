"""Matrix products on ``mma.sync``, and float32 outer products on the vector unit.

PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions": "Matrix Fragments for mma.m16n8k8", "... m16n8k16",
"... m16n8k32", "... m8n8k4". Every fragment of A is the registers that a thread holds of a 16 x K box, in the order
of `mma_sync_operand_a`; those of B of a K x 8 box, those of C and D of a 16 x 8 box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tilewright.backends.lower.context import Lowering, Registers, Table, lowers
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia.fragments import SlotReader, TileReader, operand_reader
from tilewright.ir.layout import LinearLayout, fma_accumulator, mma_sync_accumulator
from tilewright.ir.layout_fragments import fma_tile
from tilewright.ir.tile_ops import Dot
from tilewright.ir.types import DType, TileType, bf16, f8e4m3, f8e5m2, f16, f32, f64, i8, i32

ROWS, COLUMNS = 16, 8
#: K of the products of float32 parts that the matrix unit sums up before they are added to the accumulator
EXACT_K = 16

MMA_LOWERINGS: Table = {}

Reader = SlotReader | TileReader


@dataclass(frozen=True)
class Instruction:
    """One mma.sync: its K, its types of result, a and b, the constraint letters of operands and accumulators."""

    k: int
    result: str
    a: str
    b: str
    operand: str = "r"
    accumulator: str = "f"

    @property
    def name(self) -> str:
        return f"mma.sync.aligned.m16n8k{self.k}.row.col.{self.result}.{self.a}.{self.b}.{self.result}"


#: by the dtype of a; b has the same but for the two formats of 8-bit floats
INSTRUCTIONS: dict[DType, Instruction] = {
    f16: Instruction(16, "f32", "f16", "f16"),
    bf16: Instruction(16, "f32", "bf16", "bf16"),
    f32: Instruction(8, "f32", "tf32", "tf32"),
    f64: Instruction(8, "f64", "f64", "f64", "d", "d"),
    i8: Instruction(32, "s32", "s8", "s8", "r", "r"),
    f8e4m3: Instruction(32, "f32", "e4m3", "e4m3"),
    f8e5m2: Instruction(32, "f32", "e5m2", "e5m2"),
}
ACCUMULATES = {f64: f64, i8: i32}


@lowers(Dot, table=MMA_LOWERINGS)
def lower_dot(lw: Lowering, op: Dot) -> None:
    tile, right, acc = op.a.type, op.b.type, op.acc.type
    assert isinstance(tile, TileType) and isinstance(right, TileType) and isinstance(acc, TileType)
    dtype = tile.dtype
    if dtype == f32 and op.precision in ("default", "ieee"):
        lw.define(op.result, _outer_products(lw, op))
        return
    if dtype not in INSTRUCTIONS or acc.dtype != ACCUMULATES.get(dtype, f32):
        raise lw.error(f"dot of {dtype} into {acc.dtype} is not supported on {lw.target.name}")
    instruction = replace(INSTRUCTIONS[dtype], b=INSTRUCTIONS[right.dtype].b)
    lw.define(op.result, _Product(lw, op, instruction).run())


class _Product:
    """One dot on the matrix unit."""

    def __init__(self, lw: Lowering, op: Dot, instruction: Instruction):
        self.lw, self.op, self.instruction = lw, op, instruction
        acc, a, b = (lw.layout(v) for v in (op.acc, op.a, op.b))
        _check(lw, acc, mma_sync_accumulator((ROWS, COLUMNS)))
        self.layouts = acc, a, b
        self.depth = a.tile_shape[1]
        self.readers = operand_reader(lw, op.a), operand_reader(lw, op.b)
        self.rows = sorted({int(c[0]) for c in acc.table("register") if c[0] % ROWS == 0})
        self.columns = sorted({int(c[1]) for c in acc.table("register") if c[1] % COLUMNS == 0})
        #: the larger f64 instructions, where there are any
        if instruction.operand == "d" and lw.target.has("mma_f64") and self.depth % 16 == 0:
            self.instruction = replace(instruction, k=16)
        self.boxes: dict[tuple[int, ...], list[int]] = {}
        self.known: dict[tuple[Any, ...], mlir.Value] = {}

    def run(self) -> Registers:
        acc = self.layouts[0]
        held = list(self.lw.registers(self.op.acc))
        exact = self.op.precision == "3xtf32"
        step = EXACT_K if exact else self.instruction.k
        for first in range(0, self.depth, step):
            ks = range(first, min(first + step, self.depth), self.instruction.k)
            for number, row in enumerate(self.rows):
                for column in self.columns[:: -1 if number % 2 else 1]:  # neighbours share an operand
                    box = acc.registers_in((row, column), (ROWS, COLUMNS))
                    part = [held[r] for r in box]
                    result = self._split(row, column, ks, part) if exact else self._step(row, column, first, part)
                    for register, value in zip(box, result, strict=True):
                        held[register] = value
        return held

    def _step(self, row: int, column: int, k: int, acc: Registers) -> Registers:
        return self._mma(self._operands(0, (row, k)), self._operands(1, (k, column)), acc)

    def _split(self, row: int, column: int, ks: range, acc: Registers) -> Registers:
        """Three products of two parts each, summed apart: the unit truncates its sums, this addition rounds.

        a b = (a1 + a2) (b1 + b2), of which a2 b2 is below float32's precision.
        """
        fb = self.lw.fb
        total: Registers = [fb.f32(0.0)] * len(acc)
        for k in ks:
            (a, a_rest), (b, b_rest) = self._parts(0, (row, k)), self._parts(1, (k, column))
            for left, right in ((a_rest, b), (a, b_rest), (a, b)):
                total = self._mma(left, right, total)
        return [fb.fadd(x, y) for x, y in zip(acc, total, strict=True)]

    def _box(self, which: int, origin: tuple[int, int]) -> list[int]:
        key = (which, *origin)
        if key not in self.boxes:
            sizes = (ROWS, self.instruction.k) if which == 0 else (self.instruction.k, COLUMNS)
            self.boxes[key] = self.layouts[1 + which].registers_in(origin, sizes)
        return self.boxes[key]

    def _operands(self, which: int, origin: tuple[int, int]) -> Registers:
        """The registers of one instruction's operand."""
        reader, box = self.readers[which], self._box(which, origin)
        if self.instruction.operand == "d":
            return [reader.element(r) for r in box]
        words = [reader.word(r) for r in box[:: 32 // reader.dtype.bits]]
        if reader.dtype == f32:
            return [self._once(("tf32", which, *origin, i), partial(self._tf32, w)) for i, w in enumerate(words)]
        return words

    def _parts(self, which: int, origin: tuple[int, int]) -> tuple[Registers, Registers]:
        """A float32 operand as a tf32 operand and the rest, whose low 13 bits the unit ignores."""
        fb, reader = self.lw.fb, self.readers[which]
        big = self._operands(which, origin)

        def rest(register: int, word: mlir.Value) -> mlir.Value:
            value = reader.element(register)
            return fb.bitcast(fb.fsub(value, fb.bitcast(word, fb.types.f32)), fb.types.i32)

        small = [
            self._once(("rest", which, *origin, i), partial(rest, r, w))
            for i, (r, w) in enumerate(zip(self._box(which, origin), big, strict=True))
        ]
        return big, small

    def _once(self, key: tuple[Any, ...], make: Callable[[], mlir.Value]) -> mlir.Value:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def _tf32(self, word: mlir.Value) -> mlir.Value:
        """Round to nearest, ties away: without it the unit would ignore the low 13 bits."""
        fb = self.lw.fb
        return fb.inline_asm(fb.types.i32, "cvt.rna.tf32.f32 $0, $1;", "=r,r", [word], side_effects=False)

    def _mma(self, a: Sequence[mlir.Value], b: Sequence[mlir.Value], acc: Registers) -> Registers:
        if self.instruction.operand == "d" and not self.lw.target.has("mma_f64"):
            return self._small_f64(a, b, acc)
        return _emit(self.lw, self.instruction.name, self.instruction, a, b, acc)

    def _small_f64(self, a: Sequence[mlir.Value], b: Sequence[mlir.Value], acc: Registers) -> Registers:
        """m8n8k4, the one f64 instruction of Ampere: a holds (rows g and g + 8) of each 4 k, acc likewise."""
        name, result = "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", list(acc)
        for half in range(2):
            for step in range(len(b)):
                part = result[2 * half : 2 * half + 2]
                result[2 * half : 2 * half + 2] = _emit(
                    self.lw, name, self.instruction, [a[2 * step + half]], [b[step]], part
                )
        return result


def _emit(
    lw: Lowering,
    name: str,
    instruction: Instruction,
    a: Sequence[mlir.Value],
    b: Sequence[mlir.Value],
    acc: Sequence[mlir.Value],
) -> Registers:
    """``d = a b + c``; a statement of its own, so that ptxas may order and interleave."""
    groups, first = [], 0
    for count in (len(acc), len(a), len(b), len(acc)):
        groups.append("{" + ", ".join(f"${first + i}" for i in range(count)) + "}")
        first += count
    kinds = [f"={instruction.accumulator}"] * len(acc) + [instruction.operand] * (len(a) + len(b))
    constraints = ",".join([*kinds, *[instruction.accumulator] * len(acc)])
    types = [value.type for value in acc]
    return list(lw.fb.inline_asm(types, f"{name} {', '.join(groups)};", constraints, [*a, *b, *acc]))


def _check(lw: Lowering, layout: LinearLayout, fragment: LinearLayout) -> None:
    """Lanes and innermost registers are those of the fragment."""
    inner = fragment.basis("register")
    if layout.basis("register")[: len(inner)] != inner or layout.basis("lane") != fragment.basis("lane"):
        raise lw.error(f"the accumulator's layout belongs to no matrix instruction: {layout}")


# --- the vector unit --------------------------------------------------------------------------------


def _outer_products(lw: Lowering, op: Dot) -> Registers:
    """One fused multiply-add for each accumulator and step of K, in the order of K."""
    layouts = [lw.layout(v) for v in (op.acc, op.a, op.b)]
    acc, a, b = layouts
    _check(lw, acc, fma_accumulator(fma_tile(acc.tile_shape[1])))
    readers = operand_reader(lw, op.a), operand_reader(lw, op.b)
    held = list(lw.registers(op.acc))
    places = {tuple(c): r for r, c in reversed(list(enumerate(acc.table("register").tolist())))}
    left = {tuple(c): r for r, c in reversed(list(enumerate(a.table("register").tolist())))}
    right = {tuple(c): r for r, c in reversed(list(enumerate(b.table("register").tolist())))}
    for k in range(a.tile_shape[1]):
        for (row, column), register in places.items():
            x, y = readers[0].element(left[row, k]), readers[1].element(right[k, column])
            held[register] = lw.fb.fma(x, y, held[register])
    return held
