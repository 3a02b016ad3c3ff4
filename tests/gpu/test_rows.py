"""Row and column kernels on a real CUDA device against float64, outputs poisoned with NaN. Skipped without one."""

from __future__ import annotations

import pytest

import tilewright as tw
from tilewright.kernels.column_sum import column_sums, workspace_shapes
from tilewright.kernels.norm_backward import norm_backward
from tilewright.kernels.rmsnorm import rms_rows, rmsnorm
from tilewright.kernels.rows import row_tiles
from tilewright.kernels.softmax import softmax, softmax_backward, softmax_rows, softmax_rows_backward
from tilewright.kernels.transpose import tiles, transpose

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

DTYPES = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-6}
SHAPES = [(4096, 1024), (1000, 4096), (333, 16384), (257, 1000), (65, 4095), (7, 17), (1, 1)]


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def relative(actual, exact):
    torch.cuda.synchronize()
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.fixture(params=list(DTYPES), ids=str)
def x(request, shape):
    torch.manual_seed(0)
    return torch.randn(*shape, device="cuda", dtype=request.param)


def test_softmax(x):
    y, meta = poisoned(*x.shape, dtype=x.dtype), row_tiles(*x.shape)
    softmax[(tw.cdiv(x.shape[0], meta["BM"]),)](x, y, **meta)
    assert relative(y, torch.softmax(x.double(), dim=1)) < DTYPES[x.dtype]


def test_rmsnorm(x):
    y, weight, meta = poisoned(*x.shape, dtype=x.dtype), torch.randn_like(x[0]), row_tiles(*x.shape)
    rmsnorm[(tw.cdiv(x.shape[0], meta["BM"]),)](x, weight, y, 1e-5, **meta)
    wide = x.double()
    exact = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative(y, exact) < DTYPES[x.dtype]


@pytest.mark.parametrize(("rows", "tiles"), [
    (16384, {"BM": 1, "BN": 1024, "num_warps": 4, "READ": "evict_first"}),
    (16384, {"BM": 2, "BN": 1024, "num_warps": 4}),
    (4096, {"BM": 1, "BN": 8192, "num_warps": 16}),
    (4096, {"BM": 1, "BN": 8192, "num_warps": 32, "num_stages": 2, "READ": "evict_first", "AGAIN": True}),
])  # fmt: skip
def test_gradients_of_rows_that_are_copied_ahead(rows, tiles):
    """With a hint to the cache, too, where ptxas 13.0 makes illegal instructions of addresses with a uniform part."""
    torch.manual_seed(0)
    dy, x = (torch.randn(rows, tiles["BN"], device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight, wide = torch.randn_like(x[0]), x.double().requires_grad_()
    inverse = (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    (exact,) = torch.autograd.grad(wide * inverse * weight.double(), wide, dy.double())
    dx, partial = poisoned(*x.shape, dtype=x.dtype), poisoned(132, 1, tiles["BN"], dtype=torch.float32)
    norm_backward[(132,)](dy, x, weight, inverse.detach().float()[:, 0].contiguous(), dx, partial, **tiles)
    assert relative(dx, exact) < 5e-3
    columns = (dy.double() * (wide * inverse).detach()).sum(0)
    assert relative(partial[:, 0].double().sum(0), columns) < 1e-5


@pytest.mark.parametrize("ctas", [2, 4, 8])
def test_spread_over_blocks(x, ctas):
    """Programs in clusters, rows in registers, those of the gradient in shared memory; the same bits in every run."""
    meta = {**row_tiles(*x.shape), "num_ctas": ctas}
    if meta["BN"] < 64:
        pytest.skip("too narrow to be cut")
    exact, grid, first = torch.softmax(x.double(), dim=1), (tw.cdiv(x.shape[0], meta["BM"]),), None
    weights = exact.to(x.dtype)
    gradient = weights.double() * (x.double() - (weights.double() * x.double()).sum(1, keepdim=True))
    for _ in range(5):
        y, dx = (poisoned(*x.shape, dtype=x.dtype) for _ in range(2))
        softmax[grid](x, y, **meta)
        assert relative(y, exact) < DTYPES[x.dtype]
        softmax_backward[grid](x, weights, dx, **meta, AGAIN=True)
        assert relative(dx, gradient) < DTYPES[x.dtype]
        first = first or (y, dx)
        assert torch.equal(first[0], y) and torch.equal(first[1], dx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [20000, 32768, 65536, 100003, 131072])
def test_long_rows(columns, dtype):
    """What the library launches for them; the same bits in every run."""
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(300, columns, device="cuda", dtype=dtype) for _ in range(3))
    weight, (y, total, dx) = torch.randn_like(x[0]), (poisoned(*x.shape, dtype=dtype) for _ in range(3))
    exact = x.double() + residual.double()
    normal = exact * (exact.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    softmax_ = torch.softmax(x.double(), 1)
    above = softmax_.to(dtype).double()
    gradient = above * (dy.double() - (above * dy.double()).sum(1, keepdim=True))
    first = None
    for _ in range(3):
        rms_rows(x, weight, y, 1e-5, residual=residual, total=total)
        assert relative(y, normal) < DTYPES[dtype] and relative(total, exact) < DTYPES[dtype]
        softmax_rows(x, total)
        assert relative(total, softmax_) < DTYPES[dtype]
        softmax_rows_backward(dy, softmax_.to(dtype), dx)
        assert relative(dx, gradient) < DTYPES[dtype]
        found = [a.clone() for a in (y, total, dx)]
        first = first or found
        assert all(map(torch.equal, first, found))
        for a in (y, total, dx):
            a.fill_(float("nan"))


def test_transpose(x):
    (m, n), meta = x.shape, tiles(x.element_size())
    y = poisoned(n, m, dtype=x.dtype)
    transpose[(tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"]))](x, y, **meta)
    torch.cuda.synchronize()
    assert torch.equal(y, x.T)


def test_column_sum(x):
    partial, arrived = workspace_shapes(*x.shape, x.itemsize)
    workspace = poisoned(*partial, dtype=torch.float32), torch.zeros(arrived, device="cuda", dtype=torch.int32)
    out, again = (poisoned(1, x.shape[1], dtype=torch.float32) for _ in range(2))
    column_sums(x, out, *workspace)
    column_sums(x, again, *workspace)
    assert relative(out, x.double().sum(0, keepdim=True)) < 1e-5
    assert torch.equal(out, again)
