"""What the host pays before a kernel runs: finding a compiled kernel in the cache, and launching it again.

Needs no GPU but for the comparison with Triton's launches, which needs both. Every lookup is of a kernel that was
compiled beforehand into a cache of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import tilewright as tw

_FIRST_LOOKUP = """
import json, sys, time
import tilewright as tw
from tilewright.compiler.lookup import cache_key, obtain
from tilewright.compiler.options import CompileOptions
from tilewright.compiler.version import compiler_version
from tilewright.kernels.gemm import gemm

def timed(call):
    start = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - start) * 1e6

row = [None, None]
args = {"a": tw.spec("bf16", ("M", "K")), "b": tw.spec("bf16", ("K", "N")), "c": tw.spec("bf16", ("M", "N"))}
_, parse = timed(lambda: gemm.definition.parameters)
_, version = timed(compiler_version)
artifact, first = timed(lambda: obtain(gemm.definition, sys.argv[1], args, CompileOptions()))
again = [timed(lambda: obtain(gemm.definition, sys.argv[1], args, CompileOptions()))[1] for _ in range(200)]
modules = [m for m in sys.modules if m.split(".")[0] in ("mlir", "llvmlite", "lark")
           or m.startswith(("tilewright.passes", "tilewright.backends"))]
print(json.dumps({"cached": artifact.cached, "parse_us": parse, "version_us": version, "first_us": first,
                  "lookup_us": sorted(again)[100], "compiler_modules": modules}))
"""


def lookups(target: str) -> dict[str, Any]:
    """Microseconds of a lookup in a fresh process: its parts, the first, and the median of the next 200."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, TILEWRIGHT_CACHE_DIR=folder)
        command = [sys.executable, "-c", _FIRST_LOOKUP, target]
        start = time.perf_counter()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        cold = time.perf_counter() - start
        runs = []
        for _ in range(5):
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout))
        assert all(run["cached"] and not run["compiler_modules"] for run in runs)
        size = sum(f.stat().st_size for f in Path(folder).rglob("*.kernel"))
    parts = {name: median(run[name] for run in runs) for name in ("parse_us", "version_us", "first_us", "lookup_us")}
    return {"target": target, "cold_process_s": cold, "entry_bytes": size, **parts}


def launches(repeats: int = 2000) -> dict[str, float]:
    """Microseconds of a launch by Python but for the driver, on a device that does nothing."""
    import torch

    import tilewright.compiler.launch as launch
    from tilewright.kernels.gemm import gemm

    tensors = [torch.empty(64, 64) for _ in range(3)]
    call = gemm[(1, 1)]
    call(*tensors, BM=64, BN=64, BK=32)
    plan = next(iter(gemm.plans.values()))
    gemm.plans = dict.fromkeys(gemm.plans, launch.Plan(plan.constexprs, plan.sources, plan.defaults, lambda *_: None))
    return {"launch_us": _per_call(lambda: call(*tensors, BM=64, BN=64, BK=32), repeats)}


@tw.kernel
def _three(x: tw.Tensor, y: tw.Tensor, out: tw.Tensor, i: tw.int32, j: tw.int32, k: tw.int32) -> None:
    """Three tensors and three integers, and hardly any work."""
    tw.store(out, 0, tw.load(x, 0, (128,)) + tw.load(y, 0, (128,)) * (i + j + k).to(tw.float32))


def against_triton(repeats: int = 1000, rounds: int = 21) -> dict[str, float]:
    """Microseconds of host time of a repeated launch with three tensors and three integers, batches in turns."""
    import torch
    from triton_three import three

    x, y, out = (torch.ones(128, device="cuda") for _ in range(3))
    ours, theirs = _three[(1,)], three[(1,)]
    calls = {
        "ours": lambda: ours(x, y, out, 1, 2, 3),
        "python": lambda: ours.start(x, y, out, 1, 2, 3),  # without the extension
        "triton": lambda: theirs(x, y, out, 1, 2, 3, num_warps=4),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name in sorted(calls, reverse=bool(turn % 2)):
            out.fill_(float("nan"))
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            samples[name].append((time.perf_counter() - start) / repeats * 1e6)
            assert bool((out == 7).all())
    times = {name: median(values[2:]) for name, values in samples.items()}
    return {**times, "ratio": times["ours"] / times["triton"]}


def _per_call(fn: Callable[[], Any], repeats: int) -> float:
    samples = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(repeats):
            fn()
        samples.append((time.perf_counter() - start) / repeats * 1e6)
    return median(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [lookups(target) for target in ("sm_90a", "gfx942")]
    for row in rows:
        print(
            f"{row['target']:>8}  lookup {row['lookup_us']:.0f} us, first in a process {row['first_us']:.0f} us "
            f"(after parsing the kernel {row['parse_us']:.0f} us, compiler version {row['version_us']:.0f} us); "
            f"entry {row['entry_bytes']} bytes; a process that compiles {row['cold_process_s']:.2f} s"
        )
    result: dict[str, Any] = {"lookups": rows}
    try:
        result["launch"] = launches()
        print(f"  launch  {result['launch']['launch_us']:.2f} us by Python before the driver, 3 tensors, 3 constexprs")
    except ImportError:
        pass
    try:
        result["against_triton"] = against_triton()
        print(
            "  launch  {ours:.2f} us, by Python {python:.2f} us, Triton {triton:.2f} us, ratio {ratio:.2f}".format(
                **result["against_triton"]
            )
        )
    except ImportError:
        pass
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
