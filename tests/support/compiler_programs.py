"""Kernels that the tests of the compiler share. The command-line tests name this file."""

from __future__ import annotations

import tilewright as tw


@tw.kernel
def scale(x: tw.Tensor, y: tw.Tensor, factor: tw.float32, *, B: tw.constexpr = 128):
    i = tw.program_id(0)
    tw.store(y, (i,), (tw.load(x, (i,), (B,)) * factor).to(y.dtype))


@tw.kernel
def add(x: tw.Tensor, y: tw.Tensor, out: tw.Tensor, *, BM: tw.constexpr = 32, BN: tw.constexpr = 64):
    m, n = tw.program_id(0), tw.program_id(1)
    tw.store(out, (m, n), tw.load(x, (m, n), (BM, BN)) + tw.load(y, (m, n), (BM, BN)))


@tw.kernel
def gemm(
    a: tw.Tensor, b: tw.Tensor, c: tw.Tensor, *, BM: tw.constexpr = 128, BN: tw.constexpr = 128, BK: tw.constexpr = 64
):
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    tw.store(c, (m, n), acc.to(c.dtype))


@tw.kernel
def count(out: tw.Tensor, start: tw.int8, *, STEP: tw.constexpr = 1):
    i = tw.program_id(0)
    tw.store(out, (i,), tw.full((16,), start + STEP, tw.int32))


@tw.function
def exponential(x):
    return tw.exp(x)


@tw.kernel
def double_exponential(x: tw.Tensor, y: tw.Tensor):
    i = tw.program_id(0)
    tw.store(y, (i,), exponential(tw.load(x, (i,), (128,))))
