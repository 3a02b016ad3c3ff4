"""Dots with operands in registers on a real GPU, against float64: every dtype, precision, ragged shapes, strides.

Code for targets without roles runs on Hopper too: ``schedule="prefetch"`` asks for it where a dot would take the other
path. Outputs are poisoned; skipped where there is no GPU.
"""

from __future__ import annotations

import pytest
from products import product

import tilewright as tw
from tilewright.kernels.gemm import gemm
from tilewright.kernels.mlp import mlp

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)


@tw.kernel
def transposed_product(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, *, precision: tw.constexpr = "default"):
    """``c = (a b) b^T + a``: an operand read twice, once transposed, and one computed in registers."""
    m = tw.program_id(0)
    left = tw.load(a, (m, 0), (32, 64))
    right = tw.load(b, (0, 0), (64, 64))
    first = tw.dot(left, right, precision=precision).to(a.dtype)
    tw.store(c, (m, 0), tw.dot(first, right.T, left.to(c.dtype), precision=precision))


@tw.kernel
def computed_operand(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor):
    """The right operand is computed in registers from what the loop loads."""
    acc = tw.zeros((32, 32), c.dtype)
    for k in tw.range(tw.cdiv(a.shape[1], 32)):
        right = tw.load(b, (k, 0), (32, 32))
        acc = tw.dot(tw.load(a, (0, k), (32, 32)), right + right, acc)
    tw.store(c, (0, 0), acc)


@tw.kernel
def chained(x: tw.Tensor, w1: tw.Tensor, w2: tw.Tensor, y: tw.Tensor, *, precision: tw.constexpr = "3xtf32"):
    m = tw.program_id(0)
    hidden = tw.zeros((64, 128), tw.float32)
    for k in tw.range(tw.cdiv(x.shape[1], 32)):
        hidden = tw.dot(tw.load(x, (m, k), (64, 32)), tw.load(w1, (k, 0), (32, 128)), hidden, precision=precision)
    active = tw.maximum(hidden, 0.0)
    for n in tw.range(tw.cdiv(w2.shape[1], 32)):
        tw.store(y, (m, n), tw.dot(active, tw.load(w2, (0, n), (128, 32)), precision=precision))


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def random(m, n, dtype, transposed=False):
    rows, columns = (n, m) if transposed else (m, n)
    if dtype == torch.int8:
        values = torch.randint(-128, 128, (rows, columns), device="cuda", dtype=dtype)
    elif dtype in FP8:
        values = torch.randn(rows, columns, device="cuda").to(dtype)
    else:
        values = torch.randn(rows, columns, device="cuda", dtype=dtype)
    return values.T if transposed else values


def poisoned(m, n, dtype):
    if dtype == torch.int32:
        return torch.full((m, n), 0x5A5A5A5A, device="cuda", dtype=dtype)
    return torch.full((m, n), float("nan"), device="cuda", dtype=dtype)


def relative(actual, exact):
    torch.cuda.synchronize()
    return float((actual.double() - exact).norm() / exact.norm())


def multiply(a, b, acc, **meta):
    bm, bn = meta.setdefault("BM", 64), meta.setdefault("BN", 64)
    c = poisoned(a.shape[0], b.shape[1], acc)
    product[(tw.cdiv(a.shape[0], bm), tw.cdiv(b.shape[1], bn))](a, b, c, **meta)
    return relative(c, a.double() @ b.double())


#: operands, accumulator, precision, allowed relative error (norms)
DOTS = [
    (torch.bfloat16, torch.float32, "default", 1e-6),
    (torch.float16, torch.float32, "default", 1e-6),
    (torch.float32, torch.float32, "default", 1e-6),
    (torch.float32, torch.float32, "ieee", 1e-6),
    (torch.float32, torch.float32, "3xtf32", 1e-6),
    (torch.float32, torch.float32, "tf32", 1e-3),
    (torch.float64, torch.float64, "default", 1e-14),
    (torch.int8, torch.int32, "default", 0.0),
    (torch.float8_e4m3fn, torch.float32, "default", 1e-3),
    (torch.float8_e5m2, torch.float32, "default", 1e-3),
]
SHAPES = [(64, 64, 32), (256, 192, 320), (200, 136, 104), (123, 77, 61), (1, 1, 1), (65, 8, 1000)]


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "acc", "precision", "allowed"), DOTS)
def test_every_dtype_and_direction(dtype, acc, precision, allowed, shape, layout):
    m, n, k = shape
    a, b = random(m, k, dtype, layout[0] == "T"), random(k, n, dtype, layout[1] == "T")
    if not a.double().any() or not b.double().any():
        pytest.skip("zeros have no relative error")
    assert multiply(a, b, acc, precision=precision, schedule="prefetch") <= allowed * max(1, (k / 256) ** 0.5)


@pytest.mark.parametrize(("dtype", "acc", "precision", "allowed"), DOTS)
def test_strides_and_views(dtype, acc, precision, allowed):
    """Every other row and column, and a view that starts at an odd element."""
    a, b = random(260, 300, dtype)[::2, ::2], random(151, 141, dtype)[1:, 1:]
    assert multiply(a, b, acc, precision=precision, schedule="prefetch") <= allowed


@pytest.mark.parametrize(
    "meta",
    [
        {"BM": 16, "BN": 8}, {"BM": 16, "BN": 128}, {"BM": 128, "BN": 16}, {"BM": 48, "BN": 24}, {"BM": 128, "BN": 128},
        {"BK": 64}, {"BK": 96}, {"num_stages": 1}, {"num_stages": 2}, {"num_stages": 3}, {"num_stages": 6},
        {"num_warps": 1}, {"num_warps": 2}, {"num_warps": 8},
    ],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "acc", "precision", "allowed"), DOTS)
def test_tiles_stages_and_warps(dtype, acc, precision, allowed, meta):
    a, b = random(300, 520, dtype), random(520, 200, dtype)
    assert multiply(a, b, acc, precision=precision, schedule="prefetch", **meta) <= 2 * allowed


def test_precisions_of_float32():
    """True float32 by default, and nearly so in three tf32 products; against the library's float32 without tf32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = random(1024, 4096, torch.float32), random(4096, 1024, torch.float32)
    library = relative(a @ b, a.double() @ b.double())
    errors = {p: multiply(a, b, torch.float32, precision=p, BM=128, BN=128) for p in ("default", "3xtf32", "tf32")}
    errors["synchronous"] = multiply(a, b, torch.float32, precision="3xtf32", BM=128, BN=128, schedule="prefetch")
    assert errors.pop("tf32") > 30 * library
    assert max(errors.values()) <= 3 * library, (errors, library)


@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("tile", [(64, 64), (128, 128), (128, 64)])
@pytest.mark.parametrize("shape", [(512, 384, 320), (300, 200, 100), (123, 77, 61), (256, 256, 4096)])
@pytest.mark.parametrize(("precision", "allowed"), [("3xtf32", 1e-6), ("tf32", 2e-3)])
def test_float32_on_the_asynchronous_unit(precision, allowed, shape, tile, layout):
    """No option: three tf32 products always take Hopper's own unit, one where both operands run along K."""
    m, n, k = shape
    a, b = random(m, k, torch.float32, layout[0] == "T"), random(k, n, torch.float32, layout[1] == "T")
    error = multiply(a, b, torch.float32, precision=precision, BM=tile[0], BN=tile[1])
    assert error <= allowed * max(1, (k / 256) ** 0.5)


@pytest.mark.parametrize("precision", ["tf32", "3xtf32"])
def test_chained_float32_on_the_asynchronous_unit(precision):
    x, w1, w2 = (random(*s, torch.float32) for s in ((300, 130), (130, 100), (100, 70)))
    y = poisoned(300, 70, torch.float32)
    chained[(tw.cdiv(300, 64),)](x, w1, w2, y, precision=precision)
    hidden = (x.double() @ w1.double()).clamp(min=0)
    assert relative(y, hidden @ w2.double()) < (2e-6 if precision == "3xtf32" else 4e-3)


@pytest.mark.parametrize(("m", "n"), [(512, 512), (500, 333)])
def test_dots_that_do_not_fit_the_asynchronous_unit_need_no_option(m, n):
    a, b = random(m, 256, torch.bfloat16), random(256, n, torch.bfloat16)
    assert multiply(a, b, torch.float32, BM=32, BN=64) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_library_kernels(dtype):
    a, b, c = random(700, 520, dtype), random(520, 904, dtype), poisoned(700, 904, dtype)
    gemm[(tw.cdiv(700, 128), tw.cdiv(904, 128))](a, b, c, BN=128, schedule="prefetch")
    assert relative(c, a.double() @ b.double()) < 5e-3
    x, w1, w2 = random(300, 130, dtype), random(130, 100, dtype) / 11, random(100, 70, dtype)
    y = poisoned(300, 70, dtype)
    mlp[(tw.cdiv(300, 64),)](x, w1, w2, y, BM=64, schedule="prefetch")
    hidden = (x.double() @ w1.double()).clamp(min=0).to(dtype).double()
    assert relative(y, hidden @ w2.double()) < 5e-3


@pytest.mark.parametrize(
    ("dtype", "precision", "allowed"),
    [
        (torch.bfloat16, "default", 5e-3), (torch.float32, "default", 1e-6), (torch.float32, "3xtf32", 1e-6),
        (torch.float32, "tf32", 2e-3), (torch.float64, "default", 1e-14),
    ],
)  # fmt: skip
def test_chained_and_transposed_operands(dtype, precision, allowed):
    a, b = random(96, 64, dtype), random(64, 64, dtype)
    c = poisoned(96, 64, torch.float64 if dtype == torch.float64 else torch.float32)
    transposed_product[(3,)](a, b, c, precision=precision, schedule="prefetch")
    first = (a.double() @ b.double()).to(dtype).double()
    assert relative(c, first @ b.double().T + a.double()) <= allowed


@pytest.mark.parametrize(
    ("dtype", "acc"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_operands_that_are_computed(dtype, acc):
    a, b, c = random(32, 100, dtype), random(100, 32, dtype), poisoned(32, 32, acc)
    computed_operand[(1,)](a, b, c, schedule="prefetch")
    assert relative(c, a.double() @ (b + b).double()) <= 1e-6


def test_the_same_bits_every_time_and_nothing_else_is_written():
    a, b = random(512, 512, torch.float32), random(512, 512, torch.float32)
    results = []
    for _ in range(2):
        guard = poisoned(512 + 128, 512, torch.float32)
        product[(8, 8)](a, b, guard[64:-64], precision="3xtf32")
        torch.cuda.synchronize()
        assert guard[:64].isnan().all() and guard[-64:].isnan().all()
        results.append(guard[64:-64].clone())
    assert torch.equal(*results)
