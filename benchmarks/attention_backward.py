"""Attention backward against cuDNN, and decode against torch SDPA and memory bandwidth, in the same run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tilewright.kernels.attention import sdpa
from tilewright.kernels.attention_backward import sdpa_backward
from tilewright.kernels.attention_decode import decode, splits
from tilewright.runtime.bench import compare

#: batch, heads, key heads, sequence, head dimension
BACKWARD = [(8, 16, 16, 4096, 128), (4, 32, 32, 4096, 64), (2, 64, 8, 4096, 128)]
DECODE = [(1, 32, 8, 65536, 128), (16, 32, 8, 16384, 128), (128, 32, 8, 4096, 128)]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def backward(shape: tuple[int, ...], causal: bool, repeats: int) -> dict[str, Any]:
    batch, heads, groups, rows, depth = shape
    q, do = randn(batch, heads, rows, depth), randn(batch, heads, rows, depth)
    k, v = randn(batch, groups, rows, depth), randn(batch, groups, rows, depth)
    o, lse = torch.empty_like(q), torch.empty(batch, heads, rows, device="cuda")
    sdpa(q, k, v, o, causal, lse=lse)
    delta = torch.full_like(lse, float("nan"))
    results = [torch.full_like(x, float("nan")) for x in (q, k, v)]

    def ours() -> None:
        sdpa_backward(q, k, v, o, do, lse, delta, *results, causal)

    ours()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=heads != groups)
    library = torch.autograd.grad(out, leaves, do, retain_graph=True)
    errors = [error(a, b) for a, b in zip(results, library, strict=True)]
    times = compare(
        {"ours": ours, "cudnn": lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)}, repeats=repeats
    )
    mine, theirs = times["ours"].median_us, times["cudnn"].median_us
    return {"work": "backward", "shape": list(shape), "causal": causal, "ours_us": mine, "cudnn_us": theirs,
            "ratio": theirs / mine, "differences_from_cudnn": errors}  # fmt: skip


def decoding(shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    batch, heads, groups, keys, depth = shape
    q, k, v = randn(batch, heads, depth), randn(batch, groups, keys, depth), randn(batch, groups, keys, depth)
    o = torch.full_like(q, float("nan"))
    count = splits(batch, groups, keys)
    parts = torch.empty(batch, heads, count, depth, device="cuda")
    logarithms = torch.empty(batch, heads, count, device="cuda")
    lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)

    def library() -> torch.Tensor:
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    def ours() -> None:
        decode(q, k, v, o, lengths, parts, logarithms)

    ours()
    apart = error(o, library()[:, :, 0])
    target, source = torch.empty_like(k), k
    times = compare({"ours": ours, "sdpa": library, "copy": lambda: target.copy_(source)}, repeats=repeats)
    mine, theirs = times["ours"].median_us, times["sdpa"].median_us
    size = 2 * k.numel() * k.element_size()
    return {"work": "decode", "shape": list(shape), "splits": count, "ours_us": mine, "sdpa_us": theirs,
            "ratio": theirs / mine, "of_copy_bandwidth": times["copy"].median_us / mine,
            "terabytes_per_second": size / mine / 1e6, "difference_from_sdpa": apart}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for row in (
        *(lambda s=s: decoding(s, options.repeats) for s in DECODE),
        *(lambda s=s, c=c: backward(s, c, options.repeats) for s in BACKWARD for c in (False, True)),
    ):
        rows.append(row())
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if options.json:
        options.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
