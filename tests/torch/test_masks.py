"""Masks that models build as tensors: which of them the backend understands, and that it never does wrongly."""

from __future__ import annotations

from importlib import import_module

import pytest

torch = pytest.importorskip("torch")
backend = import_module("tilewright.torch.backend")
F = torch.nn.functional
ROWS = 11


def positions(n=ROWS):
    return torch.arange(n)[:, None], torch.arange(n)[None, :]


def compared(n):
    rows, columns = positions(n)
    return columns <= rows


def by_indices(n):
    """As transformers build it."""
    queries, keys = torch.arange(n) + 0, torch.arange(n) + 0
    queries, keys = queries[None, None, :, None], keys[None, None, None, :]
    mask = queries.new_ones((), dtype=torch.bool) & (keys <= queries).to(queries.device)
    return mask.expand(2, -1, n, n)


def summand(n):
    return torch.where(by_indices(n), torch.zeros(()), torch.finfo(torch.float32).min)


CAUSAL = {
    "compared": compared,
    "turned": lambda n: torch.logical_not(torch.arange(n).unsqueeze(0) > torch.arange(n).unsqueeze(1)),
    "indices": by_indices,
    "summand": summand,
    "tril": lambda n: torch.tril(torch.ones(n, n, dtype=torch.bool)),
    "triu": lambda n: torch.triu(torch.full((n, n), float("-inf")), diagonal=1),
    "not triu": lambda n: ~torch.ones(n, n, dtype=torch.bool).triu(1),
    "filled": lambda n: torch.zeros(n, n).masked_fill(~compared(n), float("-inf"))[None, None],
    "view": lambda n: torch.arange(n).view(1, -1) < torch.arange(1, n + 1).view(-1, 1),
}


def window(n):
    rows, columns = positions(n)
    return (columns <= rows) & (columns > rows - 4)


def changed(n):
    mask = compared(n)
    mask[0, 3] = True
    return mask


def changed_by_a_view(n):
    mask = torch.tril(torch.ones(n, n, dtype=torch.bool))
    mask.view(-1)[2:4].fill_(True)
    return mask


def one_row(n):
    return torch.arange(1)[None, :] <= torch.arange(n)[:, None]


OTHER = {
    "later": lambda n: torch.arange(n)[None, :] <= torch.arange(n)[:, None] + 1,
    "turned around": lambda n: torch.arange(n)[:, None] <= torch.arange(n)[None, :],
    "a step": lambda n: torch.arange(0, 2 * n, 2)[None, :] <= torch.arange(n)[:, None],
    "small": lambda n: torch.where(compared(n), torch.zeros(()), -1.0),
    "changed": changed,
    "changed by a view": changed_by_a_view,
    "one row": one_row,
    "one row, expanded": lambda n: one_row(n).expand(n, n),
    "one row, joined": lambda n: one_row(n) & compared(n),
    "a part": lambda n: torch.tril(torch.ones(2 * n, 2 * n, dtype=torch.bool))[:n, n:],
}


def both(build, *, grad, dynamic=False, groups=2):
    """(results and gradients with the backend, the same in eager)."""

    def attend(q, k, v):
        k, v = (x[:, :, None].expand(-1, -1, 2 // groups, -1, -1).reshape(2, 2, x.shape[2], 16) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(q.shape[2]))

    options = {"fallback": "eager", "cost_gate": False}
    step = torch.compile(attend, backend=backend.compile_graph, fullgraph=True, dynamic=dynamic, options=options)
    results = []
    for rows in (ROWS, ROWS + 5) if dynamic else (ROWS,):
        inputs = [torch.randn(2, heads, rows, 16, requires_grad=grad) for heads in (2, groups, groups)]
        for f in (step, attend):
            y = f(*inputs)
            results.append((y, *(torch.autograd.grad(y.square().sum(), inputs) if grad else ())))
    return results[::2], results[1::2]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_causal(reports, name, grad):
    ours, theirs = both(CAUSAL[name], grad=grad, groups=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert reports[-1].taken == ["attention+causal mask"]


def test_a_window(reports):
    ours, theirs = both(window, grad=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert reports[-1].taken == ["attention+window"]


@pytest.mark.parametrize("name", ["indices", "summand", "tril"])
def test_sizes_may_change(reports, name):
    ours, theirs = both(CAUSAL[name], grad=False, dynamic=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(report.taken == ["attention+causal mask"] for report in reports)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", sorted(OTHER))
def test_other_masks_keep_their_meaning(reports, name, grad):
    ours, theirs = both(OTHER[name], grad=grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert reports[-1].taken == ["attention"]
