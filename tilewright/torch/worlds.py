"""The world of a process group: symmetric memory that operators on several GPUs share between their calls."""

from __future__ import annotations

import atexit
import socket
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as distributed

import tilewright as tw
from tilewright.torch.support import Refusal, refuse_place


@dataclass
class Shared:
    """What a process group has: a world, or the reason why it has none; and on which stream its last launch is."""

    world: Any
    refusal: Refusal
    #: what has run, and so has its buffers
    known: set[Any] = field(default_factory=set)
    stream: Any = None
    finished: Any = None


#: seconds that a kernel waits at least: as long as torch's collectives do, since a rank may still be compiling
PATIENCE = 600.0
_shared: WeakKeyDictionary[Any, Shared] = WeakKeyDictionary()


def world_of(group: str, work: Any, *tensors: Any) -> Any:
    """The world of the process group of that name for these tensors, None where torch must do the work.

    Collective when a group is met for the first time, as is making buffers for a ``work`` of other sizes: neither is
    part of a graph that is being captured. All ranks get a world, or none does: what decides is the same for all of
    them, or was told to all of them.
    """
    first = tensors[0]
    if first.device.type != "cuda" or refuse_place(*tensors) is not None:
        return None
    members = distributed.distributed_c10d._resolve_process_group(group)
    found, key = _shared.get(members), (work, *((x.shape, x.dtype) for x in tensors))
    if torch.cuda.is_current_stream_capturing():
        return found.world if found is not None and key in found.known else None
    if found is None:
        found = _shared[members] = _make(members, first.device)
    if found.world is not None:
        found.known.add(key)
        _follow(found, first.device)
    return found.world


def _make(members: Any, device: Any) -> Shared:
    size = distributed.get_world_size(members)
    if size == 1:
        return Shared(None, "a group of one")
    place = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
    known: list[Any] = [None] * size
    distributed.all_gather_object(known, (place, device.index == torch.cuda.current_device()), group=members)
    places = [each for each, _ in known]
    if len({host for host, _ in places}) != 1 or len(set(places)) != size:
        return Shared(None, "not a GPU of its own for each rank, on one machine")
    if not all(current for _, current in known):
        return Shared(None, "tensors that are not on the current device")
    world, failure = None, None
    try:
        world = tw.World.distributed(members, patience=PATIENCE)
    except tw.DeviceError as error:
        failure = str(error)
    distributed.all_gather_object(known, failure, group=members)
    failure = next(filter(None, known), None)
    if failure and world is not None:  # another rank has none
        world.close()
        world = None
    return Shared(world, failure)


def _follow(shared: Shared, device: Any) -> None:
    """Launches of a world follow one another, whatever streams they are given.

    But for graphs, which cannot wait for what is outside of them: their replays belong on the stream of other calls.
    """
    stream = torch.cuda.current_stream(device)
    if shared.finished is not None and shared.stream != stream:
        shared.finished.wait(stream)
    shared.stream = stream


def finished(group: str) -> None:
    """Note that an operator has queued its last launch: those on other streams wait for it."""
    shared = _shared.get(distributed.distributed_c10d._resolve_process_group(group))
    if shared is None or shared.stream is None or torch.cuda.is_current_stream_capturing():
        return
    if shared.finished is None:
        shared.finished = torch.cuda.Event()
    shared.finished.record(shared.stream)


@atexit.register
def _close() -> None:
    for shared in list(_shared.values()):
        if shared.world is not None:
            shared.world.close()
    _shared.clear()


__all__ = ["finished", "world_of"]
