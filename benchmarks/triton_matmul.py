"""The rival of compile_time.py: a persistent matrix product with tensor descriptors (TMA) in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matmul_persistent(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SMS: tl.constexpr,
):
    """``c = a @ b`` in bf16, row-major (M, K), (K, N), (M, N); grid (SMS,), tiles in groups of GROUP rows."""
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BM, BK])
    b = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BK, BN])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BM, BN])
    rows, columns, steps = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, BK)
    window = GROUP * columns
    for tile in tl.range(tl.program_id(0), rows * columns, SMS, flatten=True, warp_specialize=False):
        first = tile // window * GROUP
        height = min(rows - first, GROUP)
        m = (first + tile % window % height) * BM
        n = tile % window // height * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(steps):
            acc = tl.dot(a.load([m, k * BK]), b.load([k * BK, n]), acc)
        c.store([m, n], acc.to(tl.bfloat16))
