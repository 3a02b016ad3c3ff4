"""Products beside collectives on the GPUs of this machine, one process for each, against torch's collectives."""

from __future__ import annotations

import os
import socket

import pytest

torch = pytest.importorskip("torch")
if torch.cuda.device_count() < 2:
    pytest.skip("takes two GPUs", allow_module_level=True)
import torch.distributed as distributed  # noqa: E402

from tilewright.torch import collectives, worlds  # noqa: E402

SHAPES = [
    *(((4096, 2048), 1024), ((4, 1024, 2048), 2048), ((256, 512), 384), ((4, 128, 512), 256)),
    *(((2, 264, 2, 520), 136), ((1000, 1024), 1000), ((4096, 512), 4096)),  # the last by the copy engines
]
#: of bfloat16 results, whose parts have been rounded on the way
ROUNDED = 6e-3


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_group(rank, check, size, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NCCL_NVLS_ENABLE="0")
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank))
    check(rank, size)
    (shared,) = worlds._shared.values()
    assert shared.refusal is None and shared.world is not None
    distributed.barrier()
    torch.cuda.synchronize()
    if check is not check_end:
        os._exit(0)
    distributed.destroy_process_group()


def gathered(x, dim, size):
    parts = [torch.empty_like(x) for _ in range(size)]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim).float()


def reduced(x):
    distributed.all_reduce(x)
    return x


def relative(actual, exact):
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def check_values(rank, size):
    for (shape, columns), dtype in ((case, dtype) for case in SHAPES for dtype in (torch.bfloat16, torch.float16)):
        for turn in range(2):  # with the buffers of the turn before
            torch.manual_seed(10 * turn + rank)
            x = torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)
            for dim in range(len(shape)):
                depth = shape[-1] * (size if dim == len(shape) - 1 else 1)
                w = torch.randn(columns, depth, device="cuda", dtype=dtype).t().requires_grad_()
                check_gather(x, w, dim, rank, size)
            w = torch.randn(shape[-1], columns, device="cuda", dtype=dtype, requires_grad=True)
            for dim in range(len(shape)):
                if (*shape[:-1], columns)[dim] % size == 0:
                    check_scatter(x, w, dim, rank, size)
            total = reduced(x.detach().float() @ w.detach().float())
            assert relative(collectives.matmul_all_reduce(x, w), total) < ROUNDED


def check_gather(x, w, dim, rank, size):
    y = collectives.all_gather_matmul(x, w, None, dim)
    whole, factor, dy = gathered(x.detach(), dim, size), w.detach().float(), torch.randn_like(y)
    assert relative(y, whole @ factor) < ROUNDED
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert relative(dx, reduced(dy.float() @ factor.t()).chunk(size, dim)[rank]) < ROUNDED
    assert relative(dw, whole.flatten(0, -2).t() @ dy.float().flatten(0, -2)) < ROUNDED


def check_scatter(x, w, dim, rank, size):
    y = collectives.matmul_reduce_scatter(x, w, None, dim)
    rows, factor, dy = x.detach().float(), w.detach().float(), torch.randn_like(y)
    assert relative(y, reduced(rows @ factor).chunk(size, dim)[rank]) < ROUNDED
    whole = gathered(dy, dim, size)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert relative(dx, whole @ factor.t()) < ROUNDED
    assert relative(dw, rows.flatten(0, -2).t() @ whole.flatten(0, -2)) < ROUNDED


def check_replays(rank, size):
    """Graph replays and launches on another stream take turns with ordinary calls: the same bits."""
    replay(2048)


def check_large_replays(rank, size):
    """The same where the copy engines carry sums."""
    replay(4096)


def replay(width):
    x, w = (torch.randn(width, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def works():
        h = collectives.all_gather_matmul(x, w)
        return h, collectives.matmul_reduce_scatter(h, w), collectives.matmul_all_reduce(x, w)

    works()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = works()
    for _ in range(50):
        x.normal_()
        w.normal_()
        graph.replay()
        expected = works()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            others = works()
        torch.cuda.current_stream().wait_stream(side)
        for a, b, c in zip(captured, expected, others, strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)


def check_end(rank, size):
    """A process that has used a world ends as others do."""
    x, w = (torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert collectives.all_gather_matmul(x, w).shape == (2048 * size, 2048)


@pytest.mark.parametrize("check", [check_values, check_replays, check_large_replays, check_end])
def test_two_gpus(check):
    torch.multiprocessing.spawn(in_group, (check, 2, free_port()), nprocs=2)
