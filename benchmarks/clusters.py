"""Clusters of blocks (`num_ctas`): the same products with and without, interleaved with the library's, normal inputs.

python benchmarks/clusters.py [--dtype fp8] [--tiles 128x256,128x128] [--ctas 1,2,4] [--json FILE]: for each shape the
library's speed, and how many times as fast each variant is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import tilewright as tw
from tilewright.kernels.gemm import gemm
from tilewright.kernels.gemm_scaled import gemm_scaled
from tilewright.runtime.bench import compare

SHAPES = [
    (2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096), (8192, 8192, 1024),
    (4096, 14336, 4096),
]  # fmt: skip


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a and b, both contiguous along K, and a poisoned result."""
    a, b = (torch.randn(rows, k, device="cuda").to(dtype) for rows in (m, n))
    return a, b.T, torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)


def candidates(
    m: int, n: int, k: int, dtype: str, tiles: list[tuple[int, int]], ctas: list[int]
) -> dict[str, Callable[[], object]]:
    """The library first, then ours by tile and cluster. AssertionError where clusters change a bit of the result."""
    a, b, c = operands(m, n, k, torch.bfloat16 if dtype == "bf16" else torch.float8_e4m3fn)
    out, one = torch.empty_like(c), torch.ones(1, device="cuda")

    def library() -> object:
        if dtype == "bf16":
            return torch.mm(a, b, out=out)
        return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    def ours(bm: int, bn: int, blocks: int) -> Callable[[], object]:
        launch = (gemm if dtype == "bf16" else gemm_scaled)[(tw.cdiv(m, bm), tw.cdiv(n, bn))]
        scales = () if dtype == "bf16" else (one, one)
        return lambda: launch(a, b, *scales, c, BM=bm, BN=bn, num_ctas=blocks)

    found: dict[str, Callable[[], object]] = {"library": library}
    for bm, bn in tiles:
        results = []
        for blocks in ctas:
            run = found[f"{bm}x{bn} in {blocks}"] = ours(bm, bn, blocks)
            c.fill_(float("nan"))
            run()
            results.append(c.clone())
        assert not results[0].isnan().any() and all(torch.equal(results[0], other) for other in results[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--tiles", default="128x256,128x128")
    parser.add_argument("--ctas", default="1,2")
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    tiles = [(int(bm), int(bn)) for bm, _, bn in (text.partition("x") for text in options.tiles.split(","))]
    ctas = [int(text) for text in options.ctas.split(",")]
    rows = []
    for m, n, k in SHAPES:
        result = compare(candidates(m, n, k, options.dtype, tiles, ctas), repeats=options.repeats)
        base = result["library"].median_us
        ratios = {name: base / found.median_us for name, found in result.measurements.items() if name != "library"}
        speed = 2 * m * n * k / base / 1e6
        rows.append({"shape": f"{m}x{n}x{k}", "library_tflops": speed, **ratios})
        text = "  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        print(f"{rows[-1]['shape']:>18} library {speed:6.1f} TFLOP/s  {text}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"dtype": options.dtype, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
