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


def all_to_all(world: Any, inputs: Inputs) -> Ours:
    x = inputs["x"].view(world.size, -1)
    y = world.empty(x.shape, BF16)
    return lambda: copy_engine.all_to_all(world, x, y), y.local


def ring_attention(world: Any, inputs: Inputs) -> Ours:
    """The rank's keys and values lie where the others' arrive."""
    q, size, rank = inputs["q"], world.size, world.rank
    chunks = q.shape[0]
    whole = []
    for x in (inputs["k"], inputs["v"]):
        whole.append(world.empty((chunks * size, *x.shape[1:]), BF16))
        for chunk, place in zip(x, (rank, 2 * size - 1 - rank), strict=False):
            whole[-1].local[place].copy_(chunk)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    return lambda: ring_sdpa(world, q, *whole, o, lse, chunks == 2), o


ring_attention_causal = ring_attention


#: other ways to do a work, measured beside ours
OTHERS: dict[str, dict[str, Callable[[Any, Inputs], Ours]]] = {
    "all_gather_gemm": {"in_kernel": all_gather_gemm_in_kernel},
    "gemm_reduce_scatter": {
        name: partial(gemm_reduce_scatter, copies=way) for name, way in (("in_kernel", False), ("copies", True))
    },
    "gemm_all_reduce": {
        name: partial(gemm_all_reduce, copies=way) for name, way in (("in_kernel", False), ("copies", True))
    },
    "all_reduce": {name: partial(all_reduce, algorithm=name) for name in ("packets", "push", "pull")},
}


def moe(world: Any, inputs: Inputs) -> Ours:
    """The rank's tokens lie where others read them."""
    x = world.empty(inputs["x"].shape, BF16)
    x.local.copy_(inputs["x"])
    experts, weights, w = inputs["experts"], inputs["weights"], inputs["w"]
    out = w.new_empty(x.shape[0], w.shape[2])
    return lambda: mixture(world, x, experts, weights, w, out), out
