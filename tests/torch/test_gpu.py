"""What only a GPU shows: operators on sizes that tiles are for, against torch, and in CUDA graphs."""

from __future__ import annotations

from importlib import import_module

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
twt = import_module("tilewright.torch")
functional = import_module("tilewright.torch.functional")


def normal(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16)


def starts(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def eight_bits(*shape):
    return torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)


def _calls():
    """Name -> (operator, tensors with gradients, further arguments, options)."""
    heads = [normal(2, 4, 256, 64) for _ in range(3)]
    packed = [normal(300, 4, 64), normal(300, 2, 64), normal(300, 2, 64)]
    weights = [normal(384, 512, scale=0.05) for _ in range(2)]
    classes = torch.randint(0, 5000, (64,), device="cuda")
    ends, shape, scales = starts(100, 100, 256), (1024,), torch.rand(2, 1, device="cuda")
    angles = torch.rand(128, 64, device="cuda")
    mask = torch.ones(256, 256, dtype=torch.bool, device="cuda").tril()
    return {
        "matmul, few tiles": (twt.matmul, [normal(256, 4096), normal(4096, 256)], (), {}),
        "linear": (twt.linear, [normal(256, 512), weights[0], normal(384)], ("gelu",), {}),
        "linear, residual": (twt.linear, [normal(256, 512), weights[0]], (), {"residual": normal(256, 384)}),
        "gated_linear": (twt.gated_linear, [normal(256, 512), *weights], (), {}),
        "attention": (twt.attention, heads, (), {"is_causal": True}),
        "attention, masked": (twt.attention, heads, (), {"attn_mask": mask}),
        "attention, summand": (twt.attention, [*heads, normal(1, 4, 256, 256)], (), {}),
        "attention, lengths": (twt.attention, heads, (), {"lengths": starts(256, 100), "softcap": 3.0}),
        "attention, window": (twt.attention, heads, (), {"is_causal": True, "window": 100}),
        "attention_varlen": (
            *(twt.attention_varlen, packed, (starts(0, 90, 300), starts(0, 90, 300), 210)),
            {"is_causal": True, "softcap": 3.0},
        ),
        "matmul, batches": (twt.matmul, [heads[0], heads[1].mT], (), {}),
        "cast_linear": (twt.cast_linear, [normal(256, 512), weights[0].float()], (), {}),
        "attention_decode": (
            *(twt.attention_decode, [], (normal(3, 8, 64), normal(3, 2, 2000, 64), normal(3, 2, 2000, 64))),
            {"lengths": starts(2000, 1, 777)},
        ),
        "softmax": (twt.softmax, [normal(64, 1000)], (-1,), {}),
        "rms_norm": (twt.rms_norm, [normal(64, 1024)], (shape, normal(1024)), {"eps": 1e-5}),
        "layer_norm": (twt.layer_norm, [normal(64, 1024)], (shape, normal(1024), normal(1024)), {}),
        "add_rms_norm": (twt.add_rms_norm, [normal(64, 1024), normal(64, 1024)], (shape, normal(1024), 1e-5), {}),
        "add_layer_norm": (twt.add_layer_norm, [normal(64, 1024), normal(64, 1024)], (shape, normal(1024)), {}),
        "cross_entropy": (twt.cross_entropy, [normal(64, 5000)], (classes,), {"label_smoothing": 0.1}),
        "rotary": (twt.rotary, [normal(2, 128, 8, 128)], (angles.cos(), angles.sin()), {}),
        "grouped_mm": (twt.grouped_mm, [normal(256, 512), normal(3, 512, 384, scale=0.05)], (), {"offs": ends}),
        "scaled_linear": (
            *(twt.scaled_linear, [], (eight_bits(256, 512), eight_bits(384, 512), scales[0], scales[1])),
            {},
        ),
    }


@pytest.mark.parametrize("name", sorted(_calls()))
def test_operator(name):
    """Right in a call, and in a graph that is captured once and replayed on other values."""
    torch.manual_seed(0)
    operator, tensors, others, options = _calls()[name]
    inputs = [x.clone().requires_grad_() for x in tensors]
    assert functional.refusal(operator, *inputs, *others, **options) is None

    def step(function=operator):
        results = function(*inputs, *others, **options)
        results = results if isinstance(results, tuple) else (results,)
        if not inputs:
            return results
        loss = sum(y.float().square().sum() for y in results)
        return (*results, *torch.autograd.grad(loss, inputs))

    def compare(results, expected, exact):
        for result, wanted in zip(results, expected, strict=True):
            assert wanted.float().abs().max() > 0
            if exact:
                assert torch.equal(result, wanted)
            else:
                error = (result.float() - wanted.float()).norm() / wanted.float().norm()
                assert error < 1.5e-2, f"relative error {error:.1e}"  # torch rounds between its operations too

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = step()
    torch.cuda.current_stream().wait_stream(side)
    compare(first, step(functional.eager(operator)), exact=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x) * x.float().std())
        for result in captured:
            result.detach().fill_(float("nan"))
    graph.replay()
    compare(captured, step(), exact=True)
