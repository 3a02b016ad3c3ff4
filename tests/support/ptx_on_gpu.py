"""Run the PTX of the emulator's tests on a real GPU as well, with the interface of `ptx_snippets.launch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.backends.nvidia import ptxas
from tilewright.runtime.cuda import CudaDevice


class PtxOnGpu:
    """Assembles with ptxas, launches through the driver, waits, and copies every array back."""

    def __init__(self, ordinal: int = 0) -> None:
        self.device = CudaDevice(ordinal)
        self._modules: dict[str, Any] = {}

    def launch(
        self,
        ptx: str,
        arrays: Sequence[np.ndarray],
        threads: int = 32,
        blocks: Sequence[int] = (1,),
        extra: bytes = b"",
        shared_bytes: int = 0,
    ) -> list[np.ndarray]:
        """The contents of the arrays after entry k ran."""
        device = self.device
        with device.current():
            addresses = [int(device.call("cuMemAlloc", max(array.nbytes, 16))) for array in arrays]
            try:
                for address, array in zip(addresses, arrays, strict=True):
                    data = np.ascontiguousarray(array)
                    device.call("cuMemcpyHtoD", address, data.ctypes.data, data.nbytes)
                packed = np.array(addresses, np.uint64).tobytes()
                packed += bytes(-len(packed) % 64 if extra else 0) + extra
                self._start(self._function(ptx, shared_bytes), packed, threads, blocks, shared_bytes)
                device.call("cuCtxSynchronize", doing="Running a snippet")
                results = []
                for address, array in zip(addresses, arrays, strict=True):
                    out = np.empty_like(np.ascontiguousarray(array))
                    device.call("cuMemcpyDtoH", out.ctypes.data, address, out.nbytes)
                    results.append(out)
                return results
            finally:
                for address in addresses:
                    device.call("cuMemFree", address)

    def _function(self, ptx: str, shared_bytes: int) -> Any:
        if ptx not in self._modules:
            binary = ptxas.assemble(ptx, "sm_90a", level=1).cubin
            self._modules[ptx] = self.device.load(binary).function("k")
        function = self._modules[ptx]
        function.allow_shared(shared_bytes)
        return function

    def _start(self, function: Any, packed: bytes, threads: int, blocks: Sequence[int], shared_bytes: int) -> None:
        """cuLaunchKernel with the parameters as one buffer."""
        import ctypes

        buffer, size = ctypes.create_string_buffer(packed, len(packed)), ctypes.c_size_t(len(packed))
        # CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE, _END
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        grid = [*blocks, 1, 1][:3]
        self.device.call(
            "cuLaunchKernel", function.handle, *grid, threads, 1, 1, shared_bytes, 0, 0, ctypes.addressof(extra)
        )
