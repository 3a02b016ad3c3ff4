"""bf16 matrix product against cuBLAS (torch.mm) in the same run, interleaved, random normal inputs.

python benchmarks/gemm.py [--json FILE]: ratio of median times, error of both against float64, and
whether two runs give the same bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean

import torch

import tilewright as tw
from tilewright.kernels.gemm import gemm
from tilewright.runtime.bench import compare

SHAPES = [(2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)]
DENSE_TFLOPS = 989.4  # H100 SXM datasheet, bf16 dense: the roofline


def operands(m: int, n: int, k: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a (m, k), b (k, n) and an output poisoned with NaN; ``transposed``: b is a view of an (n, k) matrix."""
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, k, device="cuda", dtype=torch.bfloat16).T if transposed else torch.randn(
        k, n, device="cuda", dtype=torch.bfloat16
    )  # fmt: skip
    return a, b, torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)


def error(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rows: int = 256) -> float:
    """Relative Frobenius error against float64 over the first and last rows."""
    pick = torch.cat([torch.arange(rows), torch.arange(c.shape[0] - rows, c.shape[0])]).to(c.device)
    exact = a[pick].double() @ b.double()
    return float((c[pick].double() - exact).norm() / exact.norm())


def measure(m: int, n: int, k: int, transposed: bool, repeats: int) -> dict[str, object]:
    a, b, c = operands(m, n, k, transposed)
    grid = (tw.cdiv(m, 128), tw.cdiv(n, 256))
    gemm[grid](a, b, c)
    again = torch.full_like(c, float("nan"))
    gemm[grid](a, b, again)
    library = torch.mm(a, b)
    errors = error(c, a, b), error(library, a, b)
    same = torch.equal(c.view(torch.int16), again.view(torch.int16))
    out = torch.empty_like(c)
    result = compare(
        {"ours": lambda: gemm[grid](a, b, c), "cublas": lambda: torch.mm(a, b, out=out)}, repeats=repeats
    )
    ours, theirs = result["ours"].median_us, result["cublas"].median_us
    flops = 2 * m * n * k
    return {
        "shape": f"{m}x{n}x{k}",
        "layout": "NT" if transposed else "NN",
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
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(*shape, transposed, options.repeats) for shape in SHAPES for transposed in (True, False)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians, random normal inputs")
    for r in rows:
        print(
            f"{r['shape']:>18} {r['layout']}  ours {r['ours_tflops']:6.1f}  cublas {r['cublas_tflops']:6.1f} TFLOP/s  "
            f"ratio {r['ratio']:.3f}  error {r['error']:.2e} / {r['cublas_error']:.2e}  bit-equal {r['bit_equal']}"
        )
    mean = geometric_mean(float(str(r["ratio"])) for r in rows)
    print(f"geometric mean of ratios: {mean:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "geometric_mean": mean}, indent=1))


if __name__ == "__main__":
    main()
