"""Chains of launches that begin early, on a real CUDA device: nobody reads or overwrites what is still in use."""

from __future__ import annotations

import pytest

import tilewright as tw
from tilewright.kernels.gemm import matmul
from tilewright.kernels.softmax import softmax_rows

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

BLOCK, PROGRAMS, ROUNDS = 1024, 1500, 60


@tw.kernel
def slow_fill(source: tw.Tensor, out: tw.Tensor) -> None:
    """``source[0]`` everywhere, written at the end of a long loop over zeros."""
    i = tw.program_id(0)
    total = tw.zeros((1024,), tw.float32)
    for j in tw.range(1, source.shape[0] // 1024):
        total = total + tw.load(source, j, (1024,))
    tw.store(out, i, total + tw.load(source, 0))


@tw.kernel
def last_first(x: tw.Tensor, y: tw.Tensor) -> None:
    """The largest element of each tile; the first program reads the last tile."""
    i = tw.program_id(0)
    tile = tw.load(x, tw.num_programs(0) - 1 - i, (1024,))
    tw.store(y, i, tw.max(tile[None, :], axis=1))


@pytest.mark.parametrize("between", ["nothing", "torch", "memset"])
def test_readers_see_what_the_launch_before_wrote_last(between):
    source = torch.zeros(65 * BLOCK, device="cuda")
    out, y = torch.zeros(PROGRAMS * BLOCK, device="cuda"), torch.zeros(PROGRAMS, device="cuda")
    right = []
    for i in range(1, ROUNDS):
        source[:1].fill_(i)
        slow_fill[PROGRAMS,](source, out)
        if between == "torch":
            out.add_(1.0)
        elif between == "memset":
            out[: 8 * BLOCK].zero_()
        last_first[PROGRAMS,](out, y)
        expected = torch.full_like(y, i + (between == "torch"))
        if between == "memset":
            expected[-8:] = 0
        right.append((y == expected).all())
    assert all(map(bool, right))


def chain(x, w, long, y, z, c, settle=lambda: None):
    """Rows, few tiles with K split, rows in place of what they came from, and a launch of one block."""
    softmax_rows(x, y)
    settle()
    matmul(y, w, z)
    settle()
    matmul(long, long.T, c)
    settle()
    softmax_rows(z, x)
    settle()
    last_first[1,](c.view(-1), y.view(-1).view(torch.float32))
    settle()


def test_chains_have_the_same_bits_where_the_host_waits_between_launches():
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    begin = [randn(512, 512), randn(512, 512), randn(128, 8192)]
    rest = [randn(512, 512), randn(512, 512), torch.zeros(128, 128, device="cuda", dtype=torch.float32)]
    ends = {}
    for way in ("overlap", "graph"):
        tensors = [x.clone() for x in begin + rest]
        graph = None
        if way == "graph":
            chain(*tensors)
            tensors = [x.clone() for x in begin + rest]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain(*tensors)
        for _ in range(ROUNDS):
            chain(*tensors) if graph is None else graph.replay()
            tensors[0].mul_(3.0)
        torch.cuda.synchronize()
        ends[way] = tensors
    tensors = [x.clone() for x in begin + rest]
    for _ in range(ROUNDS):
        chain(*tensors, settle=torch.cuda.synchronize)
        tensors[0].mul_(3.0)
    for way in ("overlap", "graph"):
        pairs = zip(tensors, ends[way], strict=True)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs), way
