"""What of our operators could stand for a call in Dynamo's graph, together with its neighbours, largest first."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.torch import gated, products
from tilewright.torch.graphs import example, is_call, is_tensor, only_user, without_dropout

_RELU = (F.relu, torch.relu, "relu")
_ACTIVATIONS = (F.silu, F.gelu, *_RELU)
_ADD = (operator.add, torch.add, "add")
_MULTIPLY = (operator.mul, torch.mul, "mul")


@dataclass(frozen=True)
class Candidate:
    """A call of ``ours`` that would give the result of the node ``last``.

    ``consumed`` are the nodes that disappear with it, ``last`` among them.
    """

    ours: Any
    args: tuple[Any, ...]
    last: Any
    consumed: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: what to call it in a report
    name: str = ""


def linear(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Candidate]:
    """A product, with the bias, the activation, the second product and the residual that belong to it."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    ours = products.linear
    yield from _gated(node)
    activated = _activation(node)
    if activated is not None:
        name, user = activated
        if name == "relu" or not _needs_gradient(node):
            options = {"activation": name}
            yield from _with_residual(ours, given, options, (node, user), f"linear+{name}")
            yield Candidate(ours, (), user, (node, user), {**given, **options}, f"linear+{name}")
    yield from _with_residual(ours, given, {}, (node,), "linear")
    yield Candidate(ours, (), node, (node,), given, "linear")


def _gated(node: Any) -> Iterator[Candidate]:
    """``activation(x @ gate) * (x @ up)``, of which the node is either product."""
    for side in (node, only_user(node)):
        product = only_user(side)
        if not is_call(product, *_MULTIPLY) or len(product.args) != 2:
            continue
        for activated, up in (product.args, product.args[::-1]):
            gate = activated.args[0] if is_call(activated, *_ACTIVATIONS) and activated.args else None
            found = _activation(gate) if is_call(gate, F.linear) else None
            if found is None or found[1] is not activated or not is_call(up, F.linear):
                continue
            first, second = _linear_arguments(gate), _linear_arguments(up)
            single = only_user(activated) is product and only_user(up) is product
            biased = first.get("bias") is not None or second.get("bias") is not None
            if single and not biased and first["input"] is second["input"]:
                weights = {"input": first["input"], "gate": first["weight"], "up": second["weight"]}
                consumed = (gate, activated, up, product)
                kwargs = {**weights, "activation": found[0]}
                yield Candidate(gated.gated_linear, (), product, consumed, kwargs, f"gated+{found[0]}")
                return


def _linear_arguments(node: Any) -> dict[str, Any]:
    return dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)


def _with_residual(
    ours: Any, given: dict[str, Any], options: dict[str, Any], nodes: tuple[Any, ...], name: str
) -> Iterator[Candidate]:
    value = without_dropout(nodes[-1])
    user = only_user(value)
    if not is_call(user, *_ADD) or user.kwargs or len(user.args) != 2 or user.args[0] is user.args[1]:
        return
    other = user.args[1] if user.args[0] is value else user.args[0]
    if is_tensor(other) and example(other).shape == example(value).shape:
        consumed = tuple(dict.fromkeys((*nodes, value, user)))
        yield Candidate(ours, (), user, consumed, {**given, **options, "residual": other}, f"{name}+residual")


def _activation(node: Any) -> tuple[str, Any] | None:
    """The activation that alone uses a node's result, and its node."""
    user = only_user(node)
    if user is None or not is_call(user, *_ACTIVATIONS) or user.args[:1] != (node,):
        return None
    if user.kwargs.get("inplace") or (len(user.args) > 1 and user.args[1] is True):
        return None
    if user.target in _RELU:
        return "relu", user
    if user.target is F.silu:
        return "silu", user
    return ("gelu_tanh" if user.kwargs.get("approximate") == "tanh" else "gelu"), user


def _needs_gradient(node: Any) -> bool:
    """Whether a gradient flows here: of an activation other than relu it needs the value before, which is not kept."""
    return getattr(example(node), "requires_grad", True)


__all__ = ["Candidate", "linear"]
