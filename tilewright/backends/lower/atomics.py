"""Lowering of `tile.atomic`: one update for each element of the tile, by the first thread that holds it.

Device scope. An ordered update has fences around it and barriers around these: what all threads of the block have
written comes before it, what they read behind comes after it, since both kinds of order add up (PTX memory model,
"causality order"). A barrier of an AMD workgroup does not wait for its waves' stores to leave for the device's cache,
so there each wave has fences of its own outside of the barriers (LLVM's memory models of the AMDGPU targets).

Float max and min are integer updates: of floats with one sign the bits are ordered as the numbers are, or backwards.
A NaN in the new value wins because it takes the sign that is outermost in that order.
Threads that hold copies of an element get its old value from the one that made the update, lanes by a shuffle,
warps through scratch memory (only where somebody asks for it).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from tilewright.backends.lower.context import Lowering, Registers, lowers
from tilewright.backends.lower.coordinates import sole_holder
from tilewright.backends.lower.elements import constant, element, from_words, to_words
from tilewright.backends.lower.places import Places
from tilewright.backends.lower.shared import shared_address, shared_pointer
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import indexed_ops
from tilewright.ir.layout import LinearLayout
from tilewright.ir.types import DType

_INTEGER = {"add": "add", "max": "max", "min": "min", "and": "and", "or": "or", "xor": "xor", "exchange": "xchg"}


@lowers(indexed_ops.Atomic)
def lower_atomic(lw: Lowering, op: indexed_ops.Atomic) -> None:
    layout = lw.layout(op.value)
    places = Places(lw, lw.view(op.view), op.index, op.indices, op.axes, layout)
    dtype = places.view.dtype
    values = lw.registers(op.value)
    expected = lw.registers(op.expected) if op.expected is not None else values
    holder = sole_holder(lw, layout)
    ordered = op.order != "relaxed"
    if ordered:
        if not lw.ops.barriers_add_up:
            lw.fb.fence("release", lw.ops.device_scope)
        lw.ops.barrier(lw, "role")
    old: dict[tuple[int, ...], mlir.Value] = {}
    for register, coordinate in enumerate(layout.table("register").tolist()):
        if tuple(coordinate) not in old:
            inside = places.inside(register, whole=False)
            conditions = [c for c in (holder, inside) if c is not None]
            condition = reduce(lw.fb.and_, conditions) if conditions else None
            pointer = places.pointer(register)
            old[tuple(coordinate)] = _update_if(lw, op, condition, pointer, values[register], expected[register], dtype)
    results = [old[tuple(coordinate)] for coordinate in layout.table("register").tolist()]
    if holder is not None and any(op.result in other.operands for other in lw.function.walk()):
        results = _pass_on(lw, op, layout, dtype, results)
    if ordered:
        lw.ops.barrier(lw, "role")
        if not lw.ops.barriers_add_up:
            lw.fb.fence("acquire", lw.ops.device_scope)
    lw.define(op.result, results)


def _update_if(
    lw: Lowering,
    op: indexed_ops.Atomic,
    condition: mlir.Value | None,
    pointer: mlir.Value,
    value: mlir.Value,
    expected: mlir.Value,
    dtype: DType,
) -> mlir.Value:
    def update() -> list[mlir.Value]:
        if op.fn == "cas":
            return [_compare_and_swap(lw, pointer, expected, value, dtype)]
        return [_update(lw, op.fn, pointer, value, dtype)]

    def ordered() -> list[mlir.Value]:
        lw.fb.fence("release", lw.ops.device_scope)  # LLVM leaves an order of the update itself out of PTX
        old = update()
        lw.fb.fence("acquire", lw.ops.device_scope)
        return old

    body = update if op.order == "relaxed" else ordered
    if condition is None:
        return body()[0]
    zero = constant(lw, 0, dtype)
    return lw.fb.if_else(condition, [zero.type], body, lambda: [zero])[0]


# --- one element ----------------------------------------------------------------------------------


def _update(lw: Lowering, fn: str, pointer: mlir.Value, value: mlir.Value, dtype: DType) -> mlir.Value:
    if not dtype.is_float:
        return _read_modify_write(lw, _INTEGER[fn], pointer, value, dtype)
    if fn == "add":
        return _read_modify_write(lw, "fadd", pointer, value, dtype)
    if fn == "exchange":
        old = _read_modify_write(lw, "xchg", pointer, lw.fb.bitcast(value, _bits(lw, dtype)), dtype)
        return lw.fb.bitcast(old, element(lw, dtype))
    return _float_extremum(lw, fn, pointer, value, dtype)


def _bits(lw: Lowering, dtype: DType) -> Any:
    return lw.fb.types.int(dtype.bits)


def _read_modify_write(lw: Lowering, name: str, pointer: mlir.Value, value: mlir.Value, dtype: DType) -> mlir.Value:
    old = lw.fb.atomicrmw(name, pointer, value, "monotonic", lw.ops.device_scope, dtype.bytes)
    for attribute in lw.ops.atomic_attributes:
        old.owner.attributes[attribute] = lw.fb.module.attribute("unit")
    return old


def _float_extremum(lw: Lowering, fn: str, pointer: mlir.Value, value: mlir.Value, dtype: DType) -> mlir.Value:
    fb, type_ = lw.fb, _bits(lw, dtype)
    sign = 1 << dtype.bits - 1
    quiet = {32: 0x7FC00000, 64: 0x7FF8000000000000}[dtype.bits] | (sign if fn == "min" else 0)
    bits = fb.select(fb.fcmp("uno", value, value), fb.const(quiet, type_), fb.bitcast(value, type_))
    signed, unsigned = ("max", "umin") if fn == "max" else ("min", "umax")
    old = fb.if_else(
        fb.icmp("sge", bits, 0),
        [type_],
        lambda: [_read_modify_write(lw, signed, pointer, bits, dtype)],
        lambda: [_read_modify_write(lw, unsigned, pointer, bits, dtype)],
    )[0]
    return fb.bitcast(old, element(lw, dtype))


def _compare_and_swap(
    lw: Lowering, pointer: mlir.Value, expected: mlir.Value, value: mlir.Value, dtype: DType
) -> mlir.Value:
    fb, type_ = lw.fb, _bits(lw, dtype)
    expected, value = fb.bitcast(expected, type_), fb.bitcast(value, type_)
    return fb.bitcast(fb.cmpxchg(pointer, expected, value, dtype.bytes, lw.ops.device_scope), element(lw, dtype))


# --- old values for threads that hold copies --------------------------------------------------------


def _pass_on(lw: Lowering, op: indexed_ops.Atomic, layout: LinearLayout, dtype: DType, results: Registers) -> Registers:
    distinct = list(dict.fromkeys(results))
    if layout.free_bits("warp"):
        passed = _through_memory(lw, op, layout, dtype, distinct)
    else:
        source = lw.fb.and_(lw.scope.lane, ~_mask(layout, "lane"))
        passed = []
        for value in distinct:
            words = [lw.ops.shuffle(lw, word, source) for word in to_words(lw, value, dtype)]
            passed.append(from_words(lw, words, dtype))
    table = dict(zip(distinct, passed, strict=True))
    return [table[value] for value in results]


def _mask(layout: LinearLayout, dim: str) -> int:
    return sum(1 << bit for bit in layout.free_bits(dim))


def _through_memory(
    lw: Lowering, op: indexed_ops.Atomic, layout: LinearLayout, dtype: DType, values: Registers
) -> Registers:
    """Every thread writes what it got; its value is that of the thread with the free bits zero."""
    if op.scratch is None:
        raise lw.error("warps exchange old values, but no scratch is set: the shared-memory plan must run first")
    fb, base = lw.fb, shared_address(lw, op.scratch)
    threads = layout.num_lanes * layout.num_warps
    free = _mask(layout, "lane") | _mask(layout, "warp") * layout.num_lanes
    own, source = lw.scope.thread, fb.and_(lw.scope.thread, ~free)

    def place(number: int, thread: mlir.Value) -> mlir.Value:
        offset = fb.mul(fb.add(thread, number * threads), dtype.bytes)
        return shared_pointer(lw, fb.add(base, offset))

    lw.ops.barrier(lw, "role")  # whoever used the scratch before has read it
    for number, value in enumerate(values):
        fb.store(value, place(number, own), dtype.bytes)
    lw.ops.barrier(lw, "role")
    return [fb.load(place(number, source), element(lw, dtype), dtype.bytes) for number in range(len(values))]
