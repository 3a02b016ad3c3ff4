"""Lowering of `tile.gather` and `tile.scatter`: accesses whose addresses come from tiles.

Reads outside go to element 0 of the tensor and are replaced by the pad value, so they need no branches; writes are
predicated. Where the tile is inside along the axes without index tile, neighbours are read and written as vectors.
"""

from __future__ import annotations

from tilewright.backends.lower.context import Lowering, Registers, lowers
from tilewright.backends.lower.coordinates import sole_holder
from tilewright.backends.lower.elements import constant, from_memory, join_vector, memory_type, split_vector, to_memory
from tilewright.backends.lower.memory import run_if
from tilewright.backends.lower.places import Places
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import indexed_ops


@lowers(indexed_ops.Gather)
def lower_gather(lw: Lowering, op: indexed_ops.Gather) -> None:
    places = Places(lw, lw.view(op.view), op.index, op.indices, op.axes, lw.layout(op.result))
    dtype = places.view.dtype
    padding = to_memory(lw, constant(lw, op.pad, dtype), dtype)
    outside = [padding] * places.layout.num_registers
    types = [value.type for value in outside]
    exists = places.exists()
    if exists is None:
        elements = _read(lw, places, padding)
    else:
        elements = lw.fb.if_else(exists, types, lambda: _read(lw, places.fresh(), padding), lambda: outside)
    lw.define(op.result, [from_memory(lw, element, dtype) for element in elements])


def _read(lw: Lowering, places: Places, padding: mlir.Value) -> Registers:
    whole, width = places.whole(), places.width()
    if whole is None:
        return _load(lw, places, width, True, padding)
    if width == 1:
        return _load(lw, places, 1, False, padding)
    types = [padding.type] * places.layout.num_registers
    return lw.fb.if_else(
        whole,
        types,
        lambda: _load(lw, places.fresh(), width, True, padding),
        lambda: _load(lw, places.fresh(), 1, False, padding),
    )


def _load(lw: Lowering, places: Places, width: int, whole: bool, padding: mlir.Value) -> Registers:
    fb, elements = lw.fb, []
    for first in places.groups(width):
        inside, pointer = places.inside(first, whole), places.pointer(first)
        if inside is not None:
            pointer = fb.select(inside, pointer, places.view.base)
        loaded = fb.load(pointer, memory_type(lw, places.view.dtype, width), places.alignment(width))
        values = split_vector(lw, loaded, width)
        elements += values if inside is None else [fb.select(inside, value, padding) for value in values]
    return elements


@lowers(indexed_ops.Scatter)
def lower_scatter(lw: Lowering, op: indexed_ops.Scatter) -> None:
    layout, values = lw.layout(op.value), lw.registers(op.value)
    places = Places(lw, lw.view(op.view), op.index, op.indices, op.axes, layout)
    run_if(lw, sole_holder(lw, layout), lambda: _write(lw, places.fresh(), values))


def _write(lw: Lowering, places: Places, values: Registers) -> None:
    whole, width = places.whole(), places.width()
    if whole is None or width == 1:
        _store(lw, places, values, width, whole is None)
        return

    def vectors() -> Registers:
        _store(lw, places.fresh(), values, width, True)
        return []

    def elements() -> Registers:
        _store(lw, places.fresh(), values, 1, False)
        return []

    lw.fb.if_else(whole, [], vectors, elements)


def _store(lw: Lowering, places: Places, values: Registers, width: int, whole: bool) -> None:
    accesses = []
    for first in places.groups(width):
        parts = [to_memory(lw, value, places.view.dtype) for value in values[first : first + width]]
        inside = places.inside(first, whole)
        accesses.append((inside, places.pointer(first), join_vector(lw, parts), places.alignment(width)))
    lw.ops.store_if(lw, accesses)
