"""The autotuner, `check` and `bench` on a real CUDA device. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import tilewright as tw
from tilewright.compiler.cli import main

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

KERNELS = str(Path(tw.__file__).parent / "kernels")


@tw.kernel
def accumulate(x: tw.Tensor, y: tw.Tensor, *, BN: tw.constexpr):
    i = tw.program_id(0)
    tw.store(y, (i,), tw.load(y, (i,), (BN,)) + tw.load(x, (i,), (BN,)))


def test_tuning_keeps_outputs_and_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_TUNING_FILE", str(tmp_path / "tuning.json"))
    configs = [tw.Config({"BN": n}, num_warps=w) for n, w in ((32, 1), (1024, 4), (4096, 8))]
    configs.append(tw.Config({"BN": 1 << 24}))  # no registers for that
    x, y = torch.randn(1 << 20, device="cuda"), torch.randn(1 << 20, device="cuda")
    expected = x + y
    for _ in range(2):
        kernel = tw.autotune(configs=configs, key=["x.shape[0]"])(accumulate)
        actual = y.clone()
        kernel[lambda meta: (tw.cdiv(1 << 20, meta["BN"]),)](x, actual)
        assert torch.equal(actual, expected) and kernel.best_config is not None
        assert kernel.best_config.meta["BN"] in (1024, 4096)
    (entry,) = json.loads((tmp_path / "tuning.json").read_text())["entries"].values()
    assert len(entry["times_us"]) + len(entry["skipped"]) == 4


def test_the_command_line() -> None:
    arguments = [f"{KERNELS}/softmax.py:softmax", "--arg", "x=f32[M,N]", "--arg", "y=f32[M,N]", "--arg", "BN=512"]
    arguments += ["--grid", "M", "--device", "cuda:0", "--json"]
    checked = CliRunner().invoke(main, ["check", *arguments])
    assert checked.exit_code == 0 and json.loads(checked.output)["ok"], checked.output
    timed = CliRunner().invoke(main, ["bench", *arguments, "--size", "M=4096", "--size", "N=512"])
    assert timed.exit_code == 0, timed.output
    (row,) = json.loads(timed.output)["results"]
    assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] and row["tb_per_s"] > 0.01
