"""Attention that models spell out: ``softmax(cap * tanh(q @ k.T * scale / cap) + mask) @ v``, as Gemma 2 has it."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.torch.graphs import example, is_call, is_tensor, only_user, without_dropout

_MATMUL = (torch.matmul, operator.matmul, "matmul", torch.bmm, "bmm")
_MULTIPLY = (operator.mul, torch.mul, "mul")
_DIVIDE = (operator.truediv, torch.div, "div", torch.true_divide)
_ADD = (operator.add, torch.add, "add")
_TANH = (torch.tanh, "tanh")
_SOFTMAX = (F.softmax, torch.softmax, "softmax")
_CASTS = ("to", "float", "type_as", "type")


def spelled_attention(product: Any) -> tuple[dict[str, Any], tuple[Any, ...], Any] | None:
    """From ``q @ k.T``: what attention is given, the nodes that it stands for, and the last of them."""
    transposed = product.args[1] if is_call(product, *_MATMUL) and len(product.args) == 2 else None
    if transposed is None or not _is_transposed(transposed) or not is_tensor(product) or example(product).ndim != 4:
        return None
    query, key = product.args[0], transposed.args[0]
    scores = _Scores()
    last, nodes = product, [transposed, product]
    while not is_call(only_user(last), *_SOFTMAX):
        user = only_user(last)
        if user is None or not scores.take(last, user):
            return None
        last = user
        nodes.append(user)
    softmax = only_user(last)
    if not _along_keys(softmax) or scores.unfinished:
        return None
    last = _behind_casts(softmax, nodes)
    if without_dropout(last) is not last:
        last = without_dropout(last)
        nodes.append(last)
    weighted = only_user(last)
    if not is_call(weighted, *_MATMUL) or len(weighted.args) != 2 or weighted.args[0] is not last:
        return None
    nodes.append(weighted)
    given = {"query": query, "key": key, "value": weighted.args[1], "attn_mask": scores.mask, "scale": scores.scale}
    if scores.cap is not None:
        given["softcap"] = scores.cap
    if not all(is_tensor(given[name]) and example(given[name]).ndim == 4 for name in ("query", "key", "value")):
        return None
    return given, tuple(nodes), weighted


class _Scores:
    """What happens to products of queries and keys before the softmax."""

    def __init__(self) -> None:
        self.factor, self.bent = 1.0, False
        self.cap: float | None = None
        self.mask: Any = None

    @property
    def unfinished(self) -> bool:
        """Whether nothing follows a tanh yet."""
        return self.bent and self.cap is None

    @property
    def scale(self) -> float:
        """``cap * tanh(s * factor)`` is ``cap * tanh(s * scale / cap)``."""
        return self.factor if self.cap is None else self.factor * self.cap

    def take(self, value: Any, user: Any) -> bool:
        """Whether attention can do what a node does with the value."""
        if is_call(user, *_CASTS):
            return is_tensor(user) and example(user).dtype in (torch.float32, example(value).dtype)
        if is_call(user, *_TANH):
            taken = not self.bent and self.mask is None
            self.bent = True
            return taken
        if user.kwargs or len(user.args) != 2:
            return False
        other = user.args[1] if user.args[0] is value else user.args[0]
        if is_call(user, *_ADD):
            taken = is_tensor(other) and self.mask is None and not self.unfinished
            self.mask = other
            return taken
        divides = is_call(user, *_DIVIDE) and user.args[0] is value
        if not (divides or is_call(user, *_MULTIPLY)) or not isinstance(other, int | float) or other <= 0:
            return False
        return self._scaled(1 / other if divides else float(other))

    def _scaled(self, factor: float) -> bool:
        if self.mask is not None or self.cap is not None:
            return False
        if self.bent:
            self.cap = factor
        else:
            self.factor *= factor
        return True


def _is_transposed(node: Any) -> bool:
    """Whether a node swaps the last two of four dimensions."""
    if is_call(node, "transpose", torch.transpose) and len(node.args) == 3:
        return is_tensor(node.args[0]) and {dim % example(node).ndim for dim in node.args[1:]} == {2, 3}
    if is_call(node, "permute", torch.permute):
        dims = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        return tuple(dims) == (0, 1, 3, 2)
    return is_call(node, getattr) and node.args[1] == "mT" and is_tensor(node.args[0])


def _along_keys(softmax: Any) -> bool:
    dim = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    return dim in (-1, 3) and softmax.kwargs.get("dtype") in (None, torch.float32)


def _behind_casts(softmax: Any, nodes: list[Any]) -> Any:
    """The softmax or the cast that alone uses it; both are added to the nodes."""
    nodes.append(softmax)
    user = only_user(softmax)
    if is_call(user, *_CASTS) and user.args[:1] == (softmax,) and is_tensor(user):
        nodes.append(user)
        return user
    return softmax


def order_is_unseen(result: Any) -> bool:
    """Whether a result (B, H, M, D) is used by ``.transpose(1, 2).contiguous()`` alone: its order is all one."""
    turned = only_user(result)
    if is_call(turned, "reshape", "view") and is_tensor(turned) and example(turned).shape == example(result).shape:
        turned = only_user(turned)
    if not is_call(turned, "transpose", torch.transpose) or set(turned.args[1:]) != {1, 2}:
        return False
    user = only_user(turned)
    return is_call(user, "contiguous") and len(user.args) == 1 and not user.kwargs


__all__ = ["order_is_unseen", "spelled_attention"]
