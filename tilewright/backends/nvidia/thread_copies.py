"""Copies that the threads of a role make themselves, for views that the copy engine cannot address.

The role's warps read the tile with coalesced, masked loads and write it to the swizzled slot. They go through it in
chunks of registers, so that a role with few registers can copy large tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import gcd

import numpy as np

from tilewright.backends.lower.context import Lowering, Registers, ThreadScope, ViewRef
from tilewright.backends.lower.elements import constant, join_vector, to_memory
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.memory import TileAccess
from tilewright.backends.lower.shared import SharedAccess
from tilewright.backends.nvidia.wgmma import pin
from tilewright.ir.async_ops import Copy
from tilewright.ir.layout import LinearLayout, SharedLayout, blocked

MAX_VECTOR_BYTES = 16
#: bytes, and accesses, in flight per thread
CHUNK_BYTES, CHUNK_ACCESSES = 128, 64
#: every shared layout repeats its swizzle after so many lines (`SharedLayout`)
SWIZZLE_LINES = 8

#: (source, first register, how many) -> their values
Load = Callable[[TileAccess, int, int], Registers]


def copy_by_threads(lw: Lowering, op: Copy) -> None:
    """All threads of the scope copy the tile at ``op.index`` into ``op.slot``, ``op.pad`` where it is outside."""
    if lw.scope.single_thread:
        raise lw.error("threads copy the tile, but the role has one thread")
    with lw.as_scope(renewed_scope(lw)):
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


def renewed_scope(lw: Lowering) -> ThreadScope:
    """The scope with thread indices that LLVM takes for new ones here.

    Otherwise it would compute the row and the bounds of every register in front of the loop around the copy, and
    keep all of them in registers.
    """
    thread, lane, warp = pin(lw, [lw.scope.thread, lw.scope.lane, lw.scope.warp])
    return replace(lw.scope, thread=thread, lane=lane, warp=warp)


def renewed_strides(lw: Lowering, view: ViewRef) -> ViewRef:
    """The same for the view's strides, of which every row has a multiple."""
    strides = tuple(s if isinstance(s, int) else pin(lw, [s])[0] for s in view.strides)
    return replace(view, strides=strides)


def lines_per_chunk(registers: LinearLayout, shared: SharedLayout, chunk: int) -> int:
    """Lines that registers 0 .. chunk - 1 of all threads cover, where chunk c covers the same ones c times further.

    0 where chunks are not laid out so, or where the swizzle is another in the next chunk.
    """
    if len(shared.shape) != 2 or registers.num_registers % chunk:
        return 0
    axis, count = shared.order[1], registers.num_registers // chunk
    lines, table = shared.shape[axis] // count, registers.table("register")
    steps = np.zeros((count, 1, 2), np.int64)
    steps[:, 0, axis] = lines * np.arange(count)
    same = np.array_equal(table.reshape(count, chunk, 2), table[None, :chunk] + steps)
    threads = [v[axis] for dim in ("lane", "warp") for v in registers.basis(dim)]
    inside = all(part < lines for part in [*threads, *table[:chunk, axis].tolist()])
    return lines if same and inside and lines % SWIZZLE_LINES == 0 else 0


class _Copier:
    """One copy. What it computes is made anew in each branch and chunk."""

    def __init__(self, lw: Lowering, op: Copy):
        self.lw, self.op, self.slot, self.view = lw, op, lw.slot(op.slot), lw.view(op.view)
        self.layout = copy_layout(lw, self.view, self.slot.type.shape)
        self.whole = TileAccess(lw, self.view, op.index, self.layout)
        self.whole.evict = op.evict
        self.pad = constant(lw, op.pad, self.view.dtype)

    def run(self) -> None:
        whole = self.whole.whole()
        if whole is None:
            self._inside()
        else:
            self.lw.fb.if_else(whole, [], self._inside, self._partly)

    def _inside(self) -> Registers:
        return self._chunks(self._load(self.whole.width, masked=False), self.whole.width)

    def _partly(self) -> Registers:
        some = self.whole.some()
        if some is None or not any(self.whole.is_ragged(axis) for axis in self.whole.open_axes()):
            return self._outside()
        return self.lw.fb.if_else(some, [], self._masked, self._outside)

    def _masked(self) -> Registers:
        width = self.whole.masked_width()
        return self._chunks(self._load(width, masked=True), width)

    def _outside(self) -> Registers:
        return self._chunks(lambda source, first, count: [self.pad] * count, self.layout.num_registers)

    def _load(self, width: int, masked: bool) -> Load:
        def load(source: TileAccess, first: int, count: int) -> Registers:
            values: Registers = []
            for register in range(first, first + count, width):
                values += source.load_group(register, width, self.pad if masked else None)
            return values

        return load

    def _chunks(self, load: Load, width: int) -> Registers:
        """Load and store chunk by chunk: a loop over lines where the layouts allow it, else one after the other."""
        total, fb = self.layout.num_registers, self.lw.fb
        chunk = gcd(total, min(CHUNK_BYTES // self.slot.dtype.bytes, CHUNK_ACCESSES * width))
        lines = lines_per_chunk(self.layout, self.slot.layout, chunk)
        if lines and total > chunk:
            with fb.for_loop(0, fb.i32(total // chunk), 1, unroll=False) as loop:
                self._move(load, range(1), chunk, fb.mul(loop.index, lines))
        else:
            self._move(load, range(total // chunk), chunk, 0)
        return []

    def _move(self, load: Load, chunks: range, chunk: int, line: IntLike) -> None:
        """Move some chunks of registers, from a number of lines on."""
        lw, slot, math, axis = self.lw, self.slot, self.lw.index, self.slot.layout.order[-1]
        skip = math.mul(line, slot.layout.block_size * slot.dtype.bytes)
        view = renewed_strides(lw, self.view)
        origin = [math.add(o, line if d == axis else 0) for d, o in enumerate(view.origin)]
        with lw.as_scope(renewed_scope(lw)):
            source = TileAccess(lw, replace(view, origin=tuple(origin)), self.op.index, self.layout)
            source.evict = self.op.evict
            base = math.add(slot.base, skip)
            target = SharedAccess(lw, base, slot.layout, self.layout, slot.dtype)
            for number in chunks:
                self._write(target, number * chunk, load(source, number * chunk, chunk))

    def _write(self, target: SharedAccess, first: int, values: Registers) -> None:
        """Store registers ``first``, ... to the slot."""
        lw, width = self.lw, target.width
        for start in range(0, len(values), width):
            parts = [to_memory(lw, v, self.slot.dtype) for v in values[start : start + width]]
            lw.fb.store(join_vector(lw, parts), target.pointer(first + start), width * self.slot.dtype.bytes)
