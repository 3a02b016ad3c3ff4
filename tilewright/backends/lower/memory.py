"""Lowering of `tile.load` and `tile.store`: the threads' own accesses to global memory.

A tile that lies inside the view takes the fast path: vectors of up to 16 bytes, no masks. The decision is one
uniform branch per tile, and none where the index's range proves it. A tile that sticks out takes a masked path,
and a load of a tile that lies outside altogether touches no memory:

    if the whole tile is inside      -> vectors
    else if a part of it is inside   -> masked vectors or masked elements
    else                             -> pad

Masked loads read element 0 of the tensor where the mask is false (it exists: a part of the tile is inside) and
select the pad value afterwards, so that they need no branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import reduce
from math import gcd

from tilewright.backends.lower.context import Lowering, Registers, ViewRef, lowers
from tilewright.backends.lower.coordinates import TileCoordinates, sole_holder
from tilewright.backends.lower.elements import constant, from_memory, join_vector, memory_type, split_vector, to_memory
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.ranges import value_range
from tilewright.backends.lower.views import index_operand
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import tile_ops
from tilewright.ir.core import Value
from tilewright.ir.layout import LinearLayout

MAX_VECTOR_BYTES = 16


class TileAccess:
    """One tile of a view: where its elements are, which of them are inside, how wide vectors may be."""

    def __init__(self, lw: Lowering, view: ViewRef, index: Sequence[Value], layout: LinearLayout):
        self.lw, self.view, self.layout = lw, view, layout
        self.sizes = layout.tile_shape
        self.starts = [self._start(axis, value) for axis, value in enumerate(index)]
        self.ranges = [self._range(axis, value) for axis, value in enumerate(index)]
        self.coordinates = TileCoordinates(lw, layout)
        self.width = self._vector_width()
        #: what is outside reads as zeros
        self.zero_pad = False
        #: what the caches are told, one of `EVICTION`
        self.evict: str | None = None
        self._predicates: dict[tuple[int, int], mlir.Value] = {}
        self._inside: dict[tuple[int, ...], mlir.Value] = {}
        self._terms: dict[tuple[int, int], IntLike] = {}
        self._base = self._thread_base()

    def fresh(self) -> TileAccess:
        """The same access for one side of a branch: values made there are not defined on the other side."""
        other = copy(self)
        other._predicates, other._inside, other._terms = {}, {}, {}
        other.coordinates = self.coordinates.fresh()
        return other

    # --- what is known at compile time --------------------------------------------------------

    def _start(self, axis: int, index: Value) -> IntLike:
        math = self.lw.index
        return math.add(math.mul(math.narrow(index_operand(self.lw, index)), self.sizes[axis]), self.view.origin[axis])

    def _range(self, axis: int, index: Value) -> tuple[int, int] | None:
        """The (least, greatest) first coordinate along an axis; None where the origin is not known."""
        low, high = value_range(index)
        origin, size = self.view.origin[axis], self.sizes[axis]
        return (low * size + origin, high * size + origin) if isinstance(origin, int) else None

    def is_inside(self, axis: int) -> bool:
        """Whether no tile can stick out along ``axis``."""
        size, known = self.view.shape[axis], self.ranges[axis]
        return known is not None and isinstance(size, int) and known[0] >= 0 and known[1] + self.sizes[axis] <= size

    def is_ragged(self, axis: int) -> bool:
        """Whether a tile can be partly inside along ``axis``; otherwise it is inside or outside as a whole."""
        size, origin, tile = self.view.shape[axis], self.view.origin[axis], self.sizes[axis]
        return not (isinstance(origin, int) and origin % tile == 0 and self.lw.is_multiple(size, tile))

    def _contiguous_axis(self) -> int | None:
        axes = [axis for axis, stride in enumerate(self.view.strides) if isinstance(stride, int) and stride == 1]
        return axes[-1] if axes else None

    def _vector_width(self) -> int:
        """Elements of one access in the fast path: contiguous, held in consecutive registers, and aligned."""
        axis, view = self._contiguous_axis(), self.view
        if axis is None:
            return 1
        bytes_ = view.dtype.bytes
        steps = [view.align, MAX_VECTOR_BYTES, self.sizes[axis] * bytes_]
        for other, stride in enumerate(view.strides):
            if other != axis:
                steps.append(stride * bytes_ if isinstance(stride, int) else view.stride_align)
        return max(1, min(self.layout.contiguity(axis), gcd(*steps) // bytes_))

    def masked_width(self) -> int:
        """Elements of one access that are all inside or all outside in the masked path."""
        axis = self._contiguous_axis()
        if axis is None or not self.is_ragged(axis):
            return self.width
        size, origin = self.view.shape[axis], self.view.origin[axis]
        return gcd(self.width, size, origin) if isinstance(size, int) and isinstance(origin, int) else 1

    # --- conditions -----------------------------------------------------------------------------

    def open_axes(self) -> list[int]:
        """The axes along which the tile may stick out."""
        return [axis for axis in range(self.view.rank) if not self.is_inside(axis)]

    def _uniform(self, last_inside: bool) -> mlir.Value | None:
        """i1: along every open axis the first, and with ``last_inside`` the last, coordinate is inside."""
        lw, conditions = self.lw, []
        for axis in self.open_axes():
            known = self.ranges[axis]
            start, size = lw.index.value(self.starts[axis]), self.view.shape[axis]
            extent = self.sizes[axis] if last_inside else 1
            if known is None or known[0] < 0:
                conditions.append(lw.fb.icmp("sge", start, lw.fb.i32(0 if last_inside else 1 - self.sizes[axis])))
            conditions.append(lw.fb.icmp("sle", start, lw.index.value(lw.index.sub(size, extent))))
        return reduce(lw.fb.and_, conditions) if conditions else None

    def whole(self) -> mlir.Value | None:
        """i1, uniform: all of the tile is inside; None where that is known."""
        return self._uniform(last_inside=True)

    def some(self) -> mlir.Value | None:
        """i1, uniform: some of the tile may be inside, and then element 0 of the tensor exists."""
        return self._uniform(last_inside=False)

    def predicate(self, register: int) -> mlir.Value:
        """i1: the register's element is inside along every open axis."""
        parts = self.coordinates.register[register]
        axes = [axis for axis in self.open_axes() if self.is_ragged(axis)]
        return reduce(self.lw.fb.and_, (self._along(axis, parts[axis]) for axis in axes))

    def _along(self, axis: int, part: int) -> mlir.Value:
        if (axis, part) not in self._predicates:
            lw = self.lw
            coordinate = lw.index.add(self.starts[axis], self.coordinates.along(axis, part))
            inside = lw.fb.icmp("ult", lw.index.value(coordinate), lw.index.value(self.view.shape[axis]))
            self._predicates[axis, part] = inside
        return self._predicates[axis, part]

    def inside(self, register: int) -> mlir.Value | None:
        """i1: the register's element is inside, whatever the rest of the tile is; None where that is known."""
        parts, axes = self.coordinates.register[register], self.open_axes()
        return reduce(self.lw.fb.and_, (self._along(axis, parts[axis]) for axis in axes)) if axes else None

    # --- addresses ------------------------------------------------------------------------------

    def _thread_base(self) -> mlir.Value:
        """Address of the thread's register 0, as far as register parts add to it."""
        math, view = self.lw.index, self.view
        terms: list[IntLike] = [view.offset]
        for axis, stride in enumerate(view.strides):
            first = self.starts[axis]
            if self.coordinates.separates(axis):
                first = math.add(first, self.coordinates.thread[axis])
            terms.append(math.mul(math.wide(first), stride))
        return self._pointer(view.base, math.sum(terms))

    def _pointer(self, base: mlir.Value, elements: IntLike) -> mlir.Value:
        offset = self.lw.index.mul(elements, self.view.dtype.bytes)
        return self.lw.fb.gep(base, self.lw.index.value(offset, 64))

    def _term(self, axis: int, part: int) -> IntLike:
        """Elements that a register's part along an axis adds to the thread's base."""
        if (axis, part) not in self._terms:
            math = self.lw.index
            steps = part if self.coordinates.separates(axis) else self.coordinates.along(axis, part)
            self._terms[axis, part] = math.mul(math.wide(steps), self.view.strides[axis])
        return self._terms[axis, part]

    def pointer(self, register: int) -> mlir.Value:
        parts = self.coordinates.register[register]
        return self._pointer(self._base, self.lw.index.sum([self._term(a, p) for a, p in enumerate(parts)]))

    # --- accesses -------------------------------------------------------------------------------

    def branchless(self) -> bool:
        """Whether masked accesses are as good as others, so that one path is enough."""
        return False

    def groups(self, width: int) -> range:
        """The first register of every access."""
        return range(0, self.layout.num_registers, width)

    def alignment(self, width: int) -> int:
        return gcd(width * self.view.dtype.bytes, MAX_VECTOR_BYTES)

    def load(self, width: int, pad: mlir.Value | None = None) -> Registers:
        """The elements of all registers in their memory form (bools as bytes); with ``pad``, masked."""
        return [element for first in self.groups(width) for element in self.load_group(first, width, pad)]

    def load_group(self, first: int, width: int, pad: mlir.Value | None) -> Registers:
        """The elements of ``width`` registers in their memory form."""
        fb, dtype = self.lw.fb, self.view.dtype
        pointer, inside = self.pointer(first), None
        if pad is not None:
            inside = self.predicate(first)
            pointer = fb.select(inside, pointer, self.view.base)
        type_ = memory_type(self.lw, dtype, width)
        loaded = self.lw.ops.load_global(self.lw, pointer, type_, self.alignment(width), self.evict)
        values = split_vector(self.lw, loaded, width)
        if inside is None:
            return values
        padding = to_memory(self.lw, pad, dtype)
        return [fb.select(inside, v, padding) for v in values]

    def store(self, values: Registers, width: int, masked: bool) -> None:
        """Write all registers; ``masked`` where the tile may stick out."""
        lw, accesses = self.lw, []
        for first in self.groups(width):
            parts = [to_memory(lw, v, self.view.dtype) for v in values[first : first + width]]
            inside = self.predicate(first) if masked else None
            accesses.append((inside, self.pointer(first), join_vector(lw, parts), self.alignment(width)))
        lw.ops.store_if(lw, accesses, self.evict)


# --- operations ---------------------------------------------------------------------------------


def tile_access(lw: Lowering, view: Value, index: Sequence[Value], layout: LinearLayout) -> TileAccess:
    """The target's way to a tile."""
    make = lw.ops.tile_access(view, layout.tile_shape) or TileAccess
    return make(lw, lw.view(view), index, layout)


@lowers(tile_ops.Load)
def lower_load(lw: Lowering, op: tile_ops.Load) -> None:
    access = tile_access(lw, op.view, op.index, lw.layout(op.result))
    access.zero_pad, access.evict = op.pad == 0, op.evict
    pad = constant(lw, op.pad, access.view.dtype)
    lw.define(op.result, load_tile(lw, access, pad))


def load_tile(lw: Lowering, access: TileAccess, pad: mlir.Value) -> Registers:
    """The registers of a tile, ``pad`` where it is outside.

    Vectors leave the branches as they were loaded: taking them apart there would wait for the memory.
    """
    return [from_memory(lw, element, access.view.dtype) for element in _load_elements(lw, access, pad)]


def _load_elements(lw: Lowering, access: TileAccess, pad: mlir.Value) -> Registers:
    whole, width = access.whole(), access.width
    if whole is None:
        return access.load(width)
    if access.branchless() and access.zero_pad:
        return access.load(width, pad)

    def packed(registers: Registers) -> list[mlir.Value]:
        return [join_vector(lw, registers[first : first + width]) for first in access.groups(width)]

    outside = packed([to_memory(lw, pad, access.view.dtype)] * access.layout.num_registers)
    types = [vector.type for vector in outside]

    def partly() -> list[mlir.Value]:
        some = access.some()
        assert some is not None
        inner = access.fresh()
        masked = lw.fb.if_else(some, types, lambda: packed(inner.load(inner.masked_width(), pad)), lambda: outside)
        return list(masked)

    ragged = any(access.is_ragged(axis) for axis in access.open_axes())
    inside = access.fresh()
    vectors = lw.fb.if_else(whole, types, lambda: packed(inside.load(width)), partly if ragged else lambda: outside)
    return [element for vector in vectors for element in split_vector(lw, vector, width)]


@lowers(tile_ops.Element)
def lower_element(lw: Lowering, op: tile_ops.Element) -> None:
    """One address for all threads. What is outside touches no memory: the tensor may be empty."""
    fb, math, view = lw.fb, lw.index, lw.view(op.view)
    index = [math.narrow(index_operand(lw, value)) for value in op.index]
    places = [math.add(origin, i) for origin, i in zip(view.origin, index, strict=True)]
    steps = [math.mul(math.wide(place), stride) for place, stride in zip(places, view.strides, strict=True)]
    offset = math.mul(math.sum([view.offset, *steps]), view.dtype.bytes)
    pad, type_ = constant(lw, op.pad, view.dtype), memory_type(lw, view.dtype, 1)
    limits = [
        fb.icmp("ult", math.value(place), math.value(size)) for place, size in zip(places, view.shape, strict=True)
    ]

    def inside() -> list[mlir.Value]:
        return [fb.load(fb.gep(view.base, math.value(offset, 64)), type_, view.dtype.bytes)]

    (element,) = fb.if_else(reduce(fb.and_, limits), [type_], inside, lambda: [to_memory(lw, pad, view.dtype)])
    lw.define(op.result, from_memory(lw, element, view.dtype))


@lowers(tile_ops.Store)
def lower_store(lw: Lowering, op: tile_ops.Store) -> None:
    layout = lw.layout(op.value)
    values = lw.registers(op.value)
    holder = sole_holder(lw, layout)
    access = tile_access(lw, op.view, op.index, layout)
    access.evict = op.evict
    run_if(lw, holder, lambda: store_tile(lw, access, values))


def run_if(lw: Lowering, condition: mlir.Value | None, body: Callable[[], None]) -> None:
    """Emit ``body`` under a condition (None: always)."""
    if condition is None:
        body()
    else:
        with lw.fb.if_then(condition):
            body()


def store_tile(lw: Lowering, access: TileAccess, values: Registers) -> None:
    """Write a tile, dropping what is outside."""
    whole = access.whole()
    if whole is None:
        access.store(values, access.width, masked=False)
        return
    if access.branchless():
        access.store(values, access.width, masked=True)
        return
    ragged = any(access.is_ragged(axis) for axis in access.open_axes())
    full, masked = access.fresh(), access.fresh()

    def inside() -> Registers:
        full.store(values, access.width, masked=False)
        return []

    def partly() -> Registers:
        if ragged:
            masked.store(values, access.masked_width(), masked=True)
        return []

    lw.fb.if_else(whole, [], inside, partly)
