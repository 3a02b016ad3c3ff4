"""Tiles of global memory through buffer descriptors: bounds in hardware, 32-bit offsets, no branches for masks.

A descriptor is four scalar registers: an address, the number of bytes behind it and a format (CDNA3 ISA guide,
"Buffer Resource Descriptor"). An access adds a 32-bit offset of the lane, a scalar offset and an immediate; beyond the
number of bytes a load returns 0 and a store is dropped. Here the descriptor's address is the tile's own origin, a
64-bit sum of scalars, so that offsets only span the tile; and a lane whose element lies outside the tensor is given an
offset beyond the end, whatever the tensor's strides are.

Offsets must stay below `EXTENT`. Where strides are known and the tile spans more, the 64-bit way is taken. Strides of
the launch are checked once, when the kernel begins: one that is too large stops it (see `check_extents`).
"""

from __future__ import annotations

from functools import reduce

from tilewright.backends.lower.context import Lowering, Registers
from tilewright.backends.lower.elements import join_vector, memory_type, split_vector, to_memory
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.memory import TileAccess
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.comm_ops import Peer, Put
from tilewright.ir.core import Function, Value
from tilewright.ir.tile_ops import Load, OffsetView, PermuteView, Store, Subview
from tilewright.ir.types import TileType, ViewType

#: bytes behind a descriptor's address that exist, and what a tile may span
EXTENT = 1 << 31
#: an offset beyond the end; what else is added to it cannot wrap around
OUTSIDE = -EXTENT
#: word 3 of a raw descriptor: 32-bit elements, as MLIR's amdgpu dialect and LLVM's fat pointers set it
FORMAT = 0x27000
#: ``nt``: the line leaves the caches before others (LLVM, "User Guide for AMDGPU Backend": buffer intrinsics)
NONTEMPORAL = 2
#: largest immediate offset of an instruction
MOST_IMMEDIATE = 4095


class BufferAccess(TileAccess):
    """One tile of a view, by offsets from its origin."""

    def fresh(self) -> BufferAccess:
        other = super().fresh()
        assert isinstance(other, BufferAccess)
        other._lanes, other._beyond = {}, None  # values of this side of a branch
        return other

    # --- addresses ------------------------------------------------------------------------------

    def _thread_base(self) -> mlir.Value:
        """Makes the descriptor; the offset of the thread's register 0 in bytes (i32)."""
        math, view = self.lw.index, self.view
        steps = [math.mul(math.wide(start), stride) for start, stride in zip(self.starts, view.strides, strict=True)]
        origin = self._pointer(view.base, math.sum([view.offset, *steps]))
        self.resource = make_resource(self.lw, origin)
        #: predicate and offset -> the offset where it holds
        self._lanes: dict[tuple[mlir.Value, mlir.Value], mlir.Value] = {}
        self._beyond: mlir.Value | None = None
        inside = [self._bytes(axis, part) for axis, part in enumerate(self.coordinates.thread) if self._separates(axis)]
        return math.value(math.sum(inside))

    def _separates(self, axis: int) -> bool:
        return self.coordinates.separates(axis)

    def _bytes(self, axis: int, steps: IntLike) -> IntLike:
        """The bytes of a number of steps inside the tile (i32)."""
        math = self.lw.index
        return math.mul(steps, math.mul(math.narrow(self.view.strides[axis]), self.view.dtype.bytes))

    def _place(self, register: int, inside: mlir.Value | None) -> list[mlir.Value]:
        """Descriptor, lane offset and scalar offset of an access; beyond the end where not inside."""
        fb, math = self.lw.fb, self.lw.index
        lane: list[IntLike] = [self._base]
        shared: list[IntLike] = []
        for axis, part in enumerate(self.coordinates.register[register]):
            if self._separates(axis):
                shared.append(self._bytes(axis, part))
            else:
                lane.append(self._bytes(axis, self.coordinates.along(axis, part)))
        constant = sum(term for term in shared if isinstance(term, int))
        immediate = constant % (MOST_IMMEDIATE + 1)
        uniform = math.sum([constant - immediate, *(term for term in shared if not isinstance(term, int))])
        own = math.value(math.sum(lane))
        if inside is not None:
            own = self._selected(inside, own)
        return [self.resource, fb.add(own, immediate), math.value(uniform)]

    def _selected(self, inside: mlir.Value, lane: mlir.Value) -> mlir.Value:
        if (inside, lane) not in self._lanes:
            self._lanes[inside, lane] = self.lw.fb.select(inside, lane, self._outside())
        return self._lanes[inside, lane]

    def _outside(self) -> mlir.Value:
        """`OUTSIDE`, hidden from LLVM, which would add immediates to a constant: a register for each of them."""
        if self._beyond is None:
            fb = self.lw.fb
            self._beyond = fb.inline_asm(fb.types.i32, "", "=s,0", [fb.i32(OUTSIDE)], side_effects=False)
        return self._beyond

    # --- accesses -------------------------------------------------------------------------------

    def branchless(self) -> bool:
        """Whether masks cost nothing worth a second path: vectors are inside or outside as a whole."""
        return self.masked_width() == self.width

    def predicate(self, register: int) -> mlir.Value:
        """i1: the element is inside; also where the tile is outside as a whole, which no branch has asked before."""
        parts = self.coordinates.register[register]
        key = tuple(part if self.is_ragged(axis) else 0 for axis, part in enumerate(parts))
        if key not in self._inside:
            axes = [axis for axis in self.open_axes() if self.is_ragged(axis) or self.branchless()]
            self._inside[key] = reduce(self.lw.fb.and_, (self._along(axis, parts[axis]) for axis in axes))
        return self._inside[key]

    def _along(self, axis: int, part: int) -> mlir.Value:
        """The thread's own part against what is left of the axis, a scalar, behind start and register part."""
        known = self.ranges[axis]
        if not self._separates(axis) or known is None or known[0] < 0:
            return super()._along(axis, part)
        if (axis, part) not in self._predicates:
            math = self.lw.index
            left = math.value(math.sub(math.sub(self.view.shape[axis], self.starts[axis]), part))
            self._predicates[axis, part] = self.lw.fb.icmp("slt", math.value(self.coordinates.thread[axis]), left)
        return self._predicates[axis, part]

    def load_group(self, first: int, width: int, pad: mlir.Value | None) -> Registers:
        fb, dtype = self.lw.fb, self.view.dtype
        inside = self.predicate(first) if pad is not None else None
        words = _words(self.lw, width * dtype.bytes)
        operands = [*self._place(first, inside), self._hint()]
        loaded = fb.intrinsic("llvm.amdgcn.raw.ptr.buffer.load", words, operands)
        values = split_vector(self.lw, fb.bitcast(loaded, memory_type(self.lw, dtype, width)), width)
        if inside is None or self.zero_pad:
            return values
        padding = to_memory(self.lw, pad, dtype)
        return [fb.select(inside, value, padding) for value in values]

    def store(self, values: Registers, width: int, masked: bool) -> None:
        lw, dtype = self.lw, self.view.dtype
        for first in self.groups(width):
            parts = [to_memory(lw, value, dtype) for value in values[first : first + width]]
            words = lw.fb.bitcast(join_vector(lw, parts), _words(lw, width * dtype.bytes))
            inside = self.predicate(first) if masked else None
            operands = [words, *self._place(first, inside), self._hint()]
            lw.fb.intrinsic("llvm.amdgcn.raw.ptr.buffer.store", None, operands)

    def _hint(self) -> mlir.Value:
        """The last operand of an access: bits of its cache policy."""
        return self.lw.fb.i32(NONTEMPORAL if self.evict == "evict_first" else 0)


def make_resource(lw: Lowering, address: mlir.Value) -> mlir.Value:
    """The descriptor of `EXTENT` bytes from a uniform address on."""
    fb = lw.fb
    operands = [address, fb.const(0, fb.types.i16), fb.i64(EXTENT), fb.i32(FORMAT)]
    return fb.intrinsic("llvm.amdgcn.make.buffer.rsrc", fb.types.ptr(8), operands)


def _words(lw: Lowering, size: int) -> mlir.Type:
    """The integer type of an access of ``size`` bytes."""
    types = lw.fb.types
    if size <= 4:
        return types.int(8 * size)
    return types.vec(size // 4, types.i32)


# --- how far a tile reaches ---------------------------------------------------------------------


def spans_too_much(access_view: ViewType, sizes: tuple[int, ...]) -> bool:
    """Whether strides that are known take a tile of these sizes beyond `EXTENT`."""
    return _known_span(access_view, sizes) >= EXTENT


def _known_span(view: ViewType, sizes: tuple[int, ...]) -> int:
    """Bytes from the first element to behind the last, over the axes whose strides are known."""
    steps = zip(view.strides, sizes, strict=True)
    return view.dtype.bytes * (1 + sum((size - 1) * abs(stride) for stride, size in steps if stride is not None))


def check_extents(lw: Lowering, function: Function) -> None:
    """Stop the kernel at its beginning where a stride of the launch takes a tile beyond `EXTENT`, or runs backwards."""
    limits: dict[tuple[Value, int], int] = {}
    for op in function.walk():
        if isinstance(op, Load | Store | Put):
            tile = (op.result if isinstance(op, Load) else op.value).type
            assert isinstance(tile, TileType) and isinstance(op.view.type, ViewType)
            root, dims = root_dims(op.view)
            unknown = [
                axis for axis, stride in enumerate(op.view.type.strides) if stride is None and tile.shape[axis] > 1
            ]
            room = EXTENT - _known_span(op.view.type, tile.shape)
            for axis in unknown:
                limit = room // len(unknown) // ((tile.shape[axis] - 1) * op.view.type.dtype.bytes)
                key = root, dims[axis]
                limits[key] = min(limit, limits.get(key, limit))
    fb = lw.fb
    too_far = [
        fb.icmp("ugt", lw.index.value(lw.view(root).strides[dim], 64), fb.i64(limit))
        for (root, dim), limit in limits.items()
    ]
    if too_far:
        with fb.if_then(reduce(fb.or_, too_far)):
            lw.ops.fail(lw, "a tile spans 2 GiB of memory or more", function.loc.file, function.loc.line)


def root_dims(view: Value) -> tuple[Value, tuple[int, ...]]:
    """The kernel parameter behind a view, and which of its dims each of the view's is."""
    path = []
    while isinstance(view.op, Subview | PermuteView | OffsetView | Peer):
        path.append(view.op)
        view = view.op.view
    assert isinstance(view.type, ViewType)
    dims = tuple(range(view.type.rank))
    for op in reversed(path):
        if isinstance(op, Subview):
            dims = dims[len(op.index) :]
        elif isinstance(op, PermuteView):
            dims = tuple(dims[p] for p in op.perm)
    return view, dims
