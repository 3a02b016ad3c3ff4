"""The interpreter's rules of communication: the ranks of a world, puts on their way, flags.

A put lands as late as it may, at the signal that covers it, or, where that is left to chance, at once; what nobody
signals lands when all ranks have ended. A flag is set once in a launch. Flags are kept beside the tensors, which stay
as they are: no rank can see a count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from tilewright.ir import comm_ops as c
from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir.builder import Builder
from tilewright.ir.collectives import TileCollective, ViewCollective, expand
from tilewright.ir.core import IRError, Location, Region, Value
from tilewright.ir.interpreter_machine import (
    Frame,
    Steps,
    Trap,
    View,
    await_condition,
    load_tile,
    rule,
    run_region,
    store_tile,
)


@dataclass(eq=False)
class PutInFlight:
    """The token of a put; ``combine`` gives what memory holds afterwards from what it held and the tile."""

    view: View
    index: list[int]
    tile: np.ndarray
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    landed: bool = False

    def land(self) -> None:
        if self.landed:
            return
        self.landed, tile = True, self.tile
        if self.combine is not None:
            tile = self.combine(load_tile(self.view, self.index, tile.shape, 0), tile)
        store_tile(self.view, self.index, tile)


@dataclass(eq=False)
class World:
    """What the programs of all ranks share in one launch. ``random``: which puts land at once."""

    size: int
    random: Random | None = None
    #: 0 or 1, launch after launch
    turn: int = 0
    #: address of each flag that is set -> where it was signalled
    flags: dict[int, Location] = field(default_factory=dict)
    puts: list[PutInFlight] = field(default_factory=list)
    #: by the address of a tile's packets: what was sent in them
    packets: dict[int, bytes] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    #: blocks of each rank that have not ended yet, where the ranks end together (comm.leave)
    left: dict[int, int] = field(default_factory=dict)

    def finish(self) -> None:
        """All ranks have ended."""
        for put in self.puts:
            put.land()


def link_ranks(params: Sequence[Value], arguments: Sequence[dict[Value, Any]]) -> None:
    """Let the symmetric arguments of each rank know those of the others. IRError where they differ in form."""
    for param in params:
        if not getattr(param.type, "symmetric", False):
            continue
        arrays = tuple(values[param].array for values in arguments)
        for rank, array in enumerate(arrays):
            if (array.shape, array.strides) != (arrays[0].shape, arrays[0].strides):
                forms = [f"{a.shape} with strides of {a.strides} bytes on rank" for a in (arrays[0], array)]
                raise IRError(f"%{param.hint} is symmetric, but has shape {forms[0]} 0 and {forms[1]} {rank}")
            for other in range(rank):
                if array.size and np.may_share_memory(array, arrays[other]):
                    raise IRError(f"%{param.hint} is symmetric, but ranks {other} and {rank} share its memory")
        for values in arguments:
            view = values[param]
            values[param] = View(view.array, view.origin, arrays)


def _rank_number(frame: Frame, rank: Value) -> int:
    """The rank that an operand names; Trap where the world has no such one."""
    number, size = int(frame.read(rank)), world_of(frame).size
    if not 0 <= number < size:
        raise Trap(f"rank {number} of a world of {size}")
    return number


def world_of(frame: Frame) -> World:
    world = frame.program.world
    assert isinstance(world, World)
    return world


# --- ranks, puts --------------------------------------------------------------------------------


@rule(c.Rank)
def _rank(frame: Frame, op: c.Rank) -> Any:
    return np.int32(frame.program.world_rank)


@rule(c.WorldSize)
def _world_size(frame: Frame, op: c.WorldSize) -> Any:
    return np.int32(world_of(frame).size)


@rule(c.Turn)
def _turn(frame: Frame, op: c.Turn) -> Any:
    return np.int32(world_of(frame).turn)


@rule(c.Peer)
def _peer(frame: Frame, op: c.Peer) -> View:
    view = frame.read(op.view)
    return View(view.ranks[_rank_number(frame, op.rank)], view.origin)


@rule(c.Put)
def _put(frame: Frame, op: c.Put) -> PutInFlight:
    return _start_put(frame, op, None)


@rule(c.ReducePut)
def _reduce_put(frame: Frame, op: c.ReducePut) -> PutInFlight:
    return _start_put(frame, op, lambda old, tile: numerics.binary(op.fn, old, tile))


def _start_put(frame: Frame, op: c.Put | c.ReducePut, combine: Any) -> PutInFlight:
    put = PutInFlight(frame.read(op.view), frame.ints(op.index), frame.read(op.value), combine)
    world = world_of(frame)
    world.puts.append(put)
    if world.random is not None and world.random.random() < 0.5:
        put.land()
    return put


@dataclass(eq=False)
class Joined:
    """The token of several puts."""

    tokens: list[PutInFlight | Joined]

    def land(self) -> None:
        for token in self.tokens:
            token.land()


@rule(c.Join)
def _join(frame: Frame, op: c.Join) -> Joined:
    return Joined(frame.reads(op.tokens))


# --- flags --------------------------------------------------------------------------------------


@rule(c.Signal)
def _signal(frame: Frame, op: c.Signal) -> None:
    world, peer = world_of(frame), _rank_number(frame, op.peer)
    for token in frame.reads(op.after):
        if isinstance(token, PutInFlight | Joined):
            token.land()
    flag = frame.read(op.flag)
    address = flag_address(flag.ranks[peer])
    if address in world.flags:
        name, first = _flag_name(frame, op.flag, flag_address(flag.array)), world.flags[address]
        raise Trap(f"{name} of rank {peer} is signalled twice in a launch, first at {first}")
    world.flags[address] = op.loc


@rule(c.WaitFlags)
def _wait(frame: Frame, op: c.WaitFlags) -> Steps:
    if op.when is not None and not frame.read(op.when):
        return op
    world, flags = world_of(frame), frame.read(op.flags).array
    for address in _addresses(flags):
        text = f"{_flag_name(frame, op.flags, address)} of rank {frame.program.world_rank} to be signalled"
        yield from await_condition(lambda address=address: address in world.flags, op, text)  # type: ignore[misc]
    return op


@rule(c.WaitEarlier)
def _wait_earlier(frame: Frame, op: c.WaitEarlier) -> c.WaitEarlier:
    """Copies have happened when they have been started, and an earlier launch's flags are not kept."""
    if int(frame.read(op.launches)) < 1:
        raise Trap(f"waits for flags of {int(frame.read(op.launches))} launches ago: there is 1 at least")
    return op


def flag_address(flag: np.ndarray) -> int:
    return int(flag.ctypes.data)


def _addresses(flags: np.ndarray) -> list[int]:
    """The addresses of a view's elements, row-major."""
    steps = [np.arange(n) * s for n, s in zip(flags.shape, flags.strides, strict=True)]
    offsets = sum(np.ix_(*steps)) if steps else np.zeros((), np.int64)
    return [int(flags.ctypes.data + offset) for offset in np.asarray(offsets).reshape(-1)]


def _flag_name(frame: Frame, flags: Value, address: int) -> str:
    """A flag of a view as the user wrote it, by its place in the whole tensor."""
    root = c.view_root(flags)
    whole = frame.read(root).array
    number = (address - flag_address(whole)) // whole.itemsize
    place = [int(i) for i in np.unravel_index(number, whole.shape)] if whole.flags.c_contiguous else []
    return f"flag {place} of %{root.hint}"


@rule(TileCollective)
@rule(ViewCollective)
def _collective(frame: Frame, op: TileCollective | ViewCollective) -> Steps:
    """Its puts, signals and waits, made once a program."""
    region = frame.program.cache.get(op.result)
    if region is None:
        region = frame.program.cache[op.result] = Region()
        b = Builder(region.block, op.loc)
        b.yield_([expand(b, op)])
    return (yield from run_region(frame, region))


# --- generated ----------------------------------------------------------------------------------


@rule(c.Enter)
def _enter(frame: Frame, op: c.Enter) -> None:
    if frame.program.block_id == 0:
        world_of(frame).entered.add(frame.program.world_rank)


@rule(c.Credit)
def _credit(frame: Frame, op: c.Credit) -> Steps:
    world = world_of(frame)
    if op.in_turn:
        return op
    peers = range(world.size) if op.peer is None else [_rank_number(frame, op.peer)]
    for peer in peers:
        yield from await_condition(lambda peer=peer: peer in world.entered, op, f"rank {peer} to begin the launch")  # type: ignore[misc]
    return op


@rule(c.Leave)
def _leave(frame: Frame, op: c.Leave) -> Steps:
    world, own = world_of(frame), frame.program.world_rank
    world.left[own] = world.left.get(own, frame.program.num_blocks) - 1
    if world.left[own]:
        return
    for peer in range(world.size):
        text = f"rank {peer} to end the launch"
        yield from await_condition(lambda peer=peer: world.left.get(peer) == 0, op, text)  # type: ignore[misc]
