"""Operators that have no namesake in torch, or one that the CPU lacks: against formulas in float32."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")
twt = import_module("tilewright.torch")
refusal = import_module("tilewright.torch.functional").refusal
F = torch.nn.functional
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_close(ours, theirs, dtype, factor=1):
    tolerance = factor * TOLERANCE[dtype]
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
    assert theirs.abs().max() > 0


def loop_over_groups(a, b, ends):
    bounds = [0, *ends.tolist()]
    return torch.cat([a[start:end].float() @ b[g].float() for g, (start, end) in enumerate(pairwise(bounds))])


@DTYPES
def test_grouped_mm(dtype):
    a, weight = normal(70, 24, dtype=dtype).requires_grad_(), normal(4, 9, 24, dtype=dtype).requires_grad_()
    ends = torch.tensor([20, 20, 67, 70], dtype=torch.int32)
    assert refusal(twt.grouped_mm, a, weight.transpose(1, 2), offs=ends) is None
    y, exact = twt.grouped_mm(a, weight.transpose(1, 2), offs=ends), loop_over_groups(a, weight.transpose(1, 2), ends)
    assert y.dtype == dtype
    assert_close(y, exact, dtype)
    dy = normal(70, 9, dtype=dtype)
    ours, theirs = torch.autograd.grad(y, (a, weight), dy), torch.autograd.grad(exact, (a, weight), dy.float())
    for gradient, expected in zip(ours, theirs, strict=True):
        assert_close(gradient, expected, dtype, 4)
    assert ours[1][1].eq(0).all()


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved, dtype):
    angles = torch.outer(torch.arange(6.0), torch.linspace(0.1, 1, 8))
    x = normal(2, 6, 3, 16, dtype=dtype).requires_grad_()
    y = twt.rotary(x, angles.cos(), angles.sin(), interleaved)
    pairs = x.float().unflatten(-1, (8, 2)) if interleaved else x.float().unflatten(-1, (2, 8)).transpose(-1, -2)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angles)[:, None]
    )
    exact = (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)
    assert_close(y, exact, dtype)
    dy = normal(*x.shape, dtype=dtype)
    (ours,), (theirs,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(exact, x, dy.float())
    assert_close(ours, theirs, dtype)
    eager = import_module("tilewright.torch.positions")._eager(x, angles.cos(), angles.sin(), interleaved)
    assert_close(eager, exact, dtype)


@pytest.mark.parametrize("kinds", ["float8_e4m3fn", "float8_e5m2 float8_e4m3fn", "int8"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_scaled_linear(kinds, per_row, fast):
    left, right = (getattr(torch, kind) for kind in (kinds.split() * 2)[:2])

    def quantised(rows, dtype):
        x = 20 * normal(rows, 32)
        scale = x.abs().amax(1 if per_row else (0, 1), keepdim=True).reshape(-1) / 100
        x = x / scale[:, None]
        return (x.round() if dtype == torch.int8 else x).to(dtype), scale

    (x, scale_x), (weight, scale_weight) = quantised(10, left), quantised(7, right)
    bias = normal(7, dtype=torch.bfloat16)
    arguments = x.view(2, 5, 32), weight, scale_x, scale_weight, bias
    assert refusal(twt.scaled_linear, *arguments) is None
    y = twt.scaled_linear(*arguments, out_dtype=torch.float32, fast_accumulation=fast)
    exact = (x.float() * scale_x[:, None]) @ (weight.float() * scale_weight[:, None]).t() + bias.float()
    # of Hopper's fast sums 14 bits are kept
    assert_close(
        y.view(10, 7) / exact.abs().max(), exact / exact.abs().max(), torch.bfloat16 if fast else torch.float32
    )
    eager = import_module("tilewright.torch.scaled")._eager(*arguments, out_dtype=torch.float32)
    torch.testing.assert_close(eager.view(10, 7), exact, rtol=1e-5, atol=1e-4)


@DTYPES
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"is_causal": True, "window": 3}, {"softcap": 1.5}], ids=str
)
def test_attention_varlen(options, dtype):
    starts = torch.tensor([0, 5, 5, 19], dtype=torch.int32), torch.tensor([0, 7, 9, 23], dtype=torch.int32)
    # two rows more than sequences have
    q, k, v = normal(21, 4, 16, dtype=dtype), normal(25, 2, 16, dtype=dtype), normal(25, 2, 16, dtype=dtype)
    dy, cap = normal(21, 4, 16, dtype=dtype), options.get("softcap")

    def exact(q, k, v):
        parts = []
        for (first, end), (start, stop) in zip(*(pairwise(bounds.tolist()) for bounds in starts), strict=True):
            rows, columns = torch.arange(end - first)[:, None], torch.arange(stop - start)
            behind = rows + (stop - start) - (end - first) - columns
            seen = (behind >= 0) & (behind <= options.get("window", 99)) if "is_causal" in options else behind < 99
            one, keys, values = (x.float().transpose(0, 1) for x in (q[first:end], k[start:stop], v[start:stop]))
            keys, values = (x.repeat_interleave(2, 0) for x in (keys, values))
            scores = one @ keys.mT / 4
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        return torch.cat([*parts, torch.zeros(2, 4, 16)])

    left, right = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    expected = exact(*right)
    wanted = torch.autograd.grad(expected, right, dy.float())
    for most in (None, 14):
        assert refusal(twt.attention_varlen, *left, *starts, 14, max_k=most, **options) is None
        y = twt.attention_varlen(*left, *starts, 14, max_k=most, **options)
        assert_close(y, expected, dtype)
        for gradient, right_one in zip(torch.autograd.grad(y, left, dy), wanted, strict=True):
            assert_close(gradient / 4, right_one.float() / 4, dtype)
            assert right_one[:-2].abs().max() > 0 and not gradient[-2:].any()
    eager = import_module("tilewright.torch.serving")._eager_varlen(q, k, v, *starts, 14, **options)
    assert_close(eager, expected, dtype)


@DTYPES
@pytest.mark.parametrize("paged", [False, True])
def test_attention_decode(paged, dtype):
    q, lengths = normal(3, 4, 16, dtype=dtype), torch.tensor([40, 1, 33], dtype=torch.int32)
    k, v = (normal(3, 2, 48, 16, dtype=dtype) for _ in range(2))
    given, pages = (k, v), None
    if paged:
        pages = torch.randperm(9).to(torch.int32).view(3, 3)
        given = tuple(torch.empty(9, 2, 16, 16, dtype=dtype) for _ in range(2))
        for pool, whole in zip(given, (k, v), strict=True):
            pool[pages.long()] = whole.unflatten(2, (3, 16)).transpose(1, 2)
    assert refusal(twt.attention_decode, q, *given, lengths, pages) is None
    seen = (torch.arange(48) < lengths[:, None])[:, None, None]
    one = q.float()[:, :, None], k.float(), v.float()
    exact = F.scaled_dot_product_attention(*one, attn_mask=seen, enable_gqa=True)[:, :, 0]
    assert_close(twt.attention_decode(q, *given, lengths, pages), exact, dtype)
    leaf, wide, dy = q.clone().requires_grad_(), [x.clone().requires_grad_() for x in given], normal(*q.shape)
    y = twt.attention_decode(leaf, *wide, lengths, pages)
    assert_close(y, exact, dtype)
    gradients = torch.autograd.grad(y, [leaf, *wide], dy.to(dtype))
    leaves = [x.requires_grad_() for x in (q.float(), k.float(), v.float())]
    exact = F.scaled_dot_product_attention(leaves[0][:, :, None], *leaves[1:], attn_mask=seen, enable_gqa=True)
    wanted = torch.autograd.grad(exact[:, :, 0], leaves, dy.to(dtype).float())
    for gradient, expected in zip(gradients, wanted, strict=True):
        whole = gradient
        if paged and gradient.ndim == 4:  # (pages, G, 16, D) to (B, G, N, D)
            whole = gradient[pages.long()].transpose(1, 2).flatten(2, 3)
        assert_close(whole / 4, expected / 4, dtype)
        assert expected.abs().max() > 0
