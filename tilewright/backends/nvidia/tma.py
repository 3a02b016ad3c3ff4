"""Bulk tensor copies by the copy engine (TMA) between global views and slots.

A slot's layout is cut into boxes, each of them one instruction: as wide as one block of the layout (its swizzle),
and as many lines as lie together, 256 elements along a dim at most (PTX ISA, "Tensor data movement"; the CUDA driver
API's cuTensorMapEncodeTiled). The tensor map lists the dims of the root tensor in the order of the slot's layout, so
that the engine numbers lines as the layout does; dims that a subview fixed have a box of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from tilewright.backends.lower.context import Lowering, SlotRef, Table, TokenRef, ViewRef, lowers
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.memory import run_if
from tilewright.backends.lower.views import index_operand
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import cp_async, ptx
from tilewright.backends.nvidia.rings import TENSOR_MAP_BYTES, announce, engine_alone, full_barrier, is_engine, ring
from tilewright.backends.nvidia.state import WARPGROUP_WARPS, leader, state, warpgroup_index, warpgroup_leader
from tilewright.backends.nvidia.thread_copies import copy_by_threads
from tilewright.ir.abi import TensorMapParam
from tilewright.ir.async_ops import BulkStore, BulkWait, Copy, MakeRing, Publish, Role, ring_of
from tilewright.ir.comm_ops import Peer, peer_of
from tilewright.ir.core import Function, IRError, Operation, Value
from tilewright.ir.layout import SharedLayout
from tilewright.ir.tile_ops import OffsetView, PermuteView, Subview
from tilewright.ir.types import SlotType, TokenType, ViewType

MOST_BOX = 256

TMA_LOWERINGS: Table = {}


# --- boxes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Boxes:
    """How the part ``sizes`` of a slot is cut: boxes of ``box`` elements, in the slot's dims, at each of ``starts``."""

    layout: SharedLayout
    box: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    def offset(self, start: Sequence[int]) -> int:
        """Bytes from the slot's base to the box at ``start``."""
        return int(self.layout.offset_of(*start)) * self.layout.element_bits // 8


def cut(layout: SharedLayout, sizes: Sequence[int]) -> Boxes:
    """Boxes for the corner ``sizes`` of a slot; ValueError where its bytes are not those that the engine writes."""
    if layout.max_phase > 1:
        raise ValueError(f"the copy engine does not write {layout}")
    box = [1] * len(sizes)
    box[layout.order[0]] = layout.block_size
    for axis in layout.order[1:]:
        box[axis] = max(d for d in range(1, min(MOST_BOX, sizes[axis]) + 1) if sizes[axis] % d == 0)
        if box[axis] != layout.shape[axis]:
            break  # lines beyond do not follow directly
    if layout.block_size > MOST_BOX:
        raise ValueError(f"a box of {layout.block_size} elements exceeds the copy engine's {MOST_BOX}")
    starts = tuple(product(*(range(0, size, step) for size, step in zip(sizes, box, strict=True))))
    boxes = Boxes(layout, tuple(box), starts)
    if any(boxes.offset(start) % layout.alignment for start in starts):
        raise ValueError(f"boxes of {box} in {layout} do not start where the swizzle's pattern does")
    return boxes


def plan_tensor_maps(function: Function, warps: int) -> list[TensorMapParam]:
    """The tensor maps that a function's bulk copies need, each once, in program order. ``warps``: of the block."""
    found: dict[TensorMapParam, None] = {}
    for op, own in with_warps(function, warps):
        if isinstance(op, BulkStore) or (isinstance(op, Copy) and is_engine(op.result)):
            found[map_of(op, own)] = None
    return list(found)


def with_warps(function: Function, warps: int) -> Iterator[tuple[Operation, int]]:
    """All operations, and how many warps run each of them."""
    for op in function.body.block.ops:
        own = op.warps if isinstance(op, Role) else warps
        for nested in op.walk():
            yield nested, own


def map_of(op: Copy | BulkStore, warps: int) -> TensorMapParam:
    """The tensor map of a copy that ``warps`` warps run."""
    slot, view = op.slot.type, op.view.type
    assert isinstance(slot, SlotType) and isinstance(view, ViewType)
    if view.strides[slot.layout.order[0]] != 1:
        raise IRError(f"'{op.name}': the slot's lines run along dim {slot.layout.order[0]}, the view's do not", op.loc)
    root, dims = provenance(op.view)
    rank = root.type.rank if isinstance(root.type, ViewType) else 0
    order = [dims[axis] for axis in slot.layout.order]
    order += [dim for dim in reversed(range(rank)) if dim not in order]
    box = [1] * rank
    for axis, size in enumerate(boxes_of(op, warps).box):
        box[dims[axis]] = size
    return TensorMapParam(root.hint, tuple(box), tuple(order), slot.layout.swizzle, peer_of(op.view) is not None)


def boxes_of(op: Copy | BulkStore, warps: int) -> Boxes:
    """The boxes of a copy: of the whole slot, or of its part of one warpgroup or block."""
    slot = op.slot.type
    assert isinstance(slot, SlotType)
    axis, parts = shares(op, warps)
    sizes = list(slot.shape)
    sizes[axis] //= parts
    return cut(slot.layout, sizes)


def shares(op: Copy | BulkStore, warps: int) -> tuple[int, int]:
    """Along which dim, and into how many parts, warpgroups or the blocks of a cluster cut what an operation moves."""
    if isinstance(op, BulkStore):
        return op.axis, max(1, warps // WARPGROUP_WARPS) if op.scope == "warpgroup" else 1
    return (0, 1) if op.multicast is None else (op.multicast, blocks_of(op))


def blocks_of(op: Copy) -> int:
    """The blocks that use the ring of a copy in step."""
    ring_ = ring_of(op.slot)
    return ring_.op.ctas if ring_ is not None and isinstance(ring_.op, MakeRing) else 1


def provenance(view: Value) -> tuple[Value, tuple[int, ...]]:
    """The parameter that a view was derived from, and which of its dims each dim of the view is."""
    op = view.op
    if isinstance(op, OffsetView | Peer):
        return provenance(op.view)
    if isinstance(op, Subview):
        root, dims = provenance(op.view)
        return root, dims[len(op.index) :]
    if isinstance(op, PermuteView):
        root, dims = provenance(op.view)
        return root, tuple(dims[p] for p in op.perm)
    assert isinstance(view.type, ViewType)
    return view, tuple(range(view.type.rank))


def coordinates(lw: Lowering, view: ViewRef, param: TensorMapParam, first: Sequence[IntLike]) -> list[mlir.Value]:
    """Where a box starts in the root tensor, contiguous dim first (i32). ``first``: per dim of the view."""
    at: dict[int, IntLike] = dict(view.fixed)
    for axis, start in enumerate(first):
        at[view.root_dims[axis]] = lw.index.add(start, view.origin[axis])
    return [lw.index.value(lw.index.narrow(at[dim])) for dim in param.order]


def _transfers(
    lw: Lowering, op: Copy | BulkStore, shift: Sequence[IntLike], skip: IntLike
) -> Iterator[tuple[mlir.Value, list[mlir.Value], mlir.Value]]:
    """(tensor map, coordinates, address in shared memory) of each box.

    The part that this thread moves starts ``shift`` elements into the tile and ``skip`` bytes into the slot.
    """
    view, slot, math, warps = lw.view(op.view), lw.slot(op.slot), lw.index, lw.scope.num_warps
    boxes, param = boxes_of(op, warps), map_of(op, warps)
    pointer = lw.entry.tensor_map(param)
    if view.peer is not None:
        pointer = lw.fb.gep(pointer, math.value(math.mul(math.wide(view.peer), TENSOR_MAP_BYTES), 64))
    index = [math.narrow(index_operand(lw, value)) for value in op.index]
    tile = [math.add(math.mul(i, n), s) for i, n, s in zip(index, slot.type.shape, shift, strict=True)]
    for start in boxes.starts:
        first = [math.add(t, s) for t, s in zip(tile, start, strict=True)]
        address = math.value(math.sum([slot.base, skip, boxes.offset(start)]))
        yield pointer, coordinates(lw, view, param, first), address


# --- operations -----------------------------------------------------------------------------------


@lowers(Copy, table=TMA_LOWERINGS)
def lower_copy(lw: Lowering, op: Copy) -> None:
    if isinstance(op.result.type, TokenType) and op.result.type.kind == cp_async.KIND:
        cp_async.lower_cp_async(lw, op)
        return
    if not is_engine(op.result):
        copy_by_threads(lw, op)
        lw.define(op.result, TokenRef("threads"))
        return
    publish = _publish(lw, op.result)
    if op.pad != 0:
        raise lw.error(f"the copy engine pads with zeros, not with {op.pad}")
    run_if(lw, leader(lw), lambda: _issue(lw, op, publish))
    lw.define(op.result, TokenRef("tma"))


def _issue(lw: Lowering, op: Copy, publish: Publish) -> None:
    if op.result is next(t for t in publish.tokens if is_engine(t)):
        announce(lw, publish)
    barrier = full_barrier(lw, ring(lw, publish.ring), lw.scalar(publish.count))
    blocks = 1 if op.multicast is None else blocks_of(op)
    shift, skip = _own_part(lw, lw.slot(op.slot), shares(op, 1), lambda: ptx.cluster_rank(lw.fb))
    for pointer, place, address in _transfers(lw, op, shift, skip):
        ptx.load_box(lw.fb, pointer, place, address, barrier, blocks, op.evict)


def _publish(lw: Lowering, token: Value) -> Publish:
    publish = state(lw).publishes.get(token)
    if publish is None:
        raise lw.error("nothing publishes this copy, so it has no barrier to complete on")
    if not engine_alone(publish) and lw.scope.single_thread:
        raise lw.error("threads and copy engine fill the stage together, but the role has one thread")
    return publish


@lowers(BulkStore, table=TMA_LOWERINGS)
def lower_bulk_store(lw: Lowering, op: BulkStore) -> None:
    shift, skip = _own_part(lw, lw.slot(op.slot), shares(op, lw.scope.num_warps), lambda: warpgroup_index(lw))
    who = warpgroup_leader(lw) if op.scope == "warpgroup" else leader(lw)
    transfers = list(_transfers(lw, op, shift, skip))
    boxes = [(where, address) for _, where, address in transfers]
    ptx.store_boxes(lw.fb, transfers[0][0], boxes, who, op.update, op.evict)


def _own_part(
    lw: Lowering, slot: SlotRef, shared: tuple[int, int], which: Callable[[], mlir.Value]
) -> tuple[list[IntLike], IntLike]:
    """Where in the tile, and how many bytes into the slot, the part of one warpgroup or block begins."""
    axis, parts = shared
    shift: list[IntLike] = [0] * slot.type.rank
    if parts == 1:
        return shift, 0
    step = slot.layout.part_bytes(axis, parts)
    if step is None:
        raise lw.error(f"{slot.type} has no {parts} parts along dim {axis} that start where the swizzle's pattern does")
    number = which()
    shift[axis] = lw.index.mul(number, slot.type.shape[axis] // parts)
    return shift, lw.index.mul(number, step)


@lowers(BulkWait, table=TMA_LOWERINGS)
def lower_bulk_wait(lw: Lowering, op: BulkWait) -> None:
    """Every thread waits for the groups that it has committed itself: the leader for its stores, others not at all."""
    ptx.wait_stores(lw.fb, op.pending, op.read)
