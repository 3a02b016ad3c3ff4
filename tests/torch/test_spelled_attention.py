"""Attention that models spell out: what the backend takes for it, and what it leaves."""

from __future__ import annotations

from importlib import import_module

import pytest

torch = pytest.importorskip("torch")
backend = import_module("tilewright.torch.backend")
F = torch.nn.functional
ROWS, DEPTH = 9, 16


def mask_of(kind, scores):
    rows, keys = torch.arange(ROWS)[:, None], torch.arange(ROWS)[None, :]
    if kind == "causal":
        return torch.where(keys <= rows, torch.zeros(()), torch.finfo(torch.float32).min)
    if kind == "window":
        return torch.where((keys <= rows) & (keys > rows - 4), torch.zeros(()), float("-inf"))[None, None]
    return torch.sin(rows * 3.0 + keys)  # any summand


def gemma(q, k, v, mask=None, cap=2.0):
    k, v = (x[:, :, None].expand(2, 1, 2, ROWS, DEPTH).reshape(2, 2, ROWS, DEPTH) for x in (k, v))
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
    weights = torch.tanh(weights / cap) * cap
    if mask is not None:
        weights = weights + mask_of(mask, weights)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=True)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def plain(q, k, v):
    return torch.softmax(q @ k.repeat_interleave(2, 1).mT / 4, -1) @ v.repeat_interleave(2, 1)


def in_order(q, k, v):
    """Its result is seen as it lies, like that of a product."""
    q = q.contiguous()
    weights = (q @ k.expand(2, 2, ROWS, DEPTH).permute(0, 1, 3, 2)).mul(0.25).div(3.0).tanh().mul(3.0).softmax(-1)
    return weights.matmul(v.expand(2, 2, ROWS, DEPTH))


TAKEN = {
    "gemma": (gemma, "attention+softcap"),
    "gemma, causal": (lambda *xs: gemma(*xs, "causal"), "attention+softcap+causal mask"),
    "gemma, window": (lambda *xs: gemma(*xs, "window"), "attention+softcap+window"),
    "gemma, a summand": (lambda *xs: gemma(*xs, "summand"), "attention+softcap"),
}


def two_masks(q, k, v):
    return torch.softmax((q @ k.expand_as(q).mT * 0.25 + mask_of("causal", q)) + mask_of("sum", q), -1) @ v


def capped_behind_the_mask(q, k, v):
    return torch.softmax(torch.tanh(q @ k.expand_as(q).mT / 4 + mask_of("sum", q)) * 2.0, -1) @ v


def scaled_behind_the_cap(q, k, v):
    return torch.softmax(torch.tanh(q @ k.expand_as(q).mT / 4) * 2.0 * 3.0, -1) @ v


def bounded_alone(q, k, v):
    """No factor follows the tanh: a cap of 1 that nothing says."""
    return torch.softmax(torch.tanh(q @ k.expand_as(q).mT / 4), -1) @ v


def weights_used(q, k, v):
    weights = torch.softmax(q @ k.expand_as(q).mT / 4, -1)
    return weights @ v + weights[..., :1]


def along_queries(q, k, v):
    return torch.softmax(q @ k.expand_as(q).mT / 4, -2) @ v


def not_transposed(q, k, v):
    return torch.softmax(q @ k.expand_as(q).transpose(1, 3).reshape(2, 2, DEPTH, ROWS) / 4, -1) @ v


LEFT = [
    *(two_masks, capped_behind_the_mask, scaled_behind_the_cap, bounded_alone, weights_used, along_queries),
    not_transposed,
]


def compare(reports, function, grad):
    """Values and gradients as in eager; the names of what was taken."""
    made = [torch.randn(2, ROWS, heads, DEPTH).transpose(1, 2).requires_grad_(grad) for heads in (2, 1, 1)]
    options = {"fallback": "eager", "cost_gate": False}
    compiled = torch.compile(function, backend=backend.compile_graph, fullgraph=True, options=options)
    results = []
    for f in (compiled, function):
        y = f(*made)
        results.append((y, *(torch.autograd.grad(y.square().sum(), made) if grad else ())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[0][0].stride() == results[1][0].stride()
    assert len(reports) == 1
    return reports[0].taken


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", sorted(TAKEN))
def test_taken(reports, name, grad):
    function, expected = TAKEN[name]
    assert compare(reports, function, grad) == [expected]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("function", [plain, in_order])
def test_a_result_whose_order_is_seen(reports, function, grad):
    """Attention gives it in the order of queries, a product of its own: taken only where these agree."""
    assert compare(reports, function, grad) == (
        ["attention+softcap"] if function is in_order else ["matmul", "softmax", "matmul"]
    )


@pytest.mark.parametrize("function", LEFT)
def test_left(reports, function):
    taken = compare(reports, function, True)
    assert "matmul" in taken and not any(name.startswith("attention") for name in taken)


def test_batched_products(reports):
    """Operands as they lie, forward and backward."""
    function = lambda a, b: torch.bmm(a, b.transpose(1, 2)) + (a @ b.mT).bmm(b.new_ones(3, 7, 7))  # noqa: E731
    options = {"fallback": "eager", "cost_gate": False}
    compiled = torch.compile(function, backend=backend.compile_graph, fullgraph=True, options=options)
    inputs = [torch.randn(3, n, 8, requires_grad=True) for n in (5, 7)]
    results = [(y := f(*inputs), *torch.autograd.grad(y.square().sum(), inputs)) for f in (compiled, function)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert reports[0].taken == ["matmul"] * 3


def test_packed_sequences_of_any_sizes_are_one_graph(reports):
    """Sizes, the longest sequences among them, change without compiling again; gradients flow."""
    twt = import_module("tilewright.torch")
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(x, weight, starts, longest):
        q, k, v = (x @ weight).view(-1, 2, 3, DEPTH).unbind(2)
        y = twt.attention_varlen(q, k, v, starts, starts, longest, max_k=longest, is_causal=True, softcap=3.0)
        return y.flatten(1).sum(1)

    step = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    weight = torch.randn(8, 6 * DEPTH, requires_grad=True)
    for lengths in ([3, 9], [5, 17], [11, 2]):
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        x = torch.randn(sum(lengths), 8, requires_grad=True)
        results = []
        for f in (step, layer):
            y = f(x, weight, starts, max(lengths))
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert count.frame_count == 1
