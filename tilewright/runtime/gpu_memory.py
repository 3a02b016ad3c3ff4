"""A GPU's memory as symmetric memory needs it: physical allocations that other GPUs and processes map.

CUDA's virtual memory management; `hip_memory` has the same for HIP.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.types import DTYPES
from tilewright.runtime.arguments import TensorView, Viewed, row_major
from tilewright.runtime.cuda import CudaDevice
from tilewright.runtime.symmetric_memory import Run, SharedWords

#: bytes of device memory that tables and tensor maps are cut from, and what their addresses are multiples of
_ARENA_BYTES, _ARENA_ALIGNMENT = 64 * 1024, 128
#: events of a stream for the ends of its copies
_KEPT_ENDS = 64


class _Side:
    """A stream beside those of callers. Its ``ends`` are taken in turn: one that is recorded anew ends a later copy."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.ends, self.copies = stream, list[Any](), 0

    def end(self, new_event: Callable[[], Any]) -> Any:
        """An event for the end of the next copy. Who waits by it for an earlier copy waits for this one too."""
        if len(self.ends) < _KEPT_ENDS:
            self.ends.append(new_event())
        self.copies += 1
        return self.ends[(self.copies - 1) % _KEPT_ENDS]


class GpuMemory(ABC):
    """One GPU. Handles stand for physical memory, addresses for where it is mapped in this process."""

    #: the device's name, and its number among those of its vendor
    name: str
    ordinal: int

    def __init__(self, faults: list[Callable[[], str | None]]) -> None:
        self._faults, self._reasons = faults, list[Callable[[], str | None]]()
        self._lock = threading.Lock()
        self._sides: list[_Side] = []
        #: recorded in one stream for another to wait for at once, under the lock
        self._passed_on: Any = None
        self._arena, self._arena_end = 0, 0
        self._arenas: list[int] = []

    # --- physical memory --------------------------------------------------------------------------------

    @abstractmethod
    def granularity(self) -> int:
        """Sizes of physical memory are multiples of this many bytes."""

    @abstractmethod
    def create(self, nbytes: int) -> Any:
        """The handle of new physical memory of this GPU."""

    @abstractmethod
    def export(self, handle: Any) -> int:
        """A file descriptor of the memory, for other processes. The caller closes it."""

    @abstractmethod
    def import_(self, descriptor: int) -> Any:
        """The handle of another process's memory."""

    @abstractmethod
    def map(self, handle: Any, nbytes: int, ordinals: Sequence[int]) -> int:
        """The address at which the GPUs ``ordinals`` reach the memory."""

    @abstractmethod
    def unmap(self, address: int, nbytes: int) -> None:
        """Undo `map`."""

    @abstractmethod
    def release(self, handle: Any) -> None:
        """Give physical memory back; it stays while it is mapped."""

    @abstractmethod
    def reaches(self, other: int) -> bool:
        """Whether this GPU may access the memory of GPU ``other`` of this process."""

    # --- contents ---------------------------------------------------------------------------------------

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Memory of this GPU for itself."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Undo `allocate`."""

    @abstractmethod
    def write(self, address: int, data: bytes) -> None:
        """Copy bytes into the GPU's memory. They are there on return, even while a graph is being captured."""

    @abstractmethod
    def read(self, address: int, nbytes: int) -> bytes:
        """Bytes of the GPU's memory, behind all work that was launched on it."""

    @abstractmethod
    def clear(self, address: int, nbytes: int) -> None:
        """Zeros, written on return."""

    @abstractmethod
    def shared_words(self, count: int) -> SharedWords:
        """Zeroed host memory that kernels may write and that outlives a failed one. It is never given back."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the GPU."""

    # --- copies beside each other -----------------------------------------------------------------------

    @abstractmethod
    def new_stream(self) -> Any:
        """A stream that waits for no other."""

    @abstractmethod
    def new_event(self) -> Any:
        """An event that takes no time."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Let the event stand for what ``stream`` has been given so far."""

    @abstractmethod
    def wait_event(self, stream: Any, event: Any) -> None:
        """Let ``stream`` go on after the event."""

    @abstractmethod
    def start_copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Give ``stream`` a copy between addresses of any GPUs."""

    @abstractmethod
    def destroy_stream(self, stream: Any) -> None:
        """Undo `new_stream`."""

    @abstractmethod
    def destroy_event(self, event: Any) -> None:
        """Undo `new_event`."""

    def start_copies(self, runs: Sequence[Run], stream: int, ordered: bool) -> list[Any]:
        """Start runs of copies behind what ``stream`` has been given; an event for the end of each run.

        They go beside the stream, and beside each other unless ``ordered``. Within a capture they become part of the
        graph, if the stream waits for all events.
        """
        # ordered ones have a side even where there is no copy: `side_stream` has what follows
        sides = [self._side(0 if ordered else i) for i in range(max(len(runs), ordered))]
        with self._lock:
            self._pass_on(stream, [side.stream for side in (sides[:1] if ordered else sides)])
            done = []
            for side, run in zip(sides, runs, strict=False):
                end = side.end(self.new_event)
                for target, source, nbytes in run:
                    self.start_copy(target, source, nbytes, side.stream)
                self.record(end, side.stream)
                done.append(end)
        return done

    def side_stream(self) -> Any:
        """The stream of ordered copies, for launches behind them; `rejoin` it."""
        return self._side(0).stream

    def rejoin(self, stream: int) -> None:
        """Let ``stream`` wait for what `side_stream` has been given."""
        side = self.side_stream()
        with self._lock:
            self._pass_on(side, [stream])

    def _pass_on(self, stream: Any, waiting: Sequence[Any]) -> None:
        """Let other streams wait for what ``stream`` has been given."""
        if self._passed_on is None:
            self._passed_on = self.new_event()
        self.record(self._passed_on, stream)
        for other in waiting:
            self.wait_event(other, self._passed_on)

    def _side(self, number: int) -> _Side:
        with self._lock:
            while len(self._sides) <= number:
                self._sides.append(_Side(self.new_stream()))
            return self._sides[number]

    def place(self, data: bytes) -> int:
        """Bytes in the GPU's memory at a multiple of 128, until `close`."""
        size = -(-len(data) // _ARENA_ALIGNMENT) * _ARENA_ALIGNMENT
        with self._lock:
            if self._arena + size > self._arena_end:
                self._arena = self.allocate(max(size, _ARENA_BYTES))
                self._arena_end = self._arena + max(size, _ARENA_BYTES)
                self._arenas.append(self._arena)
            address, self._arena = self._arena, self._arena + size
        self.write(address, data)
        return address

    def explain(self, reason: Callable[[], str | None]) -> None:
        """Have failed calls of the device say ``reason()`` where that is not None."""
        self._reasons.append(reason)
        self._faults.append(reason)

    def close(self) -> None:
        """Free what `place` and copies took, and explain nothing any more. The GPU is idle."""
        while self._reasons:
            self._faults.remove(self._reasons.pop())
        if self._passed_on is not None:
            self.destroy_event(self._passed_on)
            self._passed_on = None
        while self._sides:
            side = self._sides.pop()
            for event in side.ends:
                self.destroy_event(event)
            self.destroy_stream(side.stream)
        while self._arenas:
            self.free(self._arenas.pop())
        self._arena = self._arena_end = 0

    def padded(self, nbytes: int) -> int:
        """``nbytes`` rounded up to the granularity."""
        step = self.granularity()
        return -(-nbytes // step) * step


class CudaMemory(GpuMemory):
    """An NVIDIA GPU's memory."""

    def __init__(self, device: CudaDevice) -> None:
        super().__init__(device.faults)
        self.device, self.name, self.ordinal = device, device.name, device.ordinal
        self._driver = device._driver
        self._copies: Any = None

    def _properties(self) -> Any:
        driver = self._driver
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.ordinal
        properties.requestedHandleTypes = self._handle_type
        return properties

    @property
    def _handle_type(self) -> Any:
        return self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _call(self, function: str, *args: Any, doing: str = "") -> Any:
        with self.device.current():
            return self.device.call(function, *args, doing=doing)

    def granularity(self) -> int:
        option = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(self._call("cuMemGetAllocationGranularity", self._properties(), option))

    def create(self, nbytes: int) -> Any:
        doing = f"Allocating {nbytes} bytes on {self.name}"
        return self._call("cuMemCreate", nbytes, self._properties(), 0, doing=doing)

    def export(self, handle: Any) -> int:
        return int(self._call("cuMemExportToShareableHandle", handle, self._handle_type, 0))

    def import_(self, descriptor: int) -> Any:
        doing = f"Taking over another process's memory on {self.name}"
        return self._call("cuMemImportFromShareableHandle", descriptor, self._handle_type, doing=doing)

    def map(self, handle: Any, nbytes: int, ordinals: Sequence[int]) -> int:
        driver = self._driver
        accesses = []
        for ordinal in ordinals:
            access = driver.CUmemAccessDesc()
            access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = ordinal
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            accesses.append(access)
        doing = f"Giving cuda:{', cuda:'.join(map(str, ordinals))} access to memory of another GPU"
        with ExitStack() as undo:
            address = self._call("cuMemAddressReserve", nbytes, 0, 0, 0)
            undo.callback(self._call, "cuMemAddressFree", address, nbytes)
            self._call("cuMemMap", address, nbytes, 0, handle, 0)
            undo.callback(self._call, "cuMemUnmap", address, nbytes)
            self._call("cuMemSetAccess", address, nbytes, accesses, len(accesses), doing=doing)
            undo.pop_all()
        return int(address)

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", address, nbytes)
        self._call("cuMemAddressFree", address, nbytes)

    def release(self, handle: Any) -> None:
        self._call("cuMemRelease", handle)

    def reaches(self, other: int) -> bool:
        if other == self.ordinal:
            return True
        mine, theirs = (self._call("cuDeviceGet", ordinal) for ordinal in (self.ordinal, other))
        return bool(self._call("cuDeviceCanAccessPeer", mine, theirs))

    def allocate(self, nbytes: int) -> int:
        with self._beside_captures():
            return int(self._call("cuMemAlloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def write(self, address: int, data: bytes) -> None:
        with self._beside_captures():
            self._call("cuMemcpyHtoDAsync", address, data, len(data), self._stream())
            self._call("cuStreamSynchronize", self._stream())

    def read(self, address: int, nbytes: int) -> bytes:
        data = ctypes.create_string_buffer(nbytes)
        self.synchronize()
        self._call("cuMemcpyDtoH", ctypes.addressof(data), address, nbytes)
        return data.raw

    def clear(self, address: int, nbytes: int) -> None:
        with self._beside_captures():
            self._call("cuMemsetD8Async", address, 0, nbytes, self._stream())
            self._call("cuStreamSynchronize", self._stream())

    def shared_words(self, count: int) -> SharedWords:
        flags = self._driver.CU_MEMHOSTALLOC_PORTABLE | self._driver.CU_MEMHOSTALLOC_DEVICEMAP
        host = int(self._call("cuMemHostAlloc", 4 * count, flags))
        words = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(host))
        words.fill(0)
        return SharedWords(words, int(self._call("cuMemHostGetDevicePointer", host, 0)))

    def synchronize(self) -> None:
        self.device.synchronize()

    def new_stream(self) -> Any:
        return self._call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def new_event(self) -> Any:
        return self._call("cuEventCreate", self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def destroy_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def wait_event(self, stream: Any, event: Any) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def start_copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self._call("cuMemcpyAsync", target, source, nbytes, stream, doing=f"Copying {nbytes} bytes between GPUs")

    def close(self) -> None:
        super().close()
        if self._copies is not None:
            self.destroy_stream(self._copies)
            self._copies = None

    def _stream(self) -> Any:
        """A stream of our own for what the host writes."""
        if self._copies is None:
            self._copies = self.new_stream()
        return self._copies

    @contextmanager
    def _beside_captures(self) -> Iterator[None]:
        """Calls that would spoil a graph which this thread captures on another stream do not, within."""
        relaxed = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = self._call("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", before)


class DeviceArray(Viewed):
    """An array in a GPU's memory, for programs without torch. Row-major; ``dtype`` is the IR's name ("bf16")."""

    def __init__(self, memory: GpuMemory, address: int, shape: tuple[int, ...], dtype: str, owner: Any = None) -> None:
        self.memory, self.address, self.shape, self.dtype, self._owner = memory, address, shape, dtype, owner
        self.device = memory.name

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * DTYPES[self.dtype].bytes

    @property
    def view(self) -> TensorView:
        return TensorView(self.address, self.shape, row_major(self.shape), self.dtype, None)

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy in host memory, behind all work launched on the GPU."""
        data = self.memory.read(self.address, self.nbytes) if self.nbytes else b""
        return np.frombuffer(data, NUMPY[DTYPES[self.dtype]]).reshape(self.shape).copy()

    def __repr__(self) -> str:
        return f"<{self.dtype} array {list(self.shape)} on {self.device}>"


class _Bytes:
    """Memory that torch makes a tensor of."""

    def __init__(self, address: int, nbytes: int, owner: Any) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


_TORCH_NAMES = {
    "i1": "bool", "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64", "f16": "float16", "bf16": "bfloat16",
    "f32": "float32", "f64": "float64", "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2",
}  # fmt: skip


def torch_with_gpus() -> Any:
    """The torch module if it is loaded and sees a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def torch_dtype(torch: Any, dtype: str) -> Any:
    """Torch's dtype of the IR's name."""
    return getattr(torch, _TORCH_NAMES[dtype])


def gpu_array(memory: GpuMemory, address: int, shape: tuple[int, ...], dtype: str, owner: Any) -> Any:
    """A torch tensor at ``address`` where torch is loaded, else a `DeviceArray`; it keeps ``owner`` alive."""
    torch = torch_with_gpus()
    nbytes = int(np.prod(shape)) * DTYPES[dtype].bytes
    if torch is None:
        return DeviceArray(memory, address, shape, dtype, owner)
    if nbytes == 0:
        return torch.empty(shape, dtype=torch_dtype(torch, dtype), device=f"cuda:{memory.ordinal}")
    octets = torch.as_tensor(_Bytes(address, nbytes, owner), device=f"cuda:{memory.ordinal}")
    return octets.view(torch_dtype(torch, dtype)).view(shape)
