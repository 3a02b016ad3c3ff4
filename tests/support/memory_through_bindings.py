"""What the stub libraries are asked for when a GPU's memory is shared: run by the tests in a process of its own."""

from __future__ import annotations

import os
import sys

import numpy as np

from tilewright.ir.abi import KernelABI, TensorParam
from tilewright.runtime.peers import Endpoint, SymmetricPlace


def main(kind: str) -> None:
    if kind == "cuda":
        from tilewright.runtime.cuda import CudaDevice as Device
        from tilewright.runtime.gpu_memory import CudaMemory as Memory
    else:
        from tilewright.runtime.hip import HipDevice as Device
        from tilewright.runtime.hip_memory import HipMemory as Memory
    from tilewright.runtime.arguments import TensorView, Viewed
    from tilewright.runtime.gpu_memory import DeviceArray

    device = Device(0)
    memory = Memory(device)
    size = memory.padded(5000)
    own = memory.create(size)
    descriptor = memory.export(own)
    theirs = memory.import_(descriptor)
    os.close(descriptor)
    address = memory.map(theirs, size, [0, 1])
    memory.release(theirs)
    memory.clear(address, size)
    memory.write(address, bytes(range(8)))
    print(DeviceArray(memory, address, (3,), "i32").numpy().tolist())
    for done in memory.start_copies(
        [[(address + 64, address, 8)], [(address + 128, address + 4, 4)]], 0x77, ordered=True
    ):
        memory.wait_event(0x77, done)
    print(DeviceArray(memory, address + 128, (1,), "i32").numpy().tolist())
    table = memory.place(b"12345678")
    words = memory.shared_words(16)
    print(
        table % 128, words.words.sum(), words.address == words.words.ctypes.data, memory.reaches(0), memory.reaches(1)
    )

    class Symmetric(Viewed):
        @property
        def view(self) -> TensorView:
            endpoint = Endpoint(1, 2, (0x100, 0x200), table, memory.place)
            return TensorView(address, (4,), (1,), "i32", None, SymmetricPlace(endpoint, (address, address), table))

    params = (TensorParam("x", "i32", (4,), (1,), 4, symmetric=True),)
    abi = KernelABI("k", params, 64, 0, persistent=True, communicates=True)
    device.launch(device.load(b"\x7fELF").function("k"), abi, 5, [Symmetric()])
    memory.unmap(address, size)
    memory.close()
    assert np.all(words.words == 0)
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
