"""Whole programs: their IR, and their results on the interpreter against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright.frontend.language as tw


def gemm(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
):
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(c, (m, n), acc.to(c.dtype))


def softmax(x: tw.Tensor, y: tw.Tensor, *, N: tw.constexpr):
    """Rows of x; N covers a row."""
    row = tw.program_id(0)
    values = tw.load(x, (row, 0), (1, N), pad=float("-inf")).to(tw.float32)
    values = values - tw.max(values, axis=1, keepdims=True)
    weights = tw.exp(values)
    tw.store(y, (row, 0), (weights / tw.sum(weights, 1, keepdims=True)).to(y.dtype))


@tw.function
def online(m, total, scores):
    """One step of the online softmax: new maximum, new sum, scale of the old sum, weights."""
    new = tw.maximum(m, tw.max(scores, axis=1))
    scale = tw.exp2(m - new)
    weights = tw.exp2(scores - new[:, None])
    return new, total * scale + tw.sum(weights, axis=1), scale, weights


def attention(q, k, v, o, scale: tw.float32, BM: tw.constexpr, BN: tw.constexpr, D: tw.constexpr, CAUSAL: tw.constexpr):
    m, h = tw.program_id(0), tw.program_id(1)
    q, k, v, o = q[h], k[h], v[h], o[h]
    queries = tw.load(q, (m, 0), (BM, D))
    top, total = tw.full((BM,), float("-inf"), tw.float32), tw.zeros((BM,))
    acc = tw.zeros((BM, D))
    rows = m * BM + tw.arange(BM)
    end = tw.cdiv((m + 1) * BM, BN) if CAUSAL else tw.cdiv(k.shape[0], BN)
    for n in range(tw.minimum(end, tw.cdiv(k.shape[0], BN))):
        scores = tw.dot(queries, tw.load(k, (n, 0), (BN, D)).T) * (scale * 1.44269504)
        columns = n * BN + tw.arange(0, BN)
        valid = (columns < k.shape[0])[None, :]
        if CAUSAL:
            valid = valid & (rows[:, None] >= columns[None, :])
        scores = tw.where(valid, scores, float("-inf"))
        top, total, shrink, weights = online(top, total, scores)
        acc = acc * shrink[:, None]
        acc += tw.dot(weights.to(v.dtype), tw.load(v, (n, 0), (BN, D)))
    tw.store(o, (m, 0), (acc / total[:, None]).to(o.dtype))


def test_gemm_of_the_language_page(body, view):
    tensor = view("bf16", None, None)
    assert body(gemm, a=tensor, b=tensor, c=tensor) == [
        "%m = tile.program_id {axis = 0} : i32",
        "%n = tile.program_id {axis = 1} : i32",
        "%acc = tile.constant {value = 0.0} : tile<128x256xf32>",
        "%0 = tile.dim %a {axis = 1} : i32",
        "%1 = tile.constant {value = 63} : i32",
        "%2 = tile.add %0, %1 : i32",
        "%3 = tile.constant {value = 64} : i32",
        "%4 = tile.floordiv %2, %3 : i32",
        "%5 = tile.constant {value = 0} : i32",
        "%6 = tile.constant {value = 1} : i32",
        "%acc_3 = tile.for %k = %5 to %4 step %6 iter(%acc_1 = %acc) : tile<128x256xf32> {",
        "%7 = tile.load %a, [%m, %k] : tile<128x64xbf16>",
        "%8 = tile.load %b, [%k, %n] : tile<64x256xbf16>",
        "%acc_2 = tile.dot %7, %8, %acc_1 : tile<128x256xf32>",
        "tile.yield [%acc_2]",
        "}",
        "%9 = tile.cast %acc_3 : tile<128x256xbf16>",
        "tile.store %c, [%m, %n], %9",
    ]


def test_static_sizes_fold(body, view):
    lines = body(gemm, a=view("f16", 512, 256), b=view("f16", 256, 512), c=view("f16", 512, 512))
    assert not any("tile.dim" in line or "floordiv" in line for line in lines)
    assert "%1 = tile.constant {value = 4} : i32" in lines


def test_locations(build, view):
    tensor = view("bf16", None, None)
    module = build(gemm, a=tensor, b=tensor, c=tensor)
    first = gemm.__code__.co_firstlineno
    (load,) = [op for op in module.walk() if op.name == "tile.load" and op.operands[0].hint == "a"]
    assert (load.loc.file, load.loc.line, load.loc.column) == (__file__, first + 12, 22)
    assert all(op.loc.line > first and op.loc.file == __file__ for op in module.walk())


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_gemm_numbers(execute, dtype):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((70, 50)).astype(dtype), rng.standard_normal((50, 90)).astype(dtype)
    c = np.full((70, 90), np.nan, dtype)
    if dtype == "float64":

        def kernel(a, b, c):
            m, n = tw.program_id(0), tw.program_id(1)
            acc = tw.zeros((32, 32), tw.float64)
            for k in range(tw.cdiv(a.shape[1], 16)):
                acc = tw.dot(tw.load(a, (m, k), (32, 16)), tw.load(b, (k, n), (16, 32)), acc)
            tw.store(c, (m, n), acc)

        execute(kernel, a, b, c, grid=(3, 3))
    else:
        execute(gemm, a, b, c, grid=(3, 3), BM=32, BN=32, BK=16)
    reference = a.astype("float64") @ b.astype("float64")
    assert np.abs(reference).max() > 1
    np.testing.assert_allclose(c, reference, rtol=0, atol={"float16": 2e-2, "float32": 1e-4, "float64": 1e-12}[dtype])


def test_softmax(execute, body, view):
    x = np.random.default_rng(1).standard_normal((5, 37)).astype("float32") * 4
    y = np.zeros_like(x)
    execute(softmax, x, y, grid=(5,), N=40)
    weights = np.exp(x.astype("float64") - x.max(1, keepdims=True))
    np.testing.assert_allclose(y, weights / weights.sum(1, keepdims=True), atol=1e-6)
    lines = body(softmax, x=view("f16", None, None), y=view("f16", None, None), N=64)
    assert any("pad = -inf" in line for line in lines)
    assert any(line.endswith("tile.reduce.max") or "tile.reduce.max" in line for line in lines)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(execute, causal):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, 45, 16)).astype("float32") for _ in range(3))
    o = np.zeros_like(q)
    execute(attention, q, k, v, o, 0.25, 16, 16, 16, causal, grid=(3, 2))
    scores = q.astype("float64") @ k.astype("float64").transpose(0, 2, 1) * 0.25
    if causal:
        scores = np.where(np.tril(np.ones((45, 45), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    reference = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(o, reference, atol=2e-5)


def test_helper_is_inlined_with_its_caller(build, view):
    tensor = view("bf16", None, None, None)
    args = dict(q=tensor, k=tensor, v=tensor, o=tensor, scale=tw.float32, BM=64, BN=64, D=64, CAUSAL=True)
    module = build(attention, **args)
    inlined = [op for op in module.walk() if op.loc.caller is not None]
    assert inlined
    assert all(op.loc.caller.line == attention.__code__.co_firstlineno + 15 for op in inlined)
    (loop,) = [op for op in module.walk() if op.name == "tile.for"]
    assert [v.hint for v in loop.carried] == ["top", "total", "acc"]
    assert len([op for op in module.walk() if op.name == "tile.dot"]) == 2


def test_layer_norm_row_scalars(execute):
    def norm(x, w, y, mean_out, eps: tw.float32, N: tw.constexpr):
        row = tw.program_id(0)
        n = x.shape[1]
        columns = tw.arange(N)
        values = tw.load(x[row], 0, N)
        mean = tw.sum(values) / n
        centred = tw.where(columns < n, values - mean, 0.0)
        variance = tw.sum(centred * centred) / n
        tw.store(y[row], 0, centred * tw.rsqrt(variance + eps) * tw.load(w, 0, N))
        tw.store(mean_out, row, mean)

    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((4, 30)).astype("float32") + 1, rng.standard_normal(30).astype("float32")
    y, mean = np.zeros_like(x), np.zeros(4, "float32")
    execute(norm, x, w, y, mean, 1e-5, 32, grid=(4,))
    wide = x.astype("float64")
    reference = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(y, reference, atol=1e-5)
    np.testing.assert_allclose(mean, wide.mean(1), atol=1e-6)
