"""Matrix products whose results go through a chain of functions before they are stored.

A step of the chain is a ``@tw.function`` of ``(x, m, n, vector, matrix, factor)``: the float32 tile, its place in
tiles, and the kernel's further operands; it gives the new tile. Steps combine at will, also with a user's own.
"""

from __future__ import annotations

from math import erf, sqrt
from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.gemm import configuration

# --- steps ----------------------------------------------------------------------------------------


@tw.function
def add_bias(x, m, n, vector, matrix, factor):
    """Add ``vector`` (N,) to every row."""
    return x + tw.load(vector, n, x.shape[1]).to(tw.float32)[None, :]


@tw.function
def add_residual(x, m, n, vector, matrix, factor):
    """Add ``matrix`` (M, N)."""
    return x + tw.load(matrix, (m, n), x.shape).to(tw.float32)


@tw.function
def multiply(x, m, n, vector, matrix, factor):
    """Multiply by the scalar ``factor``."""
    return x * factor


@tw.function
def relu(x, m, n, vector, matrix, factor):
    """``max(x, 0)``."""
    return tw.maximum(x, 0.0)


@tw.function
def gelu(x, m, n, vector, matrix, factor):
    """``x Phi(x)`` with the error function's approximation 7.1.26 of Abramowitz and Stegun, 3e-7 off at most.

    Half as many instructions as with `tw.erf`, whose last digits a result of 16 bits does not show.
    """
    size = tw.minimum(abs(x), 16.0)  # from there on the weight of the tail is 0
    t = 1.0 / (1.0 + 0.23164188 * size)
    tail = ((((0.53070271 * t - 0.72657602) * t + 0.71070687) * t - 0.14224837) * t + 0.12741479) * t
    y = 0.84932180 * size
    return tw.maximum(x, 0.0) - size * tail * tw.exp2(-(y * y))


@tw.function
def gelu_tanh(x, m, n, vector, matrix, factor):
    """The usual approximation of gelu: ``Phi(x) = (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``."""
    return x / (1.0 + tw.exp2(x * (-2.302208198 - 0.1029432397 * x * x)))


@tw.function
def silu(x, m, n, vector, matrix, factor):
    """``x sigmoid(x)``."""
    return x / (1.0 + tw.exp2(-1.442695041 * x))


# --- kernels --------------------------------------------------------------------------------------


@tw.kernel
def gemm_epilogue(
    a: tw.Tensor,
    b: tw.Tensor,
    c: tw.Tensor,
    vector: tw.Tensor = None,
    matrix: tw.Tensor = None,
    factor: tw.float32 = 1.0,
    *,
    STEPS: tw.constexpr = (),
    PARTS: tw.constexpr = 1,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 256,
    BK: tw.constexpr = 64,
) -> None:
    """``c = steps(a @ b)`` with a (M, K), b (K, N), c (M, N), any strides. Grid: (cdiv(M, BM), cdiv(N, BN)).

    Accumulates and applies ``STEPS`` in float32 and rounds once, to c's dtype. ``vector`` (N,), ``matrix`` (M, N) and
    ``factor`` are what the steps use; None for those that none of them does. They see a tile in ``PARTS`` parts of its
    columns, one after the other, for what they read to fit into registers.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    acc = tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], BK)):
        acc = tw.dot(tw.load(a, (m, k), (BM, BK)), tw.load(b, (k, n), (BK, BN)), acc)
    for part in tw.static_range(PARTS):
        x, at = acc[:, part * (BN // PARTS) : (part + 1) * (BN // PARTS)], n * PARTS + part
        for step in STEPS:
            x = step(x, m, at, vector, matrix, factor)
        tw.store(c, (m, at), x.to(c.dtype))


@tw.kernel
def gate_up(
    x: tw.Tensor,
    gate: tw.Tensor,
    up: tw.Tensor,
    y: tw.Tensor,
    left_out: tw.Tensor = None,
    right_out: tw.Tensor = None,
    *,
    ACTIVATION: tw.constexpr = silu,
    BM: tw.constexpr = 128,
    BN: tw.constexpr = 128,
    BK: tw.constexpr = 64,
) -> None:
    """``y = activation(x @ gate) * (x @ up)``: x (M, K), gate and up (K, N), y (M, N).

    Grid: (cdiv(M, BM), cdiv(N, BN)). The first half of a gated feed-forward layer. Both products share x's tiles;
    weights that lie in one matrix are passed as two views of it. ``ACTIVATION`` is a step that uses its first argument
    alone. ``left_out`` and ``right_out`` (M, N), both or none, get the two products, which gradients need.
    """
    m, n = tw.program_id(0), tw.program_id(1)
    left, right = tw.zeros((BM, BN), tw.float32), tw.zeros((BM, BN), tw.float32)
    for k in tw.range(tw.cdiv(x.shape[1], BK)):
        rows = tw.load(x, (m, k), (BM, BK))
        one, other = tw.load(gate, (k, n), (BK, BN)), tw.load(up, (k, n), (BK, BN))
        left = tw.dot(rows, one, left)
        right = tw.dot(rows, other, right)
    out = ACTIVATION(left, m, n, None, None, 1.0) * right
    tw.store(y, (m, n), out.to(y.dtype))
    if left_out is not None:
        tw.store(left_out, (m, n), left.to(y.dtype))
        tw.store(right_out, (m, n), right.to(y.dtype))


# --- launches -------------------------------------------------------------------------------------


def linear(
    a: Any,
    b: Any,
    c: Any,
    steps: tuple[Any, ...] = (),
    *,
    vector: Any = None,
    matrix: Any = None,
    factor: float = 1.0,
) -> None:
    """``c = steps(a @ b)`` with tiles chosen by `tilewright.kernels.gemm.configuration`. Arrays of NumPy or torch."""
    (m, n), meta = c.shape, configuration(*c.shape)
    grid = tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"])
    parts = 1 if matrix is None else 2  # a matrix's tile beside the sums is more than the registers hold
    gemm_epilogue[grid](a, b, c, vector, matrix, factor, STEPS=steps, PARTS=parts, **meta)


def gated(
    x: Any, gate: Any, up: Any, y: Any, left_out: Any = None, right_out: Any = None, *, activation: Any = silu
) -> None:
    """``y = activation(x @ gate) * (x @ up)``, see `gate_up`. Arrays of NumPy or torch, on one device."""
    (m, n), meta = y.shape, {"BM": 128, "BN": 128, "BK": 64}
    if y.itemsize > 2:  # two tiles of exact float32 sums, whose operands are in registers too
        meta = {"BM": 64, "BN": 64, "BK": 32}
    grid = tw.cdiv(m, meta["BM"]), tw.cdiv(n, meta["BN"])
    gate_up[grid](x, gate, up, y, left_out, right_out, ACTIVATION=activation, **meta)


# --- references -----------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = 0.5 * (1 + np.tanh(x / 2))
    return result


_EXACT: dict[Any, Any] = {
    add_bias: lambda x, vector, matrix, factor: x + vector.astype(np.float64),
    add_residual: lambda x, vector, matrix, factor: x + matrix.astype(np.float64),
    multiply: lambda x, vector, matrix, factor: x * factor,
    relu: lambda x, vector, matrix, factor: np.maximum(x, 0),
    gelu: lambda x, vector, matrix, factor: 0.5 * x * (1 + np.vectorize(erf)(x / sqrt(2))),
    gelu_tanh: lambda x, vector, matrix, factor: x * _sigmoid(2 * sqrt(2 / np.pi) * (x + 0.044715 * x**3)),
    silu: lambda x, vector, matrix, factor: x * _sigmoid(x),
}


def reference(
    a: np.ndarray[Any, Any],
    b: np.ndarray[Any, Any],
    steps: tuple[Any, ...] = (),
    vector: np.ndarray[Any, Any] | None = None,
    matrix: np.ndarray[Any, Any] | None = None,
    factor: float = 1.0,
) -> np.ndarray[Any, Any]:
    """The product and the steps of this module in float64."""
    x: np.ndarray[Any, Any] = a.astype(np.float64) @ b.astype(np.float64)
    for step in steps:
        x = _EXACT[step](x, vector, matrix, factor)
    return x


def gate_up_reference(
    x: np.ndarray[Any, Any], gate: np.ndarray[Any, Any], up: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """``silu(x @ gate) * (x @ up)`` in float64."""
    return reference(x, gate, (silu,)) * reference(x, up)
