"""Matrix products on the warpgroup matrix unit: ``wgmma.mma_async`` and its waits.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". One dot is one group: a fence, an instruction for each
64-row block, column part and 16 steps of K, and a commit, all in one assembly statement, so that nothing can come
between. Accumulators are tied to the statement's results, which say what is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.backends.lower import control
from tilewright.backends.lower.context import Lowering, Registers, SlotRef, Table, TokenRef, lowers
from tilewright.backends.lower.index import IntLike
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import ptx
from tilewright.backends.nvidia.descriptors import (
    ADDRESS_MASK,
    INSTRUCTION_K,
    MatrixDescriptor,
    instruction_k,
    matrix_descriptor,
)
from tilewright.backends.nvidia.state import warpgroup_count, warpgroup_index
from tilewright.ir.async_ops import AsyncDot, Wait
from tilewright.ir.core import Operation, Value
from tilewright.ir.layout import LinearLayout, wgmma_accumulator, wgmma_operand_a
from tilewright.ir.tile_ops import Constant, For
from tilewright.ir.types import DType, SlotType, TileType, TokenType, bf16, f8e4m3, f8e5m2, f16, f32, i8, i32

BLOCK_ROWS, MOST_COLUMNS, COLUMN_STEP = 64, 256, 8
#: operands in the names of instructions
KINDS: dict[DType, str] = {bf16: "bf16", f16: "f16", f32: "tf32", f8e4m3: "e4m3", f8e5m2: "e5m2", i8: "s8"}
#: instructions on integers wider than 32 columns exist for multiples of 16
FEW_COLUMNS, INTEGER_COLUMN_STEP = 32, 16

WGMMA_LOWERINGS: Table = {}


@dataclass(frozen=True)
class Shape:
    """How one warpgroup covers its part: ``blocks`` of 64 rows, ``parts`` of ``columns``, ``steps`` of ``depth`` (K).

    ``row_step`` and ``column_step``: distance between the parts of neighbouring warpgroups.
    """

    blocks: int
    parts: int
    columns: int
    steps: int
    row_step: int
    column_step: int
    depth: int = INSTRUCTION_K

    @classmethod
    def of(cls, m: int, n: int, k: int, groups: int, grain: int = COLUMN_STEP, depth: int = INSTRUCTION_K) -> Shape:
        """``grain``: what columns of one instruction start at multiples of (a block of an MN-major operand b).

        ``depth``: K of one instruction.
        """
        split_rows = m > BLOCK_ROWS
        rows, columns = (m // groups, n) if split_rows else (m, n // groups)
        if rows % BLOCK_ROWS or k % depth or columns % COLUMN_STEP or not columns:
            raise ValueError(f"({m}, {k}) @ ({k}, {n}) does not split over {groups} warpgroups")
        whole = columns <= MOST_COLUMNS and columns == n
        sizes = [columns] if whole else [c for c in range(MOST_COLUMNS, 0, -COLUMN_STEP) if columns % c == 0]
        fitting = [c for c in sizes if whole or (c % grain == 0 and c <= columns)]
        if not fitting:
            raise ValueError(
                f"{columns} columns do not split into parts of {MOST_COLUMNS} or less, multiples of {grain}"
            )
        row_step, column_step = (rows, 0) if split_rows else (0, columns)
        size = fitting[0]
        return cls(rows // BLOCK_ROWS, columns // size, size, k // depth, row_step, column_step, depth)


# --- operands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlotOperand:
    """An operand in shared memory: ``base`` is the lower half (i32) of the descriptor of the warpgroup's first part."""

    descriptor: MatrixDescriptor
    base: mlir.Value

    def at(self, position: int, k: int) -> Part:
        """The part at (M or N position, k)."""
        return Part(self.base, self.descriptor.start(position, k) >> 4, self.descriptor.bits >> 32)


@dataclass(frozen=True)
class Part:
    """The descriptor ``(base + step, upper)`` of a part of an operand."""

    base: mlir.Value
    step: int
    upper: int


def slot_operand(lw: Lowering, slot: SlotRef, axis: int, step: int) -> SlotOperand:
    """``axis``: the M or N dim of the slot; ``step``: how many rows (columns) lie between warpgroups."""
    fb, descriptor, groups = lw.fb, matrix_descriptor(slot.layout, axis), warpgroup_count(lw)
    address: IntLike = slot.base
    if step and groups > 1:
        distance = descriptor.step(step, groups)
        address = lw.index.add(address, lw.index.mul(warpgroup_index(lw), distance))
    start = fb.and_(fb.lshr(lw.index.value(address), 4), ADDRESS_MASK)
    return SlotOperand(descriptor, fb.or_(start, descriptor.bits & 0xFFFFFFFF))


def register_operand(
    lw: Lowering, tile: TileType, registers: Registers, shape: Shape
) -> dict[tuple[int, int], Registers]:
    """The four words of A (float32 elements, or pairs or fours of smaller ones along K) by (64-row block, K step)."""
    layout = wgmma_operand_a(tile.shape, tile.dtype.bits, warpgroup_count(lw))
    if tile.layout != layout:
        raise lw.error(f"operand a is laid out as {tile.layout}, the matrix unit reads {layout}")
    words = {}
    for block in range(shape.blocks):
        for step in range(shape.steps):
            box = layout.registers_in((BLOCK_ROWS * block, shape.depth * step), (BLOCK_ROWS, shape.depth))
            words[block, step] = pack_words(lw, [registers[r] for r in box])
    return words


def pack_words(lw: Lowering, elements: Sequence[mlir.Value]) -> Registers:
    """Elements as i32: two of 16 bits or four of 8, the first in the lowest bits; 32-bit elements as they are."""
    if elements and elements[0].type == lw.fb.types.f32:
        return [lw.fb.bitcast(element, lw.fb.types.i32) for element in elements]
    count = 4 if elements and elements[0].type == lw.fb.types.i8 else 2
    parts = [elements[first : first + count] for first in range(0, len(elements), count)]
    return [lw.fb.bitcast(lw.fb.pack_vector(part), lw.fb.types.i32) for part in parts]


# --- one group ------------------------------------------------------------------------------------


class Group:
    """The assembly statement of one dot. Results and tied accumulators come first, then operands as they turn up.

    Descriptors are put together in the statement: LLVM would compute all of them in front of the loop and keep them
    in registers.
    """

    def __init__(self, lw: Lowering, accumulators: Registers, tied: bool):
        self.lw, self.accumulators, self.tied = lw, accumulators, tied
        self.descriptors: dict[Part, str] = {}
        self.inputs: list[mlir.Value] = []
        self.kinds: list[str] = []
        self.numbers: dict[mlir.Value, int] = {}
        self.lines: list[str] = []

    def operand(self, value: mlir.Value, kind: str) -> str:
        """The place ``$n`` of an operand."""
        if value not in self.numbers:
            self.numbers[value] = len(self.accumulators) * (2 if self.tied else 1) + len(self.inputs)
            self.inputs.append(value)
            self.kinds.append(kind)
        return f"${self.numbers[value]}"

    def part(self, part: Part) -> str:
        """The register with the descriptor of a part."""
        if part not in self.descriptors:
            name = self.descriptors[part] = f"part{len(self.descriptors)}"
            lower, upper = f"lower{len(self.descriptors)}", f"upper{len(self.descriptors)}"
            self.lines += [
                f".reg .b32 {lower}, {upper};",
                f".reg .b64 {name};",
                f"add.s32 {lower}, {self.operand(part.base, 'r')}, {part.step};",
                f"mov.b32 {upper}, {part.upper};",
                f"mov.b64 {name}, {{{lower}, {upper}}};",
            ]
        return self.descriptors[part]

    def multiply(
        self, registers: Sequence[int], dtypes: tuple[DType, DType], a: str, b: str, accumulate: bool, transpose: str
    ) -> None:
        """One instruction on the accumulators numbered ``registers``; ``dtypes`` of a and b."""
        columns = len(registers) * 2  # 64 rows over 128 threads
        left, right = (KINDS[dtype] for dtype in dtypes)
        k = instruction_k(dtypes[0].bits)
        result, signs = ("s32", "") if dtypes[0] == i8 else ("f32", ", 1, 1")  # integers have no negated operands
        name = f"wgmma.mma_async.sync.aligned.m64n{columns}k{k}.{result}.{left}.{right}"
        places = ", ".join(f"${r}" for r in registers)
        self.lines.append(f"{name} {{{places}}}, {a}, {b}, {int(accumulate)}{signs}{transpose};")

    def emit(self) -> Registers:
        count, type_ = len(self.accumulators), self.accumulators[0].type
        ties = [str(i) for i in range(count)] if self.tied else []
        constraints = ",".join([f"={_CONSTRAINTS[str(type_)]}"] * count + ties + self.kinds + [ptx.MEMORY])
        text = "\n".join(["{", "wgmma.fence.sync.aligned;", *self.lines, "wgmma.commit_group.sync.aligned;", "}"])
        arguments = [*(self.accumulators if self.tied else []), *self.inputs]
        return list(self.lw.fb.inline_asm([type_] * count, text, constraints, arguments))


@lowers(AsyncDot, table=WGMMA_LOWERINGS)
def lower_async_dot(lw: Lowering, op: AsyncDot) -> None:
    (m, n), k = _accumulator(op).shape, _slot_type(op.b).shape[0]
    layout, groups = _check(lw, op), warpgroup_count(lw)
    dtype = _slot_type(op.b).dtype
    dtypes = _element_type(op.a), dtype
    shape = Shape.of(m, n, k, groups, _column_grain(lw.slot(op.b)), instruction_k(dtype.bits))
    _pin_later_operands(lw, op)
    zero = isinstance(op.acc.op, Constant) and op.acc.op.value == 0
    group = Group(lw, lw.registers(op.acc), tied=not zero)
    b = slot_operand(lw, lw.slot(op.b), 1, shape.column_step)
    rows = _row_operand(lw, op, shape, group)
    trans_b = f", {int(b.descriptor.transposed)}" if dtype.bits == 16 else ""
    for step in range(shape.steps):
        for block in range(shape.blocks):
            a, trans_a = rows(block, step)
            for part in range(shape.parts):
                column = shape.columns * part
                registers = layout.registers_in((BLOCK_ROWS * block, column), (BLOCK_ROWS, shape.columns))
                place = group.part(b.at(column, shape.depth * step))
                group.multiply(registers, dtypes, a, place, not zero or step > 0, trans_a + trans_b)
    lw.define(op.results[0], group.emit())
    lw.define(op.results[1], TokenRef("mma"))


def _column_grain(slot: SlotRef) -> int:
    """What the columns of one instruction start at multiples of: a block of an MN-major operand b is not cut."""
    if slot.layout.order[0] == 1:
        return slot.layout.block_size
    return INTEGER_COLUMN_STEP if slot.dtype == i8 and slot.type.shape[1] > FEW_COLUMNS else COLUMN_STEP


def _row_operand(lw: Lowering, op: AsyncDot, shape: Shape, group: Group):  # type: ignore[no-untyped-def]
    """(block, step) -> the text of operand a, and of its transposition flag where it lies in shared memory."""
    if isinstance(op.a.type, SlotType):
        slot = slot_operand(lw, lw.slot(op.a), 0, shape.row_step)
        flag = f", {int(slot.descriptor.transposed)}" if slot.descriptor.layout.element_bits == 16 else ""
        return lambda block, step: (group.part(slot.at(BLOCK_ROWS * block, shape.depth * step)), flag)
    assert isinstance(op.a.type, TileType)
    words = register_operand(lw, op.a.type, lw.registers(op.a), shape)

    def in_registers(block: int, step: int) -> tuple[str, str]:
        return "{" + ", ".join(group.operand(word, "r") for word in words[block, step]) + "}", ""

    return in_registers


def _check(lw: Lowering, op: AsyncDot) -> LinearLayout:
    """The accumulator's layout, once dtypes and layout are those of the matrix unit."""
    acc, dtype = _accumulator(op), _slot_type(op.b).dtype
    if dtype not in KINDS or acc.dtype != (i32 if dtype == i8 else f32):
        raise lw.error(f"the matrix unit has no product of {dtype} into {acc.dtype}")
    layout = wgmma_accumulator(acc.shape, warpgroup_count(lw))
    if acc.layout != layout:
        raise lw.error(f"the accumulator is laid out as {acc.layout}, the matrix unit writes {layout}")
    return layout


def _accumulator(op: AsyncDot) -> TileType:
    assert isinstance(op.acc.type, TileType)
    return op.acc.type


def _element_type(value: Value) -> DType:
    assert isinstance(value.type, SlotType | TileType)
    return value.type.dtype


def _slot_type(value: Value) -> SlotType:
    assert isinstance(value.type, SlotType)
    return value.type


# --- order of registers and waits -----------------------------------------------------------------


_CONSTRAINTS = {"f32": "f", "f64": "d", "i32": "r", "i64": "l"}


def through(lw: Lowering, text: str, values: Sequence[mlir.Value], clobbers: str = "") -> Registers:
    """The same values as results of an assembly statement: nothing that uses them can come before it."""
    kinds = [_CONSTRAINTS[str(v.type)] for v in values]
    ties = [*(f"={kind}" for kind in kinds), *map(str, range(len(values))), *([clobbers] if clobbers else [])]
    return list(lw.fb.inline_asm([v.type for v in values], text, ",".join(ties), values))


def pin(lw: Lowering, values: Sequence[mlir.Value]) -> Registers:
    """The same values through an empty statement: LLVM can neither move them before it nor compute them later."""
    return through(lw, "", values)


def to_words(lw: Lowering, value: Value) -> Registers:
    """A tile's registers as assembly takes them: elements below 32 bits in words."""
    registers = lw.registers(value)
    return pack_words(lw, registers) if _shares_words(value) else registers


def from_words(lw: Lowering, value: Value, words: Registers) -> Registers:
    """The inverse of `to_words`."""
    if not _shares_words(value):
        return words
    assert isinstance(value.type, TileType)
    vector = lw.fb.types.vec(32 // value.type.dtype.bits, lw.fb.types.dtype(value.type.dtype.name))
    return [element for word in words for element in lw.fb.unpack_vector(lw.fb.bitcast(word, vector))]


def _shares_words(value: Value) -> bool:
    return isinstance(value.type, TileType) and value.type.dtype.bits in (8, 16)


def _pin_later_operands(lw: Lowering, op: AsyncDot) -> None:
    """Fix what the groups issued right behind this one read from registers, while none is in flight.

    LLVM moves plain arithmetic across assembly statements; computed between two groups, operands of the second
    would make ptxas serialise both (C7513 and its kin).
    """
    block = op.parent
    assert block is not None
    position = block.ops.index(op)
    if _issues_before(block.ops[:position]):
        return
    for later in block.ops[position + 1 :]:
        if isinstance(later, Wait):
            break
        if isinstance(later, AsyncDot):
            for value in (later.a, later.acc):
                if value.owner is block or value.op in block.ops[:position]:
                    _pin_value(lw, value)


def _issues_before(ops: Sequence[Operation]) -> bool:
    """Whether the block issues a group before that no wait has retired."""
    for op in reversed(ops):
        if isinstance(op, Wait):
            return False
        if isinstance(op, AsyncDot):
            return True
    return False


def _pin_value(lw: Lowering, value: Value) -> None:
    if isinstance(value.type, TileType) and not isinstance(value.op, Constant | AsyncDot):
        lw.define(value, from_words(lw, value, pin(lw, to_words(lw, value))))


def lower_pinned_for(lw: Lowering, op: For) -> None:
    """A loop whose accumulators are in registers before it, also where they begin as constants.

    LLVM may write the constants of a loop that runs no time behind the loop's groups, where ptxas sees no wait in
    between, and serialises them all (C7515). Elsewhere constants are better: the first group need not read them.
    """
    accumulators = {inner.acc for inner in op.body.block.ops if isinstance(inner, AsyncDot)}
    initial: Registers = []
    for init, carried in zip(op.inits, op.carried, strict=True):
        pinned = carried in accumulators and isinstance(init.op, Constant)
        initial += pin(lw, lw.registers(init)) if pinned else lw.flatten([init])
    control.loop(lw, op, initial)


@lowers(Wait, table=WGMMA_LOWERINGS)
def lower_wait(lw: Lowering, op: Wait) -> None:
    """``wgmma.wait_group`` with the values passed through it, so that nothing reads them before.

    A wait for copies of threads counts their groups instead.
    """
    if op.token is not None and op.token.type == TokenType("cp_async"):
        ptx.wait_copies(lw.fb, op.pending)
        return
    text = f"wgmma.wait_group.sync.aligned {op.pending};"
    parts = [to_words(lw, value) for value in op.values]
    if not parts:
        ptx.emit(lw.fb, text)
        return
    words = iter(through(lw, text, [word for part in parts for word in part], ptx.MEMORY))
    for value, result, part in zip(op.values, op.results, parts, strict=True):
        lw.define(result, from_words(lw, value, [next(words) for _ in part]))
