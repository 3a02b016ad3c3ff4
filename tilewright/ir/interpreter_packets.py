"""The interpreter's rules of packets: what is sent is there at once, and stays beside the tensors as flags do."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir import packet_ops as p
from tilewright.ir.comm_ops import view_root
from tilewright.ir.interpreter_comm import flag_address, world_of
from tilewright.ir.interpreter_machine import Frame, Steps, Trap, await_condition, rule
from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.types import TileType


@rule(p.Send)
def _send(frame: Frame, op: p.Send) -> None:
    world, packets, tile = world_of(frame), frame.read(op.view).array, np.asarray(frame.read(op.value))
    if tile.nbytes > packets.size * p.PAYLOAD:
        raise Trap(f"a tile of {tile.nbytes} bytes does not fit {packets.size} packets of %{view_root(op.view).hint}")
    address = flag_address(packets)
    if address in world.packets:
        raise Trap(f"packets of %{view_root(op.view).hint} are sent twice in a launch")
    world.packets[address] = tile.tobytes()


@rule(p.Receive)
def _receive(frame: Frame, op: p.Receive) -> Steps:
    world, address = world_of(frame), flag_address(frame.read(op.view).array)
    text = f"packets of %{view_root(op.view).hint} of rank {frame.program.world_rank} to be sent"
    yield from await_condition(lambda: address in world.packets, op, text)
    type_: Any = op.result.type
    assert isinstance(type_, TileType)
    return np.frombuffer(world.packets[address], NUMPY[type_.dtype]).reshape(type_.shape).copy()
