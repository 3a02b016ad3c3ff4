"""Scheduled asynchronous code (``async.*``): shared buffers, rings, tokens, roles and fences.

A buffer is a group of slots in shared memory. A ring passes its stages from producers to
consumers: the producer ``acquire``s a free stage, starts copies into it and ``publish``es their
tokens; the consumer ``await``s the stage, reads it and ``release``s it. Ring operations take the
running count of uses; stage = count mod stages, parity = (count div stages) mod 2.

Blocks of a cluster (function attribute ``num_ctas``) run side by side and reach each other's shared memory. Copies of
a tile that all of them want are shared: see ``multicast`` of `Copy` and ``ctas`` of `MakeRing`.
"""

from __future__ import annotations

from typing import Any

from tilewright.ir.core import (
    Effect,
    Operation,
    Region,
    Value,
    attribute,
    named_operands,
    operand,
    operands,
    operation,
    optional,
    region,
)
from tilewright.ir.layout import LinearLayout
from tilewright.ir.tile_ops import require_eviction
from tilewright.ir.types import (
    BufferType,
    ScalarType,
    SlotType,
    TileType,
    TokenType,
    ViewType,
    element_type,
    multipliable,
)

#: atomic updates of global memory that the copy engine makes, and of which element types
BULK_UPDATES = {"add": ("i32", "f32")}


@operation("async.alloc", effect=Effect.SYNC)
class Alloc(Operation):
    """Shared memory for a buffer. With ``ring``, one slot for each stage of the ring.

    The shared-memory plan sets ``offset`` (bytes) and, for elastic rings, the number of stages.
    """

    ring: Value | None = optional()
    offset: int | None = attribute(default=None)


@operation("async.ring", effect=Effect.SYNC)
class MakeRing(Operation):
    """Full and empty barriers. ``producers``/``consumers`` are the arrivals that complete a phase.

    An ``elastic`` ring gets as many stages as shared memory allows, up to ``most``. The shared-memory plan sets
    ``offset`` (bytes) of the barriers, 8 bytes each: full[stages], then empty[stages].

    With ``ctas`` > 1 that many blocks of a cluster use their rings in step, because copies of one write stages of all:
    a release arrives at the empty barrier of every block, and ``consumers`` counts the arrivals from all of them.
    """

    producers: int = attribute(default=1)
    consumers: int = attribute(default=1)
    elastic: bool = attribute(default=False)
    most: int | None = attribute(default=None)
    ctas: int = attribute(default=1)
    offset: int | None = attribute(default=None)


@operation("async.slot")
class Slot(Operation):
    """The slot of a buffer for a use count: slot number count mod stages."""

    buffer: Value = operand()
    count: Value = operand()

    def verify(self) -> None:
        buffer: Any = self.buffer.type
        self.require(isinstance(buffer, BufferType), "takes a buffer")
        self.require(buffer.slot == self.result.type, "gives the buffer's slot")


@operation("async.transpose_slot")
class TransposeSlot(Operation):
    """The same shared memory seen with permuted dimensions."""

    slot: Value = operand()
    perm: tuple[int, ...] = attribute()


@operation("async.acquire", effect=Effect.SYNC)
class Acquire(Operation):
    """Wait until the stage for ``count`` is free."""

    ring: Value = operand()
    count: Value = operand()


@operation("async.copy", effect=Effect.READ | Effect.WRITE | Effect.SYNC)
class Copy(Operation):
    """Start copying the tile at ``index`` of a global view into a slot; parts outside read as ``pad``.

    The token's kind says who copies: ``tma`` (bulk copy engine, pad must be 0), ``cp_async`` (asynchronous copies of
    the threads, pad must be 0) or ``threads``. ``after``: tokens of comm.wait, as for tile.load.

    With ``multicast``, a dim of the tile, the blocks of the cluster copy the same tile at the same use of a ring: each
    fetches its part along that dim and the copy engine writes the part into the slots of all blocks. ``evict`` as of
    tile.load. ``layout``: which thread copies what, of ``cp_async``; the backend's choice where it is absent.
    """

    view: Value = operand()
    index: list[Value] = operands()
    slot: Value = operand()
    after: list[Value] = named_operands()
    pad: float = attribute(default=0)
    multicast: int | None = attribute(default=None)
    evict: str | None = attribute(default=None)
    layout: LinearLayout | None = attribute(default=None)

    def verify(self) -> None:
        require_eviction(self, self.evict)
        view: Any = self.view.type
        slot: Any = self.slot.type
        self.require(isinstance(view, ViewType) and isinstance(slot, SlotType), "copies from a view to a slot")
        self.require(view.rank == len(self.index) == slot.rank, "index, view and slot have one rank")
        self.require(view.dtype == slot.dtype, "view and slot have one dtype")
        if self.multicast is not None:
            self.require(0 <= self.multicast < slot.rank, "multicast names a dim of the tile")
            self.require(self.result.type == TokenType("tma"), "the copy engine alone multicasts")
        if self.layout is not None:
            self.require(self.result.type == TokenType("cp_async"), "threads alone have a layout, by cp_async")
            self.require(self.layout.tile_shape == slot.shape, "the layout is the slot's")


@operation("async.publish", effect=Effect.SYNC)
class Publish(Operation):
    """Announce the stage for ``count``; it becomes full when all ``tokens`` have completed."""

    ring: Value = operand()
    count: Value = operand()
    tokens: list[Value] = operands()


@operation("async.await", effect=Effect.SYNC)
class Await(Operation):
    """Wait until the stage for ``count`` is full."""

    ring: Value = operand()
    count: Value = operand()


@operation("async.release", effect=Effect.SYNC)
class Release(Operation):
    """Give the stage for ``count`` back: this thread group has finished reading it."""

    ring: Value = operand()
    count: Value = operand()


@operation("async.dot", effect=Effect.SYNC | Effect.READ)
class AsyncDot(Operation):
    """Issue ``acc + a @ b`` as one group on the matrix unit. Gives the accumulator in flight and a token.

    ``a`` is a slot or a tile in registers, ``b`` a slot. The result may only be read through `Wait`
    or accumulated into by the next group.
    """

    a: Value = operand()
    b: Value = operand()
    acc: Value = operand()

    def verify(self) -> None:
        a: Any = self.a.type
        b: Any = self.b.type
        acc: Any = self.acc.type
        self.require(isinstance(a, SlotType | TileType) and isinstance(b, SlotType), "a is a slot or tile, b a slot")
        self.require(isinstance(acc, TileType), "the accumulator is a tile")
        self.require(a.shape[1] == b.shape[0] and acc.shape == (a.shape[0], b.shape[1]), "shapes do not agree")
        self.require(multipliable(element_type(a), element_type(b)), "a and b have one dtype, or both are 8-bit floats")
        self.require([v.type for v in self.results] == [acc, TokenType("mma")], "gives the accumulator and a token")


@operation("async.wait", effect=Effect.SYNC)
class Wait(Operation):
    """Wait until at most ``pending`` groups of the matrix unit are in flight, the youngest ones.

    With the token of a ``cp_async`` copy: until at most ``pending`` of this thread's copies of that kind are.

    ``token`` names the group that is waited for where it is known in this block. ``values`` are
    accumulators of the groups waited for, passed through: only the results may be read.
    """

    values: list[Value] = operands()
    token: Value | None = optional()
    pending: int = attribute(default=0)

    def verify(self) -> None:
        self.require(self.token is None or isinstance(self.token.type, TokenType), "takes a token")
        self.require([v.type for v in self.values] == [r.type for r in self.results], "passes its values through")


@operation("async.local_load", effect=Effect.READ)
class LocalLoad(Operation):
    """Read a slot into a tile, or the element ``at`` a place of a vector as a scalar."""

    slot: Value = operand()
    at: Value | None = optional()

    def verify(self) -> None:
        slot: Any = self.slot.type
        tile: Any = self.result.type
        if self.at is not None:
            self.require(isinstance(slot, SlotType) and len(slot.shape) == 1, "reads a vector's element")
            self.require(tile == ScalarType(slot.dtype), "gives a scalar of the slot's dtype")
            return
        self.require(isinstance(slot, SlotType) and isinstance(tile, TileType), "reads a slot into a tile")
        self.require(slot.shape == tile.shape and slot.dtype == tile.dtype, "slot and tile agree")


@operation("async.local_store", effect=Effect.WRITE)
class LocalStore(Operation):
    """Write a tile to a slot with the threads' own stores."""

    value: Value = operand()
    slot: Value = operand()

    def verify(self) -> None:
        slot: Any = self.slot.type
        tile: Any = self.value.type
        self.require(isinstance(slot, SlotType) and isinstance(tile, TileType), "writes a tile to a slot")
        self.require(slot.shape == tile.shape and slot.dtype == tile.dtype, "slot and tile agree")


@operation("async.fence", effect=Effect.SYNC)
class Fence(Operation):
    """Order this thread's accesses, by ``proxy``.

    - ``async``: its writes to shared memory before the async proxy (copy engine, matrix unit) reads them.
    - ``async_global``: what it knows to be in global memory before the copy engine reads it.
    - ``release``, ``acquire``: its accesses to memory before, or behind, those of ranks that it synchronises with.
    """

    proxy: str = attribute(default="async")


@operation("async.barrier", effect=Effect.SYNC)
class Barrier(Operation):
    """All threads of ``scope`` meet: ``cluster``, ``block``, ``role``, or ``warpgroup`` (each warpgroup on its own)."""

    scope: str = attribute(default="block")


@operation("async.await_grid", effect=Effect.SYNC)
class AwaitGrid(Operation):
    """Wait until the launch before this one has ended and all that it wrote can be seen ("griddepcontrol.wait").

    A launch may begin before the one before it has ended; every thread passes here before it touches global memory.
    """


@operation("async.take_turn", effect=Effect.SYNC)
class TakeTurn(Operation):
    """Wait for this warpgroup's turn. The warpgroups of a role take turns in their order, the first one begins.

    Each turn ends with `PassTurn`; all warpgroups take equally many.
    """


@operation("async.pass_turn", effect=Effect.SYNC)
class PassTurn(Operation):
    """End this warpgroup's turn: the next warpgroup of the role may go on, behind the last one the first again."""


@operation("async.bulk_store", effect=Effect.READ | Effect.WRITE | Effect.SYNC)
class BulkStore(Operation):
    """Start copying a slot to the tile at ``index`` of a global view; parts outside are dropped.

    With ``scope`` warpgroup each warpgroup copies what its own threads wrote: equal parts along ``axis``. With
    ``update`` the engine adds the slot to what is there, each element atomically at device scope, in no defined order.
    ``after``: as for comm.put; ``evict``: as of tile.store.
    """

    slot: Value = operand()
    view: Value = operand()
    index: list[Value] = operands()
    after: list[Value] = named_operands()
    scope: str = attribute(default="role")
    axis: int = attribute(default=0)
    update: str | None = attribute(default=None)
    evict: str | None = attribute(default=None)

    def verify(self) -> None:
        require_eviction(self, self.evict)
        self.require(self.update in (None, *BULK_UPDATES), f"update is one of {', '.join(BULK_UPDATES)}")


@operation("async.bulk_wait", effect=Effect.SYNC)
class BulkWait(Operation):
    """Wait until at most ``pending`` bulk stores of this thread are unfinished.

    ``read``: it is enough that their shared-memory source has been read (the slot is reusable).
    """

    pending: int = attribute(default=0)
    read: bool = attribute(default=True)
    scope: str = attribute(default="role")


@operation("async.role", effect=Effect.SYNC)
class Role(Operation):
    """Code of one group of warps; all roles of a kernel run side by side.

    ``warps``: how many warps; ``registers``: per thread after redistribution (0: leave);
    ``single_thread``: one elected thread runs the body.
    """

    kind: str = attribute()
    warps: int = attribute()
    registers: int = attribute(default=0)
    single_thread: bool = attribute(default=False)
    body: Region = region()


def buffer_of(slot: Value) -> Value:
    """The buffer that a slot belongs to."""
    while isinstance(slot.op, Slot | TransposeSlot):
        slot = slot.op.buffer if isinstance(slot.op, Slot) else slot.op.slot
    return slot


def ring_of(slot: Value) -> Value | None:
    """The ring whose stages a slot belongs to, None for those of plain buffers."""
    buffer = buffer_of(slot)
    return buffer.op.ring if isinstance(buffer.op, Alloc) else None
