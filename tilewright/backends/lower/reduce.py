"""Lowering of `tile.reduce`: a tree inside the thread, shuffles between lanes, shared memory between warps.

The exchange lies between two barriers; the first is left out where the threads have met since anybody may have used
that memory. The order of additions depends on the layout alone, so the same input gives the same bits.
Partial results in scratch memory: element e of the result (row-major), warp index w along the axis, at
``(e * warps + w) * bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.backends.lower import arithmetic
from tilewright.backends.lower.context import Lowering, Registers, lowers
from tilewright.backends.lower.coordinates import TileCoordinates, check_threads
from tilewright.backends.lower.elements import (
    from_memory,
    from_words,
    is_small_float,
    memory_type,
    round_to,
    split_vector,
    to_memory,
    to_words,
    widen,
)
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.scalars import define_registers
from tilewright.backends.lower.shared import shared_pointer
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import tile_ops
from tilewright.ir.async_ops import Alloc, Barrier, buffer_of
from tilewright.ir.core import Operation
from tilewright.ir.layout import LinearLayout
from tilewright.ir.scratch import AxisBits, axis_bits, exchange_places, scratch_bytes
from tilewright.ir.types import BufferType, DType, SlotType, TileType, element_type, f32

_COMBINE = {"sum": "add", "prod": "mul", "max": "max", "min": "min"}
_ANY = (-(2**63), 2**63 - 1)


@dataclass
class Reduction:
    """One reduction: its function on the type that partial results have."""

    lw: Lowering
    fn: str
    dtype: DType

    def combine(self, x: mlir.Value, y: mlir.Value) -> mlir.Value:
        return arithmetic.binary(self.lw, _COMBINE[self.fn], x, y, self.dtype, (_ANY, _ANY))

    def tree(self, values: Sequence[mlir.Value]) -> mlir.Value:
        """Neighbours first: the depth is logarithmic, the order fixed."""
        while len(values) > 1:
            paired = [self.combine(x, y) for x, y in zip(values[::2], values[1::2], strict=False)]
            values = paired + list(values[len(paired) * 2 :])
        return values[0]

    def across_lanes(self, value: mlir.Value, bits: Sequence[int]) -> mlir.Value:
        for bit in bits:
            words = to_words(self.lw, value, self.dtype)
            other = [self.lw.ops.shuffle_xor(self.lw, word, 1 << bit) for word in words]
            value = self.combine(value, from_words(self.lw, other, self.dtype))
        return value


@lowers(tile_ops.Reduce)
def lower_reduce(lw: Lowering, op: tile_ops.Reduce) -> None:
    layout, result = lw.layout(op.source), op.result.type
    check_threads(lw, layout)
    bits = axis_bits(layout, op.axis)
    _check_no_double_count(lw, layout, op.axis)
    source_dtype = element_type(op.source.type)
    reduction = Reduction(lw, op.fn, f32 if is_small_float(source_dtype) else source_dtype)
    held = [widen(lw, x, source_dtype) for x in lw.registers(op.source)]
    partial = _in_thread(reduction, layout, op.axis, held)
    partial = [reduction.across_lanes(x, bits.lane) for x in partial]
    if bits.warp:
        partial = _across_warps(reduction, op, layout.slice_dim(op.axis), bits, partial)
    partial = round_to(lw, partial, source_dtype)
    if isinstance(result, TileType):
        permutation = layout.slice_dim(op.axis).register_permutation(lw.layout(op.result))
        if permutation is None:
            raise lw.error(f"the result's layout is not the source's without axis {op.axis}: insert tile.convert")
        partial = [partial[position] for position in permutation]
    define_registers(lw, op.result, partial)


def _check_no_double_count(lw: Lowering, layout: LinearLayout, axis: int) -> None:
    """Replicas are fine where a whole bit is free, or in registers; not where bits overlap along the axis."""
    seen: set[int] = set()
    for dim in ("lane", "warp"):
        for vector in layout.basis(dim):
            if vector[axis] in seen or (vector[axis] & (vector[axis] - 1)):
                raise lw.error(f"threads of {layout} hold elements along axis {axis} twice: convert the layout first")
            seen |= {vector[axis]} if vector[axis] else set()
    mask = sum(seen)
    if any(part[axis] & mask for part in layout.table("register").tolist()):
        raise lw.error(f"registers and threads of {layout} overlap along axis {axis}: convert the layout first")


def _in_thread(reduction: Reduction, layout: LinearLayout, axis: int, held: Registers) -> Registers:
    """One partial result per register of the sliced layout."""
    groups: dict[int, dict[tuple[int, ...], mlir.Value]] = {}
    for value, target, coordinate in zip(
        held, layout.slice_registers(axis), layout.table("register").tolist(), strict=True
    ):
        groups.setdefault(target, {}).setdefault(tuple(coordinate), value)  # replicas in registers count once
    return [reduction.tree([*groups[target].values()]) for target in sorted(groups)]


# --- across warps ---------------------------------------------------------------------------------


def _across_warps(
    reduction: Reduction, op: tile_ops.Reduce, sliced: LinearLayout, bits: AxisBits, partial: Registers
) -> Registers:
    lw = reduction.lw
    if op.scratch is None:
        raise lw.error("warps exchange partial results, but no scratch is set: the shared-memory plan must run first")
    place: IntLike = op.scratch
    if op.turn is not None:
        place = lw.index.add(
            place, lw.index.mul(lw.fb.and_(lw.scalar(op.turn), 1), scratch_bytes(op) // exchange_places(op))
        )
    exchange = _Exchange(reduction, sliced, bits, place)
    if op.turn is None and not _nobody_reads_scratch(lw, op):
        lw.ops.barrier(lw, "role")  # whoever used the scratch before has read it
    with lw.fb.if_then(exchange.is_writer()):
        exchange.write(partial)
    lw.ops.barrier(lw, "role")
    return exchange.read(len(partial))


def _nobody_reads_scratch(lw: Lowering, op: tile_ops.Reduce) -> bool:
    """Whether the threads have met, or the function began, since the scratch memory may have been in use."""
    assert op.parent is not None and op.scratch is not None
    area = range(op.scratch, op.scratch + scratch_bytes(op))
    for earlier in reversed(op.parent.ops[: op.parent.ops.index(op)]):
        if isinstance(earlier, Barrier):
            return earlier.scope in ("role", "block")
        if any(_may_use(inner, area) for inner in earlier.walk()):
            return False
    return op.parent is lw.function.body.block


def _may_use(op: Operation, area: range) -> bool:
    """Whether an operation may read or write that part of shared memory."""
    if op.attributes.get("scratch") is not None:
        return True
    for buffer in [buffer_of(value) for value in op.operands if isinstance(value.type, SlotType)]:
        alloc = buffer.op
        if not isinstance(alloc, Alloc) or alloc.offset is None or not isinstance(buffer.type, BufferType):
            return True
        if alloc.offset < area.stop and area.start < alloc.offset + buffer.type.bytes:
            return True
    return False


class _Exchange:
    """The scratch memory of one reduction."""

    def __init__(self, reduction: Reduction, sliced: LinearLayout, bits: AxisBits, scratch: IntLike):
        self.lw, self.reduction, self.bits, self.sliced = reduction.lw, reduction, bits, sliced
        self.base = self.lw.fb.add(self.lw.ops.shared_base(self.lw), self.lw.index.value(scratch))
        self.warps = 1 << len(bits.warp)
        self.bytes = reduction.dtype.bytes
        self.coordinates = TileCoordinates(self.lw, sliced)
        # here, since writing and reading share them but writing is conditional
        self.addresses = [self._address(register) for register in range(sliced.num_registers)]

    def is_writer(self) -> mlir.Value:
        """i1: of the lanes that hold the same partial results, the first."""
        fb, lane = self.lw.fb, self.lw.scope.lane
        mask = sum(1 << bit for bit in self.sliced.free_bits("lane"))
        return fb.icmp("eq", fb.and_(lane, mask), 0)

    def _address(self, register: int) -> mlir.Value:
        """Where the partial results of a register's element begin."""
        math = self.lw.index
        flat: IntLike = 0
        for axis, size in enumerate(self.sliced.tile_shape):
            flat = math.add(math.mul(flat, size), self.coordinates.of(register, axis))
        return math.value(math.add(self.base, math.mul(flat, self.warps * self.bytes)))

    def write(self, partial: Registers) -> None:
        lw = self.lw
        columns = [0] * (max(self.bits.warp) + 1)
        for position, bit in enumerate(self.bits.warp):
            columns[bit] = 1 << position
        own = lw.index.mul(lw.index.linear_map(lw.scope.warp, columns), self.bytes)
        for register, value in enumerate(partial):
            pointer = shared_pointer(lw, lw.index.add(self.addresses[register], own))
            lw.fb.store(to_memory(lw, value, self.reduction.dtype), pointer, self.bytes)

    def read(self, count: int) -> Registers:
        return [self.reduction.tree(self._read_all(register)) for register in range(count)]

    def _read_all(self, register: int) -> Registers:
        """The partial results of all warps for one element, in their order."""
        lw, dtype = self.lw, self.reduction.dtype
        width = min(self.warps, 16 // self.bytes)
        address, values = self.addresses[register], []
        for first in range(0, self.warps, width):
            pointer = shared_pointer(lw, lw.fb.add(address, first * self.bytes))
            vector = lw.fb.load(pointer, memory_type(lw, dtype, width), width * self.bytes)
            values += [from_memory(lw, v, dtype) for v in split_vector(lw, vector, width)]
        return values
