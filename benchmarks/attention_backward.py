"""Attention backward against cuDNN, and decode against torch SDPA and memory bandwidth, in the same run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tilewright.kernels.attention import sdpa
from tilewright.kernels.attention_backward import sdpa_backward
from tilewright.kernels.attention_decode import decode, splits
from tilewright.runtime.bench import compare

#: batch, heads, key heads, sequence, head dimension
BACKWARD = [
    *((b, 16, 16, s, 128) for b, s in ((16, 1024), (8, 4096), (4, 8192), (2, 16384))),
    *((b, 32, 32, s, 64) for b, s in ((16, 1024), (8, 4096), (4, 8192), (2, 16384))),
    (2, 64, 8, 8192, 128),
]
DECODE = [(1, 32, 8, 65536, 128), (16, 32, 8, 16384, 128), (128, 32, 8, 4096, 128)]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def exact_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, causal: bool) -> Any:
    """dq of the first head of the first batch, in float64, and its contribution to dk and dv."""
    q, k, v, do = (x[0, 0].double() for x in (q, k, v, do))
    scale, dq, dk, dv = q.shape[-1] ** -0.5, torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first in range(0, len(q), 2048):  # the weights of all queries would not fit
        part = slice(first, min(first + 2048, len(q)))
        scores = q[part] @ k.T * scale
        if causal:
            places = torch.arange(len(k), device="cuda")
            scores.masked_fill_(places[None, :] > places[part, None], float("-inf"))
        weights = torch.softmax(scores, -1)
        dp = do[part] @ v.T
        ds = weights * (dp - (weights * dp).sum(-1, keepdim=True)) * scale
        dq[part] = ds @ k
        dk += ds.T @ q[part]
        dv += weights.T @ do[part]
    return dq, dk, dv


def forward_done(shape: tuple[int, ...], causal: bool) -> tuple[list[torch.Tensor], Callable[..., None]]:
    """q, k, v and the gradient of the output, and ours: (deterministic, [dq, dk, dv]) -> None."""
    batch, heads, groups, rows, depth = shape
    q, do = randn(batch, heads, rows, depth), randn(batch, heads, rows, depth)
    k, v = randn(batch, groups, rows, depth), randn(batch, groups, rows, depth)
    o, lse = torch.empty_like(q), torch.empty(batch, heads, rows, device="cuda")
    sdpa(q, k, v, o, causal, lse=lse)

    def ours(deterministic: bool, results: list[torch.Tensor]) -> None:
        sdpa_backward(q, k, v, o, do, lse, *results, causal, deterministic=deterministic)

    return [q, k, v, do], ours


def backward(shape: tuple[int, ...], causal: bool, repeats: int) -> dict[str, Any]:
    batch, heads, groups, rows, depth = shape
    (q, k, v, do), ours = forward_done(shape, causal)
    in_order, in_any_order = ([torch.full_like(x, float("nan")) for x in (q, k, v)] for _ in range(2))
    ours(True, in_order), ours(False, in_any_order)
    first = [x.clone() for x in in_order]
    ours(True, in_order)
    same = all(torch.equal(a, b) for a, b in zip(first, in_order, strict=True))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=heads != groups)
    library = torch.autograd.grad(out, leaves, do, retain_graph=True)
    exact = exact_gradients(q, k, v, do, causal)
    compared = 3 if heads == groups else 1  # with grouped heads one head makes no whole dk and dv
    errors = {
        name: [error(x[0, 0], y) for x, y in zip(results, exact[:compared], strict=False)]
        for name, results in (("ours", in_order), ("in_any_order", in_any_order), ("cudnn", library))
    }
    apart = [error(x, y) for x, y in zip(in_order, library, strict=True)]
    times = compare(
        {
            "ours": lambda: ours(True, in_order),
            "in_any_order": lambda: ours(False, in_any_order),
            "cudnn": lambda: torch.autograd.grad(out, leaves, do, retain_graph=True),
        },
        repeats=repeats,
    )
    mine, faster, theirs = (times[name].median_us for name in ("ours", "in_any_order", "cudnn"))
    flops = 10 * batch * heads * rows * rows * depth / (2 if causal else 1)
    return {"work": "backward", "shape": list(shape), "causal": causal, "ours_us": mine, "in_any_order_us": faster,
            "cudnn_us": theirs, "ratio": theirs / mine, "ratio_in_any_order": theirs / faster,
            "ours_tflops": flops / mine / 1e6, "cudnn_tflops": flops / theirs / 1e6, "errors": errors,
            "differences_from_cudnn": apart, "bitwise_repeatable": same}  # fmt: skip


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
    parser.add_argument("--work", choices=("backward", "decode"), help="only this")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for work, row in (
        *(("decode", lambda s=s: decoding(s, options.repeats)) for s in DECODE),
        *(("backward", lambda s=s, c=c: backward(s, c, options.repeats)) for s in BACKWARD for c in (False, True)),
    ):
        if options.work in (None, work):
            rows.append(row())
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    for name in ("ratio", "ratio_in_any_order"):
        ratios = [row[name] for row in rows if row["work"] == "backward"]
        if ratios:
            print(f"{name}: geometric mean {geometric_mean(ratios):.3f}, least {min(ratios):.3f}")
    if options.json:
        options.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
