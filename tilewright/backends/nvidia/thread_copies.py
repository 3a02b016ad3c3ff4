"""Copies that the threads of a role make themselves, for views that the copy engine cannot address.

The role's warps read the tile with coalesced, masked loads and write it to the swizzled slot. They go through it in
chunks of registers, so that a role with few registers can copy large tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from tilewright.backends.lower.context import Lowering, Registers, ViewRef
from tilewright.backends.lower.elements import constant, join_vector, to_memory
from tilewright.backends.lower.memory import TileAccess
from tilewright.backends.lower.shared import SharedAccess
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.async_ops import Copy
from tilewright.ir.layout import LinearLayout, blocked

MAX_VECTOR_BYTES = 16
#: bytes in flight per thread
CHUNK_BYTES = 128


def copy_by_threads(lw: Lowering, op: Copy) -> None:
    """All threads of the scope copy the tile at ``op.index`` into ``op.slot``, ``op.pad`` where it is outside."""
    if lw.scope.single_thread:
        raise lw.error("threads copy the tile, but the role has one thread")
    _Copier(lw, op).run()


def vector_bytes(view: ViewRef, shape: tuple[int, ...]) -> int:
    """The widest access that every tile of the view allows: its address, strides and size are multiples of it."""
    unit, steps = view.dtype.bytes, [MAX_VECTOR_BYTES, view.align]
    for size, stride in zip(shape, view.strides, strict=True):
        if isinstance(stride, int):
            steps.append(unit * (size if stride == 1 else stride))
        else:
            steps.append(view.stride_align)
    return max(unit, gcd(*steps))


def copy_layout(lw: Lowering, view: ViewRef, shape: tuple[int, ...]) -> LinearLayout:
    """Lanes along the view's contiguous dim, in vectors where alignment allows."""
    ones = [axis for axis, stride in enumerate(view.strides) if isinstance(stride, int) and stride == 1]
    fastest = ones[-1] if ones else len(shape) - 1
    order = (fastest, *(axis for axis in reversed(range(len(shape))) if axis != fastest))
    width = vector_bytes(view, shape) if ones else view.dtype.bytes
    return blocked(shape, view.dtype.bits, lw.scope.num_warps, lw.target.warp_size, order, width)


@dataclass
class _Copier:
    lw: Lowering
    op: Copy

    def run(self) -> None:
        lw, slot, view = self.lw, self.lw.slot(self.op.slot), self.lw.view(self.op.view)
        layout = copy_layout(lw, view, slot.type.shape)
        self.source = TileAccess(lw, view, self.op.index, layout)
        self.target = SharedAccess(lw, slot.base, slot.layout, layout, slot.dtype)
        self.pad = constant(lw, self.op.pad, view.dtype)
        whole = self.source.whole()
        if whole is None:
            self._move(self.source.width, masked=False)
            return
        lw.fb.if_else(whole, [], self._inside, self._partly)

    def _inside(self) -> Registers:
        self._move(self.source.width, masked=False)
        return []

    def _partly(self) -> Registers:
        some = self.source.some()
        if some is None or not any(self.source.is_ragged(axis) for axis in self.source.open_axes()):
            return self._outside()
        return self.lw.fb.if_else(some, [], self._masked, self._outside)

    def _masked(self) -> Registers:
        self._move(self.source.masked_width(), masked=True)
        return []

    def _outside(self) -> Registers:
        self._write(0, [self.pad] * self.source.layout.num_registers)
        return []

    def _move(self, width: int, masked: bool) -> None:
        """Load and store chunk by chunk."""
        total = self.source.layout.num_registers
        chunk = max(width, self.target.width, CHUNK_BYTES // self.source.view.dtype.bytes)
        for first in range(0, total, chunk):
            values: Registers = []
            for register in range(first, min(first + chunk, total), width):
                values += self.source.load_group(register, width, self.pad if masked else None)
            self._write(first, values)

    def _write(self, first: int, values: list[mlir.Value]) -> None:
        """Store registers ``first``, ... to the slot."""
        lw, width = self.lw, self.target.width
        for start in range(0, len(values), width):
            parts = [to_memory(lw, v, self.source.view.dtype) for v in values[start : start + width]]
            pointer = self.target.pointer(first + start)
            lw.fb.store(join_vector(lw, parts), pointer, width * self.source.view.dtype.bytes)
