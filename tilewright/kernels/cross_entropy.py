"""Cross-entropy of logits and class indices, forward and backward, over vocabularies of any size."""

from __future__ import annotations

from typing import Any

import numpy as np

import tilewright as tw
from tilewright.kernels.rows import LEAST, LOG2_E, row_major


@tw.kernel
def cross_entropy(
    logits: tw.Tensor,
    target: tw.Tensor,
    loss: tw.Tensor,
    lse: tw.Tensor,
    ignored: tw.int32,
    *,
    SMOOTHING: tw.constexpr = 0.0,
    BN: tw.constexpr = 4096,
    LANES: tw.constexpr = 1024,
) -> None:
    """``loss = lse - (1 - s) * logits[target] - s * mean(logits)`` with ``lse = log(sum(exp(logits)))``. Grid: (M,).

    logits (M, V), target (M,) int32 or int64, loss and lse (M,) float32, s = SMOOTHING. Rows whose target is
    ``ignored`` have loss 0. One pass over blocks of BN classes: each of LANES columns keeps a maximum and a sum of its
    own, so that no block waits for an exchange between threads.
    """
    m = tw.program_id(0)
    top = tw.full((LANES,), LEAST, tw.float32)
    total = tw.zeros((LANES,), tw.float32)
    plain = tw.zeros((LANES,), tw.float32)
    for j in tw.range(tw.cdiv(logits.shape[1], BN)):
        row = tw.load(logits, (m, j), (1, BN), pad=float("-inf")).to(tw.float32)
        x = row.reshape(BN // LANES, LANES)
        higher = tw.maximum(top, tw.max(x, axis=0))
        total = total * tw.exp2((top - higher) * LOG2_E) + tw.sum(tw.exp2((x - higher[None, :]) * LOG2_E), axis=0)
        top = higher
        if SMOOTHING > 0.0:
            inside = j * BN + tw.arange(BN) < logits.shape[1]
            plain = plain + tw.sum(tw.where(inside.reshape(BN // LANES, LANES), x, 0.0), axis=0)
    highest = tw.max(top)
    norm = highest + tw.log(tw.sum(total * tw.exp2((top - highest) * LOG2_E)))
    index = tw.load(target, m)
    chosen = tw.load(logits[m], index.to(tw.int32)).to(tw.float32)
    if SMOOTHING > 0.0:
        chosen = (1.0 - SMOOTHING) * chosen + SMOOTHING / logits.shape[1] * tw.sum(plain)
    tw.store(loss, m, tw.where(index == ignored, 0.0, norm - chosen))
    tw.store(lse, m, norm)


@tw.kernel
def cross_entropy_backward(
    logits: tw.Tensor,
    target: tw.Tensor,
    lse: tw.Tensor,
    dloss: tw.Tensor,
    dlogits: tw.Tensor,
    ignored: tw.int32,
    *,
    SMOOTHING: tw.constexpr = 0.0,
    BN: tw.constexpr = 4096,
) -> None:
    """``dlogits = (exp(logits - lse) - (1 - s) * [class is target] - s / V) * dloss``; 0 in rows that are ignored.

    Shapes as in `cross_entropy`, dloss (M,) float32: 1 / M each for the mean. Grid: `row_major_grid`
    with BM 1.
    """
    m, j = row_major(logits.shape[1], BN)
    index = tw.load(target, m).to(tw.int32)
    weight = tw.where(index == ignored, 0.0, tw.load(dloss, m))
    x = tw.load(logits, (m, j), (1, BN)).to(tw.float32)
    wanted = (j * BN + tw.arange(BN))[None, :] == index
    out = tw.exp2((x - tw.load(lse, m)) * LOG2_E) - tw.where(wanted, 1.0 - SMOOTHING, 0.0)
    if SMOOTHING > 0.0:
        out = out - SMOOTHING / logits.shape[1]
    tw.store(dlogits, (m, j), tw.where(weight == 0.0, 0.0, out * weight).to(dlogits.dtype))


def blocks(element_bytes: int) -> dict[str, int]:
    """``BN`` and ``LANES`` of `cross_entropy`: four vectors of 16 bytes in each of 128 threads, one a column."""
    lanes = 128 * 16 // element_bytes
    return {"BN": 4 * lanes, "LANES": lanes}


def reference(
    logits: np.ndarray[Any, Any], target: np.ndarray[Any, Any], ignored: int = -100, smoothing: float = 0.0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Losses of the rows and logarithms of their sums, in float64."""
    x = logits.astype(np.float64)
    top = x.max(axis=1)
    lse = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    kept = target != ignored
    chosen = x[np.arange(len(x)), np.where(kept, target, 0)]
    return np.where(kept, lse - (1 - smoothing) * chosen - smoothing * x.mean(axis=1), 0.0), lse


def reference_backward(
    logits: np.ndarray[Any, Any],
    target: np.ndarray[Any, Any],
    dloss: np.ndarray[Any, Any],
    ignored: int = -100,
    smoothing: float = 0.0,
) -> np.ndarray[Any, Any]:
    """In float64."""
    lse, kept = reference(logits, target, ignored, smoothing)[1], target != ignored
    out: np.ndarray[Any, Any] = np.exp(logits.astype(np.float64) - lse[:, None]) - smoothing / logits.shape[1]
    out[np.arange(len(out)), np.where(kept, target, 0)] -= 1 - smoothing
    return out * np.where(kept, dloss.astype(np.float64), 0.0)[:, None]
