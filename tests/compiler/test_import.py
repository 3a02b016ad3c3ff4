"""Importing the package is cheap: no GPU library, no MLIR, no LLVM, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

import tilewright

#: seconds; the best of three, since the requirement is about the package and not about a busy machine
LIMIT = 0.3
HEAVY = {"mlir", "llvm", "llvmlite", "cuda", "hip", "rocm", "nvidia", "torch", "triton"}

MEASURE = """
import json, sys, time
start = time.perf_counter()
import tilewright as tw
seconds = time.perf_counter() - start
{then}
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def imported(then: str = "") -> tuple[float, set[str]]:
    script = MEASURE.format(then=then)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


def test_import_is_fast():
    assert min(imported()[0] for _ in range(3)) < LIMIT


def test_import_loads_no_heavy_package():
    assert not imported()[1] & (HEAVY | {"numpy"})


def test_defining_and_running_a_kernel_on_the_cpu_loads_no_gpu_package():
    define = "tw.kernel; tw.Tensor; tw.compile; tw.device('cpu'); tw.spec('f32', ('N',))"
    assert not imported(define)[1] & HEAVY


def test_every_public_name_exists():
    import tilewright as tw

    assert {"kernel", "compile", "device", "devices", "spec", "dot", "load", "CompileError"} <= set(dir(tw))
    for name in dir(tw):
        if name != "torch_op" or find_spec("torch"):
            assert getattr(tw, name) is not None


def test_what_needs_torch_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [m for m in sys.modules if m.startswith("tilewright.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(tilewright), "torch_op", raising=False)
    with pytest.raises(ImportError, match=r"tw.torch_op needs PyTorch: pip install 'tilewright\[torch\]'"):
        _ = tilewright.torch_op
