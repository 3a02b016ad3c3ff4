"""Reading and editing Dynamo's graphs: what nodes stand for, what lies between them, what may be replaced."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

CALLS = ("call_function", "call_method")
#: functions that write to an argument, beside methods and functions of torch whose names end with an underscore
_WRITERS = frozenset(
    getattr(operator, name)
    for name in (
        *("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat"),
    )
)


def example(node: Any) -> Any:
    """The value that a node had while Dynamo traced it: a tensor without memory, a number, None if unknown."""
    return node.meta.get("example_value") if isinstance(node, torch.fx.Node) else node


def is_tensor(node: Any) -> bool:
    """Whether a node is known to be one tensor."""
    return isinstance(node, torch.fx.Node) and isinstance(example(node), torch.Tensor)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these functions, or methods of these names."""
    return isinstance(node, torch.fx.Node) and node.op in CALLS and node.target in targets


def name_of(target: Any) -> str:
    """The name of a function or method."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def only_user(node: Any) -> Any:
    """The node that alone uses another's result, None if there are several or none (or no node is given)."""
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def writes(node: Any) -> bool:
    """Whether a call changes one of its arguments."""
    if node.op not in CALLS:
        return False
    name = name_of(node.target)
    python = getattr(node.target, "__module__", None) == "_operator"  # operator.and_ is no and_ of torch
    in_place = name.endswith("_") and not name.endswith("__") and not python
    return node.target in _WRITERS or in_place or "out" in node.kwargs or node.kwargs.get("inplace", False) is True


def between(first: Any, last: Any) -> Iterator[Any]:
    """The nodes behind ``first`` and before ``last`` in the order of execution."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def quiet(first: Any, last: Any) -> bool:
    """Whether nothing is written between two nodes, so that what one reads the other could read."""
    return not any(writes(node) for node in between(first, last))


def precede(arguments: Any, place: Any) -> bool:
    """Whether all nodes among ``arguments`` are computed before the node ``place``."""
    found: list[Any] = []
    torch.fx.node.map_arg(arguments, found.append)
    return all(node < place for node in found)


def without_dropout(node: Any) -> Any:
    """The node itself, or its only user's where that is a dropout that drops nothing."""
    user = only_user(node)
    if not is_call(user, F.dropout, torch.dropout):
        return node
    p = user.args[1] if len(user.args) > 1 else user.kwargs.get("p", 0.5)
    training = user.args[2] if len(user.args) > 2 else user.kwargs.get("training", True)
    return user if p == 0 or training is False else node


def insert(place: Any, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any) -> Any:
    """A new call before the node ``place``; ``value`` describes its result."""
    graph = place.graph
    with graph.inserting_before(place):
        if isinstance(target, str):
            new = graph.call_method(target, args, dict(kwargs))
        else:
            new = graph.call_function(target, args, dict(kwargs))
    new.meta = {key: value for key, value in place.meta.items() if key in ("stack_trace", "nn_module_stack")}
    new.meta["example_value"] = value
    return new


__all__ = [
    "CALLS", "between", "example", "insert", "is_call", "is_tensor", "name_of", "only_user", "precede", "quiet",
    "without_dropout", "writes",
]  # fmt: skip
