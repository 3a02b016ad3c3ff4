"""The autotuner, on a stand-in for the CUDA driver whose launches take a time that depends on the grid."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_driver import CUresult, FakeDriver

import tilewright as tw
from tilewright.compiler import autotune, driver, launch, tuner
from tilewright.compiler.autotune import AutotunedKernel, program_digest
from tilewright.compiler.pool import WorkerPool
from tilewright.compiler.tuning_file import TuningFile
from tilewright.compiler.worker import Request
from tilewright.runtime.arguments import DevicePointer
from tilewright.runtime.bench import Clock
from tilewright.runtime.cuda import CudaDevice

CONFIGS = [tw.Config({"BN": 64}), tw.Config({"BN": 128}, num_warps=4), tw.Config({"BN": 256}, num_warps=8)]


@tw.kernel
def copy(x: tw.Tensor, y: tw.Tensor, n: int, *, BN: tw.constexpr, FAST: tw.constexpr = False):
    i = tw.program_id(0)
    tw.store(y, (i,), tw.load(x, (i,), (BN,)))


@tw.kernel
def accumulate(x: tw.Tensor, y: tw.Tensor, *, BN: tw.constexpr = 64, TWICE: tw.constexpr = False):
    i = tw.program_id(0)
    value = tw.load(x, (i,), (BN,)) + tw.load(y.offset(0), (i,), (BN,))
    tw.store(y.offset(0), (i,), value)
    if TWICE:
        tw.store(x, (i,), value)


class TimedDriver(FakeDriver):
    """A launch takes ``time_of(blocks)`` microseconds of ``now``; ``refused`` grids do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.time_of = {16: 30.0, 8: 10.0, 4: 20.0}
        self.refused: set[int] = set()

    def cuLaunchKernel(self, *args: Any) -> tuple[CUresult]:
        if args[1] in self.refused:
            return (CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,)
        self.now += self.time_of.get(args[1], 50.0)
        return super().cuLaunchKernel(*args)

    def grids(self) -> list[int]:
        return [args[1] for args in self.named("cuLaunchKernel")]


class DriverClock(Clock):
    def __init__(self, gpu: TimedDriver) -> None:
        self.gpu = gpu

    def prepare(self, flush: bool) -> None: ...

    def synchronize(self) -> None: ...

    def stamp(self) -> float:
        return self.gpu.now

    def elapsed_us(self, start: float, stop: float) -> float:
        return stop - start


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TimedDriver:
    gpu = TimedDriver()
    device = CudaDevice(0, gpu)
    for module in (launch, autotune):
        monkeypatch.setattr(module, "open_device", lambda name: device)
    monkeypatch.setattr(tuner, "pick_clock", lambda device: DriverClock(gpu))
    monkeypatch.setenv("TILEWRIGHT_TUNING_FILE", str(tmp_path / "tuning.json"))
    return gpu


def tuned(key: Any = ("x.shape[0]",), configs: Any = CONFIGS, kernel: Any = copy, **options: Any) -> AutotunedKernel:
    return tw.autotune(configs=configs, key=list(key), **options)(kernel)


def vector(address: int = 0x10000, n: int = 1024) -> DevicePointer:
    return DevicePointer(address, (n,))


def grid(meta: Any) -> tuple[int]:
    return (tw.cdiv(1024, meta["BN"]),)


def test_the_fastest_config_runs(gpu: TimedDriver) -> None:
    kernel = tuned()
    kernel[grid](vector(), vector(0x20000), 5)
    assert kernel.best_config is CONFIGS[1]
    assert gpu.grids()[-1] == 8 and {*gpu.grids()} == {16, 8, 4}
    launches = len(gpu.grids())
    kernel[grid](vector(0x30000), vector(0x20000), 6)
    assert gpu.grids()[launches:] == [8]
    threads = gpu.named("cuLaunchKernel")[-1][4]
    assert threads == 128


def test_each_key_is_tuned_once(gpu: TimedDriver) -> None:
    kernel = tuned(key=("x.shape[0] // 1000", "n"))
    kernel[grid](vector(), vector(0x20000), 5)
    before = len(gpu.grids())
    gpu.time_of[16] = 1.0
    kernel[grid](vector(n=1100), vector(0x20000, 1100), 5)  # the same key
    assert len(gpu.grids()) == before + 1 and kernel.best_config is CONFIGS[1]
    kernel[grid](vector(), vector(0x20000), 6)
    assert kernel.best_config is CONFIGS[0]
    kernel[grid](vector(), vector(0x20000), 5)
    assert kernel.best_config is CONFIGS[1]
    kernel[grid](vector(), vector(0x20000), 5, FAST=True)  # compile-time arguments count
    assert kernel.best_config is CONFIGS[0]


def test_choices_are_pinned(gpu: TimedDriver, tmp_path: Path) -> None:
    tuned()[grid](vector(), vector(0x20000), 5)
    data = json.loads((tmp_path / "tuning.json").read_text())
    ((key, entry),) = data["entries"].items()
    assert key.startswith("copy ") and "sm_90a NVIDIA Fake 80GB" in key and "x.shape[0]=1024" in key
    assert entry["config"] == {"meta": {"BN": 128}, "num_warps": 4}
    assert entry["times_us"]["BN=128, num_warps=4"] == 10
    before = len(gpu.grids())
    gpu.time_of[8] = 1000.0
    again = tuned()
    again[grid](vector(), vector(0x20000), 5)
    assert again.best_config is CONFIGS[1] and len(gpu.grids()) == before + 1
    without = tuned(configs=[CONFIGS[0], CONFIGS[2]])  # the pin names a config that is gone
    without[grid](vector(), vector(0x20000), 5)
    assert without.best_config is CONFIGS[2]


def test_what_does_not_fit_is_left_out(gpu: TimedDriver, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("TILEWRIGHT_PRINT_AUTOTUNING", "1")
    gpu.refused = {8}
    too_large = tw.Config({"BN": 3})  # no power of two where the language wants one, or a size the passes refuse
    kernel = tuned(configs=[tw.Config({"BN": "wide"}), *CONFIGS, too_large])
    kernel[grid_of_text](vector(), vector(0x20000), 5)
    assert kernel.best_config is CONFIGS[2]
    printed = capsys.readouterr().err
    assert "tuned copy for" in printed and "skipped     BN=wide" in printed and "fewer warps" in printed


def grid_of_text(meta: Any) -> tuple[int]:
    return (tw.cdiv(1024, meta["BN"] if isinstance(meta["BN"], int) else 1),)


def test_the_error_of_the_first_if_none_fits(gpu: TimedDriver) -> None:
    gpu.refused = {4, 8, 16}
    with pytest.raises(tw.DeviceError, match="OUT_OF_RESOURCES"):
        tuned()[grid](vector(), vector(0x20000), 5)
    with pytest.raises(tw.CompileError):
        tuned(configs=[tw.Config({"BN": "a"}), tw.Config({"BN": "b"})])[(1,)](vector(), vector(0x20000), 5)


def test_a_lost_context_ends_tuning(gpu: TimedDriver) -> None:
    gpu.failures["cuLaunchKernel"] = CUresult.CUDA_ERROR_NOT_FOUND
    with pytest.raises(tw.DeviceError, match="NOT_FOUND"):
        tuned()[grid](vector(), vector(0x20000), 5)


def test_written_tensors_are_saved_and_restored(gpu: TimedDriver) -> None:
    kernel = tuned(configs=CONFIGS[:2], kernel=accumulate)
    kernel[grid](vector(), vector(0x20000))
    copies = gpu.named("cuMemcpyDtoD")
    assert copies == [(0xEE00, 0x20000, 4096), (0x20000, 0xEE00, 4096)] and gpu.named("cuMemFree") == [(0xEE00,)]
    names = [name for name, _ in gpu.calls if name in ("cuMemcpyDtoD", "cuLaunchKernel")]
    assert names[0] == names[-2] == "cuMemcpyDtoD" and names[-1] == "cuLaunchKernel"
    for n, options in ((1001, {"restore_value": ["x"]}), (1002, {"reset_to_zero": ["x"]})):
        gpu.calls.clear()
        tuned(configs=CONFIGS[:2], kernel=accumulate, key=("y.shape[0]",), **options)[grid](
            vector(n=1000), vector(0x20000, n)
        )
        assert {args[1] for args in gpu.named("cuMemcpyDtoD")} == {0x10000, 0x20000, 0xEE00}
    gpu.calls.clear()
    twice = [tw.Config({"BN": 64, "TWICE": value}) for value in (False, True)]
    tuned(configs=twice, kernel=accumulate)[grid](vector(), vector(0x20000))
    assert {args[1] for args in gpu.named("cuMemcpyDtoD")} == {0x10000, 0x20000, 0xEE00}


def test_torch_tensors_keep_their_contents() -> None:
    torch = pytest.importorskip("torch")
    from tilewright.runtime.snapshot import save

    device: Any = SimpleNamespace(name="cuda:0")
    x = torch.arange(12.0).reshape(3, 4).T
    restore = save(device, x, "x")
    x.zero_()
    restore()
    assert torch.equal(x, torch.arange(12.0).reshape(3, 4).T)
    y = np.arange(3)
    restore = save(device, y, "y")
    y[:] = 0
    restore()
    assert y.tolist() == [0, 1, 2]
    with pytest.raises(tw.DeviceError, match="'z' cannot be saved on cuda:0"):
        save(device, vector(), "z")


@pytest.mark.parametrize("device", [None, "cpu", "emulate:gfx942"])
def test_nothing_is_measured_without_a_gpu(device: str | None) -> None:
    kernel = tuned()
    x, y = np.arange(1024, dtype=np.float32), np.zeros(1024, np.float32)
    if device is None:
        kernel[grid](x, y, 0)
    else:
        tw.device(device).launch(kernel, grid, x, y, 0)
    assert kernel.best_config is CONFIGS[0] and (x == y).all()


def test_prune(gpu: TimedDriver) -> None:
    seen = []

    def small(configs: list[tw.Config], arguments: Any) -> list[tw.Config]:
        seen.append(arguments["n"])
        return [c for c in configs if c.meta["BN"] != 128]

    kernel = tuned(prune=small)
    kernel[grid](vector(), vector(0x20000), 5)
    assert kernel.best_config is CONFIGS[2] and seen == [5] and 8 not in gpu.grids()
    with pytest.raises(tw.ArgumentError, match="left no config"):
        tuned(prune=lambda configs, arguments: [], key=("n",))[grid](vector(), vector(0x20000), 5)


def test_mistakes() -> None:
    with pytest.raises(tw.ArgumentError, match=r"key 'M' names 'M', which is no parameter(?s:.*)'a.shape\[0\]'"):
        tuned(key=["M"])
    with pytest.raises(tw.ArgumentError, match="is no expression"):
        tuned(key=["x.shape["])
    with pytest.raises(tw.ArgumentError, match="names 'FST'(?s:.*)did you mean 'FAST'"):
        tuned(configs=[tw.Config({"FST": True})])
    with pytest.raises(tw.ArgumentError, match="no configs"):
        tuned(configs=[])
    with pytest.raises(TypeError, match=r"above @tw.kernel"):
        tw.autotune(CONFIGS, [])(lambda x: x)  # type: ignore[arg-type]
    x = np.zeros(8, np.float32)
    with pytest.raises(tw.ArgumentError, match="'BN' is chosen by tw.autotune"):
        tuned()[(1,)](x, x.copy(), 1, BN=64)


def test_bad_keys_at_launch(gpu: TimedDriver) -> None:
    with pytest.raises(tw.ArgumentError, match=r"key 'x.shape\[1\]' of tw.autotune: IndexError"):
        tuned(key=["x.shape[1]"])[grid](vector(), vector(), 1)


def test_no_tuning_while_a_graph_is_captured(gpu: TimedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    torch = SimpleNamespace(
        Tensor=type(None), cuda=SimpleNamespace(is_initialized=lambda: True, is_current_stream_capturing=lambda: True)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(tw.DeviceError, match="graph is captured"):
        tuned()[grid](vector(), vector(0x20000), 5)


def test_digests_ignore_the_place() -> None:
    digest = program_digest(copy.definition)
    assert digest == program_digest(tuned().definition) != program_digest(accumulate.definition)


# --- the file ---------------------------------------------------------------------------------------


def _pin(path: Path, who: int, results: Any) -> None:
    file = TuningFile(path)
    for n in range(20):
        results.put((n, file.pin(f"key {n}", {"config": who})["config"]))


def test_processes_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    path = tmp_path / "deep" / "tuning.json"
    processes = [context.Process(target=_pin, args=(path, who, results)) for who in range(3)]
    for process in processes:
        process.start()
    seen: dict[int, set[int]] = {}
    for _ in range(60):
        n, winner = results.get()
        seen.setdefault(n, set()).add(winner)
    for process in processes:
        process.join()
    assert len(seen) == 20 and all(len(winners) == 1 for winners in seen.values())
    assert {k: e["config"] for k, e in TuningFile(path).entries().items()} == {
        f"key {n}": w.pop() for n, w in seen.items()
    }


def test_damaged_files_hold_nothing(tmp_path: Path) -> None:
    file = TuningFile(tmp_path / "tuning.json")
    for text in ("", "{", "[]", '{"version": 0, "entries": {"a": {}}}', '{"version": 1, "entries": 3}'):
        file.path.write_text(text)
        assert file.entries() == {}
    assert file.pin("a", {"config": 1}) == {"config": 1}
    assert file.pin("a", {"config": 2}) == {"config": 1}
    assert file.pin("a", {"config": 2}, replace=True) == {"config": 2} == file.entries()["a"]


# --- the pool of workers ------------------------------------------------------------------------------


def test_a_pool_uses_as_many_workers_as_callers() -> None:
    pool = WorkerPool(3)
    running, most, lock = [0], [0], threading.Lock()

    class Slow:
        def __init__(self) -> None:
            self.served = 0

        def compile(self, request: Request) -> str:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.02)
            with lock:
                running[0] -= 1
            self.served += 1
            return request.ir

    workers: list[Any] = [Slow() for _ in range(3)]
    pool._free[:] = workers
    assert [pool.compile(Request("a", "t")) for _ in range(3)] == ["a"] * 3
    assert [worker.served for worker in workers] == [0, 0, 3] and most == [1]
    threads = [threading.Thread(target=pool.compile, args=(Request("b", "t"),)) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [3] and sum(worker.served for worker in workers) == 12 and len(pool._free) == 3


def test_compilations_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setenv("TILEWRIGHT_ALWAYS_COMPILE", "1")
    pool = WorkerPool(2)
    monkeypatch.setattr(driver, "shared_pool", lambda: pool)
    spec = {n: tw.spec("f32", ("N",)) for n in "xy"} | {"n": tw.int32}
    sizes = (32, 64, 128, 256)
    try:
        with ThreadPoolExecutor(4) as threads:
            together = list(threads.map(lambda bn: tw.compile(copy, "gfx942", {**spec, "BN": bn}).binary, sizes))
        alone = [tw.compile(copy, "gfx942", {**spec, "BN": bn}).binary for bn in sizes]
        assert together == alone and len({worker.pid for worker in pool._free}) == 2
    finally:
        pool.stop()
