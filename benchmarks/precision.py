"""float64 and float32 matrix products against cuBLAS (torch.mm, tf32 off) in the same run, random normal inputs.

python benchmarks/precision.py [--size 4096] [--layouts NN,NT] [--json FILE]: ratio of median times, and error of both
against extended precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright.kernels.precise_gemm import TILES, configuration, precise_matmul, reference
from tilewright.runtime.bench import compare

#: rows that are compared with the reference, which a CPU computes
ROWS = 4


def matrix(size: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Normally distributed; layout T is a transposed view of a row-major matrix."""
    values = torch.randn(size, size, device="cuda", dtype=dtype)
    return values.T if layout == "T" else values


def error(c: torch.Tensor, exact: np.ndarray[Any, Any]) -> float:
    """Relative Frobenius error of the first rows."""
    rows = c[: len(exact)].cpu().numpy()
    return float(np.linalg.norm((rows - exact).astype(np.float64)) / np.linalg.norm(exact.astype(np.float64)))


def measure(size: int, layout: str, dtype: str, precision: str, repeats: int) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    a, b = matrix(size, layout[0], kind), matrix(size, layout[1], kind)
    c = torch.full((size, size), float("nan"), device="cuda", dtype=kind)
    precise_matmul(a, b, c, precision)
    library, exact = torch.mm(a, b), reference(a[:ROWS].cpu().numpy(), b.cpu().numpy())
    errors = [error(x, exact) for x in (c, library)]
    finite = bool(torch.isfinite(c).all())
    out = torch.empty_like(c)
    candidates = {"ours": lambda: precise_matmul(a, b, c, precision), "cublas": lambda: torch.mm(a, b, out=out)}
    result = compare(candidates, repeats=repeats)
    ours, theirs = result["ours"].median_us, result["cublas"].median_us
    flops = 2 * size**3
    return {
        "size": size,
        "layout": layout,
        "dtype": dtype,
        "precision": precision,
        "tiles": list(configuration(size, size, dtype, precision).values())[:3],
        "ours_us": ours,
        "cublas_us": theirs,
        "ratio": theirs / ours,
        "ours_tflops": flops / ours / 1e6,
        "cublas_tflops": flops / theirs / 1e6,
        "error": errors[0],
        "cublas_error": errors[1],
        "finite": finite,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--layouts", default="NN,NT")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    layouts = options.layouts.split(",")
    rows = [measure(options.size, layout, *kind, options.repeats) for kind in TILES for layout in layouts]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians, random normal inputs")
    for r in rows:
        what = f"{r['dtype']} {r['precision']:<8} {r['size']}^3 {r['layout']} {r['tiles']!s:<14}"
        speeds = f"ours {r['ours_tflops']:6.1f}  cublas {r['cublas_tflops']:6.1f} TFLOP/s  ratio {r['ratio']:.3f}"
        print(f"{what} {speeds}  error {r['error']:.2e} / {r['cublas_error']:.2e}  finite {r['finite']}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
