"""Cold compile of the matrix product, and finding it on disk, against Triton's persistent TMA matmul in the same run.

python benchmarks/compile_time.py [--rounds 3] [--json FILE]. Every time is taken in a fresh process after its imports:
`first` is the first compilation in the process, caches off; `next` one more, of other tile sizes, in the same process;
`disk` finds the first in a cache that an earlier process filled. Compilation ends with the binary; nothing is launched.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

#: (BM, BN, BK): the tiles of the first compilation and of the next
TILES = ((128, 256, 64), (128, 128, 64))
SIZE, SMS = 4096, 132
#: what Triton's tutorial of persistent products takes on Hopper
WARPS, STAGES, GROUP = 8, 3, 8


def compile_ours(tiles: tuple[int, int, int]) -> float:
    """Seconds to a binary of `tilewright.kernels.gemm.gemm`, as a launch on aligned matrices would compile it."""
    import tilewright as tw
    from tilewright.kernels.gemm import gemm

    matrix = tw.spec("bf16", ("M", "N"), align=16)
    meta = dict(zip(("BM", "BN", "BK"), tiles, strict=True))
    start = time.perf_counter()
    tw.compile(gemm, target="sm_90a", args={"a": matrix, "b": matrix, "c": matrix, **meta})
    return time.perf_counter() - start


def compile_triton(tiles: tuple[int, int, int]) -> float:
    """Seconds to a binary of the kernel below."""
    import torch
    from triton_matmul import matmul_persistent

    (bm, bn, bk), empty = tiles, torch.empty(SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
    start = time.perf_counter()
    matmul_persistent.warmup(
        empty, empty, empty, SIZE, SIZE, SIZE, bm, bn, bk, GROUP, SMS, grid=(SMS,), num_warps=WARPS, num_stages=STAGES
    )
    return time.perf_counter() - start


COMPILE = {"ours": compile_ours, "triton": compile_triton}


def child(name: str) -> None:
    """In a fresh process: imports, then one compilation after the other."""
    if name == "triton":
        import triton_matmul  # noqa: F401
    else:
        import tilewright.kernels.gemm  # noqa: F401
    print(json.dumps([COMPILE[name](tiles) for tiles in TILES]))


def measure(name: str, folder: str, always: bool) -> list[float]:
    """Seconds of both compilations in a fresh process with its cache in ``folder``."""
    environment = dict(os.environ, TILEWRIGHT_CACHE_DIR=folder, TRITON_CACHE_DIR=folder)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are byte-compiled, as the rival is here
    if always:
        environment |= {"TILEWRIGHT_ALWAYS_COMPILE": "1", "TRITON_ALWAYS_COMPILE": "1"}
    command = [sys.executable, __file__, "--child", name]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def rounds_of(names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds; the first round, which warms the page cache, does not count."""
    cold: dict[str, list[list[float]]] = {name: [] for name in names}
    warm: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds + 1):
            for name in names:
                cold[name].append(measure(name, folder, always=True))
                warm[name].append(measure(name, folder, always=False)[0])
    return {
        name: {
            "first": 1e3 * median(first for first, _ in cold[name][1:]),
            "next": 1e3 * median(following for _, following in cold[name][1:]),
            "disk": 1e3 * median(warm[name][1:]),
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=sorted(COMPILE))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    try:
        import triton

        names, version = ["ours", "triton"], triton.__version__
    except ImportError:
        names, version = ["ours"], "not installed"
    result: dict[str, Any] = rounds_of(names, options.rounds)
    print(f"milliseconds, medians of {options.rounds} fresh processes; Triton {version}")
    for name in names:
        print(f"{name:>8}  " + "  ".join(f"{what} {ms:7.1f}" for what, ms in result[name].items()))
    if options.json:
        options.json.write_text(json.dumps({"milliseconds": result, "triton": version}, indent=1))


if __name__ == "__main__":
    main()
