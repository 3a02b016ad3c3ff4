"""Ranks on real GPUs under stress: python tests/gpu/multi_gpu_stress.py [--only NAME...] [--iterations N].

Every scenario runs a kernel in which each rank sends to all others, with values that change at every launch, and
checks all that arrived on the GPU. It needs two GPUs with peer access, and torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewright as tw
from tilewright.runtime.device import open_device
from tilewright.runtime.errors import DeviceError

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from ring_kernel import LINE, PTX, N, ring_abi

SIZE = 2
#: clock cycles that a delayed rank sleeps at most before a launch (about 0.1 ms)
MOST_CYCLES = 200_000


class Exchange:
    """The kernel, its tensors and the check of what arrived, on this process's ranks of a world."""

    def __init__(self, world: Any, persistent: bool = True) -> None:
        self.world = world
        self.slots, self.flags = world.empty((world.size, N), "f32"), world.flags(world.size)
        self.devices = {r: open_device(world.memory.device(r)) for r in world.ranks}
        abi = ring_abi(world.size, persistent)
        self.lanes = torch.arange(N, dtype=torch.float32)
        self.xs, self.ys, self.wrong, self.ready, self.offsets = {}, {}, {}, {}, {}
        for rank, device in self.devices.items():
            where = f"cuda:{device.ordinal}"
            self.xs[rank] = torch.zeros(N, device=where)
            self.ys[rank] = torch.full((world.size, N), float("nan"), device=where)
            self.wrong[rank] = torch.zeros((), device=where, dtype=torch.int64)
            ranks = torch.arange(world.size, device=where, dtype=torch.float32)[:, None]
            self.offsets[rank] = self.lanes.to(where)[None, :] + 1000 * ranks
            function = device.load(PTX.encode() + b"\0").function("ring")
            arguments = [self.slots.on(rank), self.flags.on(rank), self.xs[rank], self.ys[rank]]
            self.ready[rank] = device.ready(function, abi, 1, arguments)

    def fill(self, number: float) -> None:
        """Other values for the next launch."""
        for rank in self.world.ranks:
            torch.add(self.offsets[rank][rank], number, out=self.xs[rank])

    def launch(self) -> None:
        for rank, device in self.devices.items():
            with torch.cuda.device(device.ordinal):
                self.ready[rank](None)

    def check(self, number: float) -> None:
        """Count the elements that are not what the ranks sent."""
        for rank in self.world.ranks:
            self.wrong[rank] += (self.ys[rank] != self.offsets[rank] + number).sum()

    def run(self, iterations: int, delayed: int | None = None) -> None:
        """Launches with changing values; the rank ``delayed`` sleeps a random time before some."""
        generator = torch.Generator().manual_seed(0)
        for number in range(iterations):
            self.fill(number)
            if delayed in self.devices and number % 3 == 0:
                with torch.cuda.device(self.devices[delayed].ordinal):
                    torch.cuda._sleep(int(torch.randint(MOST_CYCLES, (), generator=generator)))
            self.launch()
            self.check(number)
        self.finish()

    def finish(self) -> None:
        self.world.synchronize()
        for rank, wrong in self.wrong.items():
            assert int(wrong) == 0, f"rank {rank}: {int(wrong)} wrong elements"


# --- scenarios: a function of the world and the number of iterations --------------------------------------


def plain(world: Any, iterations: int) -> str:
    exchange = Exchange(world)
    exchange.run(10)
    start = time.perf_counter()
    exchange.run(iterations)
    return f"{iterations} launches, {(time.perf_counter() - start) / iterations * 1e6:.1f} us each with their checks"


def delays(world: Any, iterations: int) -> str:
    for delayed in range(world.size):
        Exchange(world).run(iterations // 2, delayed)
    return f"{iterations} launches"


def launch_cost(world: Any, iterations: int) -> str:
    """Time of back-to-back launches, cooperative and not, and of the host alone."""
    found = []
    for name, persistent in (("cooperative", True), ("plain", False)):
        exchange = Exchange(world, persistent)
        exchange.run(10)
        world.barrier()
        start = time.perf_counter()
        for _ in range(iterations):
            exchange.launch()
        host = time.perf_counter() - start
        world.synchronize()
        whole = time.perf_counter() - start
        found.append(f"{name} {whole / iterations * 1e6:.1f} us (host {host / iterations * 1e6:.1f})")
    return ", ".join(found)


def graph(world: Any, iterations: int) -> str:
    """Launches captured once and replayed; the values change through a counter on the GPU."""
    exchange = Exchange(world)
    exchange.run(3)
    graphs = []
    counters = {r: torch.zeros((), device=x.device) for r, x in exchange.xs.items()}
    for rank, device in exchange.devices.items():
        with torch.cuda.device(device.ordinal):
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                exchange.world.endpoints[rank].place(bytes(256))  # as tensor maps of a first launch are
                for _ in range(8):
                    counters[rank] += 1
                    torch.add(exchange.offsets[rank][rank], counters[rank], out=exchange.xs[rank])
                    exchange.ready[rank](None)
                    arrived = exchange.ys[rank] != exchange.offsets[rank] + counters[rank]
                    exchange.wrong[rank] += arrived.sum()
            graphs.append((device.ordinal, captured))
    for number in range(iterations // 8):
        for ordinal, captured in graphs:
            with torch.cuda.device(ordinal):
                captured.replay()
        if number % 10 == 0:  # launches between replays count epochs too
            exchange.launch()
    exchange.finish()
    assert all(int(counter) == iterations // 8 * 8 for counter in counters.values())
    return f"{iterations // 8} replays of 8 launches"


def dead_rank(world: Any, iterations: int) -> str:
    """The last rank is killed; the others must say so instead of hanging."""
    exchange = Exchange(world)
    exchange.run(100)
    world.barrier()
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.perf_counter()
    wanted = f"rank {world.rank} waited 2 s in kernel ring at ring.py:{LINE} for flag {world.size - 1} of 'flags'"
    with pytest.raises(DeviceError, match=wanted) as error:
        exchange.run(10)
    elapsed, message = time.perf_counter() - start, str(error.value)
    assert f"never signalled by rank {world.size - 1}" in message and elapsed < 10, (message, elapsed)
    return f"after {elapsed:.1f} s: {message}"


def disagreement(world: Any, iterations: int) -> str:
    with pytest.raises(DeviceError, match=r"rank 0: f32 \[4, 4\]; rank 1: f32 \[4, 5\]") as error:
        world.empty((4, 4 + world.rank), "f32")
    return str(error.value)


SCENARIOS: dict[str, Callable[[Any, int], str]] = {
    f.__name__: f for f in (plain, delays, launch_cost, graph, dead_rank, disagreement)
}
#: what a process with all ranks cannot run
ONE_RANK_EACH = ("dead_rank", "disagreement")
WORLDS = ("local", "connect", "distributed")


# --- processes ------------------------------------------------------------------------------------------


def open_world(kind: str, rank: int, address: str) -> Any:
    if kind == "local":
        return tw.World.local(list(range(SIZE)))
    torch.cuda.set_device(rank)
    if kind == "connect":
        return tw.World.connect(rank, SIZE, address)
    import torch.distributed as distributed

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=address)
    distributed.init_process_group("nccl", rank=rank, world_size=SIZE, device_id=torch.device("cuda", rank))
    return tw.World.distributed()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(kind: str, names: list[str], iterations: int) -> list[subprocess.Popen[str]]:
    """The processes of a job that runs scenarios in one world."""
    address = free_port() if kind == "distributed" else tw.World.address()
    environment = os.environ | {"TILEWRIGHT_WAIT_TIMEOUT": "2" if names == ["dead_rank"] else "30"}
    command = [sys.executable, __file__, "--world", kind, "--only", *names, "--iterations", str(iterations)]
    return [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--address", address],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(1 if kind == "local" else SIZE)
    ]  # fmt: skip


def finish(job: list[subprocess.Popen[str]], killed: bool, timeout: float) -> tuple[bool, str]:
    """Whether a job went well, and what its ranks said."""
    said, good = [], True
    for rank, process in enumerate(job):
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + "\n(hung)"
        good = good and process.returncode == (-signal.SIGKILL if killed and rank == SIZE - 1 else 0)
        lines = output.strip().splitlines()
        said += [f"  rank {rank}: {line}" for line in (lines if process.returncode == 0 else lines[-15:])]
    return good, "\n".join(said)


def run_all(worlds: list[str], names: list[str], iterations: int) -> int:
    together = [name for name in names if name != "dead_rank"]
    jobs: list[tuple[str, list[str]]] = [(kind, together) for kind in worlds if together]
    if "dead_rank" in names:
        jobs += [(kind, ["dead_rank"]) for kind in worlds if kind != "local"]
    failures = 0
    for kind, scenarios in jobs:
        if kind == "local":
            scenarios = [name for name in scenarios if name not in ONE_RANK_EACH]
        good, said = finish(start(kind, scenarios, iterations), scenarios == ["dead_rank"], 240)
        failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {kind}: {' '.join(scenarios)}\n{said}", flush=True)
    if "connect" in worlds and "delays" in names:  # GPUs change between processes every few milliseconds
        pair = [start("connect", ["delays"], iterations // 10) for _ in range(2)]
        results = [finish(job, False, 240) for job in pair]
        failures += not all(good for good, _ in results)
        print("two jobs at once:", *(f"{'ok' if good else 'FAIL'}\n{said}" for good, said in results), flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--only", nargs="+", choices=sorted(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--address")
    options = parser.parse_args()
    if options.rank is None:
        sys.exit(run_all(options.world, options.only, options.iterations))
    world = open_world(options.world[0], options.rank, options.address)
    for name in options.only:
        print(f"{name}: {SCENARIOS[name](world, options.iterations)}", flush=True)
    if options.only != ["dead_rank"]:
        world.close()
    os._exit(0)  # NCCL's teardown is none of ours


if __name__ == "__main__":
    main()
