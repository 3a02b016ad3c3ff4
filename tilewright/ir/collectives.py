"""Collectives on tiles (``comm.all_reduce``, ...), and what they are made of.

Each has a ``buffer``, a symmetric view with a tile for every rank (world, *tile), and ``flags``, a view (world,) of
flags; both belong to this program and this collective for the launch. Every rank sends one tile to each other rank (or
to the next), into the place of its own number there, and sets the flag of that number. The programs with the same
buffer on all ranks take part.

`expand` gives the puts, signals and waits. The pass of the name replaces the operation by them; the interpreter runs
them in its place, so that a collective means one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import FLAG
from tilewright.ir.core import Effect, Operation, Value, attribute, operand, operands, operation
from tilewright.ir.types import DType, TileType, ViewType, bf16, f16, f32, i32

TILE_COLLECTIVES = ("all_reduce", "all_gather", "ring_shift")
VIEW_COLLECTIVES = ("reduce_scatter", "all_to_all")
#: collectives that give a token for loads of the buffer instead of a tile
GATHERING = ("all_gather", "all_to_all")


@operation("comm", effect=Effect.SYNC | Effect.READ | Effect.WRITE, family=TILE_COLLECTIVES)
class TileCollective(Operation):
    """Of one tile of each rank.

    ``all_reduce``: the sum, in the order of ranks. ``all_gather``: a token; ``buffer[r]`` is then rank r's tile.
    ``ring_shift``: the tile of the rank before.
    """

    fn: str = attribute()
    value: Value = operand()
    buffer: Value = operand()
    flags: Value = operand()

    def verify(self) -> None:
        tile = self.value.type
        self.require(isinstance(tile, TileType), "takes a tile")
        assert isinstance(tile, TileType)
        _verify(self, self.buffer, self.flags, tile)


@operation("comm", effect=Effect.SYNC | Effect.READ | Effect.WRITE, family=VIEW_COLLECTIVES)
class ViewCollective(Operation):
    """Of a tile for each rank: the one at ``index`` of ``source[r]``, a view (world, ...), goes to rank r.

    ``reduce_scatter``: the sum of the tiles for this rank, in the order of ranks. ``all_to_all``: a token;
    ``buffer[r]`` is then the tile that rank r has sent. ``shape`` is that of a tile.
    """

    fn: str = attribute()
    source: Value = operand()
    index: list[Value] = operands()
    buffer: Value = operand()
    flags: Value = operand()
    shape: tuple[int, ...] = attribute()

    def verify(self) -> None:
        source = self.source.type
        self.require(isinstance(source, ViewType), "takes a view")
        assert isinstance(source, ViewType)
        ranks = {source.rank - 1, len(self.index), len(self.shape)}
        self.require(len(ranks) == 1, "index and shape have one entry for each dimension of a rank's part")
        _verify(self, self.buffer, self.flags, TileType(self.shape, source.dtype))


def _verify(op: Operation, buffer: Value, flags: Value, tile: TileType) -> None:
    for value, rank, dtype in ((buffer, tile.rank + 1, tile.dtype), (flags, 1, i32)):
        type_ = value.type
        op.require(isinstance(type_, ViewType) and type_.symmetric, "buffer and flags are symmetric views")
        assert isinstance(type_, ViewType)
        op.require(type_.rank == rank and type_.dtype == dtype, f"{type_} does not hold a tile {tile} of each rank")
    result = op.result.type
    op.require(result == FLAG if op.attributes["fn"] in GATHERING else result == tile, f"does not give {result}")


# --- what they are made of ------------------------------------------------------------------------


def expand(b: Builder, op: TileCollective | ViewCollective) -> Value:
    """Build the collective out of puts, signals and waits; gives its result."""
    me, world, one = b.rank(), b.world_size(), b.index(1)
    if isinstance(op, TileCollective):
        tile = op.value.type
        assert isinstance(tile, TileType)
    else:
        view = op.source.type
        assert isinstance(view, ViewType)
        tile = TileType(op.shape, view.dtype)
    if op.fn == "ring_shift":
        assert isinstance(op, TileCollective)
        _send(b, op.buffer, op.flags, me, b.binary("mod", b.add(me, one), world), op.value)
        before = b.binary("mod", b.add(me, b.sub(world, one)), world)
        return _receive(b, op.buffer, op.flags, before, tile)
    loop = b.for_loop(b.index(0), world, one, [], ["step"])
    with b.at(loop.body.block):
        peer = b.binary("mod", b.add(b.add(me, one), loop.index), world)  # not all to the same rank at once
        value = op.value if isinstance(op, TileCollective) else b.load(b.subview(op.source, [peer]), op.index, op.shape)
        _send(b, op.buffer, op.flags, me, peer, value)
        b.yield_()
    if op.fn in GATHERING:
        return b.wait_flags(op.flags)
    return _sum(b, tile, world, lambda rank: _receive(b, op.buffer, op.flags, rank, tile))


def _send(b: Builder, buffer: Value, flags: Value, me: Value, peer: Value, value: Value) -> None:
    token = b.put(b.subview(b.peer(buffer, peer), [me]), _origin(b, value.type), value)
    b.signal(b.subview(flags, [me]), peer, [token])


def _receive(b: Builder, buffer: Value, flags: Value, rank: Value, tile: TileType) -> Value:
    arrived = b.wait_flags(b.subview(flags, [rank]))
    return b.load(b.subview(buffer, [rank]), _origin(b, tile), tile.shape, after=[arrived])


def _sum(b: Builder, tile: TileType, count: Value, get: Callable[[Value], Value]) -> Value:
    """The sum of tiles 0, 1, ..., half-width floats in float32."""
    wide = _wide(tile.dtype)
    loop = b.for_loop(b.index(0), count, b.index(1), [b.constant(0, tile.with_dtype(wide))], ["rank", "total"])
    with b.at(loop.body.block):
        b.yield_([b.add(loop.carried[0], b.cast(get(loop.index), wide))])
    return b.cast(loop.results[0], tile.dtype)


def _wide(dtype: DType) -> DType:
    return f32 if dtype in (f16, bf16) else dtype


def _origin(b: Builder, tile: object) -> Sequence[Value]:
    assert isinstance(tile, TileType)
    return [b.index(0) for _ in tile.shape]
