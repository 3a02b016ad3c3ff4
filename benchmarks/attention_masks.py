"""Attention with soft caps, windows, key lengths, biases and packed sequences against torch, in the same run.

Rivals: `flex_attention` compiled, `varlen_attn` (FlashAttention-2), `scaled_dot_product_attention` with a mask, and for
soft caps the formulas compiled by Inductor. Times of a backward pass are those of its launches, without the forward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tilewright as tw
from tilewright.kernels.attention import LOG2E, attention_varlen, configuration, sdpa
from tilewright.kernels.attention_backward import sdpa_backward, varlen_backward
from tilewright.runtime.bench import compare

Call = Callable[[], list[torch.Tensor]]
DEVICE, DTYPE = "cuda", torch.bfloat16


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def poisoned(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.full_like(x, float("nan")) for x in tensors]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def row(work: str, calls: dict[str, Call], repeats: int) -> dict[str, Any]:
    """Medians, and how far the rivals' results are from ours. A rival that fails is left out."""
    results: dict[str, list[torch.Tensor]] = {}
    failed = {}
    for name, call in calls.items():
        try:
            results[name] = call()
        except Exception as error:
            failed[name] = str(error)[:200]
    found: dict[str, Any] = {"work": work}
    if failed:
        found["failed"] = failed
    for name, made in results.items():
        if name != "ours":
            found[f"apart from {name}"] = [apart(x, y) for x, y in zip(results["ours"], made, strict=False)]
    if repeats:
        times = compare({name: calls[name] for name in results}, repeats=repeats)
        found |= {f"{name}_us": times[name].median_us for name in results}
        found |= {f"over_{name}": found[f"{name}_us"] / found["ours_us"] for name in results if name != "ours"}
    return found


def gradients(result: torch.Tensor, leaves: list[torch.Tensor], do: torch.Tensor) -> Call:
    return lambda: list(torch.autograd.grad(result, leaves, do, retain_graph=True))


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, **options: Any) -> Call:
    (out,) = poisoned(q)

    def call() -> list[torch.Tensor]:
        sdpa(q, k, v, out, causal, **options)
        return [out]

    return call


def backward(
    tensors: tuple[torch.Tensor, ...], causal: bool, deterministic: bool = True, dbias: Any = None, **options: Any
) -> Call:
    q, k, v, do = tensors
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=DEVICE)
    sdpa(q, k, v, out, causal, lse=lse, **options)
    made = poisoned(q, k, v)

    def call() -> list[torch.Tensor]:
        more = {**options, "dbias": dbias, "deterministic": deterministic}
        sdpa_backward(q, k, v, out, do, lse, *made, causal, **more)
        return [*made, *([] if dbias is None else [dbias])]

    return call


def leaves_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


def softcap(flex: Any, repeats: int, depth: int = 128, batch: int = 4) -> list[dict[str, Any]]:
    """As in Gemma 2: 16 heads for 8 of keys, a cap of 50."""
    heads, groups, rows, cap = 16, 8, 4096, 50.0
    q, do = randn(batch, heads, rows, depth), randn(batch, heads, rows, depth)
    k, v = randn(batch, groups, rows, depth), randn(batch, groups, rows, depth)
    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, rows, rows, device=DEVICE)
    named = {"score_mod": lambda s, b, h, i, j: cap * torch.tanh(s / cap), "block_mask": block, "enable_gqa": True}

    @torch.compile(dynamic=False)
    def formulas(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * depth**-0.5 / cap) * cap
        places = torch.arange(rows, device=DEVICE)
        hidden = places[None] > places[:, None]
        scores = scores + torch.zeros((), device=DEVICE, dtype=DTYPE).masked_fill(hidden, torch.finfo(DTYPE).min)
        return torch.matmul(F.softmax(scores, -1, dtype=torch.float32).to(DTYPE), v)

    shape = f"{batch}, {heads}, {groups}, {rows}, {depth}"
    calls = {
        "ours": forward(q, k, v, True, cap=cap),
        "flex": lambda: [flex(q, k, v, **named)],
        "inductor": lambda: [formulas(q, k, v)],
    }
    found = [row(f"soft cap, causal, forward, {shape}", calls, repeats)]
    first, second = leaves_of(q, k, v), leaves_of(q, k, v)
    calls = {
        "ours": backward((q, k, v, do), True, cap=cap),
        "any_order": backward((q, k, v, do), True, False, cap=cap),
        "flex": gradients(flex(*first, **named), first, do),
    }
    if depth == 128:
        calls["inductor"] = gradients(formulas(*second), second, do)
    return [*found, row(f"soft cap, causal, backward, {shape}", calls, repeats)]


def softcap_wide(flex: Any, repeats: int) -> list[dict[str, Any]]:
    return softcap(flex, repeats, 256, 2)


def window(flex: Any, repeats: int) -> list[dict[str, Any]]:
    """A query sees itself and 1024 keys before it."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, rows, depth, left = 2, 16, 8192, 128, 1024
    q, k, v, do = (randn(batch, heads, rows, depth) for _ in range(4))
    block = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j <= left), None, None, rows, rows, device=DEVICE)
    first, flat = leaves_of(q, k, v), [x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v, do)]
    second, starts = leaves_of(*flat[:3]), torch.tensor([0, rows, 2 * rows], device=DEVICE, dtype=torch.int32)
    packed = gradients(varlen_attn(*second, starts, starts, rows, rows, window_size=(left, 0)), second, flat[3])
    calls = {
        "ours": backward((q, k, v, do), True, left=left),
        "any_order": backward((q, k, v, do), True, False, left=left),
        "flex": gradients(flex(*first, block_mask=block), first, do),
        "flash": lambda: [x.unflatten(0, (batch, rows)).transpose(1, 2) for x in packed()],
    }
    return [row(f"window of {left}, backward, {batch}, {heads}, {rows}, {depth}", calls, repeats)]


def lengths(flex: Any, repeats: int) -> list[dict[str, Any]]:
    """Keys of different numbers, 2580 on average of 4096."""
    batch, heads, rows, depth = 8, 16, 4096, 128
    exist = torch.tensor([4096, 3000, 2000, 1024, 4000, 512, 2500, 3500], device=DEVICE, dtype=torch.int32)
    q, k, v, do = (randn(batch, heads, rows, depth) for _ in range(4))
    mask, leaves = (torch.arange(rows, device=DEVICE) < exist[:, None])[:, None, None], leaves_of(q, k, v)
    calls = {
        "ours": backward((q, k, v, do), False, lengths=exist),
        "any_order": backward((q, k, v, do), False, False, lengths=exist),
        "as_a_mask": backward((q, k, v, do), False, bias=mask.expand(batch, heads, rows, rows)),
        "sdpa": gradients(F.scaled_dot_product_attention(*leaves, attn_mask=mask), leaves, do),
    }
    return [row(f"key lengths, backward, {batch}, {heads}, {rows}, {depth}", calls, repeats)]


def bias(flex: Any, repeats: int) -> list[dict[str, Any]]:
    """A learned summand that batches share, as T5 has it."""
    batch, heads, rows, depth = 8, 12, 2048, 64
    q, k, v, do = (randn(batch, heads, rows, depth) for _ in range(4))
    narrow = randn(1, heads, rows, rows)
    wide, leaves = narrow.expand(batch, heads, rows, rows), leaves_of(q, k, v, narrow)
    (dbias,) = poisoned(narrow)
    shape = f"{batch}, {heads}, {rows}, {depth}"
    calls = {
        "ours": backward((q, k, v, do), False, bias=wide, dbias=dbias),
        "without_its_gradient": backward((q, k, v, do), False, bias=wide),
        "sdpa": gradients(F.scaled_dot_product_attention(*leaves[:3], attn_mask=leaves[3]), leaves, do),
    }
    found = [row(f"bias (1, H, M, N), backward, {shape}", calls, repeats)]
    calls = {
        "ours": forward(q, k, v, False, bias=wide),
        "sdpa": lambda: [F.scaled_dot_product_attention(q, k, v, attn_mask=narrow)],
    }
    return [*found, row(f"bias (1, H, M, N), forward, {shape}", calls, repeats)]


def packed(flex: Any, repeats: int) -> list[dict[str, Any]]:
    """Eight sequences of 512 to 4096 tokens behind one another."""
    from torch.nn.attention.varlen import varlen_attn

    sizes, heads, depth = [4096, 1024, 2048, 512, 3000, 1500, 2204, 2000], 16, 128
    tokens, most = sum(sizes), max(sizes)
    starts = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).int()
    number = torch.repeat_interleave(torch.arange(len(sizes), device=DEVICE), torch.tensor(sizes, device=DEVICE))
    q, k, v, do = (randn(tokens, heads, depth) for _ in range(4))
    found, (out,), lse = [], poisoned(q), torch.empty(heads, tokens, device=DEVICE)
    meta, made = configuration(most, depth), poisoned(q, k, v)
    grid = tw.cdiv(most, meta["BM"]), heads, len(sizes)
    # a function for each: a compiled graph does not see that the default of an argument has changed
    masks = {
        False: lambda b, h, i, j: number[i] == number[j],
        True: lambda b, h, i, j: (number[i] == number[j]) & (i >= j),
    }
    for causal in (False, True):
        block = create_block_mask(masks[causal], None, None, tokens, tokens, DEVICE)
        first, second = leaves_of(q, k, v), leaves_of(*(x.transpose(0, 1)[None].contiguous() for x in (q, k, v)))
        flash = varlen_attn(*first, starts, starts, most, most, window_size=(-1, 0 if causal else -1))
        flexed = gradients(flex(*second, block_mask=block), second, do.transpose(0, 1)[None].contiguous())

        def ahead(causal: bool = causal) -> list[torch.Tensor]:
            scale, sizes = depth**-0.5 * LOG2E, {"D": depth, "DV": depth, "CAUSAL": causal}
            attention_varlen[grid](q, k, v, out, starts, starts, scale, lse, None, **sizes, **meta)
            return [out]

        def back(deterministic: bool, causal: bool = causal) -> list[torch.Tensor]:
            named = {"causal": causal, "deterministic": deterministic}
            varlen_backward(q, k, v, out, do, lse, *made, starts, starts, most, most, **named)
            return made

        name = f"{len(sizes)} packed sequences of {tokens}, {heads}, {depth}, {'causal' if causal else 'full'}"
        calls: dict[str, Call] = {"ours": ahead, "flash": lambda c=causal: [
            varlen_attn(q, k, v, starts, starts, most, most, window_size=(-1, 0 if c else -1))
        ]}  # fmt: skip
        found.append(row(f"{name}, forward", calls, repeats))
        calls = {"ours": lambda: back(True), "any_order": lambda: back(False), "flash": gradients(flash, first, do),
                 "flex": lambda f=flexed: [x[0].transpose(0, 1) for x in f()]}  # fmt: skip
        found.append(row(f"{name}, backward", calls, repeats))
    return found


WORK = {f.__name__: f for f in (softcap, window, lengths, bias, softcap_wide, packed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9, help="0: only compile and compare the results")
    parser.add_argument("--work", nargs="*", choices=WORK, default=list(WORK))
    options = parser.parse_args()
    torch.manual_seed(0)
    flex, rows = torch.compile(flex_attention, dynamic=False), []
    for name in options.work:
        try:
            found = WORK[name](flex, options.repeats)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        for line in found:
            rows.append(line)
            print({key: round(x, 3) if isinstance(x, float) else x for key, x in line.items()}, flush=True)
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
