"""The works of multi_gpu.py: inputs, what torch and NCCL do, and the exact result, for each rank of a process group.

Inputs are random normal and follow from the rank alone, so that every rank can compute what another one has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed._symmetric_memory as symmetric

Tensor = torch.Tensor
BF16 = torch.bfloat16
#: rows whose error is measured
PICKED = 32


@dataclass
class Case:
    """One work at one size on this rank.

    ``rivals`` give this rank's output; ``inputs`` are this rank's, by name. ``exact(rows)`` is the output's rows in
    float64. ``flops`` and ``link_bytes`` (sent by a rank) are what the work needs of one rank.
    """

    work: str
    size: str
    inputs: dict[str, Tensor]
    rivals: dict[str, Callable[[], Tensor]]
    output: tuple[int, ...]
    exact: Callable[[Tensor], Tensor]
    flops: float = 0.0
    link_bytes: float = 0.0
    #: what lies in rivals alone, such as the product without communication: measured, but no rival
    parts: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    #: puts back what rivals overwrite, before each sample
    reset: Callable[[], Any] = lambda: None

    def rows_of(self, result: Tensor) -> Tensor:
        """The rows of an output whose error is measured."""
        return result.reshape(self.output)[picked(self.output[0])]


def world() -> tuple[int, int]:
    return distributed.get_rank(), distributed.get_world_size()


def group_name() -> str:
    return distributed.group.WORLD.group_name


def randn(name: str, rank: int, *shape: int) -> Tensor:
    """The input ``name`` of a rank."""
    generator = torch.Generator(device="cuda").manual_seed(1000 * rank + sum(name.encode()))
    return torch.randn(*shape, device="cuda", dtype=BF16, generator=generator)


def shared(*shape: int) -> Tensor:
    """A tensor in torch's symmetric memory."""
    tensor = symmetric.empty(*shape, dtype=BF16, device="cuda")
    symmetric.rendezvous(tensor, distributed.group.WORLD)
    return tensor


# --- products -----------------------------------------------------------------------------------------


def all_gather_gemm(n: int) -> Case:
    """C (n, n / P) = the shards of A (n / P, n) of all ranks, one below the other, @ B (n, n / P)."""
    rank, ranks = world()
    a, b = randn("a", rank, n // ranks, n), randn("b", rank, n, n // ranks)
    whole, c = torch.empty(n, n, device="cuda", dtype=BF16), torch.empty(n, n // ranks, device="cuda", dtype=BF16)

    def serial() -> Tensor:
        distributed.all_gather_into_tensor(whole, a)
        return torch.mm(whole, b, out=c)

    def exact(rows: Tensor) -> Tensor:
        everything = torch.cat([randn("a", r, n // ranks, n) for r in range(ranks)])
        return everything[rows].double() @ b.double()

    return Case(
        "all_gather_gemm",
        str(n),
        {"a": a, "b": b},
        {
            "serial": serial,
            "async_tp": lambda: torch.ops.symm_mem.fused_all_gather_matmul(a, [b], 0, group_name())[1][0],
        },
        (n, n // ranks),
        exact,
        2.0 * n * n * n / ranks,
        (ranks - 1) * a.nbytes,
        {"gemm": lambda: torch.mm(whole, b, out=c)},
    )


def gemm_reduce_scatter(n: int) -> Case:
    """C (n / P, n) = this rank's rows of the sum over ranks of A (n, n / P) @ B (n / P, n)."""
    rank, ranks = world()
    a, b = randn("a", rank, n, n // ranks), randn("b", rank, n // ranks, n)
    whole, c = torch.empty(n, n, device="cuda", dtype=BF16), torch.empty(n // ranks, n, device="cuda", dtype=BF16)

    def serial() -> Tensor:
        torch.mm(a, b, out=whole)
        distributed.reduce_scatter_tensor(c, whole)
        return c

    def exact(rows: Tensor) -> Tensor:
        picks = rows + rank * (n // ranks)
        parts = ((randn("a", r, n, n // ranks)[picks], randn("b", r, n // ranks, n)) for r in range(ranks))
        return sum(x.double() @ y.double() for x, y in parts)

    return Case(
        "gemm_reduce_scatter",
        str(n),
        {"a": a, "b": b},
        {
            "serial": serial,
            "async_tp": lambda: torch.ops.symm_mem.fused_matmul_reduce_scatter(a, b, "sum", 0, group_name()),
        },
        (n // ranks, n),
        exact,
        2.0 * n * n * n / ranks,
        (ranks - 1) * c.nbytes,
        {"gemm": lambda: torch.mm(a, b, out=whole)},
    )


def gemm_all_reduce(n: int) -> Case:
    """C (n, n) = the sum over ranks of A (n, n / P) @ B (n / P, n), on every rank."""
    rank, ranks = world()
    a, b = randn("a", rank, n, n // ranks), randn("b", rank, n // ranks, n)
    c, mine = torch.empty(n, n, device="cuda", dtype=BF16), shared(n, n)

    def serial() -> Tensor:
        torch.mm(a, b, out=c)
        distributed.all_reduce(c)
        return c

    def two_shot() -> Tensor:
        torch.mm(a, b, out=mine)
        return torch.ops.symm_mem.two_shot_all_reduce_(mine, "sum", group_name())

    def exact(rows: Tensor) -> Tensor:
        parts = ((randn("a", r, n, n // ranks)[rows], randn("b", r, n // ranks, n)) for r in range(ranks))
        return sum(x.double() @ y.double() for x, y in parts)

    return Case(
        "gemm_all_reduce",
        str(n),
        {"a": a, "b": b},
        {"serial": serial, "two_shot": two_shot},
        (n, n),
        exact,
        2.0 * n * n * n / ranks,
        2.0 * (ranks - 1) / ranks * c.nbytes,
        {"gemm": lambda: torch.mm(a, b, out=c)},
    )


# --- collectives --------------------------------------------------------------------------------------


def all_reduce(nbytes: int) -> Case:
    """The sum of x (rows of 1024 bf16) over ranks."""
    rank, ranks = world()
    shape = (nbytes // 2048, 1024)
    x = randn("x", rank, *shape)
    plain, mine = x.clone(), shared(*shape)

    def reset() -> None:
        """Rivals find their input where they want it; two of them overwrite it."""
        plain.copy_(x)
        mine.copy_(x)

    def nccl() -> Tensor:
        distributed.all_reduce(plain)
        return plain

    def one_shot() -> Tensor:
        return torch.ops.symm_mem.one_shot_all_reduce(mine, "sum", group_name())

    def two_shot() -> Tensor:
        return torch.ops.symm_mem.two_shot_all_reduce_(mine, "sum", group_name())

    def exact(rows: Tensor) -> Tensor:
        return sum(randn("x", r, *shape)[rows].double() for r in range(ranks))

    return Case(
        "all_reduce",
        size_of(nbytes),
        {"x": x},
        {"nccl": nccl, "one_shot": one_shot, "two_shot": two_shot},
        shape,
        exact,
        0.0,
        2.0 * (ranks - 1) / ranks * nbytes,
        reset=reset,
    )


def all_to_all(nbytes: int) -> Case:
    """The part for this rank of each rank's x (P parts of rows of 1024 bf16), in the order of ranks."""
    rank, ranks = world()
    shape = (nbytes // 2048, 1024)
    x = randn("x", rank, *shape)
    y = torch.empty_like(x)
    part = shape[0] // ranks

    def nccl() -> Tensor:
        distributed.all_to_all_single(y, x)
        return y

    def exact(rows: Tensor) -> Tensor:
        return torch.cat([randn("x", r, *shape)[rank * part : (rank + 1) * part] for r in range(ranks)])[rows].double()

    return Case(
        "all_to_all",
        size_of(nbytes),
        {"x": x},
        {"nccl": nccl},
        shape,
        exact,
        0.0,
        (ranks - 1) / ranks * nbytes,
    )


def size_of(nbytes: int) -> str:
    return f"{nbytes >> 20} MB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KB"


# --- mixture of experts ----------------------------------------------------------------------------------

EXPERTS, CHOICES, HIDDEN, WIDTH = 256, 8, 7168, 2048


def moe(tokens: int) -> Case:
    """out (T, N): each of the rank's tokens, T of them, times the matrices of its 8 experts of 256, weighted."""
    rank, ranks = world()
    each = EXPERTS // ranks
    x, w = randn("x", rank, tokens, HIDDEN), randn("w", rank, each, HIDDEN, WIDTH)
    generator = torch.Generator(device="cuda").manual_seed(rank)
    chance = torch.rand(tokens, EXPERTS, device="cuda", generator=generator)
    experts = chance.topk(CHOICES, dim=1).indices.to(torch.int32)
    weights = torch.softmax(torch.rand(tokens, CHOICES, device="cuda", generator=generator), 1)
    out = torch.empty(tokens, WIDTH, device="cuda", dtype=BF16)

    def plan() -> dict[str, Any]:
        """Where every choice goes: the host learns how much each rank sends, as all_to_all_single wants it."""
        flat = experts.flatten().long()
        sent = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=EXPERTS)
        theirs = torch.empty_like(counts)
        distributed.all_to_all_single(theirs, counts)
        theirs = theirs.view(ranks, each)
        to, back = torch.stack([counts.view(ranks, each).sum(1), theirs.sum(1)]).tolist()
        owner = (
            torch.arange(each, device="cuda").repeat(ranks).repeat_interleave(theirs.flatten(), output_size=sum(back))
        )
        return {
            "sent": sent,
            "to": to,
            "from": back,
            "order": torch.argsort(owner, stable=True),
            "ends": theirs.sum(0).cumsum(0).to(torch.int32),
        }

    def run(known: dict[str, Any]) -> Tensor:
        arrived = x.new_empty(sum(known["from"]), HIDDEN)
        distributed.all_to_all_single(arrived, x[known["sent"] // CHOICES], known["from"], known["to"])
        product = torch._grouped_mm(arrived[known["order"]], w, offs=known["ends"])
        results, returned = torch.empty_like(product), x.new_empty(tokens * CHOICES, WIDTH)
        results[known["order"]] = product
        distributed.all_to_all_single(returned, results, known["to"], known["from"])
        chosen = torch.empty_like(returned)
        chosen[known["sent"]] = returned
        torch.bmm(weights.to(BF16)[:, None], chosen.view(tokens, CHOICES, WIDTH), out=out[:, None])
        return out

    known = plan()

    def exact(rows: Tensor) -> Tensor:
        total = torch.zeros(len(rows), WIDTH, device="cuda", dtype=torch.float64)
        for owner in range(ranks):
            matrices = w if owner == rank else randn("w", owner, each, HIDDEN, WIDTH)
            for i, row in enumerate(rows.tolist()):
                for expert, weight in zip(experts[row].tolist(), weights[row].double(), strict=True):
                    if expert // each == owner:
                        total[i] += weight * (x[row].double() @ matrices[expert % each].double())
        return total

    return Case(
        "moe",
        f"{tokens} tokens",
        {"x": x, "experts": experts, "weights": weights, "w": w},
        {"nccl": lambda: run(plan()), "nccl_planned": lambda: run(known)},
        (tokens, WIDTH),
        exact,
        2.0 * tokens * CHOICES * HIDDEN * WIDTH,
        (ranks - 1) / ranks * tokens * CHOICES * (HIDDEN + WIDTH) * 2.0,
    )


WORKS: dict[str, tuple[Callable[[int], Case], Sequence[int]]] = {
    "all_gather_gemm": (all_gather_gemm, (4096, 8192, 16384)),
    "gemm_reduce_scatter": (gemm_reduce_scatter, (4096, 8192, 16384)),
    "gemm_all_reduce": (gemm_all_reduce, (4096, 8192, 16384)),
    "all_reduce": (all_reduce, tuple(1 << bits for bits in (13, 16, 19, 22, 25))),
    "all_to_all": (all_to_all, tuple(1 << bits for bits in (26, 28, 30))),
    "moe": (moe, (4096, 8192, 16384)),
}


def picked(rows: int) -> Tensor:
    """The first and the last row, and some between."""
    return torch.unique(torch.linspace(0, rows - 1, PICKED, device="cuda").long())


def error_of(result: Any, case: Case) -> float:
    """The relative error of the picked rows, in the Frobenius norm."""
    exact = case.exact(picked(case.output[0]))
    return float((case.rows_of(result).double() - exact).norm() / exact.norm())
