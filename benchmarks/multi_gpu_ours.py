"""Our side of the works of multi_gpu.py: what runs a work on this rank's inputs, and where its result is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tilewright.kernels.multi_gpu import all_reduce as reduced
from tilewright.kernels.multi_gpu import copy_engine
from tilewright.kernels.multi_gpu.all_gather_gemm import ag_gemm
from tilewright.kernels.multi_gpu.gemm_all_reduce import gemm_ar
from tilewright.kernels.multi_gpu.gemm_reduce_scatter import gemm_rs
from tilewright.kernels.multi_gpu.moe import moe as mixture
from tilewright.kernels.multi_gpu.ring_attention import ring_sdpa
from tilewright.kernels.multi_gpu.ring_attention_backward import ring_sdpa_backward
from tilewright.kernels.multi_gpu.ulysses import ulysses_sdpa

Inputs = dict[str, torch.Tensor]
Ours = tuple[Callable[[], Any], torch.Tensor]
BF16 = torch.bfloat16


def all_gather_gemm(world: Any, inputs: Inputs) -> Ours:
    """The rank's rows lie where the others' arrive, as the kernel before would have written them."""
    a, b = inputs["a"], inputs["b"]
    rows, c = world.empty((world.size, *a.shape), BF16), a.new_empty(world.size, a.shape[0], b.shape[1])
    rows.local[world.rank].copy_(a)
    return lambda: copy_engine.all_gather_gemm(world, rows, b, c), c


def all_gather_gemm_in_kernel(world: Any, inputs: Inputs) -> Ours:
    a, b = inputs["a"], inputs["b"]
    rows, c = world.empty((world.size, *a.shape), BF16), a.new_empty(world.size, a.shape[0], b.shape[1])
    rows.local[world.rank].copy_(a)
    return lambda: ag_gemm(world, rows, b, c), c


def gemm_reduce_scatter(world: Any, inputs: Inputs, copies: bool | None = None) -> Ours:
    a, b = inputs["a"], inputs["b"]
    c = a.new_empty(a.shape[0] // world.size, b.shape[1])
    return lambda: gemm_rs(world, a, b, c, copies=copies), c


def gemm_all_reduce(world: Any, inputs: Inputs, copies: bool | None = None) -> Ours:
    a, b = inputs["a"], inputs["b"]
    c = world.empty((world.size, a.shape[0] // world.size, b.shape[1]), BF16)
    return lambda: gemm_ar(world, a, b, c, copies=copies), c.local


def all_reduce(world: Any, inputs: Inputs, algorithm: str | None = None, **meta: int) -> Ours:
    """As torch's, the input lies in symmetric memory."""
    x = world.tensor(inputs["x"].view(-1))
    y = world.empty(x.shape, BF16)
    return lambda: reduced.all_reduce(world, x, y, algorithm=algorithm, **meta), y.local


def all_to_all(world: Any, inputs: Inputs, copies: bool | None = None) -> Ours:
    x = inputs["x"].view(world.size, -1)
    y = world.empty(x.shape, BF16)
    return lambda: copy_engine.all_to_all(world, x, y, copies=copies), y.local


def chunks_of(world: Any, x: torch.Tensor) -> Any:
    """A symmetric tensor of all chunks, of which those of the rank, x, are written."""
    chunks, batch, groups, *rest = x.shape
    whole = world.empty((batch, groups, chunks * world.size, *rest), BF16)
    for chunk, place in zip(x, (world.rank, 2 * world.size - 1 - world.rank), strict=False):
        whole.local[:, :, place].copy_(chunk)
    return whole


def ring_attention(world: Any, inputs: Inputs) -> Ours:
    """The rank's keys and values lie where the others' arrive."""
    q, whole = inputs["q"], [chunks_of(world, inputs[name]) for name in "kv"]
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    return lambda: ring_sdpa(world, q, *whole, o, lse, len(q) == 2), o


ring_attention_causal = ring_attention


def ring_backward(world: Any, inputs: Inputs, deterministic: bool = True) -> Ours:
    """Behind a forward pass, which leaves all keys and values here."""
    q, k, v, o, do, lse = (inputs[name] for name in ("q", "k", "v", "o", "do", "lse"))
    whole = []
    for x, everything in ((k, inputs["keys"]), (v, inputs["values"])):
        whole.append(chunks_of(world, x))
        whole[-1].local.view(everything.shape).copy_(everything)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    arrays = *whole, o, do, lse, dq, dk, dv
    return lambda: ring_sdpa_backward(world, q, *arrays, len(q) == 2, deterministic=deterministic), dk


ring_backward_causal = ring_backward
ring_backward_any_order = ring_backward_any_order_causal = partial(ring_backward, deterministic=False)


def ulysses(world: Any, inputs: Inputs, causal: bool = False) -> Ours:
    q, k, v = (inputs[name] for name in "qkv")
    _, size, heads, _ = q.shape
    o, lse = world.empty(q.shape, BF16), q.new_empty(1, heads // world.size, world.size, size, dtype=torch.float32)
    return lambda: ulysses_sdpa(world, q, k, v, o, lse, causal), o.local


ulysses_causal = partial(ulysses, causal=True)


#: whether copy engines send
WAYS = {"in_kernel": False, "copies": True}
#: other ways to do a work, measured beside ours
OTHERS: dict[str, dict[str, Callable[[Any, Inputs], Ours]]] = {
    "all_gather_gemm": {"in_kernel": all_gather_gemm_in_kernel},
    "gemm_reduce_scatter": {name: partial(gemm_reduce_scatter, copies=way) for name, way in WAYS.items()},
    "gemm_all_reduce": {name: partial(gemm_all_reduce, copies=way) for name, way in WAYS.items()},
    "all_reduce": {name: partial(all_reduce, algorithm=name) for name in ("packets", "push", "pull")},
    "all_to_all": {name: partial(all_to_all, copies=way) for name, way in WAYS.items()},
}


def moe(world: Any, inputs: Inputs) -> Ours:
    """The rank's tokens lie where the others' arrive."""
    tokens = inputs["x"]
    x = world.empty((world.size, *tokens.shape), BF16)
    x.local[world.rank].copy_(tokens)
    experts, weights, w = inputs["experts"], inputs["weights"], inputs["w"]
    out = w.new_empty(tokens.shape[0], w.shape[2])
    return lambda: mixture(world, x, experts, weights, w, out), out
