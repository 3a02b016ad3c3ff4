"""What more GPUs would take, projected: python benchmarks/multi_gpu_projection.py RESULTS.json [--ranks 8].

Not measurements of 8 GPUs. RESULTS are rows of multi_gpu.py, measured on fewer ranks. A product runs at the rate of the
row's own product on one GPU; the link moves what each rank sends at the rate of the largest all-to-all; a kernel that
communicates takes the longer of both and what the measured one took beyond that. The serial time is the product's plus
the link's, as if NCCL had the same rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BF16_BYTES = 2
#: times that a rank sends its part of the whole matrix
ROUNDS = {"all_gather_gemm": 1, "gemm_reduce_scatter": 1, "gemm_all_reduce": 2}


def sent_bytes(work: str, n: int, ranks: int) -> float:
    """What one rank sends."""
    return ROUNDS[work] * (ranks - 1) / ranks * n * n * BF16_BYTES


def link_rate(rows: list[Row]) -> float:
    """Bytes per microsecond of the largest all-to-all."""
    largest = [row for row in rows if row["work"] == "all_to_all"][-1]
    best = min(largest[key] for key in ("ours_us", "nccl_us") if key in largest)
    sent = float(largest["size"].split()[0]) * 2**20 * (largest["ranks"] - 1) / largest["ranks"]
    return sent / best


def project(row: Row, ranks: int, rate: float) -> Row:
    """The projection that belongs to a measured row of a product with communication."""
    work, n, measured = row["work"], int(row["size"]), row["ranks"]
    beyond = max(row["ours_us"] - max(row["gemm_us"], sent_bytes(work, n, measured) / rate), 0.0)
    product, link = row["gemm_us"] * measured / ranks, sent_bytes(work, n, ranks) / rate
    together = max(product, link) + beyond
    return {
        "work": work, "size": row["size"], "ranks": ranks, "product_us": product, "link_us": link, "beyond_us": beyond,
        "projected_us": together, "projected_over_serial": (product + link) / together,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[Row] = json.loads(options.results.read_text())
    rate = link_rate(rows)
    print(f"PROJECTIONS to {options.ranks} ranks, link {rate / 1e3:.0f} GB/s")
    found = [project(row, options.ranks, rate) for row in rows if row["work"] in ROUNDS and "gemm_us" in row]
    for row in found:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
