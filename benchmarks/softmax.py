"""Softmax of rows against a device copy of the same bytes and torch.softmax, in the same run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tilewright.kernels.softmax import softmax
from tilewright.runtime.bench import compare


def measure(rows: int, columns: int, repeats: int) -> dict[str, object]:
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    y, copy, library = (torch.full_like(x, float("nan")) for _ in range(3))
    softmax[(rows,)](x, y, BN=columns)
    exact = torch.softmax(x.double(), dim=1)
    error = float((y.double() - exact).norm() / exact.norm())
    result = compare(
        {
            "ours": lambda: softmax[(rows,)](x, y, BN=columns),
            "copy": lambda: copy.copy_(x),
            "torch": lambda: torch.softmax(x, dim=1, out=library),
        },
        repeats=repeats,
    )
    bytes_moved = 2 * x.numel() * x.element_size()
    times = {name: result[name].median_us for name in ("ours", "copy", "torch")}
    return {
        "shape": f"{rows}x{columns}",
        **{f"{name}_us": t for name, t in times.items()},
        "ours_tb_s": bytes_moved / times["ours"] / 1e6,
        "copy_tb_s": bytes_moved / times["copy"] / 1e6,
        "of_copy": times["copy"] / times["ours"],
        "over_torch": times["torch"] / times["ours"],
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(m, n, options.repeats) for m, n in [(16384, 4096), (65536, 1024), (4096, 16384)]]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, medians, random normal inputs")
    for r in rows:
        print(
            f"{r['shape']:>12}  ours {r['ours_tb_s']:.2f}  copy {r['copy_tb_s']:.2f} TB/s  of copy {r['of_copy']:.2f}  "
            f"over torch {r['over_torch']:.2f}  error {r['error']:.1e}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
