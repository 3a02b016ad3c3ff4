"""staging: stores of consumer roles go through shared memory and leave by the copy engine.

A tile in accumulator layout would store a few bytes per thread and row. Instead the warps write
column chunks into a swizzled slot and the engine copies the slot out, clipping ragged edges, while
the warps go on. Where each warpgroup owns whole rows or columns of the tile, it stages and stores them on its own.
An atomic update or a signal that releases what the program wrote comes after these copies have arrived.
Puts into other ranks' tensors take the same way.
Layouts whose stores fill sectors of global memory anyway (float64 accumulators) stay direct.

Atomic additions of whole tiles whose old values nobody asks for go the same way: the engine adds the slot to what is
there, a line at a time instead of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir.async_ops import BULK_UPDATES, Barrier, BulkWait, LocalStore, Role
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import Put
from tilewright.ir.core import Block, Function, Operation, Value, replace_uses, uses_of
from tilewright.ir.indexed_ops import Atomic
from tilewright.ir.layout import SharedLayout, shared_candidates
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Store
from tilewright.ir.types import SlotType, TileType, ViewType
from tilewright.ir.verifier_comm import signals_of
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.placement import bulk_copyable

#: bytes of one line of a staging slot (one swizzled block), and how many slots take turns: the warps
#: fill one while the engine empties the other
LINE_BYTES, SLOTS = 128, 2
#: bytes of one store instruction of a thread at most, and of a row's run that is as good stored directly
VECTOR_BYTES, RUN_BYTES = 16, 64
WARPGROUP = 4
#: a tile whose columns are spread over the warps is staged as a whole, if it takes no more than this
WHOLE_BYTES = 32 * 1024


@register_pass("staging")
class Staging(FunctionPass):
    """``line_bytes``: how much of a tile's row is staged at a time."""

    line_bytes: int = LINE_BYTES

    def run_on_function(self, function: Function, context: PassContext) -> None:
        uses = uses_of(function.body)
        for role in [op for op in function.walk() if isinstance(op, Role)]:
            buffers: dict[_Plan, Value] = {}
            releases: set[Operation] = {
                op for op in role.body.walk() if isinstance(op, Atomic) and op.order != "relaxed"
            }
            staged = False
            for op in list(role.body.walk()):
                layout = None
                if isinstance(op, Store | Put):
                    layout = self._slot_layout(op, context.target)
                elif isinstance(op, Atomic) and may_update(op, context.target, uses):
                    layout = self._update_layout(op, context.target)
                if layout is not None:
                    assert isinstance(op, Store | Put | Atomic)
                    releases |= signals_of(op, uses) if isinstance(op, Put) else set()
                    _stage(function, op, layout, buffers)
                    staged = True
            if staged:
                _finish(role)
                _complete_before(releases)

    def _slot_layout(self, store: Store | Put, target: Target) -> SharedLayout | None:
        """The slot for one chunk of the stored tile; None where the store stays direct."""
        view, tile = store.view.type, store.value.type
        assert isinstance(view, ViewType) and isinstance(tile, TileType) and tile.layout is not None
        if not may_stage(store, target) or run_bytes(tile) >= RUN_BYTES:
            return None
        return self._chunk_layout(tile, target)

    def _update_layout(self, update: Atomic, target: Target) -> SharedLayout | None:
        """The same for an atomic addition: a chunk, or the whole tile where warps hold different columns."""
        tile = update.value.type
        assert isinstance(tile, TileType) and tile.layout is not None
        chunk = self._chunk_layout(tile, target)
        if chunk is not None or tile.size * tile.dtype.bytes > WHOLE_BYTES:
            return chunk
        return _swizzled(tile.shape, tile.dtype.bits, target)

    def _chunk_layout(self, tile: TileType, target: Target) -> SharedLayout | None:
        """The slot for ``line_bytes`` of each row, if every warp holds a part of them."""
        assert tile.layout is not None
        width = min(tile.shape[1], self.line_bytes // tile.dtype.bytes)
        if tile.shape[1] % width:
            return None
        try:
            tile.layout.extract((0, 0), (tile.shape[0], width))
        except ValueError:
            return None
        return _swizzled((tile.shape[0], width), tile.dtype.bits, target)


def _swizzled(shape: tuple[int, ...], bits: int, target: Target) -> SharedLayout | None:
    """The widest swizzle of the copy engine for rows of this shape."""
    try:
        options = shared_candidates(shape, bits, (1, 0), target.banks)
    except ValueError:
        return None
    return next((option for option in options if option.swizzle), None)


def may_update(op: Atomic, target: Target, uses: dict[Value, list[Operation]]) -> bool:
    """Whether the copy engine can make an atomic update: of a tile's own place, unordered, the old values unused."""
    view, tile = op.view.type, op.value.type
    assert isinstance(view, ViewType) and isinstance(tile, TileType)
    kind = tile.dtype.name in BULK_UPDATES.get(op.fn, ()) and op.order == "relaxed" and not op.indices
    fits = tile.rank == 2 and view.contiguous_axis == 1 and bulk_copyable(op, target)
    return kind and fits and not uses.get(op.result)


def may_stage(store: Store | Put, target: Target) -> bool:
    """Whether a store of a role may go through a slot; its layout decides in the end."""
    view, tile = store.view.type, store.value.type
    assert isinstance(view, ViewType) and isinstance(tile, TileType)
    return tile.rank == 2 and view.contiguous_axis == 1 and bulk_copyable(store, target)


def run_bytes(tile: TileType) -> int:
    """Consecutive bytes of a row that one store instruction of a warp writes."""
    assert tile.layout is not None
    size, run = tile.dtype.bytes, 1
    while run * size < VECTOR_BYTES and (0, run) in tile.layout.basis("register"):
        run *= 2
    while (0, run) in tile.layout.basis("lane"):
        run *= 2
    return run * size


@dataclass(frozen=True)
class _Plan:
    """How a store is staged. Stores share a buffer only if they take turns on its slots in the same way."""

    slot: SlotType
    #: 1 where an odd number of chunks would meet its own slot one store too early
    slots: int
    scope: str
    #: with scope warpgroup, the dim along which warpgroups hold parts of the tile
    axis: int


def _stage(function: Function, store: Store | Put | Atomic, layout: SharedLayout, buffers: dict[_Plan, Value]) -> None:
    tile, block = store.value.type, store.parent
    assert isinstance(tile, TileType) and block is not None
    chunks = tile.shape[1] // layout.shape[1]
    slot = SlotType(layout.shape, tile.dtype, layout)
    axis = own_axis(tile, layout)
    plan = _Plan(slot, 1 if chunks % SLOTS else SLOTS, "role" if axis is None else "warpgroup", axis or 0)
    if plan not in buffers:
        top = Builder(function.body.block, store.loc)
        with top.at(function.body.block, 0):
            buffers[plan] = top.alloc(slot, hint="staging", stages=plan.slots)
    position = block.ops.index(store)
    block.ops.remove(store)
    b = Builder(block, store.loc)
    with b.at(block, position):
        _emit(b, store, buffers[plan], plan, chunks)
        if isinstance(store, Put):  # its signal waits for all bulk stores
            replace_uses(function.body, {store.result: b.join()})


def _emit(b: Builder, store: Store | Put | Atomic, buffer: Value, plan: _Plan, chunks: int) -> None:
    tile = store.value.type
    assert isinstance(tile, TileType) and tile.layout is not None
    row, column = store.index
    sizes = plan.slot.shape
    first = b.mul(column, b.index(chunks))
    for chunk in range(chunks):
        offsets = (0, chunk * sizes[1])
        part = b.extract(store.value, offsets, sizes)
        part.type = TileType(sizes, tile.dtype, tile.layout.extract(offsets, sizes)[0])
        slot = b.slot(buffer, b.index(chunk % plan.slots))
        b.insert(BulkWait(pending=plan.slots - 1, read=True, scope=plan.scope))  # the slot's last content has left
        b.insert(Barrier(scope=plan.scope))
        b.insert(LocalStore(part, slot))
        b.insert(Barrier(scope=plan.scope))
        place = [row, b.add(first, b.index(chunk))]
        update = store.fn if isinstance(store, Atomic) else None
        after = store.after if isinstance(store, Put) else ()
        evict = store.evict if isinstance(store, Store) else None
        b.bulk_store(slot, store.view, place, plan.scope, update, after, plan.axis, evict)


def own_axis(tile: TileType, slot: SharedLayout) -> int | None:
    """The dim along which each warpgroup holds an equal run of a tile, of which slots hold all or a chunk of columns.

    A slot of all columns must have parts that the copy engine can read.
    """
    assert tile.layout is not None
    groups = tile.layout.num_warps // WARPGROUP
    axis = tile.layout.group_axis() if groups else None
    if axis == 1 and (slot.shape != tile.shape or slot.part_bytes(1, groups) is None):
        return None
    return axis


def _finish(role: Role) -> None:
    """The shared memory must outlive the copies out of it."""
    block: Block = role.body.block
    scopes = {op.scope for op in role.body.walk() if isinstance(op, BulkWait)}
    b = Builder(block, role.loc)
    for scope in sorted(scopes):
        b.insert(BulkWait(pending=0, read=False, scope=scope))


def _complete_before(releases: set[Operation]) -> None:
    """Each thread waits until its bulk stores are visible to itself; then a release covers them as its own stores."""
    for op in releases:
        assert op.parent is not None
        b = Builder(op.parent, op.loc)
        with b.at(op.parent, op.parent.ops.index(op)):
            b.insert(BulkWait(pending=0, read=False))
