"""Packets: tiles that tell of their own arrival, for messages so small that only their way over the link counts.

A packet is an int64 of a symmetric tensor: four bytes of a tile, and the number of the launch that sends it. It is
written and read as one, so that there is no flag, and no fence that waits for the tile to arrive before that is told::

    %there = comm.peer %packets, %r : view<?x?xi64>
    comm.send %mine, %tile                            // %mine: the part of %there for this tile
    %tile2 = comm.receive %theirs : tile<1024xbf16>   // on the other rank

A view of one dimension holds the packets of one tile, in the order of its elements. As with flags, one program of one
rank sends to it in a launch, and somebody receives it there. Nothing else reads or writes the tensor.
"""

from __future__ import annotations

from tilewright.ir.comm_ops import FLAG, view_root
from tilewright.ir.core import Effect, Function, IRError, Operation, Value, named_operands, operand, operation
from tilewright.ir.layout import LinearLayout, blocked
from tilewright.ir.tile_ops import Dim, OffsetView, Subview
from tilewright.ir.types import TileType, ViewType, i64

#: bytes of a tile in a packet
PAYLOAD = 4


@operation("comm.send", effect=Effect.SYNC)
class Send(Operation):
    """Start writing a tile as packets. ``after``: tokens which tell that the place may be written again."""

    view: Value = operand()
    value: Value = operand()
    after: list[Value] = named_operands()

    def verify(self) -> None:
        self.require(isinstance(self.value.type, TileType), "sends a tile")
        _verify(self, self.view, self.value)
        self.require(all(token.type == FLAG for token in self.after), "'after' takes token<flag>")


@operation("comm.receive", effect=Effect.SYNC)
class Receive(Operation):
    """Wait until the packets of this launch have come, and give the tile that is in them."""

    view: Value = operand()

    def verify(self) -> None:
        self.require(isinstance(self.result.type, TileType), "gives a tile")
        _verify(self, self.view, self.result)
        view = self.view.type
        self.require(isinstance(view, ViewType) and view.symmetric, "reads the own rank's part of a symmetric tensor")


def _verify(op: Operation, view: Value, tile: Value) -> None:
    type_ = view.type
    op.require(isinstance(type_, ViewType) and type_.dtype == i64, "packets are i64")
    assert isinstance(type_, ViewType) and isinstance(tile.type, TileType)
    op.require(type_.rank == 1 and type_.strides == (1,), "a tile's packets are a view of one dimension, of stride 1")
    op.require(tile.type.dtype.bytes <= PAYLOAD, f"{tile.type.dtype} does not fit {PAYLOAD} bytes")
    op.require(tile_bytes(tile) % PAYLOAD == 0, f"a tile of {tile_bytes(tile)} bytes does not fill packets")
    while view.op is not None:
        op.require(not isinstance(view.op, OffsetView), "packets are named by index, not by an offset")
        view = view.op.operands[0]


def tile_bytes(tile: Value) -> int:
    assert isinstance(tile.type, TileType)
    return tile.type.size * tile.type.dtype.bytes


def packed(tile: TileType, warps: int, warp_size: int) -> LinearLayout:
    """The layout in which each thread has whole packets."""
    order = tuple(reversed(range(tile.rank)))
    return blocked(tile.shape, max(8, tile.dtype.bits), warps, warp_size, order, min_vector_bytes=PAYLOAD)


def verify_packets(function: Function) -> None:
    """Tensors of packets are sent and received alone, in tiles of one size."""
    sizes: dict[Value, int] = {}
    for op in function.walk():
        if isinstance(op, Send | Receive):
            size = tile_bytes(op.value if isinstance(op, Send) else op.result)
            root = view_root(op.view)
            if sizes.setdefault(root, size) != size:
                message = f"'{op.name}' of {size} bytes, and elsewhere %{root.hint} has tiles of {sizes[root]}"
                raise IRError(message, op.loc, "packets of one tensor hold tiles of one size")
    for op in function.walk() if sizes else ():
        for value in op.operands:
            if isinstance(value.type, ViewType) and view_root(value) in sizes and not _leads_to_packets(op):
                message = f"'{op.name}' uses %{view_root(value).hint}, which holds packets"
                raise IRError(message, op.loc, "packets are sent and received: tw.send, tw.receive")


def _leads_to_packets(op: Operation) -> bool:
    return isinstance(op, Send | Receive | Dim | Subview) or op.name == "comm.peer"


__all__ = ["PAYLOAD", "Receive", "Send", "packed", "tile_bytes", "verify_packets"]
