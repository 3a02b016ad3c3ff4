"""Host microseconds of calls of operators on small tensors, where the GPU waits: ours, torch's, and their parts.

With ``--python`` without the extension that repeats calls (docs/torch.md).
"""

from __future__ import annotations

import argparse
import ctypes
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
from tilewright.kernels.softmax import softmax, softmax_rows
from tilewright.runtime import native


def host_us(call: Callable[[], Any], repeats: int, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e6)
    return median(times)


def driver_alone(x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """A launch of softmax by the driver's Python bindings, from prepared arguments: no launch takes much less."""
    from cuda.bindings import driver

    softmax_rows(x, y)
    meta = {"BM": 1, "BN": 64}
    form = softmax[(4,)].plan((x, y), meta).form((4,), (x, y), meta)
    assert form is not None
    image = ctypes.create_string_buffer(form.image, len(form.image))
    base = ctypes.addressof(image)
    pointers = (ctypes.c_void_p * len(form.offsets))(*(base + offset for offset in form.offsets))
    stream, function = torch.cuda.current_stream().cuda_stream, driver.CUfunction(form.function)
    sizes = *form.blocks, form.threads, 1, 1, form.shared_bytes

    def launch(kept: Any = (image, pointers)) -> None:
        driver.cuLaunchKernel(function, *sizes, stream, ctypes.addressof(pointers), 0)

    return launch


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
        "cuLaunchKernel by the driver's bindings": (driver_alone(x, y), eager),
        "launch of softmax, softmax[grid](x, y)": (lambda: softmax[(4,)](x, y, BM=1, BN=64), eager),
        "launch of softmax, softmax_rows(x, y)": (lambda: softmax_rows(x, y), eager),
        "operator softmax": (lambda: ours.softmax(x), eager),
        "operator softmax, no_grad": (lambda: ours.softmax(x), no_grad),
        "operator softmax, below autograd": (lambda: ours.softmax(x), torch._C._AutoDispatchBelowAutograd()),
        "operator softmax, gradients recorded": (lambda: ours.softmax(leaf), eager),
        "function softmax": (lambda: twt.softmax(x, -1), eager),
        "function softmax, gradients recorded": (lambda: twt.softmax(leaf, -1), eager),
        "torch softmax": (lambda: torch.softmax(x, -1), eager),
        "torch softmax, gradients recorded": (lambda: torch.softmax(leaf, -1), eager),
        "operator attention": (lambda: ours.attention(q, q, q, None, None, None, True, 0.125, None), eager),
        "function attention": (lambda: twt.attention(q, q, q, is_causal=True), eager),
        "torch attention": (lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), eager),
        "operator linear": (lambda: ours.linear(a, w, None, None, "none"), eager),
        "function linear": (lambda: twt.linear(a, w), eager),
        "torch linear": (lambda: F.linear(a, w), eager),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--python", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.python:
        native.extension = None
    found = {}
    for name, (call, context) in calls().items():
        with context:
            for _ in range(3):
                call()
            found[name] = host_us(call, options.repeats)
        print(f"{found[name]:8.2f} us  {name}", flush=True)
    if options.json:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "extension": bool(native.extension)}
        options.json.write_text(json.dumps({**about, "host_us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
