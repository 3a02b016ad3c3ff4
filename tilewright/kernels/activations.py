"""Activations and gated products of them, elementwise, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import row_major

#: 1 / sqrt(2 pi), log2(e) / 2, and the two constants of gelu's approximation by tanh
NORMAL, HALF_LOG2_E = 1 / math.sqrt(2 * math.pi), 0.5 / math.log(2)
SQRT_2_OVER_PI, CUBIC = math.sqrt(2 / math.pi), 0.044715

#: log2 of the normal distribution's upper tail as a polynomial, highest power first (`upper_tail`)
TAIL = (
    -2.592427961189969e-07, 3.989016022387659e-06, 9.17707529879408e-06, -0.0006891991361044347, 0.00790648814290762,
    -0.05316871777176857, -0.45896145701408386, -1.1511342525482178, -1.0,
)  # fmt: skip


@tw.function
def relu(x):
    """(max(x, 0), its derivative)."""
    return tw.maximum(x, 0.0), tw.where(x > 0.0, 1.0, 0.0)


@tw.function
def silu(x):
    """(x * sigmoid(x), its derivative)."""
    s = tw.sigmoid(x)
    return x * s, s * (1.0 + x * (1.0 - s))


@tw.function
def upper_tail(size):
    """The normal distribution's upper tail from ``size`` on, 0 <= size <= 14: errors below 4e-7, relative 2e-5 up to 6.

    2 to the power of a polynomial that was fitted for both: one exponential where the error function takes that and
    two polynomials, and no cancellation where the tail is small.
    """
    power = TAIL[0] * size + TAIL[1]
    for n in tw.static_range(2, 9):
        power = power * size + TAIL[n]
    return tw.exp2(power)


@tw.function
def gelu(x):
    """(x times the normal distribution function, its derivative)."""
    size = tw.minimum(tw.abs(x), 14.0)  # beyond, the tail is 0 in float32
    tail = upper_tail(size)
    below = tw.where(x > 0.0, 1.0 - tail, tail)
    return tw.maximum(x, 0.0) - size * tail, below + x * NORMAL * tw.exp2(-HALF_LOG2_E * x * x)


@tw.function
def gelu_tanh(x):
    """(gelu's approximation by tanh, its derivative)."""
    t = tw.tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x))
    slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)
    return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope


@tw.kernel
def activation(
    x: tw.Tensor,
    y: tw.Tensor,
    up: tw.Tensor = None,
    *,
    FN: tw.constexpr = silu,
    BM: tw.constexpr = 4,
    BN: tw.constexpr = 1024,
    READ: tw.constexpr = None,
) -> None:
    """``y = FN(x) * up`` (without ``up``: FN(x)), all (M, N), computed in float32. Grid: `row_major_grid`.

    x and up may be the halves of one matrix: strided views. READ: a hint to the cache for them.
    """
    m, n = row_major(x.shape[1], BN)
    gate = tw.load(x, (m, n), (BM, BN), eviction_policy=READ)
    if up is None:
        value, _ = FN(gate.to(tw.float32))
    else:
        factor = tw.load(up, (m, n), (BM, BN), eviction_policy=READ)
        value, _ = FN(gate.to(tw.float32))
        value = value * factor.to(tw.float32)
    tw.store(y, (m, n), value.to(y.dtype))


@tw.kernel
def activation_backward(
    dy: tw.Tensor,
    x: tw.Tensor,
    dx: tw.Tensor,
    up: tw.Tensor = None,
    dup: tw.Tensor = None,
    *,
    FN: tw.constexpr = silu,
    BM: tw.constexpr = 4,
    BN: tw.constexpr = 1024,
) -> None:
    """The gradients ``dx = dy * up * FN'(x)`` and ``dup = dy * FN(x)`` of `activation`; same grid."""
    m, n = row_major(x.shape[1], BN)
    above, gate = tw.load(dy, (m, n), (BM, BN)), tw.load(x, (m, n), (BM, BN))
    if up is None:
        _, slope = FN(gate.to(tw.float32))
        gradient = above.to(tw.float32)
    else:
        factor = tw.load(up, (m, n), (BM, BN))
        value, slope = FN(gate.to(tw.float32))
        gradient = above.to(tw.float32)
        tw.store(dup, (m, n), (gradient * value).to(dup.dtype))
        gradient = gradient * factor.to(tw.float32)
    tw.store(dx, (m, n), (gradient * slope).to(dx.dtype))


def _reference_tanh(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    t = np.tanh(SQRT_2_OVER_PI * (x + CUBIC * x**3))
    slope = SQRT_2_OVER_PI * (1 + 3 * CUBIC * x**2)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


def _reference_gelu(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    below = 0.5 + 0.5 * np.vectorize(math.erf)(x * math.sqrt(0.5))
    return x * below, below + x * NORMAL * np.exp(-0.5 * x * x)


def _reference_silu(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    s = 1 / (1 + np.exp(-x))
    return x * s, s * (1 + x * (1 - s))


#: (value, derivative) in float64 of each function
REFERENCES: dict[Any, Callable[[np.ndarray[Any, Any]], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {
    relu: lambda x: (np.maximum(x, 0), (x > 0).astype(np.float64)),
    silu: _reference_silu,
    gelu: _reference_gelu,
    gelu_tanh: _reference_tanh,
}


def reference(fn: Any, x: np.ndarray[Any, Any], up: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """In float64."""
    value = REFERENCES[fn](x.astype(np.float64))[0]
    return value if up is None else value * up.astype(np.float64)


def reference_backward(
    fn: Any, dy: np.ndarray[Any, Any], x: np.ndarray[Any, Any], up: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """dx and dup in float64."""
    value, slope = REFERENCES[fn](x.astype(np.float64))
    gradient = dy.astype(np.float64)
    return gradient * up.astype(np.float64) * slope, gradient * value
