"""Ranks on real GPUs under stress: python tests/gpu/multi_gpu_stress.py [--only NAME...] [--iterations N].

Every scenario runs kernels in which each rank sends to all others, with values that change at every launch, and
checks all that arrived on the GPU. It needs two GPUs with peer access, and torch.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewright as tw
from tilewright.kernels.multi_gpu.all_reduce import all_reduce
from tilewright.kernels.multi_gpu.copy_engine import all_to_all, gemm_all_reduce, gemm_reduce_scatter, let_meet
from tilewright.kernels.multi_gpu.gemm_reduce_scatter import gemm_rs
from tilewright.kernels.multi_gpu.moe import moe
from tilewright.kernels.multi_gpu.ring_attention import ring_sdpa
from tilewright.runtime.device import open_device
from tilewright.runtime.errors import DeviceError

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import comm_kernels
from ring_kernel import PTX, N, ring_abi

SIZE = 2
#: clock cycles that a delayed rank sleeps at most before a launch (about 0.1 ms)
MOST_CYCLES = 200_000
BF16, F32 = torch.bfloat16, torch.float32


class Work(ABC):
    """A kernel with its tensors on this process's ranks of a world. Values follow from a number, exactly."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.places = {r: torch.device("cuda", open_device(world.memory.device(r)).ordinal) for r in world.ranks}
        self.wrong = {r: torch.zeros((), device=place, dtype=torch.int64) for r, place in self.places.items()}
        self.outputs: dict[int, torch.Tensor] = {}

    @abstractmethod
    def fill(self, rank: int, number: Any) -> None:
        """Inputs of a rank for a launch; ``number`` may be a tensor on its GPU."""

    @abstractmethod
    def launch(self) -> None:
        """One launch on every rank of this process."""

    @abstractmethod
    def expected(self, rank: int, number: Any) -> torch.Tensor:
        """What the rank's output must be, in all bits."""

    def step(self, number: Any) -> None:
        for rank in self.places:
            self.fill(rank, number)
        self.launch()
        for rank, place in self.places.items():
            with torch.cuda.device(place):
                self.wrong[rank] += (self.outputs[rank] != self.expected(rank, number)).sum()

    def run(self, iterations: int, delayed: int | None = None) -> None:
        """Launches with changing values; the rank ``delayed`` sleeps a random time before some."""
        generator = torch.Generator().manual_seed(0)
        for number in range(iterations):
            cycles = int(torch.randint(MOST_CYCLES, (), generator=generator))
            if delayed in self.places and number % 3 == 0:
                with torch.cuda.device(self.places[delayed]):
                    torch.cuda._sleep(cycles)
            self.step(number)
        self.finish()

    def finish(self) -> None:
        self.world.synchronize()
        for rank, wrong in self.wrong.items():
            assert int(wrong) == 0, f"{type(self).__name__}, rank {rank}: {int(wrong)} wrong elements"


class ByHand(Work):
    """The kernel of ring_kernel.py: everybody's x to everybody."""

    def __init__(self, world: Any, persistent: bool = True) -> None:
        super().__init__(world)
        slots, flags = world.empty((world.size, N), "f32"), world.flags(world.size)
        self.xs, self.offsets, self.ready = {}, {}, {}
        for rank, place in self.places.items():
            device = open_device(world.memory.device(rank))
            self.xs[rank] = torch.zeros(N, device=place)
            self.outputs[rank] = torch.full((world.size, N), float("nan"), device=place)
            ranks = torch.arange(world.size, device=place, dtype=F32)[:, None]
            self.offsets[rank] = torch.arange(N, device=place, dtype=F32)[None, :] + 1000 * ranks
            function = device.load(PTX.encode() + b"\0").function("ring")
            arguments = [slots.on(rank), flags.on(rank), self.xs[rank], self.outputs[rank]]
            self.ready[rank] = device.ready(function, ring_abi(world.size, persistent), 1, arguments)

    def fill(self, rank: int, number: Any) -> None:
        torch.add(self.offsets[rank][rank], number, out=self.xs[rank])

    def launch(self) -> None:
        for start in self.ready.values():
            start(None)

    def expected(self, rank: int, number: Any) -> torch.Tensor:
        return self.offsets[rank] + number


class AllReduce(Work):
    """A compiled kernel that puts with ordinary stores."""

    ROWS, COLUMNS = 64, 1024

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        shape = self.ROWS, self.COLUMNS
        self.slots, self.flags = world.empty((world.size, *shape), "f32"), world.flags(world.size, self.ROWS)
        self.offsets = {r: torch.arange(self.ROWS * self.COLUMNS, device=p).view(shape) for r, p in self.places.items()}
        self.xs = {r: torch.zeros(shape, device=place) for r, place in self.places.items()}
        self.outputs = {r: torch.full(shape, float("nan"), device=place) for r, place in self.places.items()}

    def value(self, rank: int, of: int, number: Any) -> torch.Tensor:
        return ((self.offsets[rank] + 7 * number + 13 * of) % 1021).to(F32)

    def fill(self, rank: int, number: Any) -> None:
        self.xs[rank].copy_(self.value(rank, rank, number))

    def launch(self) -> None:
        xs, ys = list(self.xs.values()), list(self.outputs.values())
        self.world.launch(comm_kernels.all_reduce, (self.ROWS,), xs, ys, self.slots, self.flags, N=self.COLUMNS)

    def expected(self, rank: int, number: Any) -> torch.Tensor:
        return sum(self.value(rank, of, number) for of in range(self.world.size))


class Packets(AllReduce):
    """The library's all-reduce by packets, whose launches take turns at two halves."""

    ALGORITHM = "packets"

    def launch(self) -> None:
        xs, ys = ([x.view(-1) for x in arrays.values()] for arrays in (self.xs, self.outputs))
        all_reduce(self.world, xs, ys, algorithm=self.ALGORITHM)


class Halves(Packets):
    """The same by puts and flags."""

    ALGORITHM = "push"


class Product(Work):
    """A compiled product whose tiles go to their owners by the copy engine, while the next are computed.

    Factors are integers from -3 to 3, so that sums are exact, and what is sent is rounded once.
    """

    WIDTH, DEPTH = 2048, 128
    #: values come again after as many launches; they are computed beforehand
    PERIOD = 7

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.a, self.b, self.inputs, self.results, self.factors = {}, {}, {}, {}, {}
        each = self.WIDTH // world.size
        for rank, place in self.places.items():
            places = torch.arange(self.WIDTH * self.DEPTH, device=place).view(self.WIDTH, self.DEPTH)
            factors = [(places * 31 % 1009 + 13 * r) % self.PERIOD for r in range(world.size)]
            left = [torch.stack([(f + n) % self.PERIOD - 3.0 for n in range(self.PERIOD)]) for f in factors]
            right = [(f * 5 % self.PERIOD - 3.0).T.contiguous() for f in factors]
            self.factors[rank] = left, right
            self.inputs[rank], self.results[rank] = left[rank].to(BF16), self.sums_of(rank, rank)
            self.a[rank], self.b[rank] = torch.empty_like(self.inputs[rank][0]), right[rank].to(BF16)
            self.outputs[rank] = torch.full((each, self.WIDTH), float("nan"), device=place, dtype=BF16)

    def sums_of(self, owner: int, rank: int) -> torch.Tensor:
        """The rows that a rank owns, of all values, on the GPU of another one."""
        each = self.WIDTH // self.world.size
        rows = slice(owner * each, (owner + 1) * each)
        sums = [x[:, rows] @ y for x, y in zip(*self.factors[rank], strict=True)]
        sent = sum(part.to(BF16).float() for r, part in enumerate(sums) if r != owner)
        return (sums[owner] + sent).to(BF16)

    def fill(self, rank: int, number: Any) -> None:
        self.a[rank].copy_(picked(self.inputs[rank], number))

    def launch(self) -> None:
        gemm_rs(self.world, *(list(arrays.values()) for arrays in (self.a, self.b, self.outputs)))

    def expected(self, rank: int, number: Any) -> torch.Tensor:
        return picked(self.results[rank], number)


class ProductByCopies(Product):
    """The same where the copy engines send whole rows."""

    def launch(self) -> None:
        gemm_reduce_scatter(self.world, *(list(arrays.values()) for arrays in (self.a, self.b, self.outputs)))


class SumByCopies(Product):
    """The same for everybody: owners' sums go to all, by the copy engines too."""

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        self.c = world.empty((world.size, self.WIDTH // world.size, self.WIDTH), "bf16")
        for rank in self.places:
            self.results[rank] = torch.cat([self.sums_of(owner, rank) for owner in range(world.size)], 1)
            self.outputs[rank] = self.c[rank].view(self.WIDTH, self.WIDTH)

    def launch(self) -> None:
        gemm_all_reduce(self.world, *(list(arrays.values()) for arrays in (self.a, self.b)), self.c)


class Pushed(Work):
    """An all-to-all by the copy engines."""

    COLUMNS = 65536

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        shape = world.size, self.COLUMNS
        self.y = world.empty(shape, "f32")
        self.outputs = dict(zip(world.ranks, self.y.arrays, strict=True))
        self.offsets = {
            r: torch.arange(world.size * self.COLUMNS, device=p).view(shape) for r, p in self.places.items()
        }
        self.xs = {r: torch.zeros(shape, device=place) for r, place in self.places.items()}

    def value(self, rank: int, of: int, number: Any) -> torch.Tensor:
        return ((self.offsets[rank] + 7 * number + 13 * of) % 1021).to(F32)

    def fill(self, rank: int, number: Any) -> None:
        self.xs[rank].copy_(self.value(rank, rank, number))

    def launch(self) -> None:
        all_to_all(self.world, list(self.xs.values()), self.y, copies=True)

    def expected(self, rank: int, number: Any) -> torch.Tensor:
        return torch.stack([self.value(rank, of, number)[rank] for of in range(self.world.size)])


class Fetched(Pushed):
    """Copy engines fetch a part of each other rank, one after the other, beside the stream."""

    def fill(self, rank: int, number: Any) -> None:
        self.outputs[rank][rank].copy_(self.value(rank, rank, number)[rank])

    def launch(self) -> None:
        let_meet(self.world)
        others = {rank: [p for p in range(self.world.size) if p != rank] for rank in self.world.ranks}
        copies = self.world.pull(lambda rank: [(self.y, peer, (peer,)) for peer in others[rank]])
        copies.join()
        copies.rejoin()
        let_meet(self.world)

    def expected(self, rank: int, number: Any) -> torch.Tensor:
        return torch.stack([self.value(rank, of, number)[of] for of in range(self.world.size)])


class Remembered(Work):
    """Work whose bits are not known beforehand: those of each value's first launch, whose error is small."""

    #: values come again after as many launches
    PERIOD = 5

    def __init__(self, world: Any) -> None:
        super().__init__(world)
        #: for each own rank the tensors that change, and all values of each
        self.changing: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.make()
        found: dict[int, list[torch.Tensor]] = {rank: [] for rank in self.places}
        for number in range(self.PERIOD):
            for rank in self.places:
                self.fill(rank, number)
            self.launch()
            world.synchronize()
            for rank in self.places:
                output, exact = self.outputs[rank].clone(), self.exact(rank, number).double()
                error = float((output.double() - exact).norm() / exact.norm())
                assert error < 1e-2, f"{type(self).__name__}, rank {rank}: an error of {error}"
                found[rank].append(output)
        self.results = {rank: torch.stack(outputs) for rank, outputs in found.items()}

    @abstractmethod
    def make(self) -> None:
        """All tensors; those of ``outputs`` begin as NaN."""

    @abstractmethod
    def exact(self, rank: int, number: int) -> torch.Tensor:
        """The rank's output in float32."""

    def random(self, rank: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """What a rank has of ``name`` for all values, on this process's first GPU: the same in each process."""
        place = next(iter(self.places.values()))
        generator = torch.Generator(place).manual_seed(1000 * rank + sum(name.encode()))
        return torch.randn(self.PERIOD, *shape, device=place, generator=generator)

    def fill(self, rank: int, number: Any) -> None:
        for place, values in self.changing[rank]:
            place.copy_(picked(values, number))

    def expected(self, rank: int, number: Any) -> torch.Tensor:
        return picked(self.results[rank], number)


def picked(values: torch.Tensor, number: Any) -> torch.Tensor:
    if isinstance(number, int):
        return values[number % len(values)]
    return values.index_select(0, (number % len(values)).view(1))[0]


class Ring(Remembered):
    """Attention over a sequence divided among the ranks, whose keys the copy engines bring."""

    BATCH, HEADS, GROUPS, LENGTH, DEPTH, CHUNKS, CAUSAL = 2, 8, 2, 640, 128, 1, False

    def make(self) -> None:
        size, shape = self.world.size, (self.LENGTH, self.DEPTH)
        queries, own = (self.CHUNKS, self.BATCH, self.HEADS, *shape), (self.CHUNKS, self.BATCH, self.GROUPS, *shape)
        whole = (self.BATCH, self.GROUPS, self.CHUNKS * size, *shape)
        self.q = {rank: torch.empty(queries, device=place, dtype=BF16) for rank, place in self.places.items()}
        self.outputs = {rank: torch.full_like(q, float("nan")) for rank, q in self.q.items()}
        self.lse = {rank: q.new_empty(q.shape[:-1], dtype=F32) for rank, q in self.q.items()}
        self.k, self.v = self.world.empty(whole, "bf16"), self.world.empty(whole, "bf16")
        self.values = {
            name: [self.random(rank, name, queries if name == "q" else own).to(BF16) for rank in range(size)]
            for name in "qkv"
        }
        for rank, place in self.places.items():
            given = [(self.q[rank], self.values["q"][rank].to(place))]
            for name, x in (("k", self.k), ("v", self.v)):
                values = self.values[name][rank].to(place)
                given += [(x[rank][:, :, p], values[:, chunk]) for chunk, p in enumerate(self.chunks_of(rank))]
            self.changing[rank] = given

    def chunks_of(self, rank: int) -> list[int]:
        return [rank, 2 * self.world.size - 1 - rank][: self.CHUNKS]

    def launch(self) -> None:
        q, o, lse = (list(arrays.values()) for arrays in (self.q, self.outputs, self.lse))
        ring_sdpa(self.world, q, self.k, self.v, o, lse, self.CAUSAL)

    def exact(self, rank: int, number: int) -> torch.Tensor:
        places = [self.chunks_of(r) for r in range(self.world.size)]
        order = sorted((place, r, chunk) for r, own in enumerate(places) for chunk, place in enumerate(own))
        q, k, v = (torch.cat([x[r][number, chunk] for _, r, chunk in order], 2).float() for x in self.values.values())
        attention = torch.nn.functional.scaled_dot_product_attention
        whole = attention(q, k, v, is_causal=self.CAUSAL, enable_gqa=True).split(self.LENGTH, 2)
        return torch.stack([whole[place] for place in places[rank]]).to(self.places[rank])


class CausalRing(Ring):
    """The same with two chunks for each rank, whose keys blocks of the kernel bring."""

    CHUNKS, CAUSAL = 2, True


class Experts(Remembered):
    """Tokens that go to experts of all ranks and back."""

    TOKENS, DEPTH, WIDTH, EXPERTS, CHOICES = 300, 256, 256, 16, 4

    def make(self) -> None:
        size = self.world.size
        tokens, chosen = (self.TOKENS, self.DEPTH), (self.TOKENS, self.EXPERTS)
        self.tokens = [self.random(r, "tokens", tokens).to(BF16) for r in range(size)]
        self.chosen = [self.random(r, "chosen", chosen).topk(self.CHOICES).indices.int() for r in range(size)]
        self.shares = [self.random(r, "shares", (self.TOKENS, self.CHOICES)).softmax(-1) for r in range(size)]
        shape = self.EXPERTS // size, self.DEPTH, self.WIDTH
        self.matrices = [self.random(r, "matrices", shape)[0].to(BF16) for r in range(size)]
        self.x, self.given = self.world.empty((size, *tokens), "bf16"), {}
        for rank, place in self.places.items():
            choices, shares = (values[rank].to(place) for values in (self.chosen, self.shares))
            matrices = self.matrices[rank].to(place)
            self.given[rank] = torch.empty_like(choices[0]), torch.empty_like(shares[0]), matrices
            self.outputs[rank] = torch.full((self.TOKENS, self.WIDTH), float("nan"), device=place, dtype=BF16)
            own, weights, _ = self.given[rank]
            self.changing[rank] = [
                (self.x[rank][rank], self.tokens[rank].to(place)), (own, choices), (weights, shares),
            ]  # fmt: skip

    def launch(self) -> None:
        experts, weights, matrices = (list(arrays) for arrays in zip(*self.given.values(), strict=True))
        moe(self.world, self.x, experts, weights, matrices, list(self.outputs.values()))

    def exact(self, rank: int, number: int) -> torch.Tensor:
        matrices, total = torch.cat(self.matrices).float(), 0.0
        for choice in range(self.CHOICES):
            rows = self.tokens[rank][number].float()[:, None] @ matrices[self.chosen[rank][number, :, choice].long()]
            total = total + rows[:, 0] * self.shares[rank][number, :, choice, None]
        return total.to(self.places[rank])


WORKS = (
    *(ByHand, AllReduce, Packets, Halves, Product, ProductByCopies, SumByCopies, Pushed, Fetched),
    *(Ring, CausalRing, Experts),
)


# --- scenarios: a function of the world and the number of iterations --------------------------------------


def plain(world: Any, iterations: int) -> str:
    found = []
    for kind in WORKS:
        work = kind(world)
        work.run(10)
        start = time.perf_counter()
        work.run(iterations)
        found.append(f"{kind.__name__} {(time.perf_counter() - start) / iterations * 1e6:.0f} us")
    return f"{iterations} launches and their checks: {', '.join(found)} each"


def delays(world: Any, iterations: int) -> str:
    for kind in WORKS:
        for delayed in range(world.size):
            kind(world).run(iterations // world.size, delayed)
    return f"{iterations} launches of each kernel"


def launch_cost(world: Any, iterations: int) -> str:
    """Time of back-to-back launches, and of the host alone."""
    works = {
        "by hand, cooperative": ByHand(world), "by hand, plain": ByHand(world, persistent=False),
        "all-reduce": AllReduce(world), "product": Product(world),
    }  # fmt: skip
    found = []
    for name, work in works.items():
        work.run(10)
        world.barrier()
        start = time.perf_counter()
        for _ in range(iterations):
            work.launch()
        host = time.perf_counter() - start
        world.synchronize()
        whole = time.perf_counter() - start
        found.append(f"{name} {whole / iterations * 1e6:.1f} us (host {host / iterations * 1e6:.1f})")
    return ", ".join(found)


def graph(world: Any, iterations: int) -> str:
    """Launches captured once and replayed; the values change through a counter on the GPU."""
    for kind in WORKS:
        work = kind(world)
        work.run(3)
        ((rank, place),) = work.places.items()
        counter = torch.zeros((), device=place, dtype=torch.int64)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            world.endpoints[rank].place(bytes(256))  # as tensor maps of a first launch are
            for _ in range(8):
                counter += 1
                work.step(counter)
        for number in range(iterations // 8):
            captured.replay()
            if number % 10 == 0:  # launches between replays count too
                work.launch()
        work.finish()
        assert int(counter) == iterations // 8 * 8
    return f"{iterations // 8} replays of 8 launches of each kernel"


def dead_rank(world: Any, iterations: int) -> str:
    """The last rank is killed; the others must say so instead of hanging."""
    work = AllReduce(world)
    work.run(100)
    world.barrier()
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.perf_counter()
    with pytest.raises(DeviceError) as error:
        work.run(10)
    elapsed, message = time.perf_counter() - start, str(error.value)
    awaited = rf"(flag \d+ of 'flags' .never signalled|rank {world.size - 1} to start the launch)"
    wanted = rf"rank {world.rank} waited 2 s in kernel all_reduce\S* at \S*comm_kernels\.py:\d+ for {awaited}"
    assert re.match(wanted, message) and elapsed < 10, (message, elapsed)
    return f"after {elapsed:.1f} s: {message}"


def disagreement(world: Any, iterations: int) -> str:
    with pytest.raises(DeviceError, match=r"rank 0: f32 \[4, 4\]; rank 1: f32 \[4, 5\]") as error:
        world.empty((4, 4 + world.rank), "f32")
    return str(error.value)


SCENARIOS: dict[str, Callable[[Any, int], str]] = {
    f.__name__: f for f in (plain, delays, launch_cost, graph, dead_rank, disagreement)
}
#: what a process with all ranks cannot run
ONE_RANK_EACH = ("graph", "dead_rank", "disagreement")
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
