"""Attention forward against cuDNN (through torch SDPA) in the same run, interleaved, random normal inputs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tilewright.kernels.attention import sdpa
from tilewright.runtime.bench import compare

#: batch, heads, key heads, sequence, head dimension
SHAPES = [
    (16, 16, 16, 1024, 128), (8, 16, 16, 4096, 128), (4, 16, 16, 8192, 128), (2, 16, 16, 16384, 128),
    (16, 32, 32, 1024, 64), (8, 32, 32, 4096, 64), (4, 32, 32, 8192, 64), (2, 64, 8, 8192, 128),
]  # fmt: skip


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def inputs(shape: tuple[int, int, int, int, int]) -> list[torch.Tensor]:
    """q, k, v, and where the output goes."""
    batch, heads, groups, rows, depth = shape
    q = torch.randn(batch, heads, rows, depth, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, groups, rows, depth, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return [q, k, v, torch.full_like(q, float("nan"))]


def measure(shape: tuple[int, int, int, int, int], causal: bool, repeats: int) -> dict[str, object]:
    batch, heads, _, rows, depth = shape
    q, k, v, o = inputs(shape)
    sdpa(q, k, v, o, causal)
    library = cudnn(q, k, v, causal)
    pick = (slice(0, 1), slice(0, 1))
    exact = scaled_dot_product_attention(*(x[pick].double() for x in (q, k, v)), is_causal=causal)
    errors = [float((x[pick].double() - exact).norm() / exact.norm()) for x in (o, library)]
    result = compare(
        {"ours": lambda: sdpa(q, k, v, o, causal), "cudnn": lambda: cudnn(q, k, v, causal)}, repeats=repeats
    )
    flops = 4 * batch * heads * rows * rows * depth // (2 if causal else 1)
    ours, theirs = result["ours"].median_us, result["cudnn"].median_us
    return {
        "shape": list(shape),
        "causal": causal,
        "ours_tflops": flops / ours / 1e6,
        "cudnn_tflops": flops / theirs / 1e6,
        "ratio": theirs / ours,
        "error": errors[0],
        "cudnn_error": errors[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(shape, causal, options.repeats) for causal in (False, True) for shape in SHAPES]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, medians, random normal inputs")
    for r in rows:
        speeds = f"ours {r['ours_tflops']:6.1f}  cudnn {r['cudnn_tflops']:6.1f} TFLOP/s  ratio {r['ratio']:.3f}"
        print(f"{r['shape']!s:<28} causal {r['causal']!s:<5} {speeds}  error {r['error']:.2e} / {r['cudnn_error']:.2e}")
    mean = geometric_mean(float(str(r["ratio"])) for r in rows)
    print(f"geometric mean of ratios: {mean:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "geometric_mean": mean}, indent=1))


if __name__ == "__main__":
    main()
