"""What a launch passes on of the ranks of a world: whose memory lies where.

A world is a number of ranks whose kernels run at the same time and reach each other's memory; `Endpoint`
is one rank's side of it, and `SymmetricPlace` where a tensor of it lies on every rank.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilewright.ir.abi import KernelABI


@dataclass(frozen=True, eq=False)
class Endpoint:
    """One rank of a world: ``controls`` are the addresses of all ranks' control blocks in this rank's address space.

    ``controls_table`` and what ``place`` returns are addresses in the memory of the rank's device. ``place``
    puts bytes there, at a multiple of 128, and they stay until the world is closed. ``kernels`` are those
    that were launched here, by `tilewright.ir.abi.kernel_number`.
    """

    rank: int
    size: int
    controls: tuple[int, ...]
    controls_table: int
    place: Callable[[bytes], int]
    #: launches go to torch's current stream unless they name one
    torch_stream: bool = False
    #: addresses of the tensor maps of all ranks' tensors, by place and shape of the copies
    maps: dict[Any, int] = field(default_factory=dict)
    kernels: dict[int, KernelABI] = field(default_factory=dict)
    #: whether kernels use a tensor's halves in turn
    turns: dict[SymmetricPlace, bool] = field(default_factory=dict)

    @property
    def control(self) -> int:
        """The address of this rank's control block."""
        return self.controls[self.rank]


@dataclass(frozen=True, eq=False)
class SymmetricPlace:
    """Where a symmetric tensor lies: ``addresses`` by rank, as the endpoint's rank sees them; ``table`` holds them.

    Places compare by identity: a place is made once for a tensor and a rank.
    """

    endpoint: Endpoint
    addresses: tuple[int, ...]
    table: int


def address_table(addresses: Sequence[int]) -> bytes:
    """The int64 for each rank that a kernel reads addresses from."""
    return struct.pack(f"<{len(addresses)}q", *addresses)
