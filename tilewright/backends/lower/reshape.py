"""Lowering of operations that rename registers: broadcast, expand_dims, reshape, transpose, extract.

A reshape between layouts that are no linear map of each other goes through scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tilewright.backends.lower.context import Lowering, lowers
from tilewright.backends.lower.coordinates import TileCoordinates, sole_holder
from tilewright.backends.lower.elements import from_memory, memory_type, to_memory
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.memory import run_if
from tilewright.backends.lower.shared import shared_address, shared_pointer
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import tile_ops
from tilewright.ir.core import Value
from tilewright.ir.layout import LinearLayout
from tilewright.ir.scratch import renames_registers
from tilewright.ir.types import DType, element_type


def rename(lw: Lowering, result: Value, source: Value, derived: LinearLayout, registers: Sequence[int]) -> None:
    """Give ``result`` the source's registers in the order of ``registers``, which is that of layout ``derived``.

    The result may hold the same elements of the same threads in yet another order.
    """
    permutation = derived.register_permutation(lw.layout(result))
    if permutation is None:
        raise lw.error(
            f"the result's layout {lw.layout(result)} is not the one that follows from the source's, {derived}",
            "the layout pass must insert tile.convert",
        )
    held = lw.registers(source)
    lw.define(result, [held[registers[position]] for position in permutation])


def _same_order(layout: LinearLayout) -> range:
    return range(layout.num_registers)


@lowers(tile_ops.Broadcast)
def lower_broadcast(lw: Lowering, op: tile_ops.Broadcast) -> None:
    """Each register of the result is the one of the source with the broadcast coordinates set to 0.

    The result may spread the broadcast dims over lanes and warps in any way, provided that every thread
    already holds what it needs.
    """
    source, shape = lw.layout(op.source), lw.layout(op.result).tile_shape
    result = lw.layout(op.result)
    grown = [axis for axis in range(source.rank) if source.tile_shape[axis] != shape[axis]]
    position = {tuple(c): r for r, c in reversed(list(enumerate(source.table("register").tolist())))}
    wanted = result.table("register").copy()
    wanted[:, grown] = 0
    for dim in ("lane", "warp"):
        own = [tuple(0 if a in grown else c for a, c in enumerate(v)) for v in result.basis(dim)]
        if own != list(source.basis(dim)):
            raise lw.error(
                f"threads of the result's layout {result} do not hold their source elements in {source}",
                "the layout pass must insert tile.convert",
            )
    held = lw.registers(op.source)
    lw.define(op.result, [held[position[tuple(c)]] for c in wanted.tolist()])


@lowers(tile_ops.ExpandDims)
def lower_expand_dims(lw: Lowering, op: tile_ops.ExpandDims) -> None:
    derived = lw.layout(op.source).expand_dim(op.axis)
    rename(lw, op.result, op.source, derived, _same_order(derived))


@lowers(tile_ops.Reshape)
def lower_reshape(lw: Lowering, op: tile_ops.Reshape) -> None:
    source, result = lw.layout(op.source), lw.layout(op.result)
    if renames_registers(source, result):
        derived = source.reshape(result.tile_shape)
        rename(lw, op.result, op.source, derived, _same_order(derived))
    elif op.scratch is None:
        raise lw.error("the reshape goes through shared memory, but no scratch is set: run the shared-memory plan")
    else:
        _reshape_through(lw, op, shared_address(lw, op.scratch))


def _reshape_through(lw: Lowering, op: tile_ops.Reshape, base: mlir.Value) -> None:
    """Elements lie in row-major order in scratch memory, which is that of both shapes."""
    fb, dtype = lw.fb, element_type(op.source.type)
    source, result = TileCoordinates(lw, lw.layout(op.source)), TileCoordinates(lw, lw.layout(op.result))
    held, type_ = lw.registers(op.source), memory_type(lw, dtype)

    def write() -> None:
        places = _row_major(lw, source.fresh(), base, dtype)
        for value, place in zip(held, places, strict=True):
            fb.store(to_memory(lw, value, dtype), place, dtype.bytes)

    lw.ops.barrier(lw, "role")  # whoever used the scratch before has read it
    run_if(lw, sole_holder(lw, source.layout), write)
    lw.ops.barrier(lw, "role")
    places = _row_major(lw, result, base, dtype)
    lw.define(op.result, [from_memory(lw, fb.load(place, type_, dtype.bytes), dtype) for place in places])


def _row_major(lw: Lowering, coordinates: TileCoordinates, base: mlir.Value, dtype: DType) -> list[mlir.Value]:
    """Pointers to the elements that the thread holds."""
    index, places = lw.index, []
    for register in range(len(coordinates.register)):
        position: IntLike = 0
        for axis, size in enumerate(coordinates.layout.tile_shape):
            position = index.add(index.mul(position, size), coordinates.of(register, axis))
        places.append(shared_pointer(lw, index.add(base, index.mul(position, dtype.bytes))))
    return places


@lowers(tile_ops.Transpose)
def lower_transpose(lw: Lowering, op: tile_ops.Transpose) -> None:
    derived = lw.layout(op.source).transpose(op.perm)
    rename(lw, op.result, op.source, derived, _same_order(derived))


@lowers(tile_ops.Extract)
def lower_extract(lw: Lowering, op: tile_ops.Extract) -> None:
    source, result = lw.layout(op.source), lw.layout(op.result)
    try:
        derived, registers = source.extract(op.offsets, result.tile_shape)
    except ValueError:
        _extract_copies(lw, op, source, result)
        return
    rename(lw, op.result, op.source, derived, registers)


def _extract_copies(lw: Lowering, op: tile_ops.Extract, source: LinearLayout, result: LinearLayout) -> None:
    """The part begins at a multiple of the run that lanes and warps cover: its registers are some of the source's."""
    reach = [0] * source.rank
    for dim in ("lane", "warp"):
        if source.basis(dim) != result.basis(dim):
            raise lw.error("threads do not hold the elements of the part: the layout pass must convert")
        for vector in source.basis(dim):
            reach = [known | step for known, step in zip(reach, vector, strict=True)]
    if any(offset % (1 << bits.bit_length()) for offset, bits in zip(op.offsets, reach, strict=True) if bits):
        raise lw.error("the part begins inside the run of the threads: the layout pass must convert")
    held: dict[tuple[int, ...], mlir.Value] = {}
    for coordinate, value in zip(source.table("register").tolist(), lw.registers(op.source), strict=True):
        held.setdefault(tuple(coordinate), value)
    wanted = result.table("register") + np.asarray(op.offsets)
    lw.define(op.result, [held[tuple(coordinate)] for coordinate in wanted.tolist()])
