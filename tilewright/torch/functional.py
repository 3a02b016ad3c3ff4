"""What a functional operator is: a function of torch's, our form of it, and when ours applies."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_map

from tilewright.torch.direct import repeating
from tilewright.torch.support import FLOATS, IN_AUTOCAST, Refusal

#: functional operator -> why it leaves arguments to torch
_refusals: dict[Any, Callable[..., Refusal]] = {}
#: functional operator -> the function of torch that does what the kernels do not take
_eager: dict[Any, Callable[..., Any]] = {}
#: those that compute in autocast's dtype inside of it
_lowered: set[Any] = set()


def functional(
    refuse: Callable[..., Refusal], otherwise: Callable[..., Any], *, lowered: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function on tensors into a functional operator with eager's ``otherwise`` where ``refuse`` gives a text.

    All three take the same arguments, and the first is a tensor. torch.compile puts a call of the operator into its
    graph as it is. ``lowered``: one of those operations that torch's autocast computes in its lower precision.
    """

    def decorate(ours: Callable[..., Any]) -> Any:
        def choose(*args: Any, **kwargs: Any) -> Any:
            reason = _reason(refuse, args, kwargs)
            if reason is None:
                return ours(*args, **kwargs)
            if lowered and reason is IN_AUTOCAST:
                device = args[0].device.type
                args, kwargs = _cast((args, kwargs), device)
                with torch.autocast(device, enabled=False):
                    return operator(*args, **kwargs)
            return otherwise(*args, **kwargs)

        operator = wraps(ours)(repeating(choose))
        _refusals[operator], _eager[operator] = refuse, otherwise
        if lowered:
            _lowered.add(operator)
        return torch.compiler.allow_in_graph(operator)

    return decorate


def _reason(refuse: Callable[..., Refusal], args: Any, kwargs: Any) -> Refusal:
    try:
        return refuse(*args, **kwargs)
    except GuardOnDataDependentSymNode:  # AOTAutograd's sizes may be symbols where Dynamo's had values
        return "sizes that depend on data"


def refusal(operator: Any, *args: Any, **kwargs: Any) -> Refusal:
    """Why a functional operator would leave these arguments to torch; None if the kernels take them."""
    reason = _reason(_refusals[operator], args, kwargs)
    if reason is IN_AUTOCAST and operator in _lowered:
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).device.type
        args, kwargs = _cast((args, kwargs), device)
        with torch.autocast(device, enabled=False):
            return _refusals[operator](*args, **kwargs)
    return reason


def is_functional(target: Any) -> bool:
    """Whether something is a functional operator."""
    return target in _eager


def eager(operator: Any) -> Callable[..., Any]:
    """What a functional operator calls where the kernels do not take its arguments; it takes all of them."""
    return _eager[operator]


def _cast(values: Any, device: str) -> Any:
    """Floating-point tensors among arguments in the dtype of the device's autocast."""
    dtype = torch.get_autocast_dtype(device)
    return tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in FLOATS else x, values)


__all__ = ["eager", "functional", "is_functional", "refusal"]
