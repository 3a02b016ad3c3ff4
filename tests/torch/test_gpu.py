"""What only a GPU shows: operators in CUDA graphs, and products of the sizes that tiles are for."""

from __future__ import annotations

from importlib import import_module

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
twt = import_module("tilewright.torch")
F = torch.nn.functional


def normal(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _calls():
    """Name -> (operator, tensors, options)."""
    heads = [normal(2, 4, 256, 64) for _ in range(3)]
    return {
        "matmul": (twt.matmul, [normal(256, 4096), normal(4096, 256)], {}),
        "linear": (twt.linear, [normal(256, 512), normal(384, 512), normal(384)], {"activation": "gelu"}),
        "attention": (twt.attention, heads, {"is_causal": True}),
        "softmax": (lambda x: twt.softmax(x, -1), [normal(64, 1000)], {}),
        "rms_norm": (lambda x, w: twt.rms_norm(x, (1024,), w), [normal(64, 1024), normal(1024)], {}),
        "layer_norm": (lambda x, w, b: twt.layer_norm(x, (1024,), w, b), [normal(64, 1024), *[normal(1024)] * 2], {}),
        "cross_entropy": (
            lambda x: twt.cross_entropy(x, torch.arange(64, device="cuda")),
            [normal(64, 5000)],
            {},
        ),
    }


@pytest.mark.parametrize("name", sorted(_calls()))
def test_forward_and_backward_in_a_graph(name):
    """Captured once; replayed on other values the results are those of a call."""
    torch.manual_seed(0)
    operator, tensors, options = _calls()[name]
    inputs = [x.clone().requires_grad_() for x in tensors]

    def step():
        y = operator(*inputs, **options)
        return y, *torch.autograd.grad(y.float().square().sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    for result in captured:
        result.detach().fill_(float("nan"))
    graph.replay()
    for result, expected in zip(captured, step(), strict=True):
        assert torch.equal(result, expected)
        assert expected.abs().max() > 0
