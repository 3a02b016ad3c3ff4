"""Symmetric memory of GPUs against a stand-in for the driver, and processes that meet at a socket: no GPU."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_driver import CUresult, FakeDriver

import tilewright as tw
from tilewright.ir.abi import CONTROL_WORDS, Control, Fault, KernelABI, TensorMapParam, TensorParam, kernel_number
from tilewright.runtime import rendezvous
from tilewright.runtime.cuda import CudaDevice
from tilewright.runtime.errors import DeviceError
from tilewright.runtime.gpu_memory import CudaMemory, DeviceArray
from tilewright.runtime.rendezvous import Rendezvous, new_address
from tilewright.runtime.symmetric import SymmetricHeap
from tilewright.runtime.symmetric_connect import ConnectedMemory
from tilewright.runtime.symmetric_local import LocalMemory
from tilewright.runtime.symmetric_torch import TorchMemory, current_gpu

MIB = 2**20


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


def local(driver: FakeDriver, timeout: float = 30.0) -> SymmetricHeap:
    return SymmetricHeap(LocalMemory([CudaMemory(CudaDevice(n, driver)) for n in range(2)]), timeout)


SCALE = KernelABI(
    "scale",
    (TensorParam("x", "f32", (None, 4), (4, 1), 16, symmetric=True), TensorParam("y", "f32", (None,), (1,), 4)),
    128,
    0,
    tensor_maps=(TensorMapParam("x", (8, 4), (1, 0), 0, peers=True),),
    persistent=True,
    communicates=True,
    source="scale.py",
)


# --- one process with several GPUs ------------------------------------------------------------------


def test_every_gpu_of_a_process_gets_access(driver: FakeDriver) -> None:
    heap = local(driver)
    x = heap.empty((1024, 1024), "f32")
    assert x.addresses[1] - x.addresses[0] == 4 * MIB and x[0].shape == (1024, 1024)
    created = driver.named("cuMemCreate")
    assert [(size, prop.location.id) for size, prop, _ in created] == [
        (2 * MIB, 0),
        (2 * MIB, 1),
        (4 * MIB, 0),
        (4 * MIB, 1),
    ]
    accesses = [[(a.location.id, a.flags) for a in args[2]] for args in driver.named("cuMemSetAccess")]
    assert accesses == [[(n, "CU_MEM_ACCESS_FLAGS_PROT_READWRITE") for n in range(2)]] * 4
    heap.close()
    assert len(driver.named("cuMemUnmap")) == len(driver.named("cuMemAddressFree")) == 4


def test_control_blocks_say_where_faults_go_and_when_to_give_up(driver: FakeDriver) -> None:
    heap = local(driver, timeout=2.5)
    for rank in range(2):
        words = np.frombuffer(driver.written(heap.control.addresses[rank]), np.int32)
        assert words.size == CONTROL_WORDS and words[Control.TIMEOUT] == 2500 and words[Control.EPOCH] == 0
        address = int(words[Control.FAULT : Control.FAULT + 2].view(np.uint64)[0])
        assert address == heap.faults[rank].words.ctypes.data


def test_a_launch_passes_tables_ranks_and_maps_of_all_ranks(driver: FakeDriver) -> None:
    heap = local(driver)
    x = heap.zeros((16, 4), "f32")
    device = CudaDevice(1, driver)
    function = device.load(b"\x7fELF").function("scale")
    y = DeviceArray(heap.memory.gpus[1], 0x5000, (7,), "f32")
    for _ in range(2):
        device.launch(function, SCALE, 1000, [x.on(1), y])
    assert len(driver.named("cuTensorMapEncodeTiled")) == 2, "a map for each rank, made once"
    assert [args[2] for args in driver.named("cuTensorMapEncodeTiled")] == list(x.addresses)
    found = driver.arguments([8, 4, 8, 8, 4, 4, 4, 4, 4, 4, 8, 8, 8])
    pointer, rows, table, y_pointer, extent, gx, gy, gz, rank, world, control, controls, maps = found
    endpoint = heap.endpoints[1]
    assert (pointer, y_pointer) == (struct.pack("<Q", x.addresses[1]), struct.pack("<Q", 0x5000))
    numbers = [struct.unpack("<i", value)[0] for value in (rows, extent, gx, gy, gz, rank, world)]
    assert numbers == [16, 7, 1000, 1, 1, 1, 2]
    assert (control, controls) == (struct.pack("<Q", endpoint.control), struct.pack("<Q", endpoint.controls_table))
    assert driver.written(struct.unpack("<Q", table)[0]) == struct.pack("<2q", *x.addresses)
    assert driver.written(endpoint.controls_table) == struct.pack("<2q", *heap.control.addresses)
    assert driver.written(struct.unpack("<Q", maps)[0]) == bytes([1]) * 128 + bytes([2]) * 128
    assert struct.unpack("<Q", maps)[0] % 128 == 0
    launched = driver.named("cuLaunchKernel")
    assert [len(args) for args in launched] == [10, 10] and launched[0][1] == 132, "cooperative: all blocks resident"
    assert driver.named("cuFuncLoad") == [(0x200,)]


def test_copies_run_beside_each_other(driver: FakeDriver) -> None:
    heap = local(driver)
    y = heap.empty((2, 512), "f32")
    x = DeviceArray(heap.memory.gpus[0], 0x10000, (2, 512), "f32")
    for _ in range(2):
        driver.calls.clear()
        heap.push([x, x], y, stream=[0x71, 0x72])
        copies, (first, second) = driver.named("cuMemcpyAsync"), y.addresses
        moved = [(first, 0x10000), (second + 2048, 0x10800), (second, 0x10800), (first + 2048, 0x10000)]
        sides = [args[3] for args in copies[:2]]
        assert [args[:3] for args in copies] == [(*pair, 2048) for pair in moved] and len(set(sides)) == 2
        assert [args[3] for args in copies[2:]] == [0x71, 0x72], "one copy in the stream itself"
        order = [(name, args[0] if name == "cuStreamWaitEvent" else args[-1]) for name, args in driver.calls]
        queued = [step for step in order if step[0] in ("cuEventRecord", "cuStreamWaitEvent", "cuMemcpyAsync")]
        side = [[("cuStreamWaitEvent", n), ("cuMemcpyAsync", n), ("cuEventRecord", n)] for n in sides]
        assert queued[:8] == [("cuEventRecord", 0x71), *side[0], ("cuEventRecord", 0x72), *side[1]]
        assert queued[-2:] == [("cuStreamWaitEvent", n) for n in (0x71, 0x72)], "the streams wait for all"
    assert not driver.named("cuStreamCreate"), "streams are made once"


def test_fetched_parts_come_one_after_the_other(driver: FakeDriver) -> None:
    heap = local(driver)
    x = heap.empty((2, 4, 128), "f32")
    driver.calls.clear()
    copies = heap.pull(lambda rank: [(x, 1 - rank, (0, 1)), (x, 1 - rank, (1,))], stream=[0x71, 0x72])
    first, second = x.addresses
    moved = [(first + 512, second + 512, 512), (first + 2048, second + 2048, 2048)]
    moved += [(target, source, nbytes) for source, target, nbytes in moved]
    assert [args[:3] for args in driver.named("cuMemcpyAsync")] == moved
    sides = [args[3] for args in driver.named("cuMemcpyAsync")]
    assert sides == [side for side in copies.streams for _ in range(2)] and len(set(sides)) == 2
    driver.calls.clear()
    copies.join(1)
    copies.join()
    assert [args[0] for args in driver.named("cuStreamWaitEvent")] == [0x71, 0x72] * 2, "the last of them is enough"
    driver.calls.clear()
    copies.rejoin()
    ends, waits = driver.named("cuEventRecord"), driver.named("cuStreamWaitEvent")
    assert [args[1] for args in ends] == copies.streams and [args[0] for args in waits] == [0x71, 0x72]
    assert [args[0] for args in ends] == [args[1] for args in waits]


def test_streams_wait_for_each_of_many_copies(driver: FakeDriver) -> None:
    """Events are used again, by copies that come later in the same stream."""
    heap = local(driver)
    x = heap.empty((100, 4), "f32")
    parts = [(x, 1, (n,)) for n in range(100)]
    for copies in [heap.pull(lambda rank: parts[:80] if rank == 0 else [], [0x71, 0x72], ordered=False) for _ in "ab"]:
        copies.join()
    given: dict[int, int] = {}  # stream -> copies so far
    standing: dict[int, tuple[int, int]] = {}  # event -> (stream, copies that it stands for)
    waited: dict[int, int] = {}
    for name, args in driver.calls:
        if name == "cuMemcpyAsync":
            given[args[3]] = given.get(args[3], 0) + 1
        elif name == "cuEventRecord":
            standing[args[0]] = args[1], given.get(args[1], 0)
        elif name == "cuStreamWaitEvent" and args[0] == 0x71:
            stream, count = standing[args[1]]
            waited[stream] = max(count, waited.get(stream, 0))
    assert sum(given.values()) == 160 and waited == given
    heap.close()
    for kind in ("Stream", "Event"):
        assert len(driver.named(f"cu{kind}Create")) == len(driver.named(f"cu{kind}Destroy")) > 1


def test_memory_that_a_gpu_cannot_reach_is_given_back(driver: FakeDriver) -> None:
    heap = local(driver)
    driver.failures["cuMemSetAccess"] = CUresult.CUDA_ERROR_INVALID_VALUE
    driver.calls.clear()
    with pytest.raises(DeviceError, match="access to memory of another GPU"):
        heap.empty(4, "f32")
    for done, undone in (("Map", "Unmap"), ("AddressReserve", "AddressFree"), ("Create", "Release")):
        assert len(driver.named(f"cuMem{done}")) == len(driver.named(f"cuMem{undone}")) == 1


def test_memory_is_written_beside_a_capture(driver: FakeDriver) -> None:
    local(driver).zeros(4, "f32")
    names = [name for name, _ in driver.calls]
    modes = [args for name, args in driver.calls if name == "cuThreadExchangeStreamCaptureMode"]
    assert modes[0] == ("CU_STREAM_CAPTURE_MODE_RELAXED",) and modes[1] == ("the mode before",)
    for name in ("cuMemAlloc", "cuMemcpyHtoDAsync", "cuMemsetD8Async"):
        inside = [names[:i].count("cuThreadExchangeStreamCaptureMode") % 2 for i, n in enumerate(names) if n == name]
        assert inside and all(inside)


def test_a_failed_call_says_what_the_kernel_waited_for(driver: FakeDriver) -> None:
    heap = local(driver, timeout=2)
    x = heap.zeros((16, 4), "f32")
    device = heap.memory.gpus[1].device
    function = device.load(b"\x7fELF").function("scale")
    y = DeviceArray(heap.memory.gpus[1], 0x5000, (7,), "f32")
    device.launch(function, SCALE, 1, [x.on(1), y])
    driver.failures["cuCtxSynchronize"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DeviceError, match="driver refused"):
        heap.synchronize()
    words = heap.faults[1].words
    for place, value in [
        (Fault.LINE, 31), (Fault.FLAG, 12), (Fault.PEER, 0), (Fault.RANK, 1), (Fault.KERNEL, kernel_number("scale")),
        (Fault.PARAM, 0), (Fault.KIND, 1),
    ]:  # fmt: skip
        words[place] = value
    said = r"^rank 1 waited 2 s in kernel scale at scale.py:31 for flag 12 of 'x' \(never signalled by rank 0\)\. "
    for fails in (heap.synchronize, heap.check, device.synchronize, lambda: device.call("cuCtxSynchronize")):
        with pytest.raises(DeviceError, match=said):
            fails()
    for flag, wanted in ((Fault.ENTRY, "for rank 0 to start the launch"), (Fault.EXIT, "for rank 0 to end the launch")):
        words[Fault.FLAG] = flag
        with pytest.raises(DeviceError, match=wanted):
            heap.check()
    heap.close()
    with pytest.raises(DeviceError, match="driver refused"):
        device.synchronize()


def test_gpus_without_peer_access_are_refused(driver: FakeDriver) -> None:
    driver.values["cuDeviceCanAccessPeer"] = 0
    with pytest.raises(DeviceError, match="cuda:0 cannot access the memory of cuda:1"):
        local(driver)
    with pytest.raises(DeviceError, match="GPU of its own, not cuda:0, cuda:0"):
        LocalMemory([CudaMemory(CudaDevice(0, driver))] * 2)


# --- processes that meet ----------------------------------------------------------------------------


def ranks(count: int, body: Callable[[int], Any]) -> list[Any]:
    """What ``body`` gave or raised for each rank, run side by side."""
    results: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except DeviceError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ranks_exchange_values_and_descriptors(count: int, tmp_path: Path) -> None:
    address = new_address()

    def body(rank: int) -> Any:
        meeting = Rendezvous(rank, count, address, timeout=10)
        meeting.barrier()
        (tmp_path / str(rank)).write_text(f"from {rank}")
        descriptor = os.open(tmp_path / str(rank), os.O_RDONLY)
        values, received = meeting.gather_descriptors(["value", rank], descriptor)
        os.close(descriptor)
        texts = {}
        for other, one in enumerate(received):
            if one is not None:
                texts[other] = os.pread(one, 100, 0).decode()
                os.close(one)
        meeting.close()
        return values, texts

    for rank, (values, texts) in enumerate(ranks(count, body)):
        assert values == [["value", other] for other in range(count)]
        assert texts == {other: f"from {other}" for other in range(count) if other != rank}


def test_a_rank_that_is_missing_or_gone() -> None:
    def missing(rank: int) -> Any:
        return Rendezvous(rank, 3, address, timeout=0.3)

    address = new_address()
    with pytest.raises(DeviceError, match="Rank 1, 2 did not come"):
        missing(0)
    with pytest.raises(DeviceError, match="Rank 2 found nobody"):
        missing(2)

    def gone(rank: int) -> Any:
        meeting = Rendezvous(rank, 3, other, timeout=10)
        meeting.barrier()
        if rank == 1:
            meeting.close()
            return None
        return meeting.gather(rank)

    other = new_address()
    first, _, last = ranks(3, gone)
    assert "rank 1 has ended" in str(first) and "rank 1 has ended" in str(last)


def test_descriptors_that_a_process_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair()
    with left, right:
        rendezvous._send(left, None, [left.fileno(), right.fileno()])
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(rendezvous, "_MOST_DESCRIPTORS", 1)  # as a full table of the process does
        with pytest.raises(DeviceError, match="do not fit into this process"):
            rendezvous._receive(right, "rank 0")
        assert len(os.listdir("/proc/self/fd")) == before


def test_ranks_that_disagree_on_who_they_are() -> None:
    same, size = new_address(), new_address()
    found = ranks(2, lambda rank: Rendezvous(min(rank, 1), 2 + rank, size, timeout=10))
    assert all("Rank 1 says that there are 3 ranks" in str(error) for error in found)
    found = ranks(3, lambda rank: Rendezvous(min(rank, 1), 3, same, timeout=10))
    assert "Two processes say that they are rank 1" in str(found[0])
    with pytest.raises(DeviceError, match="Rank 2 is not one of 2"):
        Rendezvous(2, 2, same)
    with socket.socket(socket.AF_UNIX) as another:
        another.bind("\0taken")
        with pytest.raises(DeviceError, match="Another job has the address 'taken'"):
            Rendezvous(0, 2, "taken", timeout=1)


def connected(rank: int, drivers: list[FakeDriver], address: str) -> SymmetricHeap:
    memory = CudaMemory(CudaDevice(rank, drivers[rank]))
    return SymmetricHeap(ConnectedMemory(memory, rank, len(drivers), address))


def test_processes_map_each_others_memory() -> None:
    drivers, address = [FakeDriver(), FakeDriver()], new_address()

    def body(rank: int) -> Any:
        heap = connected(rank, drivers, address)
        x = heap.tensor(np.full((3, 4), rank, np.float32))
        assert heap.rank == x.rank == rank and x.local.shape == (3, 4) and x.view.symmetric.addresses == x.addresses
        written = drivers[rank].written(x.addresses[rank])
        heap.close()
        return x.addresses, written

    for rank, (addresses, written) in enumerate(ranks(2, body)):
        assert len(set(addresses)) == 2 and np.frombuffer(written, np.float32)[0] == rank
        driver = drivers[rank]
        assert len(driver.named("cuMemMap")) == len(driver.named("cuMemUnmap")) == 4
        assert len(driver.named("cuMemCreate")) == len(driver.named("cuMemImportFromShareableHandle")) == 2
        assert len(driver.named("cuMemRelease")) == 4, "mappings keep the memory"


def test_ranks_that_disagree_on_a_tensor() -> None:
    drivers, address = [FakeDriver(), FakeDriver()], new_address()
    found = ranks(2, lambda rank: connected(rank, drivers, address).empty((4, 4 + rank), "bf16"))
    for error in found:
        assert "disagree on the tensor to make: rank 0: bf16 [4, 4]; rank 1: bf16 [4, 5]" in str(error)


def test_memory_that_cannot_be_mapped_names_the_ranks() -> None:
    drivers, address = [FakeDriver(), FakeDriver()], new_address()
    drivers[1].failures["cuMemImportFromShareableHandle"] = CUresult.CUDA_ERROR_INVALID_VALUE
    found = ranks(2, lambda rank: connected(rank, drivers, address))
    assert all("Rank 1 (cuda:1) cannot access the memory of rank 0" in str(error) for error in found)


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle"])
def test_a_rank_that_fails_leaves_nothing_on_the_others(call: str) -> None:
    drivers, address = [FakeDriver(), FakeDriver()], new_address()

    def body(rank: int) -> Any:
        heap = connected(rank, drivers, address)
        if rank == 1:
            drivers[rank].failures[call] = CUresult.CUDA_ERROR_INVALID_VALUE
        drivers[rank].calls.clear()
        try:
            heap.empty(4, "f32")
        except DeviceError:
            return len(drivers[rank].named("cuMemMap")) - len(drivers[rank].named("cuMemUnmap"))
        finally:
            heap.close()

    def exported() -> list[str]:
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        return [link for link in links if os.path.exists(link) and os.readlink(link) == os.devnull]

    before = exported()
    assert ranks(2, body) == [0, 0]
    assert exported() == before


def test_two_processes_of_this_machine() -> None:
    program = "import sys; from tilewright.runtime.rendezvous import Rendezvous as R\n"
    program += "m = R(int(sys.argv[1]), 2, sys.argv[2]); print(m.gather(int(sys.argv[1]) + 10)); m.close()"
    address = new_address()
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), address], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["[10, 11]"] * 2


def test_torch_tensors_share_the_memory(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Octets:
        def view(self, what: Any) -> Any:
            seen.append(what)
            return self

    def as_tensor(source: Any, device: str) -> Any:
        seen.append((source.__cuda_array_interface__["data"], source.__cuda_array_interface__["shape"], device))
        return Octets()

    cuda = SimpleNamespace(is_available=lambda: True)
    torch = SimpleNamespace(Tensor=Octets, as_tensor=as_tensor, cuda=cuda, bfloat16="bfloat16")
    monkeypatch.setitem(sys.modules, "torch", torch)
    heap = local(driver)
    x = heap.empty((8, 4), "bf16")
    assert isinstance(x[1], Octets) and heap.endpoints[0].torch_stream
    assert seen[3:] == [((x.addresses[1], False), (64,), "cuda:1"), "bfloat16", (8, 4)]


# --- the real bindings, with libraries that only report ---------------------------------------------

_SHARED = """\
granularity of type {type} on 1.0 handles 1 option 1
create 8192 on 1.0 handles 1
export {x}a11 as 1
import 1 as 1
map 1 8192 of {x}b22
access 8192 for 1.0 flags 3
access 8192 for 1.1 flags 3
release {x}b22
write 8{write}
[50462976, 117835012, 0]
record {event} on 0x77
0x51 waits for {event}
copy 8 over 64 on 0x51
record {event} on 0x51
copy 4 over 124 on 0x51
record {event} on 0x51
0x77 waits for {event}
0x77 waits for {event}
[117835012]
write 8{write}
host 64 flags {host}
0 0 True True True
load ELF
function k 1
{loaded}cooperative 1 grid 5 1 1 rank 1 of 2
unmap 8192
end of {event}
end of {event}
end of {event}
end of 0x51
free
{end}"""
_EXPECTED = {
    "cuda": dict(
        type="1", x="", write=" stream 0x51 mode 2", host="3", loaded="loaded 1\n", event="0x62", end="end of 0x51\n"
    ),
    "hip": dict(type="40000000", x="0x", write="", host="40000003", loaded="", event="0x62", end=""),
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="builds a stand-in for the library with gcc")
@pytest.mark.parametrize("kind", ["cuda", "hip"])
def test_memory_through_the_bindings(kind: str, tmp_path: Path) -> None:
    pytest.importorskip({"cuda": "cuda.bindings.driver", "hip": "rocm.bindings.hip"}[kind])
    support = Path(__file__).parent.parent / "support"
    (tmp_path / "lib").mkdir()
    source, library = {"cuda": ("stub_libcuda.c", "libcuda.so.1"), "hip": ("stub_libamdhip64.c", "lib/libamdhip64.so")}[
        kind
    ]
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{Path(library).name}", "-o", tmp_path / library]
    subprocess.run([*command, support / source, "-ldl"], check=True)
    paths = [str(support.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"LD_LIBRARY_PATH": str(tmp_path)} if kind == "cuda" else {"ROCM_PATH": str(tmp_path)}
    program = [sys.executable, support / "memory_through_bindings.py", kind]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(("device ", "synchronize"))]
    assert lines == _SHARED.format(**_EXPECTED[kind]).splitlines(), done.stderr


# --- launches of a world, and torch's memory --------------------------------------------------------


@tw.kernel
def copy(x: tw.Symmetric, y: tw.Tensor, *, B: tw.constexpr):
    tw.store(y, (0,), tw.load(x, (0,), (B,)))


def test_all_ranks_are_ready_before_any_starts(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [CudaDevice(n, driver) for n in range(2)]
    world = tw.World(LocalMemory([CudaMemory(device) for device in devices]))
    events: list[Any] = []

    class Artifact:
        abi = SimpleNamespace(params=())

        def ready(self, device: CudaDevice, grid: Any, args: list[Any]) -> Callable[[Any], None]:
            events.append(("ready", device.name, args[0].rank, args[1].memory.name))
            return lambda stream: events.append(("start", device.name, stream))

        def launch(self, *ignored: Any) -> None:
            raise AssertionError("a rank started before the others were ready")

    monkeypatch.setattr(type(copy), "artifact", lambda *ignored: Artifact())
    monkeypatch.setattr("tilewright.compiler.launch.open_device", lambda name: devices[int(name[-1])])
    x = world.empty(16, "f32")
    ys = [DeviceArray(world.memory.gpus[rank], 0x5000 + rank, (16,), "f32") for rank in range(2)]
    world.launch(copy, (1,), x, ys, B=16, stream=[7, 8])
    ready = [("ready", f"cuda:{rank}", rank, f"cuda:{rank}") for rank in range(2)]
    assert events == [*ready, ("start", "cuda:0", 7), ("start", "cuda:1", 8)]
    assert repr(world) == "<world of 2 ranks: cuda:0, cuda:1>"


class FakeTorch:
    """Two processes of torch.distributed in one, whose symmetric memory lies 64 bytes into a buffer."""

    def __init__(self, rank: int) -> None:
        self.rank, self.values = rank, ["another's"] * 2
        self.shared = [0x100000, 0x200000]
        self.allocated: list[int] = []
        self.complaint: str | None = None

    def all_gather_object(self, values: list[Any], value: Any, group: Any) -> None:
        values[:] = [value if self.values is None else self.values[r] for r in range(2)]

    def modules(self) -> dict[str, Any]:
        group = SimpleNamespace(group_name="everybody")
        distributed = SimpleNamespace(
            group=SimpleNamespace(WORLD=group), get_world_size=lambda g: 2, get_rank=lambda g: self.rank,
            all_gather_object=self.all_gather_object, barrier=lambda group: None, is_available=lambda: True,
            is_initialized=lambda: True,
        )  # fmt: skip
        symmetric = SimpleNamespace(empty=self.empty, rendezvous=self.rendezvous)
        distributed._symmetric_memory = symmetric
        cuda = SimpleNamespace(is_available=lambda: True, current_device=lambda: self.rank)
        torch = SimpleNamespace(
            Tensor=type(self), uint8="uint8", bfloat16=SimpleNamespace(itemsize=2), cuda=cuda, distributed=distributed,
            version=SimpleNamespace(hip=None),
        )  # fmt: skip
        return {
            "torch": torch,
            "torch.distributed": distributed,
            "torch.distributed._symmetric_memory": symmetric,
        }

    def empty(self, nbytes: int, dtype: Any, device: str) -> Any:
        self.allocated.append(nbytes)
        return SimpleNamespace(data_ptr=lambda: self.shared[self.rank] + 64)

    def rendezvous(self, tensor: Any, group: str) -> Any:
        if self.complaint:
            raise RuntimeError(self.complaint)
        return SimpleNamespace(buffer_ptrs=self.shared)


def test_memory_of_torch(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = FakeTorch(rank=1)
    for name, module in torch.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    assert current_gpu() == "cuda:1"
    monkeypatch.setattr(TorchMemory, "array", lambda *ignored: "a tensor of torch")
    torch.values = None
    heap = SymmetricHeap(TorchMemory(CudaMemory(CudaDevice(1, driver))))
    x = heap.empty((8, 4), "bf16")
    assert (heap.rank, heap.size, x.local, x.addresses) == (1, 2, "a tensor of torch", (0x100040, 0x200040))
    assert torch.allocated == [4 * CONTROL_WORDS, 64] and x.view.address == 0x200040
    assert driver.written(x.view.symmetric.table) == struct.pack("<2q", *x.addresses)
    torch.values = ["bf16 [8, 4]", "bf16 [9]"]
    with pytest.raises(DeviceError, match=r"rank 0: bf16 \[8, 4\]; rank 1: bf16 \[9\]"):
        heap.empty(9, "bf16")
    torch.values, torch.complaint = None, "no peer access"
    with pytest.raises(DeviceError, match="could not share memory between the 2 ranks: no peer access"):
        heap.empty(9, "bf16")
    heap.close()


def test_torch_distributed_that_is_not_up(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = FakeTorch(rank=0).modules()
    modules["torch.distributed"].is_initialized = lambda: False
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(DeviceError, match=r"torch\.distributed is not up"):
        tw.World.distributed()
