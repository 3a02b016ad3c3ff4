"""Split products on a real CUDA device: right, equal bits each time, in graphs and on streams side by side."""

from __future__ import annotations

import pytest

from tilewright.kernels.gemm import matmul, split_configuration

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

SHAPES = [(512, 512, 16384), (64, 1024, 4096), (200, 136, 8000), (67, 129, 5001)]


def operands(m, n, k):
    torch.manual_seed(0)
    a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    return a, b, torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)


def relative(actual, exact):
    torch.cuda.synchronize()
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_right_and_equal_each_time(shape):
    a, b, c = operands(*shape)
    assert split_configuration(*shape)[1] > 1
    exact, results = a.double() @ b.double(), []
    for _ in range(20):
        c.fill_(float("nan"))
        matmul(a, b, c)
        results.append(c.clone())
    assert relative(results[0], exact) <= 1.01 * relative(a @ b, exact) + 1e-4
    assert all(torch.equal(r.view(torch.int16), results[0].view(torch.int16)) for r in results)


def test_graph_and_streams():
    shape = SHAPES[0]
    a, b, c = operands(*shape)
    matmul(a, b, c)
    expected = c.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matmul(a, b, c)
    for _ in range(3):
        c.fill_(float("nan"))
        graph.replay()
        assert torch.equal(c, expected)
    outs = [torch.full_like(c, float("nan")) for _ in range(4)]
    torch.cuda.synchronize()
    for out in outs:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                matmul(a, b, out)
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)
