"""Products whose operand is cast inside of the kernel, against what Inductor makes of the cast and the product."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.gemm_cast import cast_matmul
from tilewright.runtime.bench import compare

#: tokens, and rows and columns of the weight
EIGHT_BITS = [(16, 14336, 4096), (64, 14336, 4096), (512, 14336, 4096)]
WEIGHTS = [(64, 4096, 4096), (4096, 4096, 4096), (16384, 4096, 4096)]
INPUTS = [(16384, 128, 4096), (16384, 1024, 4096), (16384, 4096, 4096)]


def measure(kind: str, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    m, n, k = shape
    x, weight = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
    out, scale = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16), None
    x, weight = (x, weight.bfloat16()) if kind == "float32 input" else (x.bfloat16(), weight)
    if kind == "fp8 weight":
        weight, scale = weight.to(torch.float8_e4m3fn), torch.rand(n, 1, device="cuda") + 0.5
    scales = None if scale is None else scale.view(-1).contiguous()

    @torch.compile(dynamic=False)
    def rival(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        narrow = weight.bfloat16() if scale is None else (weight.float() * scale).bfloat16()
        return F.linear(x.bfloat16(), narrow)

    def ours() -> torch.Tensor:
        if kind == "float32 input":
            cast_matmul(x, weight.t(), out)
        else:
            cast_matmul(weight, x.t(), out.t(), scales=scales)
        return out

    exact = F.linear(x.bfloat16().double(), weight.bfloat16().double() * (1 if scale is None else scale.double()))
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (ours(), rival(x, weight))]
    found = {"work": kind, "shape": list(shape), "errors": errors}
    if repeats:
        narrow = weight.bfloat16()
        calls = {"ours": ours, "inductor": lambda: rival(x, weight), "product": lambda: F.linear(x.bfloat16(), narrow)}
        if kind == "float32 input":  # the cast counts in `inductor` alone
            short = x.bfloat16()
            calls["product"] = lambda: F.linear(short, narrow)
        times = compare(calls, repeats=repeats)
        found |= {f"{name}_us": times[name].median_us for name in calls}
        found["ratio"] = found["inductor_us"] / found["ours_us"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9, help="0: only compile and compare with float64")
    options = parser.parse_args()
    torch.manual_seed(0)
    works = [("fp8 weight", s) for s in EIGHT_BITS] + [("float32 weight", s) for s in WEIGHTS]
    rows = []
    for kind, shape in [*works, *(("float32 input", s) for s in INPUTS)]:
        try:
            rows.append(measure(kind, shape, options.repeats))
        except Exception as error:
            print(f"{kind} {shape}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        print({key: round(x, 3) if isinstance(x, float) else x for key, x in rows[-1].items()}, flush=True)
        if options.json:
            options.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
