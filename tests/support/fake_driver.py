"""A stand-in for ``cuda.bindings.driver`` that records calls and reads launches back as bytes."""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

CONTEXT, OTHER_CONTEXT = 0xC0, 0xD0


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701


class _Names:
    """An enumeration of which only the names matter: ``CUtensorMapSwizzle.X`` is "X"."""

    def __getattr__(self, name: str) -> str:
        return name


class FakeDriver:
    """Two GPUs of compute capability 9.0. By a function's name: ``failures`` has the error that it returns, ``values``
    what else."""

    CUresult = CUresult
    CUlaunchConfig = SimpleNamespace
    cuuint32_t = cuuint64_t = int

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failures: dict[str, CUresult] = {}
        self.current = CONTEXT
        self._stack: list[int] = []
        self.launch_contexts: list[int] = []
        self.map_contexts: list[int] = []
        self.attributes = {
            "COMPUTE_CAPABILITY_MAJOR": 9,
            "COMPUTE_CAPABILITY_MINOR": 0,
            "MULTIPROCESSOR_COUNT": 132,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
            "L2_CACHE_SIZE": 50 * 2**20,
        }
        for names in ("CUdevice_attribute", "CUfunction_attribute", "CUtensorMapDataType", "CUtensorMapInterleave"):
            setattr(self, names, _Names())
        for names in ("CUmemAllocationType", "CUmemLocationType", "CUmemAllocationHandleType", "CUmemAccess_flags"):
            setattr(self, names, _Names())
        for names in ("CUmemAllocationGranularity_flags", "CUstream_flags", "CUstreamCaptureMode", "CUevent_flags"):
            setattr(self, names, _Names())
        for names in ("CUtensorMapSwizzle", "CUtensorMapL2promotion", "CUtensorMapFloatOOBfill", "CUlaunchAttributeID"):
            setattr(self, names, _Names())
        self.values: dict[str, Any] = {
            "cuDeviceGetCount": 2,
            "cuDeviceTotalMem": 80 * 2**30,
            "cuDeviceGetName": b"NVIDIA Fake 80GB" + bytes(16),
            "cuDevicePrimaryCtxRetain": CONTEXT,
            "cuModuleLoadData": 0x100,
            "cuModuleGetFunction": 0x200,
            "cuOccupancyMaxActiveBlocksPerMultiprocessor": 2,
            "cuOccupancyMaxActiveClusters": 66,
            "cuMemAlloc": 0xEE00,
            "cuMemGetAllocationGranularity": 2 * 2**20,
            "cuMemCreate": 0x300,
            "cuMemImportFromShareableHandle": 0x301,
            "cuThreadExchangeStreamCaptureMode": "the mode before",
            "cuDeviceCanAccessPeer": 1,
        }
        self.CU_MEMHOSTALLOC_PORTABLE, self.CU_MEMHOSTALLOC_DEVICEMAP = 1, 2
        self._streams = self._events = -1
        self._reserved = 0x7_0000_0000
        self._host: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, args))
            status = self.failures.get(name, CUresult.CUDA_SUCCESS)
            return (status, self.values[name]) if name in self.values else (status,)

        return function

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of the function ``name``."""
        return [args for called, args in self.calls if called == name]

    def cuDeviceGet(self, ordinal: int) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, self.attributes[attribute.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def cuCtxGetCurrent(self) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, self.current

    def cuCtxSetCurrent(self, context: int) -> tuple[CUresult]:
        self.current = context
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, context: int) -> tuple[CUresult]:
        self._stack.append(self.current)
        self.current = context
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[CUresult, int]:
        popped, self.current = self.current, self._stack.pop()
        return CUresult.CUDA_SUCCESS, popped

    def cuTensorMapEncodeTiled(self, *args: Any) -> tuple[CUresult, Any]:
        self.calls.append(("cuTensorMapEncodeTiled", args))
        self.map_contexts.append(self.current)
        memory = ctypes.create_string_buffer(bytes([len(self.named("cuTensorMapEncodeTiled"))]) * 128, 128)
        value = SimpleNamespace(getPtr=lambda: ctypes.addressof(memory))
        return self.failures.get("cuTensorMapEncodeTiled", CUresult.CUDA_SUCCESS), value

    def CUmemAllocationProp(self) -> Any:
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self) -> Any:
        return SimpleNamespace(location=SimpleNamespace())

    def cuMemAddressReserve(self, nbytes: int, *rest: Any) -> tuple[CUresult, int]:
        self.calls.append(("cuMemAddressReserve", (nbytes, *rest)))
        self._reserved += nbytes
        return CUresult.CUDA_SUCCESS, self._reserved - nbytes

    def cuStreamCreate(self, flags: Any) -> tuple[CUresult, int]:
        self.calls.append(("cuStreamCreate", (flags,)))
        self._streams += 1
        return CUresult.CUDA_SUCCESS, 0x400 + self._streams

    def cuEventCreate(self, flags: Any) -> tuple[CUresult, int]:
        self.calls.append(("cuEventCreate", (flags,)))
        self._events += 1
        return CUresult.CUDA_SUCCESS, 0x500 + self._events

    def cuMemExportToShareableHandle(self, *args: Any) -> tuple[CUresult, int]:
        self.calls.append(("cuMemExportToShareableHandle", args))
        if "cuMemExportToShareableHandle" in self.failures:
            return self.failures["cuMemExportToShareableHandle"], -1
        return CUresult.CUDA_SUCCESS, os.open(os.devnull, os.O_RDONLY)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[CUresult, int]:
        self._host.append(ctypes.create_string_buffer(b"\xff" * nbytes, nbytes))
        return CUresult.CUDA_SUCCESS, ctypes.addressof(self._host[-1])

    def cuMemHostGetDevicePointer(self, host: int, flags: int) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, host

    def written(self, address: int) -> bytes:
        """What was last copied to an address of device memory."""
        return next(args[1] for args in reversed(self.named("cuMemcpyHtoDAsync")) if args[0] == address)

    def cuLaunchCooperativeKernel(self, *args: Any) -> tuple[CUresult]:
        return self.cuLaunchKernel(*args)

    def CUlaunchAttribute(self) -> Any:
        return SimpleNamespace(value=SimpleNamespace())

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: int, extra: int) -> tuple[CUresult]:
        self.calls.append(("cuLaunchKernelEx", (config, function, pointers, extra)))
        c = config
        grid, block = (c.gridDimX, c.gridDimY, c.gridDimZ), (c.blockDimX, c.blockDimY, c.blockDimZ)
        return self.cuLaunchKernel(function, *grid, *block, c.sharedMemBytes, c.hStream, pointers, extra)

    def cuLaunchKernel(self, *args: Any) -> tuple[CUresult]:
        self.calls.append(("cuLaunchKernel", args))
        self.launch_contexts.append(self.current)
        return (self.failures.get("cuLaunchKernel", CUresult.CUDA_SUCCESS),)

    def arguments(self, sizes: list[int], launch: int = -1) -> list[bytes]:
        """What the driver would copy from the launch's void*[], given each argument's size."""
        array = (ctypes.c_void_p * len(sizes)).from_address(self.named("cuLaunchKernel")[launch][9])
        return [ctypes.string_at(pointer, size) for pointer, size in zip(array, sizes, strict=True)]


class FakeTensor:
    """What the runtime asks of a torch tensor in CUDA memory."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, device: int = 0
    ) -> None:
        self.address, self.shape, self.strides, self.device = address, shape, strides, device
        self.dtype = f"torch.{dtype}"

    @property
    def is_cuda(self) -> bool:
        return self.device >= 0

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def get_device(self) -> int:
        return self.device


def fake_torch(stream: int) -> Any:
    """A torch module whose current stream on every GPU is ``stream`` plus the ordinal."""
    raw = SimpleNamespace(_cuda_getCurrentRawStream=lambda ordinal: stream + ordinal)
    return SimpleNamespace(Tensor=FakeTensor, _C=raw)
