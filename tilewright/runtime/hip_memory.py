"""An AMD GPU's memory as symmetric memory needs it: HIP's virtual memory management.

Symmetric memory is uncached: in coarse-grained memory a kernel need not see what another GPU writes before it ends.
Not run on AMD hardware; the tests call the library's functions in a stand-in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from tilewright.runtime.gpu_memory import GpuMemory
from tilewright.runtime.hip import HipDevice
from tilewright.runtime.symmetric_memory import SharedWords


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """hipMemAllocationProp, of which the bindings cannot set the type of handles."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
    ]


class _Access(ctypes.Structure):
    """hipMemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class HipMemory(GpuMemory):
    """An AMD GPU's memory."""

    def __init__(self, device: HipDevice) -> None:
        super().__init__(device.faults)
        self.device, self.name, self.ordinal = device, device.name, device.ordinal
        self._hip = device._driver

    def _call(self, function: str, *args: Any, doing: str = "") -> Any:
        with self.device.current():
            return self.device.call(function, *args, doing=doing)

    def _location(self, ordinal: int) -> _Location:
        return _Location(int(self._hip.hipMemLocationType.hipMemLocationTypeDevice), ordinal)

    def _properties(self) -> _Properties:
        uncached = int(self._hip.hipMemAllocationType.hipMemAllocationTypeUncached)
        return _Properties(uncached, int(self._handle_type), self._location(self.ordinal))

    @property
    def _handle_type(self) -> Any:
        return self._hip.hipMemAllocationHandleType.hipMemHandleTypePosixFileDescriptor

    def granularity(self) -> int:
        properties = self._properties()
        option = self._hip.hipMemAllocationGranularity_flags.hipMemAllocationGranularityRecommended
        return int(self._call("hipMemGetAllocationGranularity", ctypes.addressof(properties), option))

    def create(self, nbytes: int) -> Any:
        properties = self._properties()
        doing = f"Allocating {nbytes} bytes on {self.name}"
        return self._call("hipMemCreate", nbytes, ctypes.addressof(properties), 0, doing=doing)

    def export(self, handle: Any) -> int:
        descriptor = ctypes.c_int(-1)
        self._call("hipMemExportToShareableHandle", ctypes.addressof(descriptor), handle, self._handle_type, 0)
        return descriptor.value

    def import_(self, descriptor: int) -> Any:
        doing = f"Taking over another process's memory on {self.name}"
        return self._call("hipMemImportFromShareableHandle", descriptor, self._handle_type, doing=doing)

    def map(self, handle: Any, nbytes: int, ordinals: Sequence[int]) -> int:
        readable_and_writable = int(self._hip.hipMemAccessFlags.hipMemAccessFlagsProtReadWrite)
        accesses = (_Access * len(ordinals))(*[_Access(self._location(n), readable_and_writable) for n in ordinals])
        doing = f"Giving hip:{', hip:'.join(map(str, ordinals))} access to memory of another GPU"
        with ExitStack() as undo:
            address = int(self._call("hipMemAddressReserve", nbytes, 0, None, 0))
            undo.callback(self._call, "hipMemAddressFree", address, nbytes)
            self._call("hipMemMap", address, nbytes, 0, handle, 0)
            undo.callback(self._call, "hipMemUnmap", address, nbytes)
            self._call("hipMemSetAccess", address, nbytes, ctypes.addressof(accesses), len(ordinals), doing=doing)
            undo.pop_all()
        return address

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("hipMemUnmap", address, nbytes)
        self._call("hipMemAddressFree", address, nbytes)

    def release(self, handle: Any) -> None:
        self._call("hipMemRelease", handle)

    def reaches(self, other: int) -> bool:
        return other == self.ordinal or bool(self._call("hipDeviceCanAccessPeer", self.ordinal, other))

    def allocate(self, nbytes: int) -> int:
        return int(self._call("hipMalloc", nbytes))

    def free(self, address: int) -> None:
        self._call("hipFree", address)

    def write(self, address: int, data: bytes) -> None:
        source = ctypes.create_string_buffer(data, len(data))
        self._call("hipMemcpyHtoD", address, ctypes.addressof(source), len(data))

    def read(self, address: int, nbytes: int) -> bytes:
        data = ctypes.create_string_buffer(nbytes)
        self.synchronize()
        self._call("hipMemcpyDtoH", ctypes.addressof(data), address, nbytes)
        return data.raw

    def clear(self, address: int, nbytes: int) -> None:
        self._call("hipMemsetD8", address, 0, nbytes)
        self.synchronize()

    def shared_words(self, count: int) -> SharedWords:
        hip = self._hip
        flags = int(hip.hipHostMallocPortable) | int(hip.hipHostMallocMapped) | int(hip.hipHostMallocCoherent)
        host = int(self._call("hipHostMalloc", 4 * count, flags))
        words = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(host))
        words.fill(0)
        return SharedWords(words, int(self._call("hipHostGetDevicePointer", host, 0)))

    def new_stream(self) -> Any:
        return self._call("hipStreamCreateWithFlags", int(self._hip.hipStreamNonBlocking))

    def new_event(self) -> Any:
        return self._call("hipEventCreateWithFlags", int(self._hip.hipEventDisableTiming))

    def destroy_stream(self, stream: Any) -> None:
        self._call("hipStreamDestroy", stream)

    def destroy_event(self, event: Any) -> None:
        self._call("hipEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        self._call("hipEventRecord", event, stream)

    def wait_event(self, stream: Any, event: Any) -> None:
        self._call("hipStreamWaitEvent", stream, event, 0)

    def start_copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        kind = self._hip.hipMemcpyKind.hipMemcpyDefault
        self._call("hipMemcpyAsync", target, source, nbytes, kind, stream)

    def synchronize(self) -> None:
        self.device.synchronize()
