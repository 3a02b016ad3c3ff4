"""Several emulated GPUs with one address space, whose kernels run at the same time.

What is passed to the kernels is the memory of host arrays: an array given to two ranks is the same
memory to both, as a peer's buffer is on a real machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from weakref import WeakValueDictionary

from tilewright.runtime.emulated import EmulatedDevice, EmulationOptions, PreparedLaunch, run_launches
from tilewright.runtime.errors import DeviceError

_numbers = count()
#: the groups whose devices can be opened by name
_groups: WeakValueDictionary[int, EmulatedGroup] = WeakValueDictionary()


class EmulatedGroup:
    """``ranks`` emulated GPUs of a target. ``group[r]`` is the device of a rank.

    Launches inside ``with group.together():`` start together at its end, at most one for each rank;
    others run alone, at once. Nothing runs if the block raises.
    """

    def __init__(self, target: str, ranks: int, options: EmulationOptions | None = None, units: int | None = None):
        if ranks < 1:
            raise DeviceError(f"A group of {ranks} emulated GPUs cannot run anything.")
        number = next(_numbers)
        self.options = options or EmulationOptions()
        self.devices = [EmulatedDevice(target, units, options=self.options) for _ in range(ranks)]
        for rank, device in enumerate(self.devices):
            device.rank, device.ranks, device.together = rank, ranks, self._note
            device.member = f"#{number}.{rank}"
        self._waiting: list[PreparedLaunch] | None = None
        _groups[number] = self

    def __getitem__(self, rank: int) -> EmulatedDevice:
        return self.devices[rank]

    def __len__(self) -> int:
        return len(self.devices)

    def _note(self, launch: PreparedLaunch) -> bool:
        if self._waiting is None:
            return False
        if any(other.device is launch.device for other in self._waiting):
            raise DeviceError(f"{launch.device.name} already has a kernel to run together with those of other ranks.")
        self._waiting.append(launch)
        return True

    @contextmanager
    def together(self) -> Iterator[None]:
        """Launches within start together. DeviceError for the first fault of any, and for a deadlock among them."""
        if self._waiting is not None:
            raise DeviceError("Launches of this group are being collected already.")
        self._waiting = []
        try:
            yield
            launches = self._waiting
        finally:
            self._waiting = None
        if launches:
            run_launches(launches, self.options)


def member(text: str) -> EmulatedDevice:
    """The device of a group that ``NUMBER.RANK`` names, while the group lives. DeviceError if there is none."""
    number, _, rank = text.partition(".")
    group = _groups.get(int(number)) if number.isdecimal() else None
    if group is None or not rank.isdecimal() or int(rank) >= len(group):
        raise DeviceError(f"There is no emulated GPU #{text}: groups come from tw.emulate(target, ranks=...).")
    return group[int(rank)]


__all__ = ["EmulatedGroup", "member"]
