"""Worlds of real GPUs. The scenarios of `multi_gpu_stress.py`, shortened; they need two GPUs with peer access."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)


@pytest.mark.parametrize("world", ["local", "connect", "distributed"])
def test_ranks_under_stress(world: str) -> None:
    script = Path(__file__).parent / "multi_gpu_stress.py"
    command = [sys.executable, script, "--world", world, "--iterations", "500"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "ok   " + world in done.stdout, done.stdout + done.stderr
