"""Functions that models spell out in elementary operations: root-mean-square normalisation as Llama and T5 write it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch

from tilewright.torch import norms
from tilewright.torch.candidates import Candidate, with_addition
from tilewright.torch.graphs import example, is_call, is_tensor, only_user

_CASTS = ("to", "float", "type_as", "type")
_POWERS = (torch.pow, "pow", operator.pow)
_MULTIPLY = (operator.mul, torch.mul, "mul")


def rms_norm(node: Any) -> Iterator[Candidate]:
    """From ``rsqrt(mean(x ** 2, -1, keepdim=True) + eps)``: this times x, cast, times a weight."""
    found = _variance(node)
    scaled = only_user(node)
    if found is None or not is_call(scaled, *_MULTIPLY) or len(scaled.args) != 2:
        return
    x, eps, inner = found
    factor = scaled.args[1] if scaled.args[0] is node else scaled.args[0]
    same, casts = _source(factor)
    if same is not x:
        return
    last, consumed = scaled, [*casts, *inner, node, scaled]
    last = _cast(last, consumed)
    last, weight = _weighted(last, example(x), consumed)
    if weight is not None:
        last = _cast(last, consumed)
    if not is_tensor(x) or example(last).dtype != example(x).dtype:
        return
    given = {"input": x, "normalized_shape": (example(x).shape[-1],), "weight": weight, "eps": eps}
    yield from with_addition(norms.add_rms_norm, given, tuple(dict.fromkeys(consumed)))
    yield Candidate(norms.rms_norm, (), last, tuple(dict.fromkeys(consumed)), given, "rms_norm")


def _variance(node: Any) -> tuple[Any, float, list[Any]] | None:
    """(x, eps, nodes between them and ``rsqrt``)."""
    shifted: Any = node.args[0] if node.args else None
    if not is_call(shifted, operator.add, torch.add, "add") or len(shifted.args) != 2:
        return None
    mean, eps = shifted.args if isinstance(shifted.args[1], float) else shifted.args[::-1]
    if not isinstance(eps, float) or not is_call(mean, "mean", torch.mean) or not mean.args:
        return None
    dim = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    keeps = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim", False)
    square = mean.args[0]
    if dim not in (-1, (-1,), [-1]) or keeps is not True or mean.kwargs.get("dtype") is not None:
        return None
    power = is_call(square, *_POWERS) and square.args[1:] == (2,)
    product = is_call(square, *_MULTIPLY) and square.args[0] is square.args[1]
    if not power and not product and not is_call(square, torch.square, "square"):
        return None
    x, casts = _source(square.args[0])
    return x, eps, [*casts, square, mean, shifted]


def _source(node: Any) -> tuple[Any, list[Any]]:
    """What casts to float32 cast, since the kernel computes in float32 too, and these casts."""
    casts = []
    while is_call(node, *_CASTS) and is_tensor(node) and example(node).dtype == torch.float32:
        before = node.args[0]
        if not is_tensor(before) or example(node).device != example(before).device:
            break
        casts.append(node)
        node = before
    return node, casts


def _cast(last: Any, consumed: list[Any]) -> Any:
    """The cast that alone uses a result, or the result."""
    user = only_user(last)
    if is_call(user, *_CASTS) and user.args[:1] == (last,) and example(user).device == example(last).device:
        consumed.append(user)
        return user
    return last


def _weighted(last: Any, x: Any, consumed: list[Any]) -> tuple[Any, Any]:
    """The product with a weight that alone uses a result, and the weight."""
    user = only_user(last)
    if not is_call(user, *_MULTIPLY) or len(user.args) != 2:
        return last, None
    weight = user.args[1] if user.args[0] is last else user.args[0]
    if not is_tensor(weight) or example(weight).ndim != 1 or example(weight).shape[0] != x.shape[-1]:
        return last, None
    consumed.append(user)
    return user, weight


__all__ = ["rms_norm"]
