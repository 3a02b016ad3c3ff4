"""Kernels over rows and columns against torch and a device copy of the same matrix, in the same run.

`of copy`: bytes per second of ours over those of the copy (bytes read plus bytes written, each counted once).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tilewright as tw
from tilewright.kernels.column_sum import column_sums, workspace_shapes
from tilewright.kernels.rmsnorm import rms_rows
from tilewright.kernels.softmax import softmax_rows
from tilewright.kernels.transpose import tiles, transpose
from tilewright.runtime.bench import compare

EPS = 1e-5
SHAPES = [(4096, 4096), (16384, 1024), (16384, 4096), (65536, 1024), (4096, 16384), (8192, 16384), (65536, 4096)]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass
class Case:
    """What is compared: two ways to fill an output, the exact output, and the bytes that have to move."""

    ours: Callable[[], object]
    library: Callable[[], object]
    output: torch.Tensor
    exact: torch.Tensor
    bytes: int


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def softmax_case(x: torch.Tensor) -> Case:
    y, library = poisoned(*x.shape, dtype=x.dtype), torch.empty_like(x)
    return Case(
        lambda: softmax_rows(x, y),
        lambda: torch.softmax(x, dim=1, out=library),
        y,
        torch.softmax(x.double(), dim=1),
        2 * x.nbytes,
    )


def rmsnorm_case(x: torch.Tensor) -> Case:
    y, weight = poisoned(*x.shape, dtype=x.dtype), torch.randn_like(x[0])
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
    return Case(
        lambda: rms_rows(x, weight, y, EPS),
        lambda: torch.nn.functional.rms_norm(x, (x.shape[1],), weight, EPS),
        y,
        exact,
        2 * x.nbytes,
    )


def transpose_case(x: torch.Tensor) -> Case:
    (m, n), meta = x.shape, tiles(x.element_size())
    y, library = poisoned(n, m, dtype=x.dtype), torch.empty(n, m, device="cuda", dtype=x.dtype)
    return Case(
        lambda: transpose[(tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"]))](x, y, **meta),
        lambda: library.copy_(x.T),
        y,
        x.T.double(),
        2 * x.nbytes,
    )


def column_sum_case(x: torch.Tensor) -> Case:
    partial, arrived = workspace_shapes(*x.shape, x.itemsize)
    workspace = poisoned(*partial, dtype=torch.float32), torch.zeros(arrived, device="cuda", dtype=torch.int32)
    y = poisoned(1, x.shape[1], dtype=torch.float32)
    return Case(
        lambda: column_sums(x, y, *workspace),
        lambda: torch.sum(x, dim=0, dtype=torch.float32),
        y,
        x.double().sum(0, keepdim=True),
        x.nbytes,
    )


CASES = {
    "softmax": softmax_case, "rmsnorm": rmsnorm_case, "transpose": transpose_case, "column_sum": column_sum_case,
}  # fmt: skip


def measure(name: str, rows: int, columns: int, dtype: str, repeats: int) -> dict[str, Any]:
    x = torch.randn(rows, columns, device="cuda", dtype=DTYPES[dtype])
    copy = torch.empty_like(x)
    case = CASES[name](x)
    case.ours()
    error = float((case.output.double() - case.exact).norm() / case.exact.norm())
    case.exact = x.new_empty(0)
    result = compare({"ours": case.ours, "copy": lambda: copy.copy_(x), "torch": case.library}, repeats=repeats)
    ours, copied, library = (result[n].median_us for n in ("ours", "copy", "torch"))
    speed, copy_speed = case.bytes / ours / 1e6, 2 * x.nbytes / copied / 1e6
    return {
        "kernel": name, "shape": f"{rows}x{columns}", "dtype": dtype, "ours_us": ours, "torch_us": library,
        "copy_us": copied, "ours_tb_s": speed, "copy_tb_s": copy_speed, "of_copy": speed / copy_speed,
        "over_torch": library / ours, "error": error,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--kernels", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["bf16", "f32"])
    parser.add_argument("--shapes", nargs="+", type=lambda s: tuple(map(int, s.split("x"))), default=SHAPES)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians, random normal inputs")
    found = []
    for name in options.kernels:
        for dtype in options.dtypes:
            for rows, columns in options.shapes:
                r = measure(name, rows, columns, dtype, options.repeats)
                found.append(r)
                print(
                    f"{name:>10} {dtype:>4} {r['shape']:>12}  ours {r['ours_us']:7.1f} us {r['ours_tb_s']:.2f} TB/s  "
                    f"copy {r['copy_tb_s']:.2f}  of copy {r['of_copy']:.2f}  over torch {r['over_torch']:.2f}  "
                    f"error {r['error']:.1e}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
