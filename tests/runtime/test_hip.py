"""The HIP runtime against stand-ins for the bindings and for the library: no GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_driver import FakeTensor, fake_torch

from tilewright.compiler.arrays import where
from tilewright.ir.abi import KernelABI, ScalarParam, TensorMapParam, TensorParam
from tilewright.runtime import hip as hip_runtime
from tilewright.runtime.arguments import DevicePointer
from tilewright.runtime.errors import ArgumentError, DeviceError
from tilewright.runtime.hip import HipDevice, HipFunction, amd_target, enumerate_devices, initialize


class Status(IntEnum):
    hipSuccess = 0  # noqa: N815
    hipErrorNoDevice = 100  # noqa: N815
    hipErrorNoBinaryForGpu = 209  # noqa: N815
    hipErrorLaunchOutOfResources = 701  # noqa: N815


class FakeHip:
    """Two MI300X; ``failures`` maps a function's name to the error it returns."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failures: dict[str, Status] = {}
        self.current = 0
        self.launch_devices: list[int] = []
        properties = SimpleNamespace(
            name=b"AMD Fake", gcnArchName=b"gfx942:sramecc+:xnack-", multiProcessorCount=304, totalGlobalMem=2**37
        )
        self._values = {
            "hipGetDeviceCount": 2,
            "hipGetDeviceProperties": properties,
            "hipModuleLoadData": 0x100,
            "hipModuleGetFunction": 0x200,
            "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor": 2,
        }

    def __getattr__(self, name: str) -> Any:
        def function(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, args))
            status = self.failures.get(name, Status.hipSuccess)
            if name == "hipSetDevice":
                self.current = args[0]
            if name == "hipGetDevice":
                return status, self.current
            if name == "hipModuleLaunchKernel":
                self.launch_devices.append(self.current)
            return (status, self._values[name]) if name in self._values else (status,)

        return function

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.calls if called == name]


@pytest.fixture
def hip() -> FakeHip:
    return FakeHip()


@pytest.fixture
def function(hip: FakeHip) -> HipFunction:
    return HipDevice(0, hip).load(b"\x7fELF").function("kernel")


VECTOR = TensorParam("x", "f32", (None,), (1,), 4)


def abi(*params: Any, **options: Any) -> KernelABI:
    return KernelABI("kernel", params, **{"threads": 256, "shared_bytes": 65536, **options})


def launch(function: HipFunction, contract: KernelABI, grid: Any, args: list[Any], stream: Any = None) -> None:
    function.device.launch(function, contract, grid, args, stream)


def test_devices_are_described(hip: FakeHip) -> None:
    first, second = enumerate_devices(hip)
    assert (first.name, second.name, first.target, first.description) == ("hip:0", "hip:1", "gfx942", "AMD Fake")
    assert (first.units, first.memory) == (304, 2**37)
    assert HipDevice(1, hip).name == "hip:1" and HipDevice(1, hip).target == "gfx942"
    assert amd_target("gfx950") == "gfx950"
    with pytest.raises(DeviceError, match="hip:2 does not exist: 2 AMD GPUs"):
        HipDevice(2, hip)


def test_arguments_and_sizes_of_a_launch(hip: FakeHip, function: HipFunction) -> None:
    launch(function, abi(VECTOR, ScalarParam("s", "f32")), (6, 2), [DevicePointer(0xABC0, (100,)), 1.5], 0x77)
    handle, *sizes, stream, pointers, extra = hip.named("hipModuleLaunchKernel")[0]
    assert (handle, sizes, stream, extra) == (0x200, [6, 2, 1, 256, 1, 1, 0], 0x77, None)
    array = (ctypes.c_void_p * 6).from_address(pointers)
    found = [ctypes.string_at(p, n) for p, n in zip(array, (8, 4, 4, 4, 4, 4), strict=True)]
    assert found == [struct.pack("<Q", 0xABC0), *(struct.pack(c, v) for c, v in [("<i", 100), ("<f", 1.5)])] + [
        struct.pack("<i", n) for n in (6, 2, 1)
    ]


def test_launches_happen_on_their_device(hip: FakeHip) -> None:
    function = HipDevice(1, hip).load(b"\x7fELF").function("kernel")
    launch(function, abi(), 4, [])
    assert hip.launch_devices == [1] and hip.current == 0


def test_persistent_grids_fit_the_device(hip: FakeHip, function: HipFunction) -> None:
    contract = abi(persistent=True, blocks_per_unit=2)
    launch(function, contract, (1000, 1000), [])
    launch(function, contract, (5, 2), [])
    assert [args[1:4] for args in hip.named("hipModuleLaunchKernel")] == [(608, 1, 1), (10, 1, 1)]


def test_torch_tensors_and_streams(hip: FakeHip, function: HipFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = fake_torch(0x5000)
    torch.version = SimpleNamespace(hip="6.4")
    monkeypatch.setitem(sys.modules, "torch", torch)
    tensor = FakeTensor(0x4000, (8,), (1,), "float32", device=0)
    assert where({"x": tensor}) == "hip:0"
    for _ in range(2):
        launch(function, abi(VECTOR), 1, [tensor])
    assert [args[8] for args in hip.named("hipModuleLaunchKernel")] == [0x5000, 0x5000]
    torch.version.hip = None
    assert where({"x": tensor}) == "cuda:0"


def test_refusals(hip: FakeHip, function: HipFunction) -> None:
    with pytest.raises(ArgumentError, match=r"2\*\*32 threads"):
        launch(function, abi(), 2**24, [])
    with_map = abi(VECTOR, tensor_maps=(TensorMapParam("x", (8,), (0,), 0),))
    with pytest.raises(DeviceError, match="tensor map of 'x', which hip:0 has not"):
        launch(function, with_map, 1, [DevicePointer(0x4000, (8,))])
    with pytest.raises(ArgumentError, match="dtype bf16"):
        launch(function, abi(VECTOR), 1, [DevicePointer(0x4000, (8,), dtype="bf16")])
    assert not hip.named("hipModuleLaunchKernel")


def test_errors_say_what_to_do(hip: FakeHip, function: HipFunction) -> None:
    hip.failures["hipModuleLaunchKernel"] = Status.hipErrorLaunchOutOfResources
    with pytest.raises(DeviceError, match="on hip:0 with 3x1x1 .* 65536 bytes of LDS: .*fewer warps"):
        launch(function, abi(), 3, [])
    hip.failures["hipModuleLoadData"] = Status.hipErrorNoBinaryForGpu
    with pytest.raises(DeviceError, match="another architecture") as caught:
        function.device.load(b"")
    assert caught.value.code == "hipErrorNoBinaryForGpu"
    hip.failures["hipInit"] = Status.hipErrorNoDevice
    with pytest.raises(DeviceError, match="No AMD GPU is visible"):
        initialize(hip)

    def missing(flags: int) -> Any:
        raise RuntimeError("failed to dlopen 'libamdhip64.so'")

    with pytest.raises(DeviceError, match="No HIP runtime .* install ROCm"):
        initialize(SimpleNamespace(hipInit=missing))


# -- the real bindings on a libamdhip64 that only reports -----------------------------------------

_THROUGH_BINDINGS = """
import sys
from types import SimpleNamespace
if len(sys.argv) > 1:  # as torch for ROCm, which brings the library
    sys.modules["torch"] = SimpleNamespace(__file__=sys.argv[1] + "/__init__.py")
from tilewright.ir.abi import KernelABI, ScalarParam, TensorParam
from tilewright.runtime.arguments import DevicePointer
from tilewright.runtime.device import devices, open_device
print([info.name for info in devices() if not info.name.startswith(("cuda", "emulate"))], flush=True)
device = open_device("hip:0")
function = device.load(b"?hsaco" + bytes(1)).function("gemm")
abi = KernelABI("gemm", (TensorParam("a", "bf16", (None, 64), (64, 1)), ScalarParam("s", "f32")), 256, 65536)
device.launch(function, abi, (6, 2), [DevicePointer(0xABC00, (100, 64), None, "bf16"), 1.5], stream=0x77)
print("occupancy", device.blocks_per_unit(function, 256), device.target, device.info, flush=True)
device.synchronize()
try:
    device.launch(function, KernelABI("gemm", abi.params, 2048, 0), 1, [DevicePointer(0, (9, 64), None, "bf16"), 1.5])
except Exception as error:
    print(type(error).__name__, error.code)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("torch_brings_it", [False, True])
def test_the_real_bindings_take_what_we_pass(tmp_path: Path, torch_brings_it: bool) -> None:
    pytest.importorskip("rocm.bindings.hip")
    (tmp_path / "lib").mkdir()
    source = Path(__file__).parent.parent / "support" / "stub_libamdhip64.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", tmp_path / "lib" / "libamdhip64.so", source], check=True)
    paths = [str(Path(hip_runtime.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if not torch_brings_it:
        environment["ROCM_PATH"] = str(tmp_path)
    command = [sys.executable, "-c", _THROUGH_BINDINGS, *([str(tmp_path)] if torch_brings_it else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    info = "DeviceInfo(name='hip:0', target='gfx942', description='AMD Stub', units=304, memory=4096)"
    inside = ["device 0", "{}", "device 1"]
    expected = [["['hip:0', 'hip:1', 'cpu']"]]
    for line in (
        "load hsaco",
        "function gemm 1",
        "launch 1 grid 6 2 1 block 256 1 1 shared 0 stream 0x77 args 0xabc00 100 1.500000 6 2 1 extra (nil)",
    ):
        expected.append([part.format(line) for part in inside])
    expected += [["device 0", "device 1"], [f"occupancy 2 gfx942 {info}"], ["device 0", "synchronize", "device 1"]]
    launch = "launch 1 grid 1 1 1 block 2048 1 1 shared 0 stream (nil) args (nil) 9 1.500000 1 1 1 extra (nil)"
    expected += [["device 0", launch, "device 1"], ["DeviceError hipErrorLaunchOutOfResources"]]
    assert done.stdout.splitlines() == [line for group in expected for line in group], done.stderr
