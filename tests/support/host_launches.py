"""A CUDA device whose memory is the host's: the extension starts kernels there, and the interpreter runs them.

Kernels get a plain ABI of what their types say, with a tensor map wherever a matrix could have one; what the driver
would be handed is decoded again, so that a wrong address, number or map shows in the results or in `errors`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partialmethod
from typing import Any

import ml_dtypes
import numpy as np
import torch
from fake_driver import CONTEXT, FakeDriver

from tilewright.compiler import kernel as kernels
from tilewright.compiler import launch, recording
from tilewright.compiler.arrays import host_array
from tilewright.ir.abi import KernelABI, ScalarParam, TensorMapParam, TensorParam
from tilewright.ir.interpreter import run
from tilewright.ir.types import DType, ViewType
from tilewright.runtime import arguments, native
from tilewright.runtime.cuda import CudaDevice, CudaFunction
from tilewright.runtime.launching import stream_handle

_POINTER = ctypes.c_void_p
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, _POINTER, *[ctypes.c_uint] * 7, _POINTER, ctypes.POINTER(_POINTER), ctypes.POINTER(_POINTER)
)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", _POINTER),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


_EARLY = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Config), _POINTER, ctypes.POINTER(_POINTER), ctypes.POINTER(_POINTER)
)
_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int, _POINTER, ctypes.c_int, ctypes.c_uint, _POINTER, ctypes.POINTER(ctypes.c_uint64),
    *[_POINTER] * 3, *[ctypes.c_int] * 4,
)  # fmt: skip
_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_POINTER))
_NUMPY = {"f16": "f2", "f32": "f4", "f64": "f8", "i1": "?", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8"}
_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "f32": ctypes.c_float, "f64": ctypes.c_double}


def _artifact(kernel: Any, launches: HostLaunches, types: Any, target: str, options: Any) -> HostArtifact:
    return launches.artifact(kernel, types)


class _Numbers:
    """Constants of the driver, of which only that they are numbers matters."""

    def __getattr__(self, name: str) -> int:
        return 1


class HostLaunches:
    """``started``: (kernel, stream) of each start that the extension made; ``python``: kernels that Python launched.

    Every second kernel waits for the launch before it, and ``early`` has their starts again.
    """

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.early: list[tuple[str, int]] = []
        self.python: list[str] = []
        self.errors: list[BaseException] = []
        self.encoded = 0
        self.context = CONTEXT
        self.failing = False
        self._artifacts: list[HostArtifact] = []
        launches = _LAUNCH(self._launch), _EARLY(self._launch_early)
        self._callbacks = *launches, _ENCODE(self._encode), _CONTEXT(self._current)
        driver = FakeDriver()
        driver.CUtensorMapDataType = driver.CUtensorMapSwizzle = _Numbers()
        names = "cuLaunchKernel", "cuLaunchKernelEx", "cuTensorMapEncodeTiled", "cuCtxGetCurrent"
        addresses = [int(ctypes.cast(c, _POINTER).value or 0) for c in self._callbacks]
        driver.entry_points = dict(zip(names, addresses, strict=True))
        self.device = CudaDevice(0, driver)
        exchange = torch.Tensor.__dlpack_c_exchange_api__
        self.host = native.make_host(torch, exchange, torch._C._dynamo.guards._empty_strided_cpu, 1, *addresses)

    def install(self, monkeypatch: Any) -> None:
        """Launches on torch tensors go to this device, until `remove`."""
        kinds = launch.signature
        monkeypatch.setattr(launch, "signature", lambda *given: (id(self), *kinds(*given)))  # no plans from elsewhere
        read = arguments.read_torch
        monkeypatch.setattr(arguments, "read_torch", lambda x, name: read(x, name)._replace(device=0))
        monkeypatch.setattr(native, "host", lambda device: self.host if device is self.device else None)
        for module in (launch, recording):
            monkeypatch.setattr(module, "open_device", lambda name: self.device)
        monkeypatch.setattr(launch, "where", lambda tensors: "cuda:0")
        monkeypatch.setattr(kernels.Kernel, "artifact", partialmethod(_artifact, self))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda ordinal: 0, raising=False)

    def remove(self) -> None:
        """Tables go, which would call what is gone."""
        for artifact in self._artifacts:
            artifact.key[0].table = None

    def artifact(self, kernel: Any, types: Any) -> HostArtifact:
        key = kernel, [(name, type(kind), kind) for name, kind in sorted(types.items())]
        for made in self._artifacts:
            if made.key == key:
                return made
        self._artifacts.append(HostArtifact(self, key, types, len(self._artifacts) + 1))
        return self._artifacts[-1]

    def _current(self, out: Any) -> int:
        out[0] = self.context
        return 0

    def _encode(self, out: int, element: int, rank: int, address: int, dims: Any, *rest: Any) -> int:
        self.encoded += 1
        ctypes.cast(out, ctypes.POINTER(ctypes.c_uint64))[0] = address
        return 0

    def _launch(self, function: int, x: int, y: int, z: int, *rest: Any) -> int:
        *block, _, stream, pointers, _ = rest
        return self._run(function, (x, y, z), block, stream, pointers, False)

    def _launch_early(self, config: Any, function: int, pointers: Any, extra: Any) -> int:
        given = config[0]
        attributes = [(a.id, a.value[0]) for a in given.attributes[: given.count]]
        if attributes != [(6, 1)]:  # programmatic stream serialization, allowed
            self.errors.append(AssertionError(f"launched with the attributes {attributes}"))
        return self._run(function, tuple(given.grid), list(given.block), given.stream, pointers, True)

    def _run(self, function: int, grid: Any, block: list[int], stream: int | None, pointers: Any, early: bool) -> int:
        try:
            if self.failing:
                return 1
            artifact = self._artifacts[function - 1]
            assert block == [artifact.abi.threads, 1, 1] and early == artifact.abi.awaits_grid
            artifact.decoded(grid, pointers)
            self.started.append((artifact.name, stream or 0))
            if early:
                self.early.append(self.started[-1])
            return 0
        except BaseException as error:
            self.errors.append(error)
            return 1


class HostArtifact:
    """A kernel for some types, as much of a `tilewright.compiler.artifact.Artifact` as launches ask for."""

    def __init__(self, owner: HostLaunches, key: Any, types: Any, handle: int) -> None:
        self.owner, self.key, self.name = owner, key, key[0].__name__
        self.function = key[0].function(types)
        params: list[TensorParam | ScalarParam] = []
        maps = []
        for name in (p.name for p in key[0].definition.parameters):
            kind = types.get(name)
            if isinstance(kind, ViewType):
                params.append(TensorParam(name, kind.dtype.name, kind.shape, kind.strides, kind.align))
                if kind.strides == (None, 1) and kind.align == 16:
                    maps.append(TensorMapParam(name, (8, 16 // kind.dtype.bytes), (1, 0), 0))
            elif isinstance(kind, DType):
                params.append(ScalarParam(name, kind.name))
        self.abi = KernelABI(self.name, tuple(params), 128, 0, tuple(maps), awaits_grid=handle % 2 == 1)
        self.launcher = CudaFunction(owner.device, self.name, handle).make_launcher(self.abi)

    def launch(self, device: Any, grid: Any, args: Sequence[Any], stream: Any) -> None:
        self.owner.python.append(self.name)
        stream_handle(stream, torch, 0)
        pairs = list(zip(self.abi.params, args, strict=True))
        self.launcher.layout.pack_scalars([a for p, a in pairs if isinstance(p, ScalarParam)])
        run(self.function, {p.name: host_array(a) if hasattr(a, "shape") else a for p, a in pairs}, grid=grid)

    def form(self, device: Any, grid: Any, args: Sequence[Any]) -> Any:
        return self.launcher.form(grid, args)

    def prepare(self, device: Any, grid: Any, args: Sequence[Any]) -> None:
        return None

    def ready(self, device: Any, grid: Any, args: Sequence[Any]) -> Callable[[Any], None]:
        return lambda stream: self.launch(device, grid, args, stream)

    def decoded(self, grid: tuple[int, int, int], pointers: Any) -> None:
        """Run the kernel on what a driver would read through ``pointers``."""
        position = 0

        def read(kind: Any) -> Any:
            nonlocal position
            position += 1
            return ctypes.cast(pointers[position - 1], ctypes.POINTER(kind))[0]

        values: dict[str, Any] = {}
        for param in self.abi.params:
            if isinstance(param, ScalarParam):
                values[param.name] = read(_C_TYPES[param.dtype])
                continue
            address = read(ctypes.c_uint64)
            shape = [read(ctypes.c_int32) if n is None else n for n in param.shape]
            strides = [read(ctypes.c_int64) if n is None else n for n in param.strides]
            values[param.name] = _array(address, shape, strides, param.dtype)
        assert (read(ctypes.c_int32), read(ctypes.c_int32), read(ctypes.c_int32)) == grid
        for map_param in self.abi.tensor_maps:
            assert read(ctypes.c_uint64) == values[map_param.param].ctypes.data, "a map of another address"
        run(self.function, values, grid=grid)


def _array(address: int, shape: list[int], strides: list[int], dtype: str) -> np.ndarray[Any, Any]:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bf16" else _NUMPY[dtype])
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (extent * kind.itemsize)).from_address(address)
    flat: np.ndarray[Any, Any] = np.frombuffer(memory, kind)
    return np.lib.stride_tricks.as_strided(flat, shape, [s * kind.itemsize for s in strides])


__all__ = ["HostArtifact", "HostLaunches"]
