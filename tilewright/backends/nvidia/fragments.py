"""Operands of matrix products in registers: whole tiles, or read from shared memory where a dot needs them.

An operand that only one dot reads is not loaded as a whole: the dot reads it step by step along K (`Operands`),
so that no more of it than a few steps takes registers.

``ldmatrix`` (PTX ISA, "Warp Level Matrix Load Instruction: ldmatrix") gives lane l word l % 4 of row l / 4 of each
8 x 16-byte matrix, whose rows' addresses come from lanes 8 i ... 8 i + 7 for matrix i. That is the fragment of every
mma.sync operand of 32 bits or less whose slot runs along K; of 16-bit elements ``.trans`` reads the other direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.backends.lower.context import Lowering, Registers, SlotRef, Table, lowers
from tilewright.backends.lower.deferred import is_deferrable
from tilewright.backends.lower.elements import join_vector, memory_type, split_vector
from tilewright.backends.lower.shared import SharedAccess, lower_local_load
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import ptx
from tilewright.backends.nvidia.state import state
from tilewright.ir.async_ops import LocalLoad
from tilewright.ir.core import Value
from tilewright.ir.layout import LinearLayout, SharedLayout
from tilewright.ir.layout_bits import log2_exact, unit
from tilewright.ir.types import DType, TileType

#: of a matrix that ldmatrix reads
ROW_BYTES = 16

FRAGMENT_LOWERINGS: Table = {}


# --- matrices that ldmatrix reads -----------------------------------------------------------------


@dataclass(frozen=True)
class MatrixRead:
    """How ``ldmatrix`` fills a register layout. Register r of ``rows`` is one instruction: where lanes point."""

    rows: LinearLayout
    #: 8 x 16-byte matrices, and elements in registers, of one instruction
    matrices: int
    elements: int
    transposed: bool


def matrix_read(layout: LinearLayout, shared: SharedLayout) -> MatrixRead | None:
    """How to read a slot into a fragment layout by ``ldmatrix``; None where that does not give it."""
    bits, registers = shared.element_bits, layout.basis("register")
    if len(shared.shape) != 2 or bits not in (8, 16, 32):
        return None
    packed, contiguous = 32 // bits, shared.order[0]
    inner = log2_exact(packed)
    for along in (0, 1):
        lanes = [unit(2, along, packed << i) for i in range(2)] + [unit(2, 1 - along, 1 << i) for i in range(3)]
        words = tuple(unit(2, along, 1 << i) for i in range(inner))
        if layout.basis("lane") == tuple(lanes) and registers[:inner] == words:
            break
    else:
        return None
    transposed = contiguous != along
    run = ROW_BYTES * 8 // bits  # elements of a row
    sizes = [8, 8]
    sizes[along] = 4 * packed
    if (transposed and bits != 16) or shared.block_size % run or (shared.max_phase > 1 and shared.vec % run):
        return None
    others = [*registers[inner:], *layout.basis("warp")]
    if any(c % sizes[axis] for v in others for axis, c in enumerate(v)):
        return None
    if any(size % sizes[axis] for axis, size in enumerate(layout.shape)):
        return None
    walk = along if transposed else 1 - along
    picked = registers[inner : inner + 2]
    bases = {
        "register": registers[inner + len(picked) :],
        "lane": [*(unit(2, walk, 1 << i) for i in range(3)), *picked, *[(0, 0)] * (2 - len(picked))],
        "warp": layout.basis("warp"),
    }
    rows = LinearLayout.make(bases, layout.shape, layout.repeat, layout.repeat_order)
    matrices = 1 << len(picked)
    return MatrixRead(rows, matrices, matrices * packed, transposed)


# --- loads that wait for their dot ------------------------------------------------------------------


@lowers(LocalLoad, table=FRAGMENT_LOWERINGS)
def lower_operand_load(lw: Lowering, op: LocalLoad) -> None:
    if op.at is not None:
        lower_local_load(lw, op)
        return
    if is_deferrable(op):
        state(lw).deferred[op.result] = lw.slot(op.slot)
        return
    reader = SlotReader(lw, lw.slot(op.slot), lw.layout(op.result))
    lw.define(op.result, [e for r in range(0, reader.layout.num_registers, reader.unit) for e in reader.elements(r)])


class SlotReader:
    """Reads the registers of a layout from a slot, ``unit`` at a time, each run once."""

    def __init__(self, lw: Lowering, slot: SlotRef, layout: LinearLayout):
        self.lw, self.dtype, self.layout = lw, slot.dtype, layout
        self.matrix = matrix_read(layout, slot.layout)
        registers = layout if self.matrix is None else self.matrix.rows
        self.access = SharedAccess(lw, slot.base, slot.layout, registers, slot.dtype)
        self.unit = self.access.width if self.matrix is None else self.matrix.elements
        self._words: dict[int, Registers] = {}
        self._elements: dict[int, Registers] = {}

    def _matrix_words(self, number: int) -> Registers:
        """The words of one ``ldmatrix``."""
        assert self.matrix is not None
        if number not in self._words:
            place, matrix = self.access.place(number), self.matrix
            self._words[number] = ptx.load_matrices(self.lw.fb, place, matrix.matrices, matrix.transposed)
        return self._words[number]

    def elements(self, register: int) -> Registers:
        """The elements of the run of ``unit`` registers around one."""
        first = register - register % self.unit
        if first not in self._elements:
            if self.matrix is not None:
                words = self._matrix_words(first // self.unit)
                self._elements[first] = [e for word in words for e in unpack_word(self.lw, word, self.dtype)]
            else:
                type_ = memory_type(self.lw, self.dtype, self.unit)
                value = self.lw.fb.load(self.access.pointer(first), type_, self.unit * self.dtype.bytes)
                self._elements[first] = split_vector(self.lw, value, self.unit)
        return self._elements[first]

    def word(self, register: int) -> mlir.Value:
        """The 32-bit word that starts at a register (elements of 32 bits or less)."""
        if self.matrix is not None:
            packed = 32 // self.dtype.bits
            return self._matrix_words(register // self.unit)[register % self.unit // packed]
        return pack_word(self.lw, [self.element(r) for r in range(register, register + 32 // self.dtype.bits)])

    def element(self, register: int) -> mlir.Value:
        return self.elements(register)[register % self.unit]


class TileReader:
    """The same for a tile in registers."""

    def __init__(self, lw: Lowering, registers: Registers, dtype: DType):
        self.lw, self.registers, self.dtype = lw, registers, dtype
        self._words: dict[int, mlir.Value] = {}

    def word(self, register: int) -> mlir.Value:
        if register not in self._words:
            count = 32 // self.dtype.bits
            self._words[register] = pack_word(self.lw, self.registers[register : register + count])
        return self._words[register]

    def element(self, register: int) -> mlir.Value:
        return self.registers[register]


def operand_reader(lw: Lowering, value: Value) -> SlotReader | TileReader:
    """Reads a dot's operand where it is."""
    waiting = state(lw).deferred.get(value)
    if waiting is not None:
        return SlotReader(lw, waiting, lw.layout(value))
    assert isinstance(value.type, TileType)
    return TileReader(lw, lw.registers(value), value.type.dtype)


def pack_word(lw: Lowering, elements: Sequence[mlir.Value]) -> mlir.Value:
    """One to four elements as an i32, the first in the lowest bits."""
    return lw.fb.bitcast(join_vector(lw, elements), lw.fb.types.i32)


def unpack_word(lw: Lowering, word: mlir.Value, dtype: DType) -> Registers:
    """The inverse of `pack_word`."""
    fb, count = lw.fb, 32 // dtype.bits
    one = fb.types.dtype(dtype.name)
    return [fb.bitcast(word, one)] if count == 1 else fb.unpack_vector(fb.bitcast(word, fb.types.vec(count, one)))
