"""What 8 GPUs would take, projected: python benchmarks/multi_gpu_projection.py RESULTS.json [--ranks 8].

Not measurements of 8 GPUs. One GPU multiplies what each of the ranks would; the link moves what each would send at the
rate that RESULTS (rows of multi_gpu.py, measured on fewer ranks) show for its largest all-to-all; a kernel that
communicates takes the longer of both and what the measured ones took beyond that. The serial time is cuBLAS's plus the
link's, as if NCCL had the same rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tilewright.kernels.gemm import matmul
from tilewright.runtime.bench import compare

Row = dict[str, Any]
BF16_BYTES = 2


def shape_of(work: str, n: int, ranks: int) -> tuple[int, int, int]:
    """M, N, K of the product of one rank."""
    return (n, n // ranks, n) if work == "all_gather_gemm" else (n, n, n // ranks)


def sent_bytes(work: str, n: int, ranks: int) -> float:
    """What one rank sends."""
    whole = n * n * BF16_BYTES
    return {"all_gather_gemm": 1, "gemm_reduce_scatter": 1, "gemm_all_reduce": 2}[work] * (ranks - 1) / ranks * whole


def link_rate(rows: list[Row]) -> float:
    """Bytes per microsecond of the largest all-to-all."""
    largest = [row for row in rows if row["work"] == "all_to_all"][-1]
    best = min(largest[key] for key in ("ours_us", "nccl_us") if key in largest)
    sent = float(largest["size"].split()[0]) * 2**20 * (largest["ranks"] - 1) / largest["ranks"]
    return sent / best


def product_times(m: int, n: int, k: int) -> tuple[float, float]:
    """Microseconds of our product and of cuBLAS's on this GPU."""
    a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    c, out = torch.empty(m, n, device="cuda", dtype=a.dtype), torch.empty(m, n, device="cuda", dtype=a.dtype)
    found = compare({"ours": lambda: matmul(a, b, c), "cublas": lambda: torch.mm(a, b, out=out)}, repeats=20)
    return found["ours"].median_us, found["cublas"].median_us


def project(row: Row, ranks: int, rate: float) -> Row:
    """The projection that belongs to a measured row of a product with communication."""
    n, measured = int(row["size"]), row["ranks"]
    beyond = row["ours_us"] - max(row["gemm_us"], sent_bytes(row["work"], n, measured) / rate)
    ours, library = product_times(*shape_of(row["work"], n, ranks))
    link = sent_bytes(row["work"], n, ranks) / rate
    together = max(ours, link) + max(beyond, 0.0)
    return {
        "work": row["work"], "size": row["size"], "ranks": ranks, "product_us": ours, "library_us": library,
        "link_us": link, "beyond_us": beyond, "projected_us": together, "projected_serial_us": library + link,
        "projected_over_serial": (library + link) / together,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = json.loads(options.results.read_text())
    rate = link_rate(rows)
    print(f"PROJECTIONS to {options.ranks} ranks from {torch.cuda.get_device_name()}, link {rate / 1e3:.0f} GB/s")
    found = []
    for row in rows:
        if "gemm_us" in row and "ours_us" in row:
            found.append(project(row, options.ranks, rate))
            print(
                "  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{v}" for k, v in found[-1].items()), flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
