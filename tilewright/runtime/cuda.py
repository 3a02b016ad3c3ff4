"""NVIDIA GPUs through the CUDA driver API (the ``cuda-bindings`` package, imported on first use).

The device's primary context is used, which is torch's as well, so both see each other's memory
and streams. A launch that repeats earlier arguments reuses their packed block and costs about as
much as reading the arguments and calling the driver.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tilewright.ir.abi import KernelABI, ScalarParam, TensorMapParam, TensorParam
from tilewright.runtime.arguments import DevicePointer, TensorView
from tilewright.runtime.device import DeviceInfo, nvidia_target
from tilewright.runtime.driver_module import DriverDevice, DriverFunction, DriverModule, check_status
from tilewright.runtime.errors import ArgumentError, DeviceError
from tilewright.runtime.launching import Launcher, LaunchForm, ReadyLaunch, stream_handle
from tilewright.runtime.tensor_maps import TensorMapEncoder, tensor_map_geometry

__all__ = ["CudaDevice", "CudaFunction", "CudaLauncher", "CudaModule", "DevicePointer", "enumerate_devices"]

#: dynamic shared memory that a kernel may have without asking, in bytes
_DEFAULT_SHARED_BYTES = 48 * 1024
_MAX_GRID_YZ = 65535
#: grids and streams of one function for which the driver's structure is kept
_KEPT_CONFIGS = 64

_ADVICE = {
    "CUDA_ERROR_NO_DEVICE": "No NVIDIA GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES.",
    "CUDA_ERROR_INVALID_DEVICE": "There is no GPU of that number: look at nvidia-smi and CUDA_VISIBLE_DEVICES.",
    "CUDA_ERROR_STUB_LIBRARY": "The toolkit's stub libcuda was loaded: take its folder out of LD_LIBRARY_PATH.",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "Kernel module and libcuda differ in version: reboot or reinstall the driver.",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "The forward-compatibility driver does not support this GPU.",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "Another process holds the GPU exclusively.",
    "CUDA_ERROR_OUT_OF_MEMORY": "The GPU's memory is full: free tensors, or call torch.cuda.empty_cache().",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "The binary is for another architecture: compile it for this device's target.",
    "CUDA_ERROR_INVALID_IMAGE": "The bytes are no cubin: was a text or another vendor's binary passed?",
    "CUDA_ERROR_INVALID_PTX": "The driver's assembler refused the PTX: assemble it with ptxas to see why.",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "The driver is older than the toolkit that made this: update the driver.",
    "CUDA_ERROR_NOT_FOUND": "The binary has no symbol of that name.",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "The block needs more registers or threads than an SM has: "
    "use fewer warps or smaller tiles.",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "A kernel touched memory outside its tensors, perhaps one launched earlier; the "
    "context is lost. Restart the process and run under compute-sanitizer.",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "A kernel made a misaligned access, perhaps one launched earlier; the context is "
    "lost. Restart the process and run under compute-sanitizer.",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": "A kernel ran an invalid instruction or gave one invalid operands, such as a bad "
    "descriptor; the context is lost. Restart the process and run under compute-sanitizer.",
    "CUDA_ERROR_LAUNCH_FAILED": "A kernel failed on the device, perhaps one launched earlier; the context is lost. "
    "Restart the process and run under compute-sanitizer.",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "The display watchdog stopped the kernel: use a GPU without a display.",
    "CUDA_ERROR_NOT_INITIALIZED": "A process forked after its parent used CUDA cannot use it: start it with 'spawn'.",
    "CUDA_ERROR_INVALID_VALUE": "The driver refused an argument of the call.",
}


def load_driver() -> Any:
    """The ``cuda.bindings.driver`` module, initialised; `DeviceError` where there is no driver."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(
            f"The CUDA bindings cannot be imported ({error}): install them with `pip install 'tilewright[cuda]'`."
        ) from error
    initialize(driver)
    return driver


def initialize(driver: Any) -> None:
    """cuInit, with its several ways of failing turned into a `DeviceError`."""
    try:
        (status,) = driver.cuInit(0)
    except (RuntimeError, ImportError, OSError) as error:  # no libcuda, or one without cuInit
        raise DeviceError(
            f"No NVIDIA driver (libcuda.so.1) on this machine: install the NVIDIA driver, or launch on the cpu "
            f"device or an emulated one ({type(error).__name__}: {error})."
        ) from error
    _check(status, "cuInit")


def _check(status: Any, doing: str) -> None:
    check_status(status, doing, _ADVICE)


def _attribute(driver: Any, name: str, device: Any) -> int:
    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    status, value = driver.cuDeviceGetAttribute(attribute, device)
    _check(status, f"cuDeviceGetAttribute({name})")
    return int(value)


def enumerate_devices(driver: Any = None) -> list[DeviceInfo]:
    """Every visible NVIDIA GPU; `DeviceError` where there is no driver. Creates no context."""
    driver = load_driver() if driver is None else driver
    status, count = driver.cuDeviceGetCount()
    _check(status, "cuDeviceGetCount")
    return [_describe(driver, ordinal) for ordinal in range(count)]


def _describe(driver: Any, ordinal: int) -> DeviceInfo:
    status, device = driver.cuDeviceGet(ordinal)
    _check(status, f"Opening cuda:{ordinal}")
    status, name = driver.cuDeviceGetName(256, device)
    _check(status, "cuDeviceGetName")
    status, memory = driver.cuDeviceTotalMem(device)
    _check(status, "cuDeviceTotalMem")
    capability = [_attribute(driver, f"COMPUTE_CAPABILITY_{part}", device) for part in ("MAJOR", "MINOR")]
    return DeviceInfo(
        name=f"cuda:{ordinal}",
        target=nvidia_target(*capability),
        description=bytes(name).rstrip(b"\0").decode(),
        units=_attribute(driver, "MULTIPROCESSOR_COUNT", device),
        memory=int(memory),
    )


class CudaDevice(DriverDevice):
    """One NVIDIA GPU, by its ordinal among the visible ones.

    ``driver`` is a stand-in for ``cuda.bindings.driver`` (tests).
    """

    advice = _ADVICE

    def __init__(self, ordinal: int = 0, driver: Any = None) -> None:
        driver = load_driver() if driver is None else driver
        infos = enumerate_devices(driver)
        if not 0 <= ordinal < len(infos):
            raise DeviceError(
                f"cuda:{ordinal} does not exist: {len(infos)} NVIDIA GPUs are visible. Look at nvidia-smi and "
                "CUDA_VISIBLE_DEVICES.",
                "CUDA_ERROR_INVALID_DEVICE",
            )
        super().__init__(driver, ordinal, infos[ordinal])
        device = self.call("cuDeviceGet", ordinal)
        self.multiprocessors = self.info.units
        self.max_shared_bytes = _attribute(self._driver, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", device)
        self.l2_bytes = _attribute(self._driver, "L2_CACHE_SIZE", device)
        # The primary context is the one that torch and the CUDA runtime use. It is never released:
        # its functions and tensor maps live as long as the process.
        self._context = self.call("cuDevicePrimaryCtxRetain", device)
        self._context_handle = int(self._context)
        self._spare_address = 0
        self._lock = threading.Lock()
        self.tensor_maps = TensorMapEncoder(self._driver, self.call, self._spare_cell)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this device's context the calling thread's, and restore the one it had.

        A thread without any keeps ours, as with the CUDA runtime.
        """
        found = int(self.call("cuCtxGetCurrent"))
        if found == self._context_handle:
            yield
        elif not found:
            self.call("cuCtxSetCurrent", self._context)
            yield
        else:
            self.call("cuCtxPushCurrent", self._context)
            try:
                yield
            finally:
                self.call("cuCtxPopCurrent")

    def load(self, binary: bytes, asm: Mapping[str, str] | None = None) -> CudaModule:
        """Load a cubin. Functions found in it stay valid."""
        with self.current():
            doing = f"Loading a {len(binary)}-byte binary on {self.name} ({self.target})"
            return CudaModule(self, self.call("cuModuleLoadData", binary, doing=doing))

    def blocks_per_unit(self, function: CudaFunction, threads: int, shared_bytes: int) -> int:
        """How many blocks of ``threads`` with that dynamic shared memory fit on one SM at once."""
        function.allow_shared(shared_bytes)
        with self.current():
            return int(self.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function.handle, threads, shared_bytes))

    def prepare(
        self, function: CudaFunction, abi: KernelABI, grid: int | Sequence[int], args: Sequence[Any]
    ) -> Callable[[Any], None] | None:
        """See `Device.prepare`; offered where all tensors are torch's."""
        return function.launcher(abi).prepared(grid, args)

    def form(
        self, function: CudaFunction, abi: KernelABI, grid: int | Sequence[int], args: Sequence[Any]
    ) -> LaunchForm | None:
        """See `Device.form`; offered where all tensors are torch's and none is empty."""
        return function.launcher(abi).form(grid, args)

    @property
    def context(self) -> int:
        """The driver's handle of the device's context."""
        return self._context_handle

    def entry_point(self, name: str) -> int:
        """The address of a driver's function, for callers that are no Python."""
        found = getattr(self._driver, "entry_points", None)  # of a stand-in
        if found is not None:
            return int(found[name])
        return int(ctypes.cast(getattr(ctypes.CDLL("libcuda.so.1"), name), ctypes.c_void_p).value or 0)

    def synchronize(self) -> None:
        with self.current():
            self.call("cuCtxSynchronize", doing=f"Waiting for {self.name}")

    def _spare_cell(self) -> int:
        """Address of 16 zeroed bytes that stand in for empty tensors in tensor maps."""
        with self._lock, self.current():
            if not self._spare_address:
                address = self.call("cuMemAlloc", 16)
                self.call("cuMemsetD8", address, 0, 16)
                self._spare_address = int(address)
        return self._spare_address


class CudaFunction(DriverFunction[CudaDevice, "CudaLauncher"]):
    """A kernel of a loaded module. ``handle`` is the driver's CUfunction."""

    def __init__(self, device: CudaDevice, name: str, handle: Any) -> None:
        super().__init__(device, name, handle)
        self._allowed_shared = _DEFAULT_SHARED_BYTES

    def allow_shared(self, size: int) -> None:
        """Permit launches with ``size`` bytes of dynamic shared memory."""
        if size <= self._allowed_shared:
            return
        if size > self.device.max_shared_bytes:
            raise DeviceError(
                f"Kernel '{self.name}' needs {size} bytes of shared memory; a block on {self.device.name} "
                f"({self.device.target}) has at most {self.device.max_shared_bytes}. Use smaller tiles or fewer stages."
            )
        attribute = self.device._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self.device.current():
            self.device.call("cuFuncSetAttribute", self.handle, attribute, size)
        self._allowed_shared = size

    def make_launcher(self, abi: KernelABI) -> CudaLauncher:
        return CudaLauncher(self, abi)


class CudaModule(DriverModule[CudaDevice, CudaFunction]):
    """A loaded cubin."""

    find_call, function_class = "cuModuleGetFunction", CudaFunction


class CudaLauncher(Launcher):
    """Launches one function with one ABI through cuLaunchKernel, or cuLaunchKernelEx where it may begin early."""

    device: CudaDevice

    def __init__(self, function: CudaFunction, abi: KernelABI) -> None:
        function.allow_shared(abi.shared_bytes)
        super().__init__(function.device, function.device.ordinal, abi)
        self.function = function
        # blocks that wait for other GPUs' must all be resident, or those that others wait for may never start
        cooperative = abi.communicates and abi.persistent
        driver = self.device._driver
        self._cu_launch_kernel = driver.cuLaunchCooperativeKernel if cooperative else driver.cuLaunchKernel
        self._cu_launch_early = driver.cuLaunchKernelEx
        self._extra = () if cooperative else (0,)
        self._call = self._launch_early if abi.awaits_grid else self._launch_behind
        #: CUlaunchConfig by grid and stream, which nobody changes: several threads may launch at once
        self._configs: dict[tuple[tuple[int, int, int], int], Any] = {}
        if abi.communicates:  # else the driver may load it at its first launch, behind a kernel that waits for it
            with self.device.current():
                self.device.call("cuFuncLoad", function.handle)
        self._get_current = self.device._driver.cuCtxGetCurrent

    def units(self) -> int:
        return self.device.multiprocessors

    def resident_clusters(self) -> int:
        """The driver knows how many clusters find multiprocessors that lie together."""
        if self.abi.cluster_blocks == 1:
            return super().resident_clusters()
        config = self.device._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self.abi.cluster_blocks * self.units(), 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.abi.threads, 1, 1
        config.sharedMemBytes = self.abi.shared_bytes
        with self.device.current():
            doing = f"Counting the clusters of '{self.abi.name}' on {self.device.name}"
            clusters = self.device.call("cuOccupancyMaxActiveClusters", self.function.handle, config, doing=doing)
        if clusters < 1:
            raise DeviceError(f"A cluster of {self.abi.cluster_blocks} blocks of '{self.abi.name}' does not fit.")
        return int(clusters)

    def check_grid(self, counts: tuple[int, int, int]) -> None:
        if max(counts[1:]) > _MAX_GRID_YZ:
            raise ArgumentError(
                f"The grid of {self.abi.name}, {counts}, exceeds {_MAX_GRID_YZ} in its second or third dimension, "
                "which is CUDA's limit: put the large dimension first."
            )

    def tensor_map(self, param: TensorMapParam, view: TensorView) -> bytes:
        with self.device.current():  # a thread's first call may be this one: autograd has threads of its own
            return self.device.tensor_maps.encode(param, view)

    def start(self, ready: ReadyLaunch, stream: int) -> None:
        status, context = self._get_current()
        if not status and int(context) == self.device._context_handle:
            self._launch(ready, stream)
            return
        with self.device.current():
            self._launch(ready, stream)

    def prepared(self, grid: int | Sequence[int], args: Sequence[Any]) -> Callable[[Any], None] | None:
        """The launch as a function of the stream (None: torch's current one), with nothing left to look up."""
        ready, torch = self.ready(grid, args), sys.modules.get("torch")
        raw_stream = getattr(getattr(torch, "_C", None), "_cuda_getCurrentRawStream", None)
        if ready is None or torch is None or raw_stream is None:
            return None
        if ready.arguments is None:
            return lambda stream: None
        call, ordinal, blocks = self._call, self.ordinal, ready.blocks
        pointers, device_of_thread = ready.arguments.pointers, torch._C._cuda_getDevice

        def start(stream: Any) -> None:
            where = raw_stream(ordinal) if stream is None else stream_handle(stream, torch, ordinal)
            if device_of_thread() == ordinal:
                (status,) = call(blocks, where, pointers)
                if not status:
                    return
            self.start(ready, where)  # another device or no context is current in this thread; or it reports the error

        return start

    def form(self, grid: int | Sequence[int], args: Sequence[Any]) -> LaunchForm | None:
        """The launch as data; None for those that depend on more than addresses and numbers."""
        ready = None if self.abi.communicates else self.ready(grid, args)
        if ready is None or ready.arguments is None:
            return None
        params = self.abi.params
        pairs = [(p, arg) for p, arg in zip(params, args, strict=True) if isinstance(p, TensorParam)]
        views = {p.name: self.device.view(arg, p.name) for p, arg in pairs}
        if any(0 in view.shape for view in views.values()):
            return None
        number = {param.name: i for i, param in enumerate(params)}
        maps = []
        for param, offset in zip(self.abi.tensor_maps, self.layout.map_starts, strict=True):
            view = views[param.param]
            geometry = tensor_map_geometry(param, view)
            element, swizzle = map(int, self.device.tensor_maps.kinds(param, view))
            maps.append((offset, number[param.param], element, geometry.dims, geometry.strides, geometry.box, swizzle))
        placed = list(zip(self.layout.starts, range(len(params)), params, strict=True))
        return LaunchForm(
            self.device,
            int(self.function.handle),
            ready.blocks,
            self.abi.threads,
            self.abi.shared_bytes,
            self.abi.awaits_grid,
            ready.arguments.image(self.layout.size),
            self.layout.offsets,
            tuple((offset, i) for offset, i, p in placed if isinstance(p, TensorParam)),
            tuple((offset, i, p.dtype) for offset, i, p in placed if isinstance(p, ScalarParam)),
            tuple(maps),
        )

    def _launch(self, ready: ReadyLaunch, stream: int) -> None:
        assert ready.arguments is not None
        (status,) = self._call(ready.blocks, stream, ready.arguments.pointers)
        if status:
            x, y, z = ready.blocks
            self.device.fail(
                status,
                f"Launching '{self.abi.name}' on {self.device.name} with {x}x{y}x{z} blocks of {self.abi.threads} "
                f"threads and {self.abi.shared_bytes} bytes of shared memory",
            )

    def _launch_behind(self, blocks: tuple[int, int, int], stream: int, pointers: int) -> Any:
        """Start behind what is in the stream."""
        abi = self.abi
        return self._cu_launch_kernel(
            self.function.handle, *blocks, abi.threads, 1, 1, abi.shared_bytes, stream, pointers, *self._extra
        )

    def _launch_early(self, blocks: tuple[int, int, int], stream: int, pointers: int) -> Any:
        """Start as soon as the kernel before lets others begin; this one waits itself for its end."""
        config = self._configs.get((blocks, stream)) or self._config(blocks, stream)
        return self._cu_launch_early(config, self.function.handle, pointers, 0)

    def _config(self, blocks: tuple[int, int, int], stream: int) -> Any:
        """What cuLaunchKernelEx takes for a grid and a stream, kept for the next launch."""
        driver = self.device._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks
        config.blockDimX, config.blockDimY, config.blockDimZ = self.abi.threads, 1, 1
        config.sharedMemBytes, config.hStream = self.abi.shared_bytes, stream
        config.attrs, config.numAttrs = [attribute], 1
        if len(self._configs) >= _KEPT_CONFIGS:
            self._configs.clear()
        self._configs[blocks, stream] = config
        return config

    def wait_for(self, stream: int) -> None:
        with self.device.current():
            self.device.call("cuStreamSynchronize", stream)
