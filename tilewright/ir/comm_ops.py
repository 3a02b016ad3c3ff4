"""Communication between the ranks of a world (``comm.*``): tensors of other ranks, puts, flags.

A symmetric view stands for one tensor on each rank, of the same dtype, shape and strides; used as it is it is the own
rank's. Tiles travel by puts; a flag tells that they have arrived::

    %there  = comm.peer %parts, %owner : view<...>
    %put    = comm.put %there, [%i, %j], %tile : token<put>
    comm.signal %flag, %owner, after(%put)                        // on the rank that sends
    %there2 = comm.wait %flags : token<flag>                      // on the rank that receives
    %tile   = tile.load %parts, [%i, %j], after(%there2) : tile<...>

A flag is an element of a symmetric i32 tensor. It is signalled at most once in a launch, by one program of one rank,
and stays set for that launch: flags are not reset, and a wait for many signals is a wait for many flags.

What else a launch needs, the pass `communicate` adds: `Enter`, `Credit` and `Leave`.

Launches may take turns at the two halves of a tensor (`Turn`): what one writes to other ranks then lies where the
launch before does not look, and needs no word from a rank that it has begun this one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tilewright.ir.core import (
    Effect,
    Operation,
    Value,
    attribute,
    named_operands,
    operand,
    operands,
    operation,
    optional,
)
from tilewright.ir.tile_ops import Dim, OffsetView, PermuteView, Subview
from tilewright.ir.types import ScalarType, TileType, TokenType, ViewType, i1, i32

PUT, FLAG = TokenType("put"), TokenType("flag")
REDUCTIONS = ("add",)


@operation("comm.rank")
class Rank(Operation):
    """The number of this rank in its world (i32)."""

    def verify(self) -> None:
        self.require(self.result.type == ScalarType(i32), "gives i32")


@operation("comm.world_size")
class WorldSize(Operation):
    """The number of ranks (i32)."""

    def verify(self) -> None:
        self.require(self.result.type == ScalarType(i32), "gives i32")


@operation("comm.turn")
class Turn(Operation):
    """0 and 1 in turn, launch after launch of the world (i32): the same on all ranks."""

    def verify(self) -> None:
        self.require(self.result.type == ScalarType(i32), "gives i32")


@operation("comm.peer")
class Peer(Operation):
    """The view at the same place of another rank's tensor; ``rank`` may be the own one."""

    view: Value = operand()
    rank: Value = operand()

    def verify(self) -> None:
        view: Any = self.view.type
        self.require(isinstance(view, ViewType) and view.symmetric, "takes a view of a symmetric tensor")
        self.require(self.rank.type == ScalarType(i32), "the rank is i32")
        self.require(self.result.type == replace(view, symmetric=False), "gives the same view of one rank")


@operation("comm.put", effect=Effect.WRITE)
class Put(Operation):
    """Start writing the tile at ``index`` (counted in tiles) of a symmetric tensor; parts outside are dropped.

    Nobody may read it before the token has reached a signal and the reader has waited for that.
    ``after``: tokens of waits, which tell that the place may be written again.
    """

    view: Value = operand()
    index: list[Value] = operands()
    value: Value = operand()
    after: list[Value] = named_operands()

    def verify(self) -> None:
        _verify_put(self, self.view, self.index, self.value)
        _verify_tokens(self, self.after, (FLAG,))


@operation("comm.reduce_put", effect=Effect.WRITE, family=REDUCTIONS)
class ReducePut(Operation):
    """Like `Put`, but what is in memory is combined with the tile. The order of such updates is open."""

    fn: str = attribute()
    view: Value = operand()
    index: list[Value] = operands()
    value: Value = operand()
    after: list[Value] = named_operands()

    def verify(self) -> None:
        _verify_put(self, self.view, self.index, self.value)
        _verify_tokens(self, self.after, (FLAG,))


@operation("comm.join")
class Join(Operation):
    """One token for several puts, or for none."""

    tokens: list[Value] = operands()

    def verify(self) -> None:
        _verify_tokens(self, self.tokens, (PUT,))
        self.require(self.result.type == PUT, "gives token<put>")


@operation("comm.signal", effect=Effect.SYNC)
class Signal(Operation):
    """Set a flag on rank ``peer``: whoever waits for it sees the puts of ``after``.

    It comes after all that the program has read before, so that it may give a place back. ``after`` takes tokens of
    waits too: the flag is then set after those.
    """

    flag: Value = operand()
    peer: Value = operand()
    after: list[Value] = named_operands()

    def verify(self) -> None:
        _verify_flags(self, self.flag)
        self.require(isinstance(self.flag.type, ViewType) and self.flag.type.rank == 0, "sets one flag")
        self.require(self.peer.type == ScalarType(i32), "the peer's rank is i32")
        _verify_tokens(self, self.after, (PUT, FLAG))


@operation("comm.wait", effect=Effect.SYNC)
class WaitFlags(Operation):
    """Wait until all flags of a view of the own rank's tensor are set; not at all where ``when`` (i1) is false."""

    flags: Value = operand()
    when: Value | None = optional()

    def verify(self) -> None:
        _verify_flags(self, self.flags)
        self.require(self.when is None or self.when.type == ScalarType(i1), "the condition is i1")
        self.require(self.result.type == FLAG, "gives token<flag>")


@operation("comm.wait_earlier", effect=Effect.SYNC)
class WaitEarlier(Operation):
    """Wait until all flags of a view of the own rank's tensor hold the number of the launch so many ``launches`` ago.

    For flags that are copied behind data (`tilewright.runtime.symmetric.SymmetricHeap.start_push`) from those that the
    earlier launch has set: nothing that this launch signals.
    """

    flags: Value = operand()
    launches: Value = operand()

    def verify(self) -> None:
        _verify_flags(self, self.flags)
        self.require(self.launches.type == ScalarType(i32), "the number of launches is i32")
        self.require(self.result.type == FLAG, "gives token<flag>")


# --- generated ----------------------------------------------------------------------------------


@operation("comm.enter", effect=Effect.SYNC)
class Enter(Operation):
    """The begin of a block. It learns the launch's number, and the last one to begin makes the next launch's known.

    The first block tells every rank that this one has begun the launch: its tensors may be accessed. ``place``: where
    in shared memory the number is handed to all threads (bytes, set by the shared-memory plan); ``lent``: others use
    the place behind it.
    """

    place: int | None = attribute(default=None)
    lent: bool = attribute(default=False)


@operation("comm.credit", effect=Effect.SYNC)
class Credit(Operation):
    """Wait until rank ``peer`` (absent: every rank) has begun this launch; gives a token for accesses to its memory.

    ``in_turn``: that it has begun the launch before is enough. For accesses to the halves of tensors that launches take
    turns at: the launch that used the same half is over then.
    """

    peer: Value | None = optional()
    in_turn: bool = attribute(default=False)

    def verify(self) -> None:
        self.require(self.peer is None or self.peer.type == ScalarType(i32), "the peer's rank is i32")
        self.require(self.result.type == FLAG, "gives token<flag>")


@operation("comm.leave", effect=Effect.SYNC)
class Leave(Operation):
    """The end of a block where ranks read each other's tensors: the last one waits until every rank has come so far."""


# --- questions ----------------------------------------------------------------------------------


def view_root(view: Value) -> Value:
    """The kernel parameter that a view was derived from."""
    while isinstance(view.op, Subview | PermuteView | OffsetView | Peer):
        view = view.op.view
    return view


def peer_of(view: Value) -> Value | None:
    """The rank whose tensor a view is of; None for the own one."""
    while isinstance(view.op, Subview | PermuteView | OffsetView):
        view = view.op.view
    return view.op.rank if isinstance(view.op, Peer) else None


def takes_turns(root: Value, uses: dict[Value, list[Operation]]) -> bool:
    """Whether a symmetric tensor is used in halves alone, the one whose turn it is (``uses`` as of `uses_of`)."""
    accesses = [op for op in uses.get(root, []) if not isinstance(op, Dim)]
    return bool(accesses) and all(
        (isinstance(op, Subview) and bool(op.index) and isinstance(op.index[0].op, Turn))
        or (isinstance(op, Peer) and takes_turns(op.result, uses))
        for op in accesses
    )


def _verify_put(op: Operation, view: Value, index: list[Value], value: Value) -> None:
    type_, tile = view.type, value.type
    op.require(isinstance(type_, ViewType) and isinstance(tile, TileType), "writes a tile to a view")
    assert isinstance(type_, ViewType) and isinstance(tile, TileType)
    op.require(len(index) == type_.rank == tile.rank, "index, view and tile have one rank")
    op.require(type_.dtype == tile.dtype, f"cannot write {tile.dtype} to a view of {type_.dtype}")
    op.require(op.result.type == PUT, "gives token<put>")


def _verify_flags(op: Operation, flags: Value) -> None:
    type_ = flags.type
    op.require(
        isinstance(type_, ViewType) and type_.symmetric, "flags lie in the own rank's part of a symmetric tensor"
    )
    assert isinstance(type_, ViewType)
    op.require(type_.dtype == i32, f"flags are i32, not {type_.dtype}")
    while flags.op is not None:
        op.require(not isinstance(flags.op, OffsetView), "flags are named by index, not by an offset")
        flags = flags.op.operands[0]


def _verify_tokens(op: Operation, tokens: list[Value], kinds: tuple[TokenType, ...]) -> None:
    for token in tokens:
        names = " or ".join(map(str, kinds))
        op.require(token.type in kinds, f"'after' takes {names}, not {token.type}")
