"""Launches through a driver: arguments read, checked and packed once, then repeated at little cost.

CUDA and HIP differ in the calls at the end, which subclasses of `Launcher` make.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

from tilewright.ir.abi import KernelABI, TensorMapParam, TensorParam, kernel_number
from tilewright.runtime.arguments import (
    INT32_MAX,
    ArgumentBlock,
    ArgumentLayout,
    TensorView,
    check_tensor,
    endpoint_of,
    normalize_grid,
    read_tensor,
)
from tilewright.runtime.device import Device
from tilewright.runtime.errors import ArgumentError, DeviceError

#: launches of one function whose packed arguments are kept
_KEPT_LAUNCHES = 256


@dataclass(frozen=True)
class ReadyLaunch:
    """Everything of a launch but the stream: checked, encoded, packed. ``arguments`` is None for an empty grid."""

    blocks: tuple[int, int, int]
    arguments: ArgumentBlock | None


@dataclass(frozen=True)
class LaunchForm:
    """A launch as data: what it hands to the driver, and where in that the addresses and numbers of its arguments are.

    ``early``: the launch may begin while the one before it runs. ``tensors``, ``scalars``: (offset in ``image``,
    parameter) and, for scalars, their dtype. ``maps``: (offset, parameter, element type, dims, strides, box, swizzle)
    with the driver's numbers and orders.
    """

    device: Any
    function: int
    blocks: tuple[int, int, int]
    threads: int
    shared_bytes: int
    early: bool
    image: bytes
    offsets: tuple[int, ...]
    tensors: tuple[tuple[int, int], ...]
    scalars: tuple[tuple[int, int, str], ...]
    maps: tuple[tuple[int, int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...], int], ...]


class Launcher(ABC):
    """Launches one function with one ABI: ``launcher(grid, args, stream)``.

    Arguments already seen (same addresses, shapes, strides, scalar bits and grid) go straight to
    the driver; others are checked against the ABI and packed first.
    """

    def __init__(self, device: Device, ordinal: int, abi: KernelABI) -> None:
        self.device = device
        self.ordinal = ordinal
        self.abi = abi
        self.layout = ArgumentLayout(abi)
        self._tensor_params = [p for p in abi.params if isinstance(p, TensorParam)]
        self._is_tensor = [isinstance(p, TensorParam) for p in abi.params]
        self._map_sources = [self._source(m.param) for m in abi.tensor_maps]
        self._ready: dict[Any, ReadyLaunch] = {}

    def _source(self, name: str) -> int:
        for index, param in enumerate(self._tensor_params):
            if param.name == name:
                return index
        raise ArgumentError(f"{self.abi.name} has a tensor map of '{name}', which is none of its tensors.")

    def __call__(self, grid: int | Sequence[int], args: Sequence[Any], stream: Any = None) -> None:
        """Start the kernel; see `Device.launch`."""
        self.bound(grid, args)(stream)

    def bound(self, grid: int | Sequence[int], args: Sequence[Any]) -> Callable[[Any], None]:
        """The launch as a function of the stream, which has nothing left to do but to start the kernel."""
        if len(args) != len(self._is_tensor):
            raise ArgumentError(
                f"{self.abi.name} takes {len(self._is_tensor)} arguments "
                f"({', '.join(p.name for p in self.abi.params)}), not {len(args)}."
            )
        torch = sys.modules.get("torch")
        views, scalars, producers, from_torch = self._split(args, torch)
        packed = self.layout.pack_scalars(scalars) if scalars else b""
        key = (tuple(grid) if isinstance(grid, list) else grid, packed, *views)
        ready = self._ready.get(key) or self._prepare(key)

        def start(stream: Any) -> None:
            if ready.arguments is None:
                return
            handle = stream_handle(stream, torch if from_torch else None, self.ordinal)
            for producer in producers:
                if producer != handle:  # the array interface, v3: wait for the producer's stream
                    self.wait_for(producer)
            self.start(ready, handle)

        return start

    def ready(self, grid: int | Sequence[int], args: Sequence[Any]) -> ReadyLaunch | None:
        """The launch but for the stream, while the arguments' memory lives; None unless all tensors are torch's."""
        views, scalars, producers, from_torch = self._split(args, sys.modules.get("torch"))
        if producers or not from_torch:
            return None
        packed = self.layout.pack_scalars(scalars) if scalars else b""
        key = (tuple(grid) if isinstance(grid, list) else grid, packed, *views)
        return self._ready.get(key) or self._prepare(key)

    def _split(self, args: Sequence[Any], torch: ModuleType | None) -> tuple[list[Any], list[Any], list[int], bool]:
        """The views, scalars and producers' streams among ``args``; last, whether a torch tensor was there."""
        tensor_type: Any = getattr(torch, "Tensor", ())  # absent, too, from a torch that is being imported
        views: list[Any] = []
        scalars: list[Any] = []
        producers: list[int] = []
        from_torch = False
        for is_tensor, arg in zip(self._is_tensor, args, strict=True):
            if not is_tensor:
                scalars.append(arg)
            elif type(arg) is tensor_type and arg.is_cuda:
                # read_torch, without its cost: a plain tuple equals the TensorView as a key
                views.append((arg.data_ptr(), arg.shape, arg.stride(), arg.dtype, arg.get_device()))
                from_torch = True
            else:
                view, producer = self._read(arg, len(views), torch)
                views.append(view)
                from_torch = from_torch or isinstance(arg, tensor_type) or _follows_torch(view)
                if producer is not None:
                    producers.append(producer)
        return views, scalars, producers, from_torch

    def _read(self, argument: Any, index: int, torch: ModuleType | None) -> tuple[TensorView, int | None]:
        return read_tensor(argument, self._tensor_params[index].name, torch)

    def _prepare(self, key: tuple[Any, ...]) -> ReadyLaunch:
        grid, packed, *entries = key
        counts = normalize_grid(grid, self.abi.name)
        views = [TensorView(*entry) for entry in entries]
        for param, view in zip(self._tensor_params, views, strict=True):
            self.check(param, view)
        blocks = self._blocks(counts)
        if 0 in counts:
            ready = ReadyLaunch(blocks, None)
        else:
            maps = [
                self._tensor_map(param, views[source])
                for param, source in zip(self.abi.tensor_maps, self._map_sources, strict=True)
            ]
            endpoint = endpoint_of(self.abi, views)
            if endpoint is not None:
                endpoint.kernels[kernel_number(self.abi.name)] = self.abi
            ready = ReadyLaunch(blocks, self.layout.pack(views, packed, counts, maps, endpoint))
        self._keep(key, ready)
        return ready

    def _tensor_map(self, param: TensorMapParam, view: TensorView) -> bytes | int:
        """A tensor map, or the address of one for each rank, which are made once for a tensor."""
        if not param.peers:
            return self.tensor_map(param, view)
        place = view.symmetric
        assert place is not None, "the view has been checked"
        key = (place, view.shape, view.strides, param.box, param.order, param.swizzle)
        address = place.endpoint.maps.get(key)
        if address is None:
            maps = [self.tensor_map(param, view._replace(address=address)) for address in place.addresses]
            address = place.endpoint.maps[key] = place.endpoint.place(b"".join(maps))
        return address

    def _keep(self, key: tuple[Any, ...], ready: ReadyLaunch) -> None:
        """Remember a launch, first in first out; an exact LRU would cost every launch some time."""
        try:
            while len(self._ready) >= _KEPT_LAUNCHES:
                self._ready.pop(next(iter(self._ready)), None)
        except (StopIteration, RuntimeError):  # another thread changed the dictionary meanwhile
            pass
        self._ready[key] = ready

    def _blocks(self, counts: tuple[int, int, int]) -> tuple[int, int, int]:
        total = prod(counts)
        if self.abi.persistent:
            if total > INT32_MAX:
                raise ArgumentError(
                    f"The grid of {self.abi.name}, {counts}, has {total} programs; at most {INT32_MAX} can be counted."
                )
            return (self.abi.persistent_blocks(counts, self.resident_clusters()), 1, 1)
        blocks = self.abi.direct_blocks(counts)
        self.check_grid(blocks)
        return blocks

    def check(self, param: TensorParam, view: TensorView) -> None:
        """ArgumentError for a tensor that the kernel was not compiled for."""
        check_tensor(param, view, self.ordinal)

    # --- what a driver provides -----------------------------------------------------------------

    @abstractmethod
    def units(self) -> int:
        """How many SMs or CUs the device has."""

    def resident_clusters(self) -> int:
        """How many clusters of the kernel's blocks run at once; a block without a cluster counts as one."""
        return self.units() * self.abi.blocks_per_unit

    @abstractmethod
    def check_grid(self, counts: tuple[int, int, int]) -> None:
        """ArgumentError for a grid that the driver cannot launch."""

    @abstractmethod
    def start(self, ready: ReadyLaunch, stream: int) -> None:
        """Call the driver, with the device current for the thread."""

    @abstractmethod
    def wait_for(self, stream: int) -> None:
        """Wait until the work in ``stream`` has finished."""

    def tensor_map(self, param: TensorMapParam, view: TensorView) -> bytes:
        """The encoded tensor map of a view, for devices that have them."""
        raise DeviceError(f"{self.abi.name} needs a tensor map of '{param.param}', which {self.device.name} has not.")


def _follows_torch(view: TensorView) -> bool:
    return view.symmetric is not None and view.symmetric.endpoint.torch_stream


def stream_handle(stream: Any, torch: ModuleType | None, ordinal: int) -> int:
    """The stream's handle of what a caller passed; ``torch`` is None if no tensor is torch's."""
    if stream is None:
        return 0 if torch is None else _torch_stream(torch, ordinal)
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    try:
        return int(stream)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"A stream must be a CUDA handle (int), a torch stream or have __cuda_stream__, not {stream!r}."
        ) from None


def _torch_stream(torch: ModuleType, ordinal: int) -> int:
    try:
        # what torch.cuda.current_stream wraps, without making a Stream object
        return int(torch._C._cuda_getCurrentRawStream(ordinal))
    except AttributeError:
        return int(torch.cuda.current_stream(ordinal).cuda_stream)
