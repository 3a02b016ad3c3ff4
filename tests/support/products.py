"""Matrix products that tests of dtypes, targets and schedules share."""

from __future__ import annotations

import tilewright as tw


@tw.kernel
def product(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    *,
    BM: tw.constexpr = 64,
    BN: tw.constexpr = 64,
    BK: tw.constexpr = 32,
    precision: tw.constexpr = "default",
):
    """``c = a @ b``, accumulated in c's dtype. Grid: (cdiv(M, BM), cdiv(N, BN))."""
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), c.dtype)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc, precision=precision)
    tw.store(c, (m, n), acc)


@tw.kernel
def product_behind(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, first: tw.int32):
    """The columns of ``a`` from ``first`` on, times ``b``. Grid: (cdiv(M, 64),), c of up to 64 columns."""
    m, acc = tw.program_id(0), tw.zeros((64, 64), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1] - first, 32)):
        acc = tw.dot(tw.load(a.offset(0, first), (m, k), (64, 32)), tw.load(b, (k, 0), (32, 64)), acc)
    tw.store(c, (m, 0), acc)
