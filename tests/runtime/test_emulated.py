"""Emulated AMD devices: kernels compiled to their assembly, run on host arrays."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import tilewright as tw
from tilewright.compiler.cli import main
from tilewright.ir.abi import KernelABI, ScalarParam
from tilewright.kernels.gemm import gemm
from tilewright.kernels.softmax import softmax
from tilewright.runtime.device import open_device
from tilewright.runtime.emulated import EmulatedDevice, EmulationOptions
from tilewright.runtime.errors import ArgumentError, DeviceError

TARGETS = ("gfx942", "gfx950")


@tw.kernel
def affine(x: tw.Tensor, y: tw.Tensor, scale: tw.float32, shift: int, *, BM: tw.constexpr = 16, BN: tw.constexpr = 64):
    i, j = tw.program_id(0), tw.program_id(1)
    tw.store(y, (i, j), tw.load(x, (i, j), (BM, BN)) * scale + shift.to(tw.float32))


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_a_matrix_product(target: str) -> None:
    a, b = normal(70, 50, dtype=ml_dtypes.bfloat16), normal(50, 90, dtype=ml_dtypes.bfloat16, seed=1)
    c = np.full((70, 90), np.nan, ml_dtypes.bfloat16)
    tw.device(f"emulate:{target}").launch(gemm, (2, 2), a, b, c, BM=64, BN=64, BK=32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(c.astype(np.float64) - exact).max() / np.abs(exact).max()
    assert error < 0.01
    device = open_device(f"emulate:{target}")
    assert isinstance(device, EmulatedDevice) and device.statistics is not None
    assert any("mfma" in name for name in device.statistics.by_mnemonic)


def test_reversed_tensors_are_refused_on_amd() -> None:
    x, y = normal(40, 200), np.zeros((40, 200), np.float32)
    with pytest.raises(DeviceError, match="'x' runs backwards along dimension 0"):
        tw.emulate("gfx942").launch(affine, lambda meta: (3, -(-200 // meta["BN"])), x[::-1], y, 2.5, -3)


@pytest.mark.parametrize("layout", ["plain", "transposed", "rows apart", "unaligned", "broadcast"])
def test_every_layout_of_memory(layout: str) -> None:
    base = normal(40, 200)
    x = {
        "plain": base,
        "transposed": np.ascontiguousarray(base.T).T,
        "rows apart": normal(40, 300)[:, 20:220],
        "unaligned": normal(40 * 200 + 1).reshape(-1)[1:].reshape(40, 200),
        "broadcast": np.broadcast_to(normal(200), (40, 200)),
    }[layout]
    home = np.full((40, 400), 7.0, np.float32)
    y = home[:, 100:300]
    tw.emulate("gfx942").launch(affine, lambda meta: (3, -(-200 // meta["BN"])), x, y, 2.5, -3)
    np.testing.assert_allclose(y, x * np.float32(2.5) - 3, rtol=1e-6, atol=1e-6)  # with or without fma
    assert (home[:, :100] == 7).all() and (home[:, 300:] == 7).all()


def test_overlapping_arrays_are_one_memory() -> None:
    x = normal(16, 64)
    expected = x * 2 + 1
    tw.emulate("gfx942").launch(affine, (1, 1), x, x, 2.0, 1)
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)


def test_an_artifact_with_two_entries_picks_by_alignment() -> None:
    artifact = tw.compile(softmax, "gfx942", {n: tw.spec("f32", ("M", "N")) for n in "xy"} | {"BN": 256})
    assert len(artifact.entries) == 2
    device = open_device("emulate:gfx942")
    for columns in (128, 99):  # 99: rows that are not multiples of 16 bytes
        x, y = normal(5, columns), np.full((5, columns), np.nan, np.float32)
        artifact.launch(device, (5,), [x, y])
        exact = np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(y, exact, rtol=1e-4)


def test_torch_tensors_of_the_host() -> None:
    torch = pytest.importorskip("torch")
    x, y = torch.randn(20, 70), torch.full((20, 70), float("nan"))
    tw.emulate("gfx950").launch(affine, (2, 2), x, y, 0.5, 4)
    assert torch.allclose(y, x * 0.5 + 4)


def test_threads_open_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, together = EmulationOptions.parse, threading.Barrier(2, timeout=10)

    def slow(text: str) -> Any:
        time.sleep(0.05)
        return parse(text)

    monkeypatch.setattr(EmulationOptions, "parse", slow)

    def work(_: int) -> Any:
        together.wait()
        return open_device("emulate:gfx942,seed=71")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert first is second


def test_nothing_to_do() -> None:
    x, y = normal(16, 64), np.full((16, 64), 7.0, np.float32)
    tw.emulate("gfx942").launch(affine, (0, 4), x, y, 2.0, 0)
    assert (y == 7).all()
    tw.emulate("gfx942").launch(affine, (1, 1), x[:, :0], y[:, :0], 2.0, 0)
    assert (y == 7).all()


def test_read_only_arrays_are_safe() -> None:
    x, y = normal(16, 64), np.zeros((16, 64), np.float32)
    x.flags.writeable = False
    tw.emulate("gfx942").launch(affine, (1, 1), x, y, 2.0, 0)
    y.flags.writeable = False
    before = y.copy()
    with pytest.raises(DeviceError, match="read-only"):
        tw.emulate("gfx942").launch(affine, (1, 1), x, y, 3.0, 0)
    np.testing.assert_array_equal(y, before)


def test_errors() -> None:
    with pytest.raises(DeviceError, match="no emulator of 'sm_70'.*emulate:gfx942"):
        tw.device("emulate:sm_70")
    with pytest.raises(DeviceError, match="no emulator of ''"):
        tw.device("emulate")
    device = open_device("emulate:gfx942")
    with pytest.raises(DeviceError, match="assembly"):
        device.load(b"\x7fELF")
    with pytest.raises(DeviceError, match="nothing"):
        device.load(b"", {"amdgcn": ""}).function("nothing")
    with pytest.raises(ArgumentError, match="takes 1 arguments"):
        device.launch(None, KernelABI("k", (ScalarParam("s", "i32"),), 64, 0), 1, [])
    records = np.zeros(8, np.dtype({"names": ["a"], "formats": ["f4"], "itemsize": 6}))
    with pytest.raises(ArgumentError, match="byte strides"):
        device.view(records["a"], "x")


def test_a_fault_names_the_kernel_and_the_instruction() -> None:
    types = {n: tw.spec("f32", (16, 64)) for n in "xy"}
    artifact = tw.compile(affine, "gfx942", {**types, "scale": tw.float32, "shift": tw.int32})
    device = open_device("emulate:gfx942")
    with pytest.raises(ArgumentError, match="compiled for 16"):
        artifact.launch(device, (1, 1), [normal(8, 64), normal(8, 64), 1.0, 1])
    wild = "s_mov_b64 exec, -1\n\tglobal_load_dword v0, v[0:1], off\n\ts_endpgm"
    asm = artifact.asm["amdgcn"].replace("s_endpgm", wild)
    function = device.load(b"", {"amdgcn": asm}).function("affine")
    with pytest.raises(DeviceError, match=r"'affine' on emulate:gfx942: .*(?s:.*)global_load_dword"):
        device.launch(function, artifact.abi, (1, 1), [normal(16, 64), normal(16, 64), 1.0, 1])


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "double.py").write_text(
        "import tilewright as tw\n\n@tw.kernel\ndef double(x: tw.Tensor, y: tw.Tensor):\n"
        "    i = tw.program_id(0)\n    tw.store(y, (i,), tw.load(x, (i,), (64,)) * 2.0)\n"
    )
    arguments = ["run", f"{tmp_path}/double.py:double", "--arg", "x=f32[100]", "--arg", "y=f32[100]", "--grid", "2"]
    outputs = []
    for device in ("cpu", "emulate:gfx942", "emulate:sm_90a"):
        done = CliRunner().invoke(main, [*arguments, "--device", device, "--json"])
        assert done.exit_code == 0, done.output
        outputs.append(json.loads(done.output)["written"])
    assert outputs[0] == outputs[1] and {*outputs[0]} == {"y"}
    refused = CliRunner().invoke(main, [*arguments, "--device", "emulate:sm_70"])
    assert refused.exit_code == 1 and "no emulator" in refused.output
