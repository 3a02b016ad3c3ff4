"""Matrix product against cuBLAS (torch.mm) in the same run, interleaved, random normal inputs.

python benchmarks/gemm.py [--shapes all|small] [--dtype f16] [--json FILE]: ratio of median times, error of
both against float64, and whether two runs give the same bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean

import torch

from tilewright.kernels.gemm import matmul, split_configuration
from tilewright.runtime.bench import compare

SHAPES = [(2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)]
MORE_SHAPES = [
    (8192, 8192, 1024), (4096, 14336, 4096), (512, 8192, 8192), (64, 8192, 8192), (8191, 4097, 2049),
]  # fmt: skip
#: few tiles: the grid would leave SMs idle
SMALL_SHAPES = [
    (512, 512, 16384), (1024, 1024, 8192), (256, 4096, 4096), (128, 8192, 8192), (64, 4096, 16384), (2048, 2048, 2048),
    (64, 8192, 8192), (512, 512, 4096), (1024, 512, 8192), (256, 256, 16384),
]  # fmt: skip
#: forward, gradients of inputs and of weights in Llama 3 8B's layers, for 16384 rows
LLAMA_SHAPES = [
    *((16384, n, k, "NT") for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))),
    *((16384, n, k, "NN") for n, k in ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))),
    *((m, n, 16384, "TN") for m, n in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))),
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
DENSE_TFLOPS = 989.4  # H100 SXM datasheet, bf16 dense: the roofline


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Normally distributed; layout T is a transposed view of a row-major matrix."""
    if layout == "T":
        return torch.randn(columns, rows, device="cuda", dtype=dtype).T
    return torch.randn(rows, columns, device="cuda", dtype=dtype)


def error(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rows: int = 256) -> float:
    """Relative Frobenius error against float64 over the first and last rows."""
    every = torch.arange(c.shape[0], device=c.device)
    pick = torch.unique(torch.cat([every[:rows], every[-rows:]]))
    exact = a[pick].double() @ b.double()
    return float((c[pick].double() - exact).norm() / exact.norm())


def measure(
    m: int, n: int, k: int, layout: str, dtype: torch.dtype, repeats: int, launches: int = 1
) -> dict[str, object]:
    a, b = matrix(m, k, layout[0], dtype), matrix(k, n, layout[1], dtype)
    c = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
    matmul(a, b, c)
    again = torch.full_like(c, float("nan"))
    matmul(a, b, again)
    library = torch.mm(a, b)
    errors = error(c, a, b), error(library, a, b)
    same = torch.equal(c.view(torch.int16), again.view(torch.int16))
    out = torch.empty_like(c)
    calls = {"ours": lambda: matmul(a, b, c), "cublas": lambda: torch.mm(a, b, out=out)}
    several = {name: lambda call=call: [call() for _ in range(launches)] for name, call in calls.items()}
    result = compare(several, repeats=repeats)
    ours, theirs = (result[name].median_us / launches for name in calls)
    flops = 2 * m * n * k
    tiles, runs = split_configuration(m, n, k)
    return {
        "shape": f"{m}x{n}x{k}",
        "layout": layout,
        "tiles": list(tiles.values()),
        "runs": runs,
        "ours_us": ours,
        "cublas_us": theirs,
        "ratio": theirs / ours,
        "ours_tflops": flops / ours / 1e6,
        "cublas_tflops": flops / theirs / 1e6,
        "of_roofline": flops / ours / 1e6 / DENSE_TFLOPS,
        "error": errors[0],
        "cublas_error": errors[1],
        "bit_equal": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--shapes", choices=["few", "all", "small", "llama"], default="few")
    parser.add_argument("--layouts", default="NT,NN", help="not for llama, whose layouts belong to the shapes")
    parser.add_argument("--launches", type=int, default=1, help="in a sample: several run at the clocks of long work")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = {"llama": [], "few": SHAPES, "all": SHAPES + MORE_SHAPES, "small": SMALL_SHAPES}[options.shapes]
    dtype = DTYPES[options.dtype]
    cases = [(*shape, layout) for shape in shapes for layout in options.layouts.split(",")]
    if options.shapes == "llama":
        cases = LLAMA_SHAPES
    rows = [measure(*case, dtype, options.repeats, options.launches) for case in cases]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}, medians, random normal inputs")
    for r in rows:
        speeds = f"ours {r['ours_tflops']:6.1f}  cublas {r['cublas_tflops']:6.1f} TFLOP/s  ratio {r['ratio']:.3f}"
        errors = f"error {r['error']:.2e} / {r['cublas_error']:.2e}  bit-equal {r['bit_equal']}"
        print(f"{r['shape']:>18} {r['layout']} {r['tiles']!s:<14} x {r['runs']}  {speeds}  {errors}")
    mean = geometric_mean(float(str(r["ratio"])) for r in rows)
    print(f"geometric mean of ratios: {mean:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "geometric_mean": mean}, indent=1))


if __name__ == "__main__":
    main()
