"""Lowering of shared memory: buffers, slots, and tiles on their way between slots and registers.

A slot's byte offset of a coordinate is linear over F2 inside the layout's core (`SharedLayout.offset_bases`), so
it splits into a run-time part of the thread and a constant part of the register. Where their bits are disjoint the
constant is added, and LLVM turns it into the instruction's immediate offset; where a swizzle mixes them, the mixed
bits are XORed into the thread's part once per distinct value.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import reduce
from operator import or_, xor

from tilewright.backends.lower.context import BufferRef, Lowering, Registers, SlotRef, lowers
from tilewright.backends.lower.coordinates import check_threads, sole_holder
from tilewright.backends.lower.elements import from_memory, join_vector, memory_type, split_vector, to_memory
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.memory import run_if
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import async_ops
from tilewright.ir.layout import ExchangeLayout, LinearLayout, SharedLayout, shared_vector_bytes
from tilewright.ir.types import BufferType, DType, SlotType

MAX_VECTOR_BYTES = 16


class SharedAccess:
    """The addresses at which the threads of a register layout find their elements in a slot."""

    def __init__(
        self,
        lw: Lowering,
        slot: IntLike,
        shared: SharedLayout | ExchangeLayout,
        registers: LinearLayout,
        dtype: DType,
    ):
        check_threads(lw, registers)
        self.lw, self.shared, self.registers, self.dtype = lw, shared, registers, dtype
        self.bases, self.strides = shared.offset_bases(), shared.repeat_strides()
        self.width = max(1, shared_vector_bytes(registers, shared, MAX_VECTOR_BYTES) // dtype.bytes)
        self.slot = slot
        lanes, warps = ([self._inside(v) for v in registers.basis(dim)] for dim in ("lane", "warp"))
        #: the bits of the offset that depend on the thread
        self.mask = reduce(or_, lanes + warps, 0)
        math, scope = lw.index, lw.scope
        self.thread = math.xor(math.linear_map(scope.lane, lanes), math.linear_map(scope.warp, warps))
        self.far = math.sum([self._thread_beyond(axis) for axis in range(registers.rank)])
        self._starts: dict[int, mlir.Value] = {}

    def fresh(self) -> SharedAccess:
        """The same access for one side of a branch: values made there are not defined on the other side."""
        other = copy(self)
        other._starts = {}
        return other

    def _inside(self, coordinate: Sequence[int]) -> int:
        """The bytes that a coordinate contributes by XOR: its part inside the core."""
        bits = (b for c, bases in zip(coordinate, self.bases, strict=True) for i, b in enumerate(bases) if c >> i & 1)
        return reduce(xor, bits, 0)

    def _beyond(self, coordinate: Sequence[int]) -> int:
        """The bytes that it adds: its repetitions of the core."""
        parts = zip(coordinate, self.bases, self.strides, strict=True)
        return sum((c >> len(bases)) * stride for c, bases, stride in parts)

    def _thread_beyond(self, axis: int) -> IntLike:
        """The bytes that the thread's repetitions of the core along an axis add."""
        core_bits = len(self.bases[axis])
        lanes, warps = ([v[axis] >> core_bits for v in self.registers.basis(dim)] for dim in ("lane", "warp"))
        mask = reduce(or_, lanes + warps, 0)
        if any(part[axis] >> core_bits & mask for part in self.registers.table("register").tolist()):
            raise self.lw.error(f"registers and threads of {self.registers} share repetitions of {self.shared}")
        math, scope = self.lw.index, self.lw.scope
        copies = math.xor(math.linear_map(scope.lane, lanes), math.linear_map(scope.warp, warps))
        return math.mul(copies, self.strides[axis])

    def _start(self, mixed: int) -> mlir.Value:
        """Address of the thread's part with ``mixed`` XORed in, !llvm.ptr<3>.

        A pointer, to which registers add constants: LLVM would compute the sums of constants and what does not change
        in a loop in front of it, and keep every one in a register.
        """
        if mixed not in self._starts:
            math = self.lw.index
            offset = math.add(math.xor(self.thread, mixed), self.far)
            self._starts[mixed] = shared_pointer(self.lw, math.add(self.slot, offset))
        return self._starts[mixed]

    def place(self, register: int) -> tuple[mlir.Value, int]:
        """(!llvm.ptr<3>, bytes from there) of a register's element; few registers differ in the pointer."""
        coordinate = self.registers.table("register")[register].tolist()
        inside = self._inside(coordinate)
        return self._start(inside & self.mask), (inside & ~self.mask) + self._beyond(coordinate)

    def pointer(self, register: int) -> mlir.Value:
        """Address of a register's element, !llvm.ptr<3>."""
        start, apart = self.place(register)
        return self.lw.fb.gep(start, self.lw.fb.i32(apart)) if apart else start

    def groups(self) -> range:
        return range(0, self.registers.num_registers, self.width)

    def load(self) -> Registers:
        lw, registers = self.lw, []
        for first in self.groups():
            type_ = memory_type(lw, self.dtype, self.width)
            value = lw.fb.load(self.pointer(first), type_, self.width * self.dtype.bytes)
            registers += [from_memory(lw, v, self.dtype) for v in split_vector(lw, value, self.width)]
        return registers

    def store(self, values: Registers) -> None:
        lw = self.lw
        for first in self.groups():
            parts = [to_memory(lw, v, self.dtype) for v in values[first : first + self.width]]
            lw.fb.store(join_vector(lw, parts), self.pointer(first), self.width * self.dtype.bytes)


def shared_pointer(lw: Lowering, address: IntLike) -> mlir.Value:
    """A pointer to a byte address of shared memory."""
    return lw.fb.inttoptr(lw.index.value(address), lw.fb.types.ptr(3))


def shared_address(lw: Lowering, offset: int) -> mlir.Value:
    """The byte address (i32) at an offset in the block's shared memory."""
    return lw.fb.add(lw.ops.shared_base(lw), offset)


# --- operations -----------------------------------------------------------------------------------


@lowers(async_ops.Alloc)
def lower_alloc(lw: Lowering, op: async_ops.Alloc) -> None:
    type_ = op.result.type
    assert isinstance(type_, BufferType)
    if op.offset is None:
        raise lw.error("the buffer has no offset: the shared-memory plan must run before lowering")
    lw.define(op.result, BufferRef(shared_address(lw, op.offset), type_.slot, type_.stages))


@lowers(async_ops.Slot)
def lower_slot(lw: Lowering, op: async_ops.Slot) -> None:
    buffer = lw.buffer(op.buffer)
    if buffer.stages == 1:
        lw.define(op.result, SlotRef(buffer.base, buffer.slot))
        return
    stage = lw.fb.urem(lw.scalar(op.count), buffer.stages)
    offset = lw.fb.mul(lw.index.value(stage), buffer.slot.stride)
    lw.define(op.result, SlotRef(lw.index.add(buffer.base, offset), buffer.slot))


@lowers(async_ops.TransposeSlot)
def lower_transpose_slot(lw: Lowering, op: async_ops.TransposeSlot) -> None:
    type_ = op.result.type
    assert isinstance(type_, SlotType)
    lw.define(op.result, SlotRef(lw.slot(op.slot).base, type_))


@lowers(async_ops.LocalLoad)
def lower_local_load(lw: Lowering, op: async_ops.LocalLoad) -> None:
    slot = lw.slot(op.slot)
    if op.at is not None:
        address = lw.index.add(slot.base, lw.index.mul(lw.index.value(lw.scalar(op.at)), slot.dtype.bytes))
        value = lw.fb.load(shared_pointer(lw, address), memory_type(lw, slot.dtype, 1), slot.dtype.bytes)
        lw.define(op.result, from_memory(lw, value, slot.dtype))
        return
    access = SharedAccess(lw, slot.base, slot.layout, lw.layout(op.result), slot.dtype)
    lw.define(op.result, access.load())


@lowers(async_ops.LocalStore)
def lower_local_store(lw: Lowering, op: async_ops.LocalStore) -> None:
    slot, layout = lw.slot(op.slot), lw.layout(op.value)
    access = SharedAccess(lw, slot.base, slot.layout, layout, slot.dtype)
    run_if(lw, sole_holder(lw, layout), lambda: access.store(lw.registers(op.value)))


@lowers(async_ops.Barrier)
def lower_barrier(lw: Lowering, op: async_ops.Barrier) -> None:
    lw.ops.barrier(lw, op.scope)
