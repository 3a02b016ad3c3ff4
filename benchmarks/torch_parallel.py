"""Tensor-parallel layers through torch.compile on several GPUs: this backend, Inductor, and its own pipelining pass.

One process for each GPU; a sample takes as long as its slowest rank (see multi_gpu.py). bfloat16, random normal inputs.
Rows are those of a sequence that the ranks divide; weights are divided along the wide dimension of the layer. Errors,
relative in the Frobenius norm: of the output, and with backward of the gradients, against float32 on the same GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from multi_gpu import free_port, times_of_slowest
from torch.distributed import _functional_collectives as collectives

from tilewright.torch.backend import compile_graph

PASSES = "forward", "forward and backward"


def gather(x: torch.Tensor) -> torch.Tensor:
    return collectives.all_gather_tensor_autograd(x, 0, distributed.group.WORLD)


def scatter(x: torch.Tensor) -> torch.Tensor:
    return collectives.reduce_scatter_tensor_autograd(x, "sum", 0, distributed.group.WORLD)


def pair(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two linear layers, rows divided before and behind."""
    return scatter(F.linear(F.silu(F.linear(gather(x), first)), second))


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A gated feed-forward layer, rows divided before and behind."""
    rows = gather(x)
    return scatter(F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down))


def pair_all_reduce(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two linear layers whose input and result every rank has."""
    return collectives.all_reduce(F.linear(F.silu(F.linear(x, first)), second), "sum", distributed.group.WORLD)


#: work -> function, whether rows are divided, how many weights there are from the narrow to the wide dimension
WORKS: dict[str, tuple[Callable[..., torch.Tensor], bool, int]] = {
    "linear pair": (pair, True, 1),
    "gated layer": (gated, True, 2),
    "linear pair, all-reduce": (pair_all_reduce, False, 1),
}


def make(work: str, options: argparse.Namespace) -> list[torch.Tensor]:
    """The rank's rows and weights."""
    _, divided, wide = WORKS[work]
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    rows, feed = options.rows // ranks if divided else options.rows, options.feed // ranks
    generator = torch.Generator("cuda").manual_seed(rank if divided else 0)
    x = torch.randn(rows, options.hidden, device="cuda", generator=generator)
    generator.manual_seed(100 + rank)
    weights = [torch.randn(feed, options.hidden, device="cuda", generator=generator) for _ in range(wide)]
    weights.append(torch.randn(options.hidden, feed, device="cuda", generator=generator))
    scaled = [x, *(w * w.shape[1] ** -0.5 for w in weights)]
    return [value.bfloat16().requires_grad_() for value in scaled]


def steps(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, Callable[[], Any]]:
    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (function(*inputs),)

    def both() -> tuple[torch.Tensor, ...]:
        out = function(*inputs)
        return (out, *torch.autograd.grad(out, inputs, out.detach()))

    return dict(zip(PASSES, (forward, both), strict=True))


def rivals(function: Callable[..., torch.Tensor], options: argparse.Namespace) -> dict[str, Any]:
    ours = {"explain": options.explain and distributed.get_rank() == 0}
    if options.take:
        ours["operators"] = tuple(options.take.split(","))
    return {
        "inductor": torch.compile(function),
        "pipelined": torch.compile(function, options={"_micro_pipeline_tp": True}),
        "tilewright": torch.compile(function, backend=compile_graph, options=ours),
    }


def errors(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, exact, strict=True))
    value = torch.tensor(worst, device="cuda")
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return float(value)


def measure(work: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    inputs = make(work, options)
    function = WORKS[work][0]
    torch._dynamo.reset()
    compiled = {name: steps(f, inputs) for name, f in rivals(function, options).items()}
    wide = [value.detach().float().requires_grad_() for value in inputs]
    for pass_, exact in steps(function, wide).items():
        if pass_ not in options.passes:
            continue
        row: dict[str, Any] = {"work": work, "pass": pass_, "rows": options.rows, "hidden": options.hidden,
                               "feed": options.feed, "ranks": distributed.get_world_size()}  # fmt: skip
        expected, calls = exact(), {}
        for name, each in compiled.items():
            try:
                row[f"{name}_error"] = errors(each[pass_](), expected)
                calls[name] = each[pass_]
            except Exception as error:  # a rival that does not run here is no reason to measure nothing
                row[f"{name}_missing"] = f"{type(error).__name__}: {error}"[:300]
        del expected
        if options.repeats:
            times = times_of_slowest(calls, options.repeats)
            row |= {f"{name}_us": median(values) for name, values in times.items()}
            for name in times:
                if name != "tilewright" and "tilewright" in times:
                    pairs = zip(times[name], times["tilewright"], strict=True)
                    row[f"over_{name}"] = median(theirs / ours for theirs, ours in pairs)
        if distributed.get_rank() == 0:
            print("  ".join(f"{key} {f'{v:.4g}' if isinstance(v, float) else v}" for key, v in row.items()), flush=True)
        yield row


def rank_main(rank: int, options: argparse.Namespace, port: int) -> None:
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", rank=rank, world_size=options.ranks, device_id=torch.device("cuda", rank))
    enable_symm_mem_for_group(distributed.group.WORLD.group_name)
    rows = []
    for row in (row for work in options.works for row in measure(work, options)):
        rows.append(row)
        if rank == 0 and options.json:
            about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
            options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    distributed.barrier()
    os._exit(0)  # NCCL's teardown waits for tensors that torch's symmetric memory keeps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("ranks", 2), ("rows", 16384), ("hidden", 4096), ("feed", 14336), ("repeats", 12)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--take", default="", help="take calls of these operators alone, whatever the gate says")
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{options.ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    torch.multiprocessing.spawn(rank_main, (options, free_port()), nprocs=options.ranks)


if __name__ == "__main__":
    main()
