"""The cost gate of the backend: which calls our kernels are worth, by what docs/performance.md has measured.

That is Hopper. Elsewhere, and where a call alone was never ahead, the gate leaves it to the rest of the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod
from typing import Any

import torch

from tilewright.torch import cast_products, gated, grouped, losses, norms, products, rows, sdpa
from tilewright.torch.support import Refusal

#: multiply-adds of a product, and elements of rows, below which launching ours takes longer than it saves
LEAST_PRODUCT, LEAST_ROWS = 2048**3, 2**24
#: rows and columns from which products that are only stored, or added to a residual, are ahead of cuBLAS
LEAST_TALL, LEAST_WIDE = 16384, 1024
#: queries from which attention is ahead of cuDNN: without and with the causal mask
LEAST_QUERIES, LEAST_CAUSAL_QUERIES = 1024, 2048
#: queries from which attention with a soft cap was measured ahead of its formulas, and the longest heads
LEAST_CAPPED_QUERIES, MOST_CAPPED_DEPTH = 4096, 256
#: tokens and elements of a weight that is cast for which the product was measured ahead of the cast and a product
CAST_TOKENS, LEAST_CAST = range(16, 65), 4096**2
#: the compute capability of the measured GPU
MEASURED = (9, 0)


#: why an operator does not pay for its arguments, None if it does
Gate = Callable[..., Refusal]
#: products with a collective of torch.distributed
COLLECTIVES = frozenset({"all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"})
#: the size of the groups that were measured, and what rows, depth and columns of their products were multiples of
MEASURED_RANKS, MEASURED_MULTIPLE = 2, 256


def gate_of(cost_gate: bool, only: Collection[str] | None) -> Gate:
    """The gate of these options: with ``only`` it is for these operators, whatever they cost."""
    if only is not None:
        return lambda operator, *args, **kwargs: None if operator.__name__ in only else "not asked for"
    return not_worthwhile if cost_gate else always


def always(operator: Any, *args: Any, **kwargs: Any) -> Refusal:
    """Every call pays."""
    return None


def not_worthwhile(operator: Any, *args: Any, **kwargs: Any) -> Refusal:
    """Why a call of a functional operator costs more than what would run instead; None if it does not.

    The first tensor is given by position.
    """
    tensor = args[0]
    if tensor.device.type != "cuda":
        return "on the CPU kernels run in an interpreter"
    if tensor.dtype == torch.float32:
        return "float32 was not measured to be faster"
    if torch.version.hip or (torch.cuda.is_available() and torch.cuda.get_device_capability(tensor.device) != MEASURED):
        return "this GPU was not measured"
    cost = _collective if operator.__name__ in COLLECTIVES else _COSTS[operator]
    return cost(*args, **kwargs)


def _collective(input: Any, other: Any, group: str, columns: bool = False) -> Refusal:
    if columns:
        return "collectives along the last dimension were not measured"
    if torch.distributed.distributed_c10d._get_group_size_by_name(group) != MEASURED_RANKS:
        return "groups of another size were not measured"
    if _elements(input) * _hint(other.shape[1]) < LEAST_PRODUCT:
        return "a small product"
    sizes = prod(map(_hint, input.shape[:-1])), *map(_hint, other.shape)
    even = all(size % MEASURED_MULTIPLE == 0 for size in sizes)
    return None if even else f"sizes that are no multiples of {MEASURED_MULTIPLE} were not measured"


def _linear(input: Any, weight: Any, bias: Any = None, activation: str | None = None, residual: Any = None) -> Refusal:
    if _trains(input, weight):
        return "its gradient was not measured"
    if activation is None and bias is None:
        rows, least = _elements(input) // max(1, _hint(weight.shape[1])), min(map(_hint, weight.shape))
        small = rows < LEAST_TALL or least < LEAST_WIDE
        return "a product of this size without activation is as fast in cuBLAS" if small else None
    if activation is None:
        return "a product with a bias alone was not measured"
    size = _elements(input) * _hint(weight.shape[0])
    return "a small product" if size < LEAST_PRODUCT else None


def _cast(input: Any, weight: Any, *rest: Any, **named: Any) -> Refusal:
    """Few tokens leave the time of a pass over the weight, which is read narrow here and written by no one."""
    if _trains(input, weight) or weight.dtype in cast_products.HALVES:
        return "casts of inputs, or with gradients, were not measured to cost more"
    few = _elements(input) // max(1, _hint(weight.shape[1])) in CAST_TOKENS and _elements(weight) >= LEAST_CAST
    return None if few else "casts before products were not measured to cost more with so many tokens or so few"


def _gated(input: Any, gate: Any, up: Any, activation: str = "silu") -> Refusal:
    if _trains(input, gate, up):
        return "with its gradient it is as fast in torch"
    size = _elements(input) * _hint(gate.shape[0])
    return "a small product" if size < LEAST_PRODUCT else None


def _grouped(mat_a: Any, mat_b: Any, **rest: Any) -> Refusal:
    return "a grouped product is as fast in torch"


def _matmul(input: Any, other: Any) -> Refusal:
    return "a product without activation is as fast in cuBLAS"


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> Refusal:
    if rest.get("softcap") is not None:
        return _capped(query, attn_mask, is_causal)
    if _trains(query, key, value):
        return "with its gradient it is as fast in torch"
    if attn_mask is not None or rest.get("window") is not None:
        return "masks and windows were not measured"
    least = LEAST_CAUSAL_QUERIES if is_causal else LEAST_QUERIES
    return f"fewer than {least} queries" if _hint(query.shape[2]) < least else None


def _capped(query: Any, attn_mask: Any, is_causal: bool) -> Refusal:
    """A window hides more of what the causal mask leaves, for which formulas still compute everything."""
    if attn_mask is not None or not is_causal or _hint(query.shape[3]) > MOST_CAPPED_DEPTH:
        return "soft caps were measured with causal masks and short heads"
    least = LEAST_CAPPED_QUERIES
    return f"fewer than {least} queries" if _hint(query.shape[2]) < least else None


def _norm(*args: Any, **kwargs: Any) -> Refusal:
    return "fused with its neighbours by Inductor"


def _wide_rows(x: Any, *args: Any, **kwargs: Any) -> Refusal:
    return "few elements" if _elements(x) < LEAST_ROWS else None


_COSTS: dict[Any, Callable[..., Refusal]] = {
    products.linear: _linear,
    products.matmul: _matmul,
    cast_products.cast_linear: _cast,
    gated.gated_linear: _gated,
    grouped.grouped_mm: _grouped,
    sdpa.attention: _attention,
    norms.rms_norm: _norm,
    norms.layer_norm: _norm,
    norms.add_rms_norm: _norm,
    norms.add_layer_norm: _norm,
    rows.softmax: _wide_rows,
    losses.cross_entropy: _wide_rows,
}


def _trains(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _elements(x: Any) -> int:
    return prod(_hint(n) for n in x.shape)


def _hint(size: Any) -> int:
    """The size that a symbol stands for at present, without a guard on it; 0 if unknown."""
    return size if isinstance(size, int) else size.node.hint or 0


__all__ = ["COLLECTIVES", "Gate", "always", "gate_of", "not_worthwhile"]
