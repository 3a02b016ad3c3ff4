"""Builds operations at the end of a block and infers their result types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import gcd
from typing import Any, TypeVar

from tilewright.ir import async_ops, check_ops, comm_ops, indexed_ops, packet_ops, tile_ops
from tilewright.ir.core import UNKNOWN, Block, IRError, Location, Operation, Region, Value
from tilewright.ir.layout import LinearLayout
from tilewright.ir.types import (
    BufferType,
    DType,
    RingType,
    ScalarType,
    SlotType,
    TileType,
    TokenType,
    Type,
    ViewType,
    i1,
    i32,
    like,
)

Op = TypeVar("Op", bound=Operation)


class Builder:
    """Appends to ``block`` (or inserts before ``position``); every operation gets ``loc``."""

    def __init__(self, block: Block, loc: Location = UNKNOWN):
        self.block, self.loc = block, loc
        self.position: int | None = None

    def insert(self, op: Op) -> Op:
        """Place an operation at the insertion point and return it."""
        if op.loc == UNKNOWN:
            op.loc = self.loc
        if self.position is None:
            self.block.append(op)
        else:
            self.block.insert(self.position, op)
            self.position += 1
        return op

    @contextmanager
    def at(self, block: Block, position: int | None = None) -> Iterator[None]:
        """Build elsewhere for the length of a ``with``."""
        saved = self.block, self.position
        self.block, self.position = block, position
        try:
            yield
        finally:
            self.block, self.position = saved

    # --- values -----------------------------------------------------------------------------

    def constant(self, value: int | float | bool, type_: Type | DType) -> Value:
        """A scalar (dtype or scalar type) or a tile of one value."""
        full = ScalarType(type_) if isinstance(type_, DType) else type_
        return self.insert(tile_ops.Constant(types=[full], value=value)).result

    def index(self, value: int) -> Value:
        """An i32 constant."""
        return self.constant(value, i32)

    def iota(self, size: int, start: int = 0, dtype: DType = i32) -> Value:
        return self.insert(tile_ops.Iota(types=[TileType((size,), dtype)], start=start)).result

    def splat(self, source: Value, shape: Sequence[int]) -> Value:
        type_ = TileType(tuple(shape), _scalar(source).dtype)
        return self.insert(tile_ops.Splat(source, types=[type_])).result

    def expand_dims(self, source: Value, axis: int) -> Value:
        shape = list(_tile(source).shape)
        shape.insert(axis, 1)
        type_ = TileType(tuple(shape), _tile(source).dtype)
        return self.insert(tile_ops.ExpandDims(source, types=[type_], axis=axis)).result

    def broadcast(self, source: Value, shape: Sequence[int]) -> Value:
        if _tile(source).shape == tuple(shape):
            return source
        return self.insert(tile_ops.Broadcast(source, types=[TileType(tuple(shape), _tile(source).dtype)])).result

    def reshape(self, source: Value, shape: Sequence[int]) -> Value:
        return self.insert(tile_ops.Reshape(source, types=[TileType(tuple(shape), _tile(source).dtype)])).result

    def transpose(self, source: Value, perm: Sequence[int]) -> Value:
        tile = _tile(source)
        type_ = TileType(tuple(tile.shape[p] for p in perm), tile.dtype)
        return self.insert(tile_ops.Transpose(source, types=[type_], perm=tuple(perm))).result

    def extract(self, source: Value, offsets: Sequence[int], sizes: Sequence[int]) -> Value:
        type_ = TileType(tuple(sizes), _tile(source).dtype)
        return self.insert(tile_ops.Extract(source, types=[type_], offsets=tuple(offsets))).result

    def unary(self, fn: str, source: Value) -> Value:
        return self.insert(tile_ops.Unary(source, types=[source.type], fn=fn)).result

    def binary(self, fn: str, lhs: Value, rhs: Value) -> Value:
        return self.insert(tile_ops.Binary(lhs, rhs, types=[lhs.type], fn=fn)).result

    def add(self, lhs: Value, rhs: Value) -> Value:
        return self.binary("add", lhs, rhs)

    def sub(self, lhs: Value, rhs: Value) -> Value:
        return self.binary("sub", lhs, rhs)

    def mul(self, lhs: Value, rhs: Value) -> Value:
        return self.binary("mul", lhs, rhs)

    def compare(self, fn: str, lhs: Value, rhs: Value) -> Value:
        return self.insert(tile_ops.Compare(lhs, rhs, types=[like(lhs.type, i1)], fn=fn)).result

    def select(self, condition: Value, on_true: Value, on_false: Value) -> Value:
        return self.insert(tile_ops.Select(condition, on_true, on_false, types=[on_true.type])).result

    def cast(self, source: Value, dtype: DType) -> Value:
        type_ = like(source.type, dtype)
        return source if type_ == source.type else self.insert(tile_ops.Cast(source, types=[type_])).result

    def bitcast(self, source: Value, dtype: DType) -> Value:
        return self.insert(tile_ops.Bitcast(source, types=[like(source.type, dtype)])).result

    def reduce(self, fn: str, source: Value, axis: int) -> Value:
        """Reduce a tile over ``axis``; a rank-one tile gives a scalar."""
        tile = _tile(source)
        shape = tile.shape[:axis] + tile.shape[axis + 1 :]
        type_: Type = TileType(shape, tile.dtype) if shape else ScalarType(tile.dtype)
        return self.insert(tile_ops.Reduce(source, types=[type_], fn=fn, axis=axis)).result

    def scan(self, fn: str, source: Value, axis: int) -> Value:
        return self.insert(tile_ops.Scan(source, types=[source.type], fn=fn, axis=axis)).result

    def cat(self, sources: Sequence[Value], axis: int) -> Value:
        """Tiles of one dtype, and of one shape but for ``axis``, one behind the other."""
        shape = list(_tile(sources[0]).shape)
        shape[axis] = sum(_tile(source).shape[axis] for source in sources)
        type_ = TileType(tuple(shape), _tile(sources[0]).dtype)
        return self.insert(tile_ops.Cat(sources, types=[type_], axis=axis)).result

    def dot(self, a: Value, b: Value, acc: Value, precision: str = "default") -> Value:
        return self.insert(tile_ops.Dot(a, b, acc, types=[acc.type], precision=precision)).result

    def convert(self, source: Value, layout: LinearLayout) -> Value:
        return self.insert(tile_ops.Convert(source, types=[_tile(source).with_layout(layout)])).result

    # --- views and memory -------------------------------------------------------------------

    def dim(self, view: Value, axis: int) -> Value:
        """The size along an axis; a constant where it is static."""
        size = _view(view).shape[axis]
        if size is not None:
            return self.index(size)
        return self.insert(tile_ops.Dim(view, types=[ScalarType(i32)], axis=axis)).result

    def subview(self, view: Value, index: Sequence[Value]) -> Value:
        """Fix the leading dimensions. A static stride that is no multiple of the alignment lowers it."""
        type_, n = _view(view), len(index)
        steps = [s * type_.dtype.bytes for s in type_.strides[:n] if s is not None]
        align = gcd(type_.align, *steps)
        result = replace(type_, shape=type_.shape[n:], strides=type_.strides[n:], align=align)
        return self.insert(tile_ops.Subview(view, index, types=[result])).result

    def permute_view(self, view: Value, perm: Sequence[int]) -> Value:
        type_ = _view(view)
        shape, strides = tuple(type_.shape[p] for p in perm), tuple(type_.strides[p] for p in perm)
        result = replace(type_, shape=shape, strides=strides)
        return self.insert(tile_ops.PermuteView(view, types=[result], perm=tuple(perm))).result

    def offset_view(self, view: Value, offsets: Sequence[Value]) -> Value:
        """Move the origin by elements. The alignment of the base is no longer known; the bounds stay."""
        type_ = _view(view)
        result = replace(type_, align=type_.dtype.bytes)
        return self.insert(tile_ops.OffsetView(view, offsets, types=[result])).result

    def load(
        self,
        view: Value,
        index: Sequence[Value],
        shape: Sequence[int],
        pad: float = 0,
        after: Sequence[Value] = (),
        evict: str | None = None,
    ) -> Value:
        type_ = TileType(tuple(shape), _view(view).dtype)
        return self.insert(tile_ops.Load(view, index, after, types=[type_], pad=pad, evict=evict)).result

    def element(self, view: Value, index: Sequence[Value], pad: float = 0, after: Sequence[Value] = ()) -> Value:
        type_ = ScalarType(_view(view).dtype)
        return self.insert(tile_ops.Element(view, index, after, types=[type_], pad=pad)).result

    def store(self, view: Value, index: Sequence[Value], value: Value, evict: str | None = None) -> None:
        self.insert(tile_ops.Store(view, index, value, evict=evict))

    def gather(
        self,
        view: Value,
        index: Sequence[Value],
        indices: Sequence[Value],
        axes: Sequence[int],
        pad: float = 0,
        after: Sequence[Value] = (),
    ) -> Value:
        """See `indexed_ops`: ``indices`` have the result's shape, ``index`` is for the axes not in ``axes``."""
        type_ = TileType(_tile(indices[0]).shape, _view(view).dtype)
        op = indexed_ops.Gather(view, index, indices, after, types=[type_], axes=tuple(axes), pad=pad)
        return self.insert(op).result

    def scatter(
        self, view: Value, index: Sequence[Value], indices: Sequence[Value], value: Value, axes: Sequence[int]
    ) -> None:
        self.insert(indexed_ops.Scatter(view, index, indices, value, axes=tuple(axes)))

    def atomic(
        self,
        fn: str,
        view: Value,
        index: Sequence[Value],
        indices: Sequence[Value],
        value: Value,
        axes: Sequence[int] = (),
        expected: Value | None = None,
        order: str = "relaxed",
    ) -> Value:
        """The old values. Without ``axes`` the places are those of a store."""
        types = [value.type]
        op = indexed_ops.Atomic(
            view, index, indices, value, expected, types=types, fn=fn, axes=tuple(axes), order=order
        )
        return self.insert(op).result

    # --- communication ------------------------------------------------------------------------

    def rank(self) -> Value:
        return self.insert(comm_ops.Rank(types=[ScalarType(i32)])).result

    def world_size(self) -> Value:
        return self.insert(comm_ops.WorldSize(types=[ScalarType(i32)])).result

    def send(self, view: Value, value: Value) -> Operation:
        return self.insert(packet_ops.Send(view, value, []))

    def receive(self, view: Value, type_: TileType) -> Value:
        return self.insert(packet_ops.Receive(view, types=[type_])).result

    def turn(self) -> Value:
        return self.insert(comm_ops.Turn(types=[ScalarType(i32)])).result

    def peer(self, view: Value, rank: Value) -> Value:
        """The view of another rank's tensor; ``view`` is symmetric."""
        return self.insert(comm_ops.Peer(view, rank, types=[replace(_view(view), symmetric=False)])).result

    def put(self, view: Value, index: Sequence[Value], value: Value, after: Sequence[Value] = ()) -> Value:
        """The token of an asynchronous store."""
        return self.insert(comm_ops.Put(view, index, value, after, types=[TokenType("put")])).result

    def reduce_put(self, view: Value, index: Sequence[Value], value: Value, after: Sequence[Value] = ()) -> Value:
        """The token of an asynchronous addition to memory."""
        return self.insert(comm_ops.ReducePut(view, index, value, after, types=[TokenType("put")], fn="add")).result

    def join(self, tokens: Sequence[Value] = ()) -> Value:
        """One token for several puts, or for none."""
        return self.insert(comm_ops.Join(tokens, types=[TokenType("put")])).result

    def signal(self, flag: Value, peer: Value, after: Sequence[Value] = ()) -> None:
        self.insert(comm_ops.Signal(flag, peer, after))

    def wait_flags(self, flags: Value, when: Value | None = None) -> Value:
        """The token that says that all flags of a view are set, or that ``when`` is false."""
        return self.insert(comm_ops.WaitFlags(flags, when, types=[TokenType("flag")])).result

    def wait_earlier(self, flags: Value, launches: Value) -> Value:
        """The token that says that all flags of a view are those of the launch so many ``launches`` ago."""
        return self.insert(comm_ops.WaitEarlier(flags, launches, types=[TokenType("flag")])).result

    # --- checks -------------------------------------------------------------------------------

    def print_(self, text: str, values: Sequence[Value]) -> None:
        self.insert(check_ops.Print(values, text=text))

    def check(self, condition: Value, text: str = "") -> None:
        self.insert(check_ops.Assert(condition, text=text))

    def assume(self, condition: Value) -> None:
        self.insert(check_ops.Assume(condition))

    # --- control flow -----------------------------------------------------------------------

    def program_id(self, axis: int) -> Value:
        return self.insert(tile_ops.ProgramId(types=[ScalarType(i32)], axis=axis)).result

    def num_programs(self, axis: int) -> Value:
        return self.insert(tile_ops.NumPrograms(types=[ScalarType(i32)], axis=axis)).result

    def for_loop(
        self, lo: Value, hi: Value, step: Value, inits: Sequence[Value], hints: Sequence[str] = ()
    ) -> tile_ops.For:
        """An empty loop; fill ``body.block`` and end it with `yield_`. ``hints`` name index and carried values."""
        names = [*hints, *[""] * (1 + len(inits) - len(hints))]
        block = Block(list(zip(names, [lo.type, *(v.type for v in inits)], strict=True)))
        types = [v.type for v in inits]
        return self.insert(tile_ops.For(lo, hi, step, inits, types=types, regions=[Region(block)], hints=names[1:]))

    def if_else(self, condition: Value, types: Sequence[Type] = ()) -> tile_ops.If:
        """An empty conditional; fill both blocks and end each with `yield_`."""
        return self.insert(tile_ops.If(condition, types=types, regions=[Region(), Region()]))

    def while_loop(self, inits: Sequence[Value], hints: Sequence[str] = ()) -> tile_ops.While:
        """An empty while; the condition block yields i1, the body the next carried values."""
        names = [*hints, *[""] * (len(inits) - len(hints))]
        parts = [Region(Block([(n, v.type) for n, v in zip(names, inits, strict=True)])) for _ in range(2)]
        return self.insert(tile_ops.While(inits, types=[v.type for v in inits], regions=parts, hints=names))

    def yield_(self, values: Sequence[Value] = ()) -> None:
        self.insert(tile_ops.Yield(list(values)))

    # --- asynchronous code --------------------------------------------------------------------

    def alloc(self, slot: SlotType, ring: Value | None = None, hint: str = "", stages: int = 1) -> Value:
        """A buffer of ``stages`` slots, or of one slot for each stage of ``ring``."""
        stages = ring.type.stages if ring is not None and isinstance(ring.type, RingType) else stages
        return self.insert(async_ops.Alloc(ring, types=[BufferType(stages, slot)], hints=[hint])).result

    def ring(self, stages: int, hint: str = "", **attributes: Any) -> Value:
        return self.insert(async_ops.MakeRing(types=[RingType(stages)], hints=[hint], **attributes)).result

    def slot(self, buffer: Value, count: Value) -> Value:
        assert isinstance(buffer.type, BufferType)
        return self.insert(async_ops.Slot(buffer, count, types=[buffer.type.slot])).result

    def transpose_slot(self, slot: Value, perm: Sequence[int]) -> Value:
        type_ = slot.type
        assert isinstance(type_, SlotType)
        shape = tuple(type_.shape[p] for p in perm)
        result = SlotType(shape, type_.dtype, type_.layout.transpose(tuple(perm)))
        return self.insert(async_ops.TransposeSlot(slot, types=[result], perm=tuple(perm))).result

    def copy(
        self,
        view: Value,
        index: Sequence[Value],
        slot: Value,
        engine: str,
        pad: float = 0,
        multicast: int | None = None,
        after: Sequence[Value] = (),
        evict: str | None = None,
    ) -> Value:
        types = [TokenType(engine)]
        copy = async_ops.Copy(view, index, slot, after, types=types, pad=pad, multicast=multicast, evict=evict)
        return self.insert(copy).result

    def async_dot(self, a: Value, b: Value, acc: Value) -> tuple[Value, Value]:
        """(accumulator in flight, token)."""
        op = self.insert(async_ops.AsyncDot(a, b, acc, types=[acc.type, TokenType("mma")]))
        return op.results[0], op.results[1]

    def wait(self, values: Sequence[Value] = (), token: Value | None = None, pending: int = 0) -> list[Value]:
        """Wait until at most ``pending`` dots are in flight; gives ``values`` as readable tiles."""
        hints = [v.hint for v in values]
        op = async_ops.Wait(values, token, types=[v.type for v in values], pending=pending, hints=hints)
        return self.insert(op).results

    def local_load(self, slot: Value, layout: LinearLayout | None = None) -> Value:
        type_ = slot.type
        assert isinstance(type_, SlotType)
        return self.insert(async_ops.LocalLoad(slot, types=[TileType(type_.shape, type_.dtype, layout)])).result

    def local_element(self, slot: Value, at: Value) -> Value:
        """The element at a place of a slot that holds a vector."""
        type_ = slot.type
        assert isinstance(type_, SlotType)
        return self.insert(async_ops.LocalLoad(slot, at, types=[ScalarType(type_.dtype)])).result

    def bulk_store(
        self,
        slot: Value,
        view: Value,
        index: Sequence[Value],
        scope: str = "role",
        update: str | None = None,
        after: Sequence[Value] = (),
        axis: int = 0,
        evict: str | None = None,
    ) -> None:
        self.insert(async_ops.BulkStore(slot, view, index, after, scope=scope, axis=axis, update=update, evict=evict))


def _tile(value: Value) -> TileType:
    if not isinstance(value.type, TileType):
        raise IRError(f"expected a tile, got {value.type}")
    return value.type


def _view(value: Value) -> ViewType:
    if not isinstance(value.type, ViewType):
        raise IRError(f"expected a view of global memory, got {value.type}")
    return value.type


def _scalar(value: Value) -> ScalarType:
    if not isinstance(value.type, ScalarType):
        raise IRError(f"expected a scalar, got {value.type}")
    return value.type
