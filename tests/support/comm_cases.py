"""Kernels that communicate, with the types of their arguments: what the protocol checker is tested on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.support import comm_kernels
from tilewright.compiler.driver import complete_types
from tilewright.frontend.build import build_module
from tilewright.ir.core import Module
from tilewright.ir.target import get_target
from tilewright.ir.types import DTYPES, ViewType
from tilewright.kernels.multi_gpu import (
    all_gather_gemm,
    all_reduce,
    collectives,
    gemm_all_reduce,
    gemm_reduce_scatter,
    moe,
    ring_attention,
    ring_attention_backward,
    ulysses,
)
from tilewright.passes.manager import PassContext, PassManager, PassOptions
from tilewright.passes.pipelines import default_pipeline


def own(dtype: str, rank: int) -> ViewType:
    """A tensor of one rank."""
    return ViewType((None,) * rank, DTYPES[dtype], (*(None,) * (rank - 1), 1), 16)


def all_ranks(dtype: str, rank: int) -> ViewType:
    """A tensor of each rank."""
    return ViewType((None,) * rank, DTYPES[dtype], (*(None,) * (rank - 1), 1), 16, symmetric=True)


def of_sizes(view: ViewType, *sizes: int | None) -> ViewType:
    """The tensor with known sizes: no flag says how many tiles such a kernel has, and small launches shall have few."""
    return replace(view, shape=sizes)


def flags(rank: int) -> ViewType:
    return all_ranks("i32", rank)


_MATRICES = {name: own("bf16", 2) for name in "abc"}
_ATTENTION: dict[str, Any] = {
    "q": own("bf16", 5), "k": all_ranks("bf16", 5), "v": all_ranks("bf16", 5), "o": own("bf16", 5),
    "lse": own("f32", 4), "arrived": flags(3), "FLAGS": 1,
}  # fmt: skip
_PARTS = {"parts": all_ranks("bf16", 3), "sent": flags(3)}

#: by name: kernel, types of its tensors, and meta-parameters without a default. FLAGS is 1: of several flags that one
#: program sets in small launches, each would come behind the barriers of those before.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "small all-reduce": (
        comm_kernels.all_reduce,
        {"x": own("bf16", 2), "y": own("bf16", 2), "slots": all_ranks("bf16", 3), "flags": flags(2), "N": 256},
    ),
    "small GEMM + reduce-scatter": (
        comm_kernels.gemm_reduce_scatter,
        {**_MATRICES, "parts": all_ranks("bf16", 3), "flags": flags(3), "BM": 128, "BN": 128, "BK": 64},
    ),
    "small all-gather + GEMM": (
        comm_kernels.gather_gemm_push,
        {
            **_MATRICES, "a": all_ranks("bf16", 2), "whole": all_ranks("bf16", 3), "flags": flags(1),
            "BM": 128, "BN": 128, "BK": 64,
        },
    ),
    "added to one rank's": (
        comm_kernels.add_to_first,
        {"x": own("f32", 2), "y": own("f32", 2), "total": all_ranks("f32", 2), "flags": flags(1), "M": 8, "N": 32},
    ),
    "barrier": (comm_kernels.meet, {"y": own("i32", 2), "places": all_ranks("i32", 1), "flags": flags(2)}),
    "all-reduce, pull": (all_reduce.all_reduce_pull, {"x": all_ranks("bf16", 1), "y": own("bf16", 1)}),
    "all-reduce, push": (
        all_reduce.all_reduce_push,
        {"x": own("bf16", 1), "y": own("bf16", 1), "slots": all_ranks("bf16", 3), "sent": flags(3)},
    ),
    "all-reduce, packets": (
        all_reduce.all_reduce_packets, {"x": own("bf16", 1), "y": own("bf16", 1), "packets": all_ranks("i64", 4)}
    ),
    "all-reduce, two-shot": (
        all_reduce.all_reduce_two_shot, {"x": all_ranks("bf16", 1), "y": all_ranks("bf16", 1), "done": flags(2)}
    ),
    "all-gather": (
        collectives.all_gather,
        {
            "x": of_sizes(own("bf16", 2), 16, 4096), "y": of_sizes(all_ranks("bf16", 3), 16, None, 4096),
            "done": flags(2),
        },
    ),
    "reduce-scatter": (collectives.reduce_scatter, {"x": all_ranks("bf16", 3), "y": own("bf16", 2)}),
    "all-to-all": (
        collectives.all_to_all,
        {
            "x": of_sizes(own("bf16", 5), 1, None, 16, 1, 4096), "done": flags(2),
            "y": of_sizes(all_ranks("bf16", 5), 1, 16, 1, None, 4096),
        },
    ),
    "GEMM + reduce-scatter": (gemm_reduce_scatter.gemm_reduce_scatter, {**_MATRICES, **_PARTS}),
    "GEMM + all-reduce": (
        gemm_all_reduce.gemm_all_reduce, {**_MATRICES, **_PARTS, "c": all_ranks("bf16", 3), "done": flags(3)}
    ),
    "GEMM + all-reduce, one-shot": (gemm_all_reduce.gemm_all_reduce_one_shot, {**_MATRICES, **_PARTS}),
    "all-gather + GEMM": (
        all_gather_gemm.all_gather_gemm,
        {
            "a": all_ranks("bf16", 3), "b": own("bf16", 2), "c": own("bf16", 3), "arrived": flags(3), "FLAGS": 1,
        },
    ),
    "ring attention": (ring_attention.ring_attention, _ATTENTION),
    "ring attention, causal": (ring_attention.ring_attention, {**_ATTENTION, "CAUSAL": True}),
    "ring attention, gradients": (
        ring_attention_backward.ring_attention_sum,
        {"parts": all_ranks("bf16", 6), "total": own("bf16", 5), "D": 64, "BN": 64, "CAUSAL": True},
    ),
    "Ulysses attention": (
        ulysses.ulysses_attention,
        {
            "q": own("bf16", 5), "k": own("bf16", 4), "v": own("bf16", 4), "o": all_ranks("bf16", 4),
            "lse": own("f32", 4), "done": flags(3),
        },
    ),
    "mixture of experts": (
        moe.moe_combine,
        {
            "rows_of": own("i32", 1), "weights": own("f32", 1), "y": own("bf16", 2), "arrived": flags(2),
            "parts": of_sizes(all_ranks("bf16", 3), None, 8, 256), "out": of_sizes(own("bf16", 2), 8, 256),
            "K": 2, "BT": 4, "BN": 256,
        },
    ),
}  # fmt: skip


def scheduled(name: str, target: str) -> Module:
    """The case as the passes leave it, not checked."""
    return schedule(*CASES[name], target)


def schedule(kernel: Any, types: dict[str, Any], target: str, **options: Any) -> Module:
    """A kernel as the passes leave it, not checked."""
    module = build_module(kernel.definition, complete_types(kernel.definition, types))
    context = PassContext(get_target(target), PassOptions(**options))
    PassManager(default_pipeline(get_target(target), check=False), context).run(module)
    return module
