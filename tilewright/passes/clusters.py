"""Clusters: neighbouring programs run in blocks that reach each other's shared memory, and share their copies.

With ``num_ctas`` = n, n programs along one grid axis run side by side in the n blocks of a cluster. A copy whose
address and whose control flow do not follow that axis brings the same tile to all of them: each block fetches an nth
and the copy engine writes it into every block's slot (`Copy.multicast`), so the tile crosses the L2 cache once.
Blocks that share copies use the ring in step, which the ring's `ctas` says.

`tile-order` chooses the axis and numbers programs such that a cluster holds neighbours; `pipeline` asks `varies` of
each copy. PTX ISA, "Cluster of Cooperative Thread Arrays" and "Bulk Tensor copy: multicast".
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Effect, Function, IRError, Operation, Value, uses_of
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Binary, BlockId, Constant, Dot, Element, For, Load, While
from tilewright.ir.types import SlotType, TileType
from tilewright.passes.analysis import (
    control_values,
    enclosing_operations,
    producers,
    program_axes,
    view_root,
    written_tensors,
)
from tilewright.passes.matrix import ROLES, schedule_of
from tilewright.passes.placement import copy_engine, dot_loads

#: how often a loop is taken to run, where copies in and out of it are weighed against each other
LOOP_WEIGHT = 8


def cluster_size(function: Function) -> int:
    """Blocks of a cluster."""
    return int(function.attributes.get("num_ctas", 1))


# --- which axis -------------------------------------------------------------------------------------


def choose_axis(function: Function, target: Target, ctas: int) -> int | None:
    """The grid axis whose neighbours should share copies in clusters of ``ctas`` blocks.

    The one along which most bytes stay the same. None where copies could be shared but the tensors' alignment rules
    the copy engine out; IRError where the program or the target has nothing to share.
    """
    if not target.has("clusters"):
        raise IRError(f"num_ctas={ctas}: {target.name} has no clusters of blocks", function.loc, "leave out num_ctas")
    if not any(isinstance(op, Dot) for op in function.walk()) or schedule_of(function, target) != ROLES:
        raise IRError(
            f"num_ctas={ctas}: '{function.name}' copies without rings, so its blocks have nothing to share",
            function.loc,
            "clusters need matrix products that fit the asynchronous unit (schedule='roles')",
        )
    loads = list(dot_loads(function))
    axes = [(_shared_bytes(loads, axis, function), -axis) for axis in range(3) if _walks(function, axis)]
    if not axes or max(axes)[0] == 0:
        raise IRError(
            f"num_ctas={ctas}: neighbouring programs of '{function.name}' load no tile in common",
            function.loc,
            "a tile can be shared if neither its address nor the loops around it depend on one of the program ids",
        )
    axis = -max(axes)[1]
    wanted = [load for load in loads if not _follows(load, axis, function)]
    return axis if any(copy_engine(load, target) == "tma" for load in wanted) else None


def _walks(function: Function, axis: int) -> bool:
    """Whether programs along the axis differ at all."""
    return any(op.base_name == "tile.program_id" and op.attributes["axis"] == axis for op in function.walk())


def _follows(load: Load, axis: int, function: Function) -> bool:
    """Whether a load's address, or how often it runs, depends on a grid axis."""
    loops = enclosing_operations(function)
    assert load.parent is not None
    values = [load.view, *load.index, *control_values(load.parent, loops)]
    return any(axis in program_axes(value, loops) for value in values)


def _shared_bytes(loads: Iterable[Load], axis: int, function: Function) -> int:
    loops = enclosing_operations(function)
    total = 0
    for load in loads:
        if not _follows(load, axis, function):
            assert isinstance(load.result.type, TileType)
            size = prod(load.result.type.shape) * load.result.type.dtype.bytes
            total += size * LOOP_WEIGHT ** _depth(load.parent, loops)
    return total


def _depth(block: Block | None, loops: dict[Block, Operation]) -> int:
    depth = 0
    while block in loops:
        assert block is not None
        depth += isinstance(loops[block], For | While)
        block = loops[block].parent
    return depth


# --- programs of a cluster ----------------------------------------------------------------------------


def guard_effects(block: Block, valid: Value) -> None:
    """Let a program act only if ``valid``: blocks without a program of their own run a neighbour's beside it.

    They take part in what the cluster does together. Assertions and assumptions hold in the neighbour's program.
    """
    for op in list(block.ops):
        for region in op.regions:
            guard_effects(region.block, valid)
        acts = bool(op.effect & Effect.WRITE) or op.base_name == "tile.print"
        if not acts or op.regions:
            continue
        if any(_used(block, result) for result in op.results):
            raise IRError(
                f"'{op.name}' gives a value that the program uses, which programs in clusters cannot have",
                op.loc,
                "leave out num_ctas",
            )
        guard(op, valid)


def _used(block: Block, result: Value) -> bool:
    """Whether a value has uses; they lie in its own block or further in."""
    assert block.parent is not None
    return bool(uses_of(block.parent).get(result))


def guard(op: Operation, valid: Value) -> None:
    """Run an operation whose results nobody uses only if ``valid``."""
    block = op.parent
    assert block is not None
    position = block.ops.index(op)
    block.ops.remove(op)
    b = Builder(block, op.loc)
    with b.at(block, position):
        branch = b.if_else(valid)
    with b.at(branch.then_body.block):
        b.insert(op)
        b.yield_()
    with b.at(branch.else_body.block):
        b.yield_()


# --- copies in common -----------------------------------------------------------------------------------


def shared_axis(load: Load, slot: SlotType, function: Function) -> int | None:
    """The dim along which the blocks of a cluster divide a copy among them; None where each makes its own."""
    ctas = cluster_size(function)
    if ctas == 1 or load.engine != "tma" or varies(load, function):
        return None
    return next((axis for axis in slot.layout.order if slot.layout.part_bytes(axis, ctas) is not None), None)


def varies(load: Load, function: Function) -> bool:
    """Whether the tile, or how often it is loaded, may differ between the blocks of a cluster."""
    loops, ctas, written = enclosing_operations(function), cluster_size(function), written_tensors(function)
    assert load.parent is not None
    pending = [load.view, *load.index, *control_values(load.parent, loops)]
    seen: set[Value] = set()
    while pending:
        value = pending.pop()
        if value in seen or _numbers_clusters(value, ctas):
            continue
        seen.add(value)
        op = value.op
        if isinstance(op, BlockId) or (op is not None and op.effect & Effect.WRITE):
            return True
        if isinstance(op, Load | Element) and view_root(op.view) in written:
            return True
        pending += producers(value, loops)
    return False


def _numbers_clusters(value: Value, ctas: int) -> bool:
    """The index of the block's cluster: the block's divided by the cluster's size."""
    op = value.op
    if not isinstance(op, Binary) or op.fn != "floordiv" or not isinstance(op.lhs.op, BlockId):
        return False
    return isinstance(op.rhs.op, Constant) and op.rhs.op.value == ctas
