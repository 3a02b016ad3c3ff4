"""Asynchronous copies of threads, from global to shared memory without registers: ``cp.async``.

PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy". A copy moves 4, 8 or 16 bytes and fills with
zeros what its source size leaves out, which is how parts of a tile outside the tensor come to be zero. Every
`async.copy` is one group of the thread; ``cp.async.wait_group n`` waits for all but the youngest n.
"""

from __future__ import annotations

from functools import reduce

from tilewright.backends.lower.context import Lowering, TokenRef
from tilewright.backends.lower.coordinates import sole_holder
from tilewright.backends.lower.memory import TileAccess, run_if
from tilewright.backends.lower.shared import SharedAccess
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import ptx
from tilewright.backends.nvidia.thread_copies import copy_layout, vector_bytes
from tilewright.ir.async_ops import Copy

KIND = "cp_async"


def lower_cp_async(lw: Lowering, op: Copy) -> None:
    if op.pad != 0:
        raise lw.error(f"cp.async pads with zeros, not with {op.pad}")
    copier = _Copier(lw, op)
    run_if(lw, sole_holder(lw, copier.layout), copier.run)
    ptx.commit_copies(lw.fb)
    lw.define(op.result, TokenRef(KIND))


class _Copier:
    """One copy: every thread has runs of its layout, as wide as the view's alignment allows."""

    def __init__(self, lw: Lowering, op: Copy):
        self.lw, self.op, self.slot, self.view = lw, op, lw.slot(op.slot), lw.view(op.view)
        shape = self.slot.type.shape
        self.layout = op.layout or copy_layout(lw, self.view, shape)
        self.axis = self.slot.layout.order[0]
        size = self.view.dtype.bytes
        self.width = min(vector_bytes(self.view, shape) // size, self.layout.contiguity(self.axis))
        if self.width * size < 4 or self.view.strides[self.axis] != 1:
            raise lw.error(f"cp.async copies 4, 8 or 16 contiguous bytes; this view allows {self.width * size}")

    def run(self) -> None:
        access = TileAccess(self.lw, self.view, self.op.index, self.layout)
        target = SharedAccess(self.lw, self.slot.base, self.slot.layout, self.layout, self.slot.dtype)
        if target.width < self.width:
            raise self.lw.error(f"{self.width} elements are not contiguous in {self.slot.layout}")
        whole = access.whole()
        if whole is None:
            self._copy(access, target, masked=False)
            return

        def side(masked: bool) -> list[mlir.Value]:
            destination = SharedAccess(self.lw, self.slot.base, self.slot.layout, self.layout, self.slot.dtype)
            self._copy(access.fresh(), destination, masked)
            return []

        self.lw.fb.if_else(whole, [], lambda: side(False), lambda: side(True))

    def _copy(self, access: TileAccess, target: SharedAccess, masked: bool) -> None:
        fb, size = self.lw.fb, self.width * self.view.dtype.bytes
        for first in access.groups(self.width):
            count = self._inside(access, first) if masked else None
            ptx.copy_async(fb, target.place(first), access.pointer(first), size, count, self.op.evict)

    def _inside(self, access: TileAccess, register: int) -> mlir.Value:
        """Bytes of a run that lie inside the view (i32)."""
        fb, math, view = self.lw.fb, self.lw.index, self.view
        parts, conditions = access.coordinates.register[register], []
        size = fb.i32(self.width * view.dtype.bytes)
        for axis in access.open_axes():
            place = math.value(math.add(access.starts[axis], access.coordinates.along(axis, parts[axis])))
            limit = math.value(view.shape[axis])
            if axis == self.axis:
                left = fb.mul(fb.smax(fb.sub(limit, place), 0), view.dtype.bytes)
                size = fb.smin(left, size)
                conditions.append(fb.icmp("sge", place, 0))
            else:
                conditions.append(fb.icmp("ult", place, limit))
        return fb.select(reduce(fb.and_, conditions), size, 0) if conditions else size
