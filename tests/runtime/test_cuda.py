"""The CUDA runtime against stand-ins for the driver: no GPU, no timing."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_driver import CONTEXT, OTHER_CONTEXT, CUresult, FakeDriver, FakeTensor, fake_torch

from tilewright.ir.abi import KernelABI, ScalarParam, TensorMapParam, TensorParam
from tilewright.runtime import cuda, launching
from tilewright.runtime.arguments import DevicePointer, TensorView, bf16_bits, row_major
from tilewright.runtime.cuda import CudaDevice
from tilewright.runtime.device import devices, nvidia_target, open_device
from tilewright.runtime.errors import ArgumentError, DeviceError
from tilewright.runtime.lru import LRU
from tilewright.runtime.tensor_maps import tensor_map_geometry

MATRIX = TensorParam("a", "bf16", (None, None), (None, 1), alignment=16)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def device(driver: FakeDriver) -> CudaDevice:
    return CudaDevice(0, driver)


@pytest.fixture
def function(device: CudaDevice) -> cuda.CudaFunction:
    return device.load(b"\x7fELF").function("kernel")


def kernel(*params: Any, **options: Any) -> KernelABI:
    return KernelABI("kernel", params, **{"threads": 128, "shared_bytes": 0, **options})


def pointer(
    address: int = 0x1000, shape: tuple[int, ...] = (64, 32), strides: Any = None, dtype: str = "bf16"
) -> DevicePointer:
    return DevicePointer(address, shape, strides, dtype)


def ints(*values: int) -> list[bytes]:
    return [struct.pack("<i", value) for value in values]


# -- argument packing ----------------------------------------------------------------------------


def test_a_tensor_is_pointer_then_dimensions_then_strides(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction
) -> None:
    abi = kernel(TensorParam("x", "f32", (None, 8, None), (None, None, 1)))
    x = pointer(0x7F0000001000, (5, 8, 3), (2**33, 40, 1), "float32")
    device.launch(function, abi, (7, 2), [x])
    expected = [struct.pack("<Q", 0x7F0000001000), *ints(5, 3), struct.pack("<q", 2**33), struct.pack("<q", 40)]
    assert driver.arguments([8, 4, 4, 8, 8, 4, 4, 4]) == expected + ints(7, 2, 1)


def test_scalars_of_every_type(device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction) -> None:
    values = {"i1": True, "i8": -5, "i16": 300, "i32": -(2**31), "i64": 2**40, "f16": 1.5, "bf16": -2.5}
    values |= {"f32": 0.1, "f64": 0.1}
    abi = kernel(*[ScalarParam(f"s_{dtype}", dtype) for dtype in values])
    device.launch(function, abi, 3, list(values.values()))
    codes = ["<?", "<b", "<h", "<i", "<q", "<e", "<H", "<f", "<d"]
    plain = [*list(values.values())[:6], 0xC020, 0.1, 0.1]
    packed = [struct.pack(code, value) for code, value in zip(codes, plain, strict=True)]
    assert driver.arguments([1, 1, 2, 4, 8, 2, 2, 4, 8, 4, 4, 4]) == packed + ints(3, 1, 1)


def test_parameters_keep_their_order_and_maps_come_last(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction
) -> None:
    maps = tuple(TensorMapParam(name, (64, 32), (1, 0), 64) for name in ("b", "a"))
    other = TensorParam("b", "bf16", (64, 32), (32, 1))
    abi = kernel(ScalarParam("s", "f32"), MATRIX, ScalarParam("n", "i64"), other, tensor_maps=maps)
    device.launch(function, abi, (4,), [0.5, pointer(0x1000), 9, pointer(0x2000)])
    first, second = bytes([1]) * 128, bytes([2]) * 128
    assert driver.arguments([4, 8, 4, 4, 8, 8, 8, 4, 4, 4, 128, 128]) == [
        struct.pack("<f", 0.5),
        struct.pack("<Q", 0x1000),
        *ints(64, 32),
        struct.pack("<q", 32),
        struct.pack("<q", 9),
        struct.pack("<Q", 0x2000),
        *ints(4, 1, 1),
        first,
        second,
    ]
    assert [args[2] for args in driver.named("cuTensorMapEncodeTiled")] == [0x2000, 0x1000]
    driver.current = 0  # a thread that has not used CUDA yet
    device.launch(function, abi, (4,), [0.5, pointer(0x3000), 9, pointer(0x4000)])
    assert driver.map_contexts == [CONTEXT] * 4


@pytest.mark.parametrize(
    ("value", "bits"),
    [(1.0, 0x3F80), (-0.0, 0x8000), (1 + 2**-8, 0x3F80), (1 + 3 * 2**-8, 0x3F82), (float("inf"), 0x7F80)],
)
def test_bf16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert bf16_bits(value) == bits


def test_bf16_keeps_nan_and_refuses_overflow() -> None:
    assert bf16_bits(float("nan")) & 0x7F80 == 0x7F80
    assert bf16_bits(float("nan")) & 0x7F
    with pytest.raises(OverflowError):
        bf16_bits(3.4e38)


# -- tensor arguments ----------------------------------------------------------------------------


def test_array_interface_counts_strides_in_elements_and_waits_for_its_stream(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction
) -> None:
    interface = {"typestr": "<f4", "shape": (3, 4), "data": (0x500, False), "strides": (32, 4), "version": 3}
    abi = kernel(TensorParam("x", "f32", (3, 4), (None, 1)))
    device.launch(function, abi, 1, [SimpleNamespace(__cuda_array_interface__={**interface, "stream": 77})])
    assert driver.arguments([8, 8]) == [struct.pack("<Q", 0x500), struct.pack("<q", 8)]
    assert driver.named("cuStreamSynchronize") == [(77,)]


def test_legacy_default_stream_needs_no_wait(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction
) -> None:
    interface = {"typestr": "<f4", "shape": (4,), "data": (0x500, False), "version": 3, "stream": 1}
    device.launch(
        function, kernel(TensorParam("x", "f32", (4,), (1,))), 1, [SimpleNamespace(__cuda_array_interface__=interface)]
    )
    assert driver.named("cuStreamSynchronize") == []


def test_torch_tensors_launch_on_torchs_stream(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(0xABC))
    tensor = FakeTensor(0x1000, (64, 32), (32, 1), "bfloat16")
    device.launch(function, kernel(MATRIX), 1, [tensor])
    device.launch(function, kernel(MATRIX), 1, [pointer()])
    device.launch(function, kernel(MATRIX), 1, [tensor], stream=5)
    device.launch(function, kernel(MATRIX), 1, [tensor], stream=SimpleNamespace(cuda_stream=6))
    device.launch(function, kernel(MATRIX), 1, [tensor], stream=SimpleNamespace(__cuda_stream__=lambda: (0, 7)))
    assert [args[8] for args in driver.named("cuLaunchKernel")] == [0xABC, 0, 5, 6, 7]


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (pointer(dtype="f16"), "'a' has dtype f16; the kernel was compiled for bf16"),
        (pointer(shape=(4, 4, 4)), r"'a' has 3 dimensions \(4, 4, 4\); the kernel was compiled for 2"),
        (pointer(shape=(64, 32), strides=(64, 2)), "dimension 1 has a stride of 2 elements; the kernel was compiled"),
        (pointer(shape=(64, 33), strides=(33, 1)), "stride of 33 elements, 66 bytes, no multiple of the 16 bytes"),
        (pointer(0x1008), "address 0x1008 is not a multiple of the 16 bytes"),
        (pointer(shape=(2**31, 8)), "dimension 0 has 2147483648 elements; a kernel takes at most 2147483647"),
        (object(), "'a' must be a tensor in GPU memory"),
        (SimpleNamespace(__array_interface__={}), "in host memory"),
        (SimpleNamespace(__cuda_array_interface__={"typestr": "<V2"}), "'<V2', which names none of ours"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction, argument: Any, text: str
) -> None:
    with pytest.raises(ArgumentError, match=text):
        device.launch(function, kernel(MATRIX), 1, [argument])
    assert driver.named("cuLaunchKernel") == []


def test_what_the_copy_engine_writes_has_whole_lines(device: CudaDevice, function: cuda.CudaFunction) -> None:
    abi = kernel(replace(MATRIX, whole_lines=True))
    device.launch(function, abi, 1, [pointer(shape=(64, 32), strides=(64, 1))])
    with pytest.raises(ArgumentError, match="lines of 33 elements are no multiple of the 16 bytes"):
        device.launch(function, abi, 1, [pointer(shape=(64, 33), strides=(64, 1))])


def test_static_dimensions_must_match(device: CudaDevice, function: cuda.CudaFunction) -> None:
    abi = kernel(TensorParam("w", "bf16", (64, 16), (16, 1)))
    with pytest.raises(ArgumentError, match="'w': dimension 1 has 32 elements; the kernel was compiled for 16"):
        device.launch(function, abi, 1, [pointer(shape=(64, 32))])


@pytest.mark.parametrize(("ordinal", "text"), [(1, "on cuda:1; the launch is on cuda:0"), (-1, "in host memory")])
def test_a_tensor_elsewhere_is_refused(
    device: CudaDevice, function: cuda.CudaFunction, monkeypatch: pytest.MonkeyPatch, ordinal: int, text: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(0))
    with pytest.raises(ArgumentError, match=text):
        device.launch(function, kernel(MATRIX), 1, [FakeTensor(0x1000, (8, 8), (8, 1), "bfloat16", ordinal)])


def test_strides_that_no_address_depends_on_are_free(device: CudaDevice, function: cuda.CudaFunction) -> None:
    device.launch(function, kernel(MATRIX), 1, [pointer(shape=(1, 32), strides=(7, 1))])
    device.launch(function, kernel(MATRIX), 1, [pointer(shape=(64, 1), strides=(32, 9))])
    device.launch(function, kernel(MATRIX), 1, [pointer(0, shape=(0, 32), strides=(3, 3))])


@pytest.mark.parametrize(
    ("dtype", "value"), [("i32", 2**31), ("i32", 1.0), ("i1", 2), ("f32", 1e39), ("f16", 70000.0), ("bf16", "x")]
)
def test_a_scalar_that_does_not_fit_is_named(
    device: CudaDevice, function: cuda.CudaFunction, dtype: str, value: Any
) -> None:
    abi = kernel(ScalarParam("fine", "bf16"), ScalarParam("bad", dtype), ScalarParam("last", "i1"))
    with pytest.raises(ArgumentError, match=rf"'bad' = .* does not fit {dtype}"):
        device.launch(function, abi, 1, [1.0, value, True])


def test_the_number_of_arguments_must_match(device: CudaDevice, function: cuda.CudaFunction) -> None:
    with pytest.raises(ArgumentError, match=r"takes 1 arguments \(a\), not 2"):
        device.launch(function, kernel(MATRIX), 1, [pointer(), 3])


# -- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "persistent", "blocks"),
    [
        ((3, 4, 5), False, (3, 4, 5)),
        (9, False, (9, 1, 1)),
        (np.int64(9), False, (9, 1, 1)),
        ((3, 4), True, (12, 1, 1)),
        ([100, 100], True, (264, 1, 1)),
    ],
)
def test_blocks_of_a_grid(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction, grid: Any, persistent: bool, blocks: Any
) -> None:
    device.launch(function, kernel(persistent=persistent, blocks_per_unit=2), grid, [])
    (launch,) = driver.named("cuLaunchKernel")
    assert launch[1:8] == (*blocks, 128, 1, 1, 0)
    counts = (*grid, 1, 1)[:3] if isinstance(grid, (tuple, list)) else (grid, 1, 1)
    assert driver.arguments([4, 4, 4]) == ints(*counts)


def test_kernels_that_wait_for_the_one_before_start_early(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_KEPT_CONFIGS", 3)
    abi = kernel(MATRIX, shared_bytes=1000, awaits_grid=True)
    for stream in (5, 6, 5):
        device.launch(function, abi, (7, 2), [pointer()], stream=stream)
    assert [args[1:9] for args in driver.named("cuLaunchKernel")] == [(7, 2, 1, 128, 1, 1, 1000, s) for s in (5, 6, 5)]
    configs = [args[0] for args in driver.named("cuLaunchKernelEx")]
    for config in configs:
        (attribute,) = config.attrs
        assert config.numAttrs == 1 and attribute.id == "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
        assert attribute.value.programmaticStreamSerializationAllowed == 1
    assert configs[0] is configs[2] is not configs[1]  # made once for a grid and a stream
    for stream in range(7, 20):
        device.launch(function, abi, (7, 2), [pointer()], stream=stream)
    assert len(function.launcher(abi)._configs) <= 3
    device.launch(function, replace(abi, awaits_grid=False), (7, 2), [pointer()])
    assert len(driver.named("cuLaunchKernelEx")) == 16 and len(driver.named("cuLaunchKernel")) == 17


@pytest.mark.parametrize(
    ("grid", "cluster", "blocks"),
    [
        ((3, 4), (2, 1, 1), 16),  # two groups of rows, the second short, times four columns
        ((3, 4), (1, 2, 1), 12),
        ((3, 5), (1, 4, 1), 24),
        ((100, 100), (2, 1, 1), 132),  # as many clusters as the driver counts
    ],
)
def test_grids_of_clusters(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction, grid: Any, cluster: Any, blocks: int
) -> None:
    device.launch(function, kernel(persistent=True, cluster=cluster, shared_bytes=1000), grid, [])
    (launch,) = driver.named("cuLaunchKernel")
    assert launch[1:8] == (blocks, 1, 1, 128, 1, 1, 1000)
    ((handle, config),) = driver.named("cuOccupancyMaxActiveClusters")
    assert handle == function.handle and (config.blockDimX, config.sharedMemBytes) == (128, 1000)
    assert config.gridDimX % (cluster[0] * cluster[1]) == 0


@pytest.mark.parametrize(("persistent", "blocks"), [(False, (24, 5, 1)), (True, (120, 1, 1))])
def test_grids_of_programs_that_are_spread(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction, persistent: bool, blocks: tuple[int, int, int]
) -> None:
    """Eight blocks side by side for each of 3 x 5 programs."""
    device.launch(function, kernel(persistent=persistent, spread=8, shared_bytes=1000), (3, 5), [])
    (launch,) = driver.named("cuLaunchKernel")
    assert launch[1:8] == (*blocks, 128, 1, 1, 1000)


def test_clusters_that_fit_nowhere(device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction) -> None:
    driver.values["cuOccupancyMaxActiveClusters"] = 0
    with pytest.raises(DeviceError, match="cluster of 4 blocks of 'kernel' does not fit"):
        device.launch(function, kernel(persistent=True, cluster=(4, 1, 1)), 9, [])


@pytest.mark.parametrize("persistent", [False, True])
def test_an_empty_grid_starts_nothing(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction, persistent: bool
) -> None:
    for _ in range(2):
        device.launch(function, kernel(MATRIX, persistent=persistent), (4, 0), [pointer()])
    assert driver.named("cuLaunchKernel") == []
    with pytest.raises(ArgumentError, match="'a' has dtype"):
        device.launch(function, kernel(MATRIX), (4, 0), [pointer(dtype="f32")])


@pytest.mark.parametrize(
    ("grid", "persistent", "text"),
    [
        ((1, 70000), False, "exceeds 65535 in its second or third"),
        ((2**16, 2**16), True, "has 4294967296 programs"),
        ((-1,), False, "between 0 and"),
        ((1, 1, 1, 1), False, "one to three dimensions, not 4"),
        ((1.5,), False, "must be one to three integers"),
    ],
)
def test_impossible_grids(
    device: CudaDevice, function: cuda.CudaFunction, grid: Any, persistent: bool, text: str
) -> None:
    with pytest.raises(ArgumentError, match=text):
        device.launch(function, kernel(persistent=persistent), grid, [])


# -- repeated launches ---------------------------------------------------------------------------


def test_repeated_arguments_reuse_their_block(
    device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction
) -> None:
    abi = kernel(MATRIX, ScalarParam("s", "f32"))
    for scalar in (0.0, 0.0, -0.0):
        device.launch(function, abi, 1, [pointer(), scalar])
    first, second, negative = (args[9] for args in driver.named("cuLaunchKernel"))
    assert first == second != negative
    assert driver.arguments([8, 4, 4, 8, 4])[4] == struct.pack("<f", -0.0)


def test_kept_launches_are_bounded(device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction) -> None:
    abi = kernel(ScalarParam("n", "i32"))
    for n in range(2 * launching._KEPT_LAUNCHES):
        device.launch(function, abi, 1, [n])
        assert driver.arguments([4]) == ints(n)
    assert len(function.launcher(abi)._ready) == launching._KEPT_LAUNCHES


def test_a_lru_drops_what_was_unused_for_longest() -> None:
    cache: LRU[str, int] = LRU(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    assert (cache.hits, cache.misses) == (3, 1)


# -- tensor maps ---------------------------------------------------------------------------------


def view(shape: tuple[int, ...], strides: Any = None, dtype: str = "bf16", address: int = 0x1000) -> TensorView:
    return TensorView(address, shape, row_major(shape) if strides is None else strides, dtype, None)


@pytest.mark.parametrize(
    ("shape", "strides", "box", "order", "dims", "steps", "reordered"),
    [
        ((100, 64), (64, 1), (128, 32), (1, 0), (64, 100), (128,), (32, 128)),
        ((64, 100), (1, 64), (32, 128), (0, 1), (64, 100), (128,), (32, 128)),  # transposed view
        ((100, 64), (256, 1), (8, 32), (1, 0), (64, 100), (512,), (32, 8)),  # a slice of wider rows
        ((2, 3, 5, 64), (3 * 5 * 64, 64, 3 * 64, 1), (1, 2, 4, 64), (3, 1, 2, 0), (64, 3, 5, 2), (128, 384, 1920),
         (64, 2, 4, 1)),  # batch, head, row, column with rows outside heads
        ((1, 64), (5, 1), (1, 64), (1, 0), (64, 1), (128,), (64, 1)),  # a stride that nothing depends on
        ((0, 64), (64, 1), (8, 64), (1, 0), (1, 1), (16,), (64, 8)),  # an empty tensor
    ],
)  # fmt: skip
def test_tensor_map_geometry(
    shape: Any, strides: Any, box: Any, order: Any, dims: Any, steps: Any, reordered: Any
) -> None:
    geometry = tensor_map_geometry(TensorMapParam("a", box, order, 0), view(shape, strides))
    assert (geometry.dims, geometry.strides, geometry.box) == (dims, steps, reordered)


@pytest.mark.parametrize(
    ("param", "tensor", "text"),
    [
        (TensorMapParam("a", (8, 64), (1, 0), 0), view((8, 64), (64, 2)), "dimension 1 must be contiguous"),
        (TensorMapParam("a", (8, 64), (1, 0), 0), view((8, 60), (60, 1)), "stride of 120 bytes; TMA needs a multiple"),
        (TensorMapParam("a", (8, 64), (1, 0), 0), view((8, 64), address=0x1008), "address 0x1008 is not a multiple"),
        (TensorMapParam("a", (512, 64), (1, 0), 0), view((512, 64)), "not within 1 to 256"),
        (TensorMapParam("a", (8, 64), (1, 0), 64), view((8, 64)), "has 128 bytes; .* at most the swizzle's 64"),
        (TensorMapParam("a", (8, 4), (1, 0), 0), view((8, 64)), "has 8 bytes"),
        (TensorMapParam("a", (8, 64), (1, 1), 0), view((8, 64)), "do not describe a tensor of rank 2"),
    ],
)
def test_what_tma_cannot_do(param: TensorMapParam, tensor: TensorView, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        tensor_map_geometry(param, tensor)


def test_tensor_map_call(device: CudaDevice, driver: FakeDriver) -> None:
    device.tensor_maps.encode(TensorMapParam("a", (16, 64), (1, 0), 128), view((100, 64)))
    assert driver.named("cuTensorMapEncodeTiled") == [
        (
            "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16", 2, 0x1000, [64, 100], [128], [64, 16], [1, 1],
            "CU_TENSOR_MAP_INTERLEAVE_NONE", "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_L2_PROMOTION_L2_256B",
            "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE",
        )
    ]  # fmt: skip


def test_tensor_maps_are_cached_by_what_they_depend_on(device: CudaDevice, driver: FakeDriver) -> None:
    maps = device.tensor_maps
    param = TensorMapParam("a", (16, 64), (1, 0), 128)
    first = maps.encode(param, view((100, 64)))
    assert maps.encode(param, view((100, 64))) == first
    assert maps.encode(TensorMapParam("renamed", (16, 64), (1, 0), 128), view((100, 64))) == first
    assert len(driver.named("cuTensorMapEncodeTiled")) == 1
    different = [
        (param, view((101, 64))),
        (param, view((100, 64), (128, 1))),
        (param, view((100, 64), address=0x2000)),
        (param, view((100, 64), dtype="f16")),
        (TensorMapParam("a", (32, 64), (1, 0), 128), view((100, 64))),
        (TensorMapParam("a", (16, 32), (1, 0), 64), view((100, 64))),
    ]
    assert first not in [maps.encode(*arguments) for arguments in different]
    assert (maps.cache.hits, len(maps.cache)) == (2, 7)


def test_an_empty_tensor_maps_to_a_zeroed_cell(device: CudaDevice, driver: FakeDriver) -> None:
    param = TensorMapParam("a", (16, 64), (1, 0), 128)
    device.tensor_maps.encode(param, view((0, 64), address=0))
    device.tensor_maps.encode(param, view((0, 128), address=0))
    assert [args[2:4] for args in driver.named("cuTensorMapEncodeTiled")] == [(0xEE00, [1, 1])] * 2
    assert driver.named("cuMemsetD8") == [(0xEE00, 0, 16)]


def test_a_refused_tensor_map_is_named(device: CudaDevice, driver: FakeDriver) -> None:
    driver.failures["cuTensorMapEncodeTiled"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DeviceError, match=r"Tensor map of 'a' .*dims=\(64, 100\).*CUDA_ERROR_INVALID_VALUE"):
        device.tensor_maps.encode(TensorMapParam("a", (16, 64), (1, 0), 128), view((100, 64)))


def test_a_map_of_no_tensor_is_refused(function: cuda.CudaFunction) -> None:
    with pytest.raises(ArgumentError, match="a tensor map of 'z', which is none of its tensors"):
        function.launcher(kernel(MATRIX, tensor_maps=(TensorMapParam("z", (8, 8), (1, 0), 0),)))


# -- devices, contexts and errors ----------------------------------------------------------------


def test_a_device_describes_itself(device: CudaDevice) -> None:
    assert (device.name, device.target, device.multiprocessors) == ("cuda:0", "sm_90a", 132)
    assert device.info.description == "NVIDIA Fake 80GB"


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "sm_120a")],
)
def test_targets(capability: tuple[int, int], target: str) -> None:
    assert nvidia_target(*capability) == target


def test_a_missing_ordinal_is_an_error(driver: FakeDriver) -> None:
    with pytest.raises(DeviceError, match="cuda:2 does not exist: 2 NVIDIA GPUs are visible"):
        CudaDevice(2, driver)


def test_contexts_are_restored(device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction) -> None:
    abi = kernel()
    driver.current = OTHER_CONTEXT
    device.launch(function, abi, 1, [])
    assert (driver.launch_contexts, driver.current) == ([CONTEXT], OTHER_CONTEXT)
    driver.current = 0  # a thread that has not used CUDA yet
    device.launch(function, abi, 1, [])
    assert (driver.launch_contexts, driver.current) == ([CONTEXT, CONTEXT], CONTEXT)


def test_shared_memory_is_asked_for_once(device: CudaDevice, driver: FakeDriver, function: cuda.CudaFunction) -> None:
    abi = kernel(shared_bytes=200_000)
    for _ in range(2):
        device.launch(function, abi, 1, [])
    assert device.blocks_per_unit(function, 128, 200_000) == 2
    assert [args[1:] for args in driver.named("cuFuncSetAttribute")] == [
        ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", 200_000)
    ]
    assert driver.named("cuLaunchKernel")[0][7] == 200_000


def test_too_much_shared_memory_is_an_error_before_the_launch(device: CudaDevice, function: cuda.CudaFunction) -> None:
    with pytest.raises(DeviceError, match="needs 300000 bytes of shared memory; .* has at most 232448"):
        device.launch(function, kernel(shared_bytes=300_000), 1, [])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ("cuModuleLoadData", CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, r"on cuda:0 \(sm_90a\).*another architecture"),
        ("cuModuleGetFunction", CUresult.CUDA_ERROR_NOT_FOUND, "kernel 'missing'.*no symbol of that name"),
        ("cuLaunchKernel", CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "4x1x1 blocks of 128 threads.*fewer warps"),
    ],
)
def test_driver_errors_say_what_to_do(
    device: CudaDevice, driver: FakeDriver, call: str, error: CUresult, text: str
) -> None:
    driver.failures[call] = error
    with pytest.raises(DeviceError, match=text) as raised:
        device.launch(device.load(b"\x7fELF").function("missing"), kernel(), 4, [])
    assert raised.value.code == error.name
    assert error.name in str(raised.value)


def test_no_driver_is_an_error_that_says_so(driver: FakeDriver) -> None:
    def init(flags: int) -> Any:
        raise RuntimeError("libcuda.so.1 not found")

    with pytest.raises(DeviceError, match="No NVIDIA driver .* install the NVIDIA driver, or launch on the cpu"):
        cuda.initialize(SimpleNamespace(cuInit=init))
    driver.failures["cuInit"] = CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(DeviceError, match="CUDA_ERROR_NO_DEVICE. No NVIDIA GPU is visible"):
        cuda.initialize(driver)


def test_this_machine_lists_its_devices_without_raising() -> None:
    names = [info.name for info in devices()]
    assert {"cpu", "emulate:sm_90a", "emulate:gfx942", "emulate:gfx950"} <= set(names)
    if "cuda:0" not in names:
        with pytest.raises(DeviceError):
            open_device("cuda:0")


def test_unknown_device_names() -> None:
    with pytest.raises(DeviceError, match="No runtime opens the device 'tpu:0'. This machine has: .*cpu"):
        open_device("tpu:0")
    with pytest.raises(DeviceError, match="'cuda:x' names no device"):
        open_device("cuda:x")


# -- the real bindings on a libcuda that only reports ---------------------------------------------

_THROUGH_BINDINGS = """
from tilewright.ir.abi import KernelABI, ScalarParam, TensorMapParam, TensorParam
from tilewright.runtime.cuda import CudaDevice, DevicePointer
device = CudaDevice(0)
function = device.load(b"?cubin" + bytes(1)).function("gemm")
abi = KernelABI("gemm", (TensorParam("a", "bf16", (None, 64), (64, 1)), ScalarParam("s", "f32")), 256, 100000,
                (TensorMapParam("a", (128, 32), (1, 0), 64),))
device.launch(function, abi, (6, 2), [DevicePointer(0xABC00, (100, 64), None, "bf16"), 1.5], stream=0x77)
print("occupancy", device.blocks_per_unit(function, 256, 0), device.target, device.info.description, flush=True)
device.synchronize()
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_real_bindings_take_what_we_pass(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    source = Path(__file__).parent.parent / "support" / "stub_libcuda.c"
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source, "-ldl"], check=True
    )
    paths = [str(Path(cuda.__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", _THROUGH_BINDINGS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "load cubin",
        "function gemm 1",
        "attribute 8 100000",
        "map type 9 rank 2 at 0xabc00 dims 64 100 stride 128 box 32 128 steps 1 1 options 0 2 3 0",
        "launch 1 grid 6 2 1 block 256 1 1 shared 100000 stream 0x77 args 0xabc00 100 1.500000 6 2 1 map 5a 5a 0",
        "occupancy 3 sm_90a NVIDIA Stub",
    ], done.stderr
