"""Where the elements of a gather, a scatter or an atomic update lie: addresses and bounds, register by register.

The rule is that of `tilewright.ir.indexed_ops`. Along the axes of the index tiles each register brings its own
coordinate; along the others the tile is placed as a load's, and neighbours along the contiguous one may share an
access where they also share their coordinates (broadcast index tiles do: their registers are the same value).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import gcd

from tilewright.backends.lower.context import Lowering, Registers, ViewRef
from tilewright.backends.lower.coordinates import TileCoordinates
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.ranges import value_range
from tilewright.backends.lower.views import index_operand
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.core import Value
from tilewright.ir.indexed_ops import free_axes
from tilewright.ir.layout import LinearLayout

MAX_VECTOR_BYTES = 16


class Places:
    """Addresses and bounds of the elements that the current thread holds."""

    def __init__(
        self,
        lw: Lowering,
        view: ViewRef,
        index: Sequence[Value],
        indices: Sequence[Value],
        axes: Sequence[int],
        layout: LinearLayout,
    ):
        self.lw, self.view, self.axes, self.layout = lw, view, tuple(axes), layout
        self.coordinates = TileCoordinates(lw, layout)
        self.free = free_axes(view.rank, axes)
        self.given: dict[int, Registers] = {a: lw.registers(v) for a, v in zip(axes, indices, strict=True)}
        self.starts: dict[int, IntLike] = {}
        self.first: dict[int, tuple[int, int] | None] = {}
        for axis, value in zip(self.free, index, strict=True):
            self._place_tile(axis, value)
        self._terms: dict[tuple[int, IntLike], IntLike] = {}
        self._base = self._thread_base()

    def _place_tile(self, axis: int, index: Value) -> None:
        math, size, origin = self.lw.index, self.layout.tile_shape[axis], self.view.origin[axis]
        self.starts[axis] = math.add(math.mul(math.narrow(index_operand(self.lw, index)), size), origin)
        low, high = value_range(index)
        self.first[axis] = (low * size + origin, high * size + origin) if isinstance(origin, int) else None

    # --- bounds -------------------------------------------------------------------------------

    def open_axes(self) -> list[int]:
        """The axes without index tile along which the tile may stick out."""
        return [axis for axis in self.free if not self._is_inside(axis)]

    def _is_inside(self, axis: int) -> bool:
        size, known = self.view.shape[axis], self.first[axis]
        extent = self.layout.tile_shape[axis]
        return known is not None and isinstance(size, int) and known[0] >= 0 and known[1] + extent <= size

    def whole(self) -> mlir.Value | None:
        """i1, uniform: the tile is inside along every open axis; None where there is none."""
        lw, conditions = self.lw, []
        for axis in self.open_axes():
            start, extent = lw.index.value(self.starts[axis]), self.layout.tile_shape[axis]
            last = lw.index.value(lw.index.sub(self.view.shape[axis], extent))
            conditions += [lw.fb.icmp("sge", start, lw.fb.i32(0)), lw.fb.icmp("sle", start, last)]
        return reduce(lw.fb.and_, conditions) if conditions else None

    def exists(self) -> mlir.Value | None:
        """i1, uniform: the view has an element, so that the tensor has an element 0; None where that is known."""
        sizes = [size for size in self.view.shape if not (isinstance(size, int) and size > 0)]
        conditions = [self.lw.fb.icmp("sgt", self.lw.index.value(size), 0) for size in sizes]
        return reduce(self.lw.fb.and_, conditions) if conditions else None

    def inside(self, register: int, whole: bool) -> mlir.Value | None:
        """i1: a register's element is inside; with ``whole``, the open axes are known to be. None: always."""
        axes = [*self.axes, *([] if whole else self.open_axes())]
        conditions = [self._inside_along(axis, register) for axis in axes]
        return reduce(self.lw.fb.and_, conditions) if conditions else None

    def _inside_along(self, axis: int, register: int) -> mlir.Value:
        """One unsigned comparison: a negative coordinate is a large one."""
        math, place = self.lw.index, self._coordinate(axis, register)
        if isinstance(place, int):
            return self.lw.fb.icmp("ult", self.lw.fb.i32(place), math.value(self.view.shape[axis]))
        bits = mlir.IntegerType(place.type).width
        return self.lw.fb.icmp("ult", place, math.value(self.view.shape[axis], bits))

    # --- addresses ------------------------------------------------------------------------------

    def _coordinate(self, axis: int, register: int) -> IntLike:
        """A coordinate in the tensor: an int, an i32, or an i64 where a sum might not fit less."""
        math = self.lw.index
        if axis not in self.given:
            return math.add(self.starts[axis], self.coordinates.of(register, axis))
        value, origin = self.given[axis][register], self.view.origin[axis]
        if isinstance(origin, int) and origin == 0:
            return value
        return math.add(math.wide(value), math.wide(origin))

    def _thread_base(self) -> mlir.Value:
        """The address as far as it does not depend on the register."""
        math, view = self.lw.index, self.view
        terms: list[IntLike] = [view.offset]
        for axis, stride in enumerate(view.strides):
            if axis in self.given:
                terms.append(math.mul(math.wide(view.origin[axis]), stride))
                continue
            first = self.starts[axis]
            if self.coordinates.separates(axis):
                first = math.add(first, self.coordinates.thread[axis])
            terms.append(math.mul(math.wide(first), stride))
        return self._moved(view.base, math.sum(terms))

    def _moved(self, base: mlir.Value, elements: IntLike) -> mlir.Value:
        offset = self.lw.index.mul(elements, self.view.dtype.bytes)
        return self.lw.fb.gep(base, self.lw.index.value(offset, 64))

    def _term(self, axis: int, register: int) -> IntLike:
        """Elements that a register's own coordinate along an axis adds to the thread's base."""
        math = self.lw.index
        steps: IntLike
        if axis in self.given:
            steps = self.given[axis][register]
        elif self.coordinates.separates(axis):
            steps = self.coordinates.register[register][axis]
        else:
            steps = self.coordinates.of(register, axis)
        if (axis, steps) not in self._terms:
            self._terms[axis, steps] = math.mul(math.wide(steps), self.view.strides[axis])
        return self._terms[axis, steps]

    def pointer(self, register: int) -> mlir.Value:
        terms = [self._term(axis, register) for axis in range(self.view.rank)]
        return self._moved(self._base, self.lw.index.sum(terms))

    def width(self) -> int:
        """Elements of one access where the tile is inside along the open axes."""
        view = self.view
        axes = [axis for axis in self.free if isinstance(view.strides[axis], int) and view.strides[axis] == 1]
        if not axes:
            return 1
        bytes_ = view.dtype.bytes
        steps = [view.align, MAX_VECTOR_BYTES, self.layout.tile_shape[axes[-1]] * bytes_]
        for axis, stride in enumerate(view.strides):
            if axis != axes[-1]:
                steps.append(stride * bytes_ if isinstance(stride, int) else view.stride_align)
        width = max(1, min(self.layout.contiguity(axes[-1]), gcd(*steps) // bytes_))
        while width > 1 and not all(self._shared(values, width) for values in self.given.values()):
            width //= 2
        return width

    @staticmethod
    def _shared(values: Registers, width: int) -> bool:
        """Whether the registers of every access have one coordinate."""
        return all(len(set(values[first : first + width])) == 1 for first in range(0, len(values), width))

    def groups(self, width: int) -> range:
        """The first register of every access."""
        return range(0, self.layout.num_registers, width)

    def alignment(self, width: int) -> int:
        return gcd(width * self.view.dtype.bytes, MAX_VECTOR_BYTES)

    def fresh(self) -> Places:
        """The same places for one side of a branch: values made there are not defined on the other side."""
        other = object.__new__(Places)
        other.__dict__.update(self.__dict__)
        other.coordinates, other._terms = self.coordinates.fresh(), {}
        return other
