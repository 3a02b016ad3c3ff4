"""Products whose operands were cast for them: the operator, and the casts that the backend takes into it."""

from __future__ import annotations

from importlib import import_module

import pytest

torch = pytest.importorskip("torch")
twt = import_module("tilewright.torch")
backend = import_module("tilewright.torch.backend")
refusal = import_module("tilewright.torch.functional").refusal
F = torch.nn.functional
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
BOTH = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@HALVES
@pytest.mark.parametrize("which", ["input", "weight"])
@pytest.mark.parametrize("biased", [False, True])
def test_float32(half, which, biased):
    x, weight = torch.randn(2, 5, 24), torch.randn(17, 24)
    x, weight = (x, weight.to(half)) if which == "input" else (x.to(half), weight)
    given = [x, weight, torch.randn(17, dtype=half)] if biased else [x, weight]
    left, right = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    assert refusal(twt.cast_linear, *left) is None
    y, expected = twt.cast_linear(*left), F.linear(*(t.to(half) for t in right))
    torch.testing.assert_close(y, expected, rtol=BOTH[half], atol=BOTH[half])
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, left, dy), torch.autograd.grad(expected, right, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * BOTH[half], atol=4 * BOTH[half])
        assert theirs.abs().max() > 0


@HALVES
@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [(), (1,), (17,), (17, 1)], ids=str)
def test_eight_bits_with_a_scale(half, kind, scale):
    x, weight = torch.randn(5, 24, dtype=half, requires_grad=True), torch.randn(17, 24).to(kind)
    factor = torch.rand(scale) + 0.5
    assert refusal(twt.cast_linear, x, weight, None, factor) is None
    y, exact = twt.cast_linear(x, weight, scale=factor), F.linear(x.float(), weight.float() * factor.reshape(-1, 1))
    torch.testing.assert_close(y.float(), exact, rtol=BOTH[half], atol=BOTH[half])
    dy = torch.randn_like(y)
    gradient, expected = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(exact, x, dy.float())[0]
    torch.testing.assert_close(gradient, expected, rtol=4 * BOTH[half], atol=4 * BOTH[half])


def bf16(x):
    return x.to(torch.bfloat16)


#: name -> (function of x and weight, their dtypes, what is taken)
GRAPHS = {
    "weight": (lambda x, w: F.linear(x, bf16(w)), (torch.bfloat16, torch.float32), ["cast_linear"]),
    "input": (lambda x, w: F.linear(x.bfloat16(), w), (torch.float32, torch.bfloat16), ["cast_linear"]),
    "product": (lambda x, w: bf16(x) @ w.t(), (torch.float32, torch.bfloat16), ["cast_linear"]),
    "product, weight": (lambda x, w: x @ bf16(w.t()), (torch.bfloat16, torch.float32), ["cast_linear"]),
    "fp8": (lambda x, w: F.linear(x, bf16(w) * 1), (torch.bfloat16, E4M3), ["linear"]),
    "fp8, one scale": (
        lambda x, w: F.linear(x, bf16(w) * bf16(x.new_full((), 0.5))),
        (torch.bfloat16, E4M3),
        ["cast_linear"],
    ),
    "fp8, rows": (
        lambda x, w: F.linear(x, bf16(w.float() * torch.linspace(1, 2, 17)[:, None])),
        (torch.bfloat16, E4M3),
        ["cast_linear"],
    ),
    "fp8, columns": (
        lambda x, w: F.linear(x, bf16(w) * bf16(torch.linspace(1, 2, 24))),
        (torch.bfloat16, E4M3),
        ["linear"],
    ),
    "used twice": (
        lambda x, w: F.linear(bf16(x), w) + bf16(x).sum(),
        (torch.float32, torch.bfloat16),
        ["cast_linear"],
    ),
    "the cast used twice": (
        lambda x, w: (lambda c: F.linear(c, w) + c.sum())(bf16(x)),
        (torch.float32, torch.bfloat16),
        ["linear"],
    ),
}


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_graphs(reports, name):
    function, kinds, expected = GRAPHS[name]
    x, weight = torch.randn(2, 5, 24).to(kinds[0]), torch.randn(17, 24).to(kinds[1])
    options = {"fallback": "eager", "cost_gate": False}
    compiled = torch.compile(function, backend=backend.compile_graph, fullgraph=True, options=options)
    torch.testing.assert_close(compiled(x, weight), function(x, weight), rtol=2e-2, atol=5e-2)
    assert reports[0].taken == expected


def test_gradients_in_a_graph(reports):
    """Master weights in float32, of which each step casts."""
    options = {"fallback": "eager", "cost_gate": False}
    function = lambda x, w: F.linear(x, w.to(x.dtype))  # noqa: E731
    compiled = torch.compile(function, backend=backend.compile_graph, fullgraph=True, options=options)
    x, weight = torch.randn(6, 24, dtype=torch.bfloat16, requires_grad=True), torch.randn(17, 24, requires_grad=True)
    ours, theirs = (torch.autograd.grad(f(x, weight).float().square().sum(), (x, weight)) for f in (compiled, function))
    assert reports[0].taken == ["cast_linear"] and ours[1].dtype == torch.float32
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=5e-2, atol=5e-1)


@pytest.mark.parametrize(
    ("reason", "x", "weight", "scale"),
    [
        ("dtypes", torch.float32, torch.float32, None),
        ("dtypes", torch.bfloat16, torch.float16, None),
        ("dtypes", torch.float32, torch.bfloat16, (17,)),
        ("one scale", torch.bfloat16, E4M3, (24,)),
    ],
    ids=str,
)
def test_refused(reason, x, weight, scale):
    arguments = torch.randn(5, 24).to(x), torch.randn(17, 24).to(weight), None
    assert reason in refusal(twt.cast_linear, *arguments, None if scale is None else torch.rand(scale))
