"""One program spread over the blocks of a cluster: what the blocks tell each other (`tilewright.passes.spread`).

With the function attributes ``num_ctas`` = n and ``spread`` the n blocks of a cluster run one program of the grid
together, each on its part of the tiles. Their control flow is the same. What they combine goes through mailboxes.
"""

from __future__ import annotations

from tilewright.ir.core import Effect, Operation, Value, attribute, operand, operation, optional
from tilewright.ir.tile_ops import REDUCTIONS
from tilewright.ir.types import MailboxType, ScalarType, TileType, element_type, i32

#: element types that blocks exchange: words of the hardware's messages
EXCHANGED = ("i32", "i64", "f32", "f64")


@operation("tile.cluster_reduce", effect=Effect.SYNC, family=REDUCTIONS)
class ClusterReduce(Operation):
    """Combine the values that the blocks of a cluster have, in the order of the blocks: all get the same bits.

    The pass `mailboxes` gives it a ``mailbox`` and the ``count`` of the mailbox's uses before this one (i32).
    """

    fn: str = attribute()
    source: Value = operand()
    mailbox: Value | None = optional()
    count: Value | None = optional()

    def verify(self) -> None:
        type_ = self.source.type
        self.require(isinstance(type_, ScalarType | TileType), "takes a scalar or a tile")
        self.require(self.result.type == type_, "keeps the type")
        name = element_type(type_).name
        self.require(name in EXCHANGED, f"blocks exchange {', '.join(EXCHANGED)}, not {name}")
        self.require((self.mailbox is None) == (self.count is None), "takes a mailbox and a count, or neither")
        if self.mailbox is not None and self.count is not None:
            message = type_.with_layout(None) if isinstance(type_, TileType) else type_
            box = self.mailbox.type
            self.require(isinstance(box, MailboxType) and box.message == message, f"takes a mailbox of {message}")
            self.require(self.count.type == ScalarType(i32), "counts in i32")


@operation("async.mailbox", effect=Effect.SYNC)
class MakeMailbox(Operation):
    """Shared memory and barriers for messages from all blocks of the cluster.

    The shared-memory plan sets ``offset`` (bytes): two barriers of 8 bytes, then two slots, which uses take in turns.
    """

    offset: int | None = attribute(default=None)

    def verify(self) -> None:
        self.require(isinstance(self.result.type, MailboxType), "makes a mailbox")


@operation("async.await_mailboxes", effect=Effect.SYNC)
class AwaitMailboxes(Operation):
    """Wait until all blocks of the cluster have made their mailboxes; once, before the first message."""
