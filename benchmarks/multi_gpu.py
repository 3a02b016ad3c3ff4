"""Kernels that communicate against NCCL and torch in the same run: python benchmarks/multi_gpu.py [--json FILE].

One process for each GPU (--ranks). Before each sample all ranks meet on the GPU; a sample takes as long as its slowest
rank; medians. Random normal inputs, outputs poisoned with NaN, errors against float64. Our side of a work is the
function of its name in multi_gpu_ours.py, where there is one. NVLink multicast is off (NCCL_NVLS_ENABLE=0).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

import torch
import torch.distributed as distributed
from multi_gpu_attention import WORKS as ATTENTION
from multi_gpu_works import WORKS as OTHERS
from multi_gpu_works import Case, error_of

import tilewright as tw
from tilewright.runtime.bench import TorchClock, compare

WORKS = {**OTHERS, **ATTENTION}
Row = dict[str, Any]
Run = Callable[[], Any]

#: idle time before each sample, in cycles (about 0.6 ms): launches of several calls and the meeting are queued in it
LEAD_CYCLES = 1_100_000
#: floating-point operations from which on a work is repeated less often
LARGE = 5e12


class MeetingClock(TorchClock):
    """Ranks meet on the GPU before each sample, behind idle time in which Python queues meeting and sample."""

    def __init__(self, reset: Run) -> None:
        super().__init__(torch)
        self._token, self._reset = torch.zeros(1, device="cuda"), reset

    def prepare(self, flush: bool) -> None:
        self._reset()
        torch.cuda._sleep(LEAD_CYCLES)
        distributed.all_reduce(self._token)


def times_of_slowest(candidates: dict[str, Run], repeats: int, reset: Run = lambda: None) -> dict[str, list[float]]:
    """Microseconds of each sample on the rank that took longest. ``reset`` precedes each sample."""
    found = compare(candidates, repeats, warmup=min(5, repeats // 2 + 1), clock=MeetingClock(reset))
    mine = torch.tensor([found[name].times_us for name in candidates], device="cuda")
    distributed.all_reduce(mine, distributed.ReduceOp.MAX)
    return dict(zip(candidates, mine.tolist(), strict=True))


def ours_of(world: Any, case: Case) -> tuple[Run, torch.Tensor] | None:
    """Our side of a work: what runs it, and its output."""
    try:
        import multi_gpu_ours
    except ModuleNotFoundError:
        return None
    make = getattr(multi_gpu_ours, case.work, None)
    return None if make is None else make(world, case.inputs)


def others_of(work: str) -> dict[str, Any]:
    """Other ways of ours to do a work."""
    import multi_gpu_ours

    others: dict[str, Any] = multi_gpu_ours.OTHERS.get(work, {})
    return others


def error_on_all(ours: tuple[Run, torch.Tensor], case: Case) -> float:
    """The largest error of all ranks, of an output that was poisoned before."""
    run, output = ours
    output.fill_(float("nan"))
    run()
    return worst(error_of(output, case))


def measure(world: Any, case: Case, repeats: int) -> Row:
    row: Row = {"work": case.work, "size": case.size, "ranks": world.size}
    candidates: dict[str, Run] = {}
    try:
        ours = ours_of(world, case)
    except (tw.CompileError, tw.ArgumentError, ValueError) as error:
        ours, row["ours_missing"] = None, str(error).splitlines()[0][:120]
    if ours is not None:
        row["error"] = error_on_all(ours, case)
        candidates["ours"] = ours[0]
        for name, make in others_of(case.work).items():
            other = make(world, case.inputs)
            row[f"{name}_error"], candidates[name] = error_on_all(other, case), other[0]
    for name, rival in case.rivals.items():
        case.reset()
        distributed.barrier()  # a peer reads what was put back
        try:
            row[f"{name}_error"] = worst(error_of(rival(), case))
            candidates[name] = rival
        except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
            row[f"{name}_missing"] = str(error).splitlines()[0][:120]
    if case.flops > LARGE:
        repeats = max(5, round(repeats * LARGE / case.flops))
    times = times_of_slowest(candidates | case.parts, repeats, case.reset)
    for name, values in times.items():
        row[f"{name}_us"] = median(values)
    if ours is not None:
        for name in case.rivals:
            if name in times:
                row[f"over_{name}"] = median(b / a for a, b in zip(times["ours"], times[name], strict=True))
    row["link_gb_s"] = case.link_bytes / row[f"{next(iter(candidates))}_us"] / 1e3
    return row


def worst(error: float) -> float:
    """The largest of all ranks' errors."""
    value = torch.tensor(error, device="cuda")
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return float(value)


def line(row: Row) -> str:
    times = [f"{key.removesuffix('_us')} {value:.1f}" for key, value in row.items() if key.endswith("_us")]
    ratios = [f"{key.replace('_', ' ', 1)} {value:.3f}" for key, value in row.items() if key.startswith("over_")]
    errors = [f"{value:.1e}" for key, value in row.items() if key.endswith("error")]
    missing = [f"no {key.removesuffix('_missing')}: {row[key]}" for key in row if key.endswith("_missing")]
    return (
        f"{row['work']:<20} {row['size']:>7}  us: {', '.join(times)}  {' '.join(ratios)}  "
        f"{row['link_gb_s']:.0f} GB/s  errors {' '.join(errors)}  {' '.join(missing)}"
    )


def rank_main(rank: int, works: list[str], options: argparse.Namespace, port: int, found: Any) -> None:
    """Works at all their sizes; rank 0 hands the rows over."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", rank=rank, world_size=options.ranks, device_id=torch.device("cuda", rank))
    for work in works:
        make, sizes = WORKS[work]
        for size in options.sizes or sizes:
            with tw.World.distributed() as world:
                row = measure(world, make(size), options.repeats)
            if rank == 0:
                print(line(row), flush=True)
                found.put(row)
            gc.collect()
            torch.cuda.empty_cache()
    distributed.barrier()
    os._exit(0)  # NCCL's teardown waits for tensors that torch's symmetric memory keeps


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--works", nargs="+", choices=sorted(WORKS), default=list(WORKS))
    parser.add_argument("--sizes", nargs="+", type=int, help="instead of each work's own: n, bytes, or tokens")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--together", action="store_true", help="all works in the same processes: begins sooner")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{options.ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}, medians, random normal inputs")
    found: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()
    rows: list[Row] = []
    # processes for each work, so that a kernel that fails takes no other work with it
    for works in [options.works] if options.together else [[work] for work in options.works]:
        running = torch.multiprocessing.spawn(
            rank_main, (works, options, free_port(), found), nprocs=options.ranks, join=False
        )
        while True:
            try:
                ended = running.join(timeout=1)
            except (
                torch.multiprocessing.ProcessRaisedException,
                torch.multiprocessing.ProcessExitedException,
            ) as error:
                print(f"{' '.join(works)} failed: {error}", flush=True)
                ended = True
            while not found.empty():
                rows.append(found.get())
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
            if ended:
                break


if __name__ == "__main__":
    main()
