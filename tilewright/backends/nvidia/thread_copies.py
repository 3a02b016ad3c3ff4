"""Copies that the threads of a role make themselves, for views that the copy engine cannot address.

The role's warps read the tile with coalesced, masked loads and write it to the swizzled slot. They go through it in
chunks of registers, so that a role with few registers can copy large tiles.
"""

from __future__ import annotations

from math import gcd

from tilewright.backends.lower.context import Lowering, Registers, ViewRef
from tilewright.backends.lower.elements import constant, join_vector, to_memory
from tilewright.backends.lower.memory import TileAccess
from tilewright.backends.lower.shared import SharedAccess
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


class _Copier:
    """One copy. Each side of a branch makes its own addresses (`TileAccess.fresh`)."""

    def __init__(self, lw: Lowering, op: Copy):
        self.lw, self.slot = lw, lw.slot(op.slot)
        view = lw.view(op.view)
        self.layout = copy_layout(lw, view, self.slot.type.shape)
        self.source = TileAccess(lw, view, op.index, self.layout)
        self.pad = constant(lw, op.pad, view.dtype)

    def run(self) -> None:
        whole = self.source.whole()
        if whole is None:
            self._inside()
        else:
            self.lw.fb.if_else(whole, [], self._inside, self._partly)

    def _inside(self) -> Registers:
        return self._move(self.source.width, masked=False)

    def _partly(self) -> Registers:
        some = self.source.some()
        if some is None or not any(self.source.is_ragged(axis) for axis in self.source.open_axes()):
            return self._outside()
        return self.lw.fb.if_else(some, [], self._masked, self._outside)

    def _masked(self) -> Registers:
        return self._move(self.source.masked_width(), masked=True)

    def _outside(self) -> Registers:
        self._write(self._target(), 0, [self.pad] * self.layout.num_registers)
        return []

    def _target(self) -> SharedAccess:
        return SharedAccess(self.lw, self.slot.base, self.slot.layout, self.layout, self.slot.dtype)

    def _move(self, width: int, masked: bool) -> Registers:
        """Load and store chunk by chunk."""
        source, target, total = self.source.fresh(), self._target(), self.layout.num_registers
        chunk = max(width, target.width, CHUNK_BYTES // self.slot.dtype.bytes)
        for first in range(0, total, chunk):
            values: Registers = []
            for register in range(first, min(first + chunk, total), width):
                values += source.load_group(register, width, self.pad if masked else None)
            self._write(target, first, values)
        return []

    def _write(self, target: SharedAccess, first: int, values: Registers) -> None:
        """Store registers ``first``, ... to the slot."""
        lw, width = self.lw, target.width
        for start in range(0, len(values), width):
            parts = [to_memory(lw, v, self.slot.dtype) for v in values[start : start + width]]
            lw.fb.store(join_vector(lw, parts), target.pointer(first + start), width * self.slot.dtype.bytes)
