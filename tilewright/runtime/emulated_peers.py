"""What an emulated launch of a world adds: control blocks to map, and tables of peers' addresses in the emulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tilewright.ir.abi import CONTROL_WORDS, KernelABI
from tilewright.runtime.arguments import TensorView, endpoint_of
from tilewright.runtime.errors import DeviceError
from tilewright.runtime.peers import Endpoint, SymmetricPlace, address_table

if TYPE_CHECKING:
    from tilewright.runtime.emulator.memory import GlobalMemory

#: the emulator's address of a host address that has been mapped, else None
Translate = Callable[[int], int | None]


def control_views(abi: KernelABI, views: Sequence[TensorView]) -> list[TensorView]:
    """The own control block as memory to map, if the kernel communicates."""
    endpoint = endpoint_of(abi, views)
    if endpoint is None:
        return []
    return [TensorView(endpoint.control, (CONTROL_WORDS,), (1,), "i32", None)]


def place_peers(views: Sequence[TensorView], translate: Translate, memory: GlobalMemory) -> list[TensorView]:
    """The views with the places of other ranks' tensors in the emulator's memory instead of the host's."""
    endpoints: dict[Endpoint, Endpoint] = {}
    placed = []
    for view in views:
        place = view.symmetric
        if place is not None:
            if place.endpoint not in endpoints:
                endpoints[place.endpoint] = _endpoint(place.endpoint, translate, memory)
            addresses = _translated(place.addresses, translate)
            place = SymmetricPlace(endpoints[place.endpoint], addresses, _table(addresses, memory))
        placed.append(view._replace(symmetric=place))
    return placed


def _endpoint(endpoint: Endpoint, translate: Translate, memory: GlobalMemory) -> Endpoint:
    controls = tuple(translate(address) or 0 for address in endpoint.controls)  # 0 if the kernel does not communicate
    return Endpoint(
        endpoint.rank, endpoint.size, controls, _table(controls, memory), lambda data: _put(data, "tensor maps", memory)
    )


def _translated(addresses: Sequence[int], translate: Translate) -> tuple[int, ...]:
    found = [translate(address) for address in addresses]
    if None in found:
        raise DeviceError(
            f"A kernel reaches the tensors of rank {found.index(None)}, which does not take part: launch all ranks "
            "together, with the same tensors (world.launch)."
        )
    return tuple(address for address in found if address is not None)


def _table(addresses: Sequence[int], memory: GlobalMemory) -> int:
    return _put(address_table(addresses), "addresses of ranks", memory)


def _put(data: bytes, name: str, memory: GlobalMemory) -> int:
    return memory.allocate(np.frombuffer(data, np.uint8), name)
