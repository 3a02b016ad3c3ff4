"""Host microseconds of calls of operators on small tensors, where the GPU waits: ours, torch's, and their parts."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import tilewright.torch as twt
from tilewright.kernels.softmax import softmax_rows


def host_us(call: Callable[[], Any], repeats: int, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e6)
    return median(times)


def calls() -> dict[str, tuple[Callable[[], Any], Any]]:
    """Name -> (call, context to call it in)."""
    x, q = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((4, 64), (1, 4, 128, 64)))
    a, w = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((16, 256), (256, 256)))
    y, leaf = torch.empty_like(x), x.clone().requires_grad_()
    for name in ("softmax", "attention", "linear"):
        getattr(twt, name)  # registers the operators
    ours, eager, no_grad = torch.ops.tilewright, nullcontext(), torch.no_grad()
    return {
        "new_empty": (lambda: x.new_empty(x.shape), eager),
        "empty_like": (lambda: torch.empty_like(x), eager),
        "launch of softmax into a given tensor": (lambda: softmax_rows(x, y), eager),
        "operator softmax": (lambda: ours.softmax(x), eager),
        "operator softmax, no_grad": (lambda: ours.softmax(x), no_grad),
        "operator softmax, below autograd": (lambda: ours.softmax(x), torch._C._AutoDispatchBelowAutograd()),
        "operator softmax, gradients recorded": (lambda: ours.softmax(leaf), eager),
        "function softmax": (lambda: twt.softmax(x, -1), eager),
        "torch softmax": (lambda: torch.softmax(x, -1), eager),
        "torch softmax, gradients recorded": (lambda: torch.softmax(leaf, -1), eager),
        "operator attention": (lambda: ours.attention(q, q, q, None, None, True, 0.125), eager),
        "function attention": (lambda: twt.attention(q, q, q, is_causal=True), eager),
        "torch attention": (lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), eager),
        "operator linear (K split)": (lambda: ours.linear(a, w, None, None, "none"), eager),
        "function linear (K split)": (lambda: twt.linear(a, w), eager),
        "torch linear": (lambda: F.linear(a, w), eager),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for name, (call, context) in calls().items():
        with context:
            call()
            found[name] = host_us(call, options.repeats)
        print(f"{found[name]:8.2f} us  {name}", flush=True)
    if options.json:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "host_us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
