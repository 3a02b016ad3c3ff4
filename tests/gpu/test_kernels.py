"""Kernels on a real CUDA device against float64, outputs poisoned with NaN. Skipped where there is none."""

from __future__ import annotations

import math

import pytest

import tilewright as tw
from tilewright.kernels.attention import attention, sdpa
from tilewright.kernels.gemm import gemm
from tilewright.kernels.mlp import mlp
from tilewright.kernels.softmax import softmax

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.bfloat16, transposed=False):
    if transposed:
        return torch.randn(*reversed(shape), device="cuda", dtype=dtype).T
    return torch.randn(*shape, device="cuda", dtype=dtype)


def poisoned(*shape, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def relative(actual, exact):
    torch.cuda.synchronize()
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize(
    "shape", [(128, 256, 64), (512, 512, 512), (1024, 768, 4096), (1000, 1112, 1000), (1000, 1111, 1003), (1, 1, 1)]
)
def test_gemm(shape, layout, dtype):
    m, n, k = shape
    a = randn(m, k, dtype=dtype, transposed=layout[0] == "T")
    b = randn(k, n, dtype=dtype, transposed=layout[1] == "T")
    c = poisoned(m, n, dtype=dtype)
    gemm[(tw.cdiv(m, 128), tw.cdiv(n, 256))](a, b, c)
    library = a @ b
    exact = a.double() @ b.double()
    assert relative(c, exact) <= 1.01 * relative(library, exact) + 1e-4


@pytest.mark.parametrize("ctas", [2, 4])
@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("shape", [(128, 256, 64), (1000, 776, 200), (2056, 4104, 1032), (1001, 777, 201)])
def test_gemm_in_clusters(shape, layout, ctas):
    m, n, k = shape
    a, b = randn(m, k, transposed=layout[0] == "T"), randn(k, n, transposed=layout[1] == "T")
    for meta in ({"BM": 128, "BN": 256}, {"BM": 256, "BN": 128}, {"BM": 64, "BN": 128}):
        c = poisoned(m, n)
        gemm[(tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"]))](a, b, c, **meta, num_ctas=ctas)
        assert relative(c, a.double() @ b.double()) < 3e-3


@pytest.mark.parametrize(
    "meta",
    [
        {"BM": 64, "BN": 64, "BK": 32},
        {"BM": 128, "BN": 128, "BK": 128},
        {"num_stages": 1},
        {"num_stages": 2},
        {"BM": 256, "BN": 128},
        {"BM": 64, "schedule": "alternate"},
        {"BM": 128, "BN": 128, "schedule": "alternate", "num_stages": 2},
        {"BM": 128, "BN": 128, "schedule": "roles"},
    ],
)
def test_gemm_configurations(meta):
    a, b, c = randn(700, 520), randn(520, 904), poisoned(700, 904)
    bm, bn = meta.get("BM", 128), meta.get("BN", 256)
    gemm[(tw.cdiv(700, bm), tw.cdiv(904, bn))](a, b, c, **meta)
    assert relative(c, a.double() @ b.double()) < 5e-3


@pytest.mark.parametrize("tile", [(128, 128), (64, 256)])
@pytest.mark.parametrize("depth", [64, 1000, 4096])
def test_consumers_that_alternate(depth, tile):
    """So many tiles that each block has several, an odd number in some."""
    (bm, bn), (m, n) = tile, (5000, 4104)
    a, b, c = randn(m, depth), randn(depth, n, transposed=True), poisoned(m, n)
    gemm[(tw.cdiv(m, bm), tw.cdiv(n, bn))](a, b, c, BM=bm, BN=bn, schedule="alternate")
    assert relative(c, a.double() @ b.double()) < 5e-3


@pytest.mark.parametrize("schedule", ["roles", "turns"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "depth"), [(1000, 64), (1000, 128), (333, 128)])
def test_attention(rows, depth, causal, schedule):
    q, k, v = (randn(2, 16, rows, depth) for _ in range(3))
    o = poisoned(2, 16, rows, depth)
    scale = depth**-0.5 * math.log2(math.e)
    attention[(tw.cdiv(rows, 128), 16, 2)](q, k, v, o, scale, D=depth, DV=depth, CAUSAL=causal, schedule=schedule)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=causal)
    assert relative(o, exact) < 4e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "depth"), [(100, 64), (1000, 64), (1000, 128)])
def test_sdpa(rows, depth, causal):
    q, k, v = (randn(2, 16, rows, depth) for _ in range(3))
    o = poisoned(2, 16, rows, depth)
    sdpa(q, k, v, o, causal)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=causal)
    assert relative(o, exact) < 4e-3


def test_gemm_is_deterministic_and_writes_nothing_else():
    a, b = randn(2048, 2048), randn(2048, 2048)
    guard = poisoned(2048 + 256, 2048)
    gemm[(16, 8)](a, b, guard[128:-128])
    again = poisoned(2048, 2048)
    gemm[(16, 8)](a, b, again)
    torch.cuda.synchronize()
    assert torch.equal(guard[128:-128].view(torch.int16), again.view(torch.int16))
    assert guard[:128].isnan().all() and guard[-128:].isnan().all()


def test_many_launches_reuse_tensor_maps_and_streams():
    a, b, c = randn(512, 512), randn(512, 512), poisoned(512, 512)
    stream = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(stream):
            gemm[(4, 2)](a, b, c)
    assert relative(c, a.double() @ b.double()) < 5e-3


@pytest.mark.parametrize("shape", [(1000, 1000, 128, 1000), (300, 130, 100, 70), (4096, 1024, 128, 2048)])
def test_chained_dots(shape):
    m, k, h, n = shape
    x, w1, w2, y = randn(m, k), randn(k, h) / k**0.5, randn(h, n), poisoned(m, n)
    mlp[(tw.cdiv(m, 128),)](x, w1, w2, y)
    hidden = (x.double() @ w1.double()).clamp(min=0).to(x.dtype).double()
    assert relative(y, hidden @ w2.double()) < 5e-3


@pytest.mark.parametrize("columns", [4096, 4095, 1000, 17])
@pytest.mark.parametrize("rows_per_program", [1, 4])
def test_softmax(columns, rows_per_program):
    x, y = randn(1001, columns), poisoned(1001, columns)
    softmax[(tw.cdiv(1001, rows_per_program),)](x, y, BM=rows_per_program)
    assert relative(y, torch.softmax(x.double(), dim=1)) < 5e-3
    assert not y.isnan().any()
