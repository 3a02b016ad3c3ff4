"""What a functional operator is: a function of torch's, our form of it, and when ours applies."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from tilewright.torch.support import Refusal

#: functional operator -> why it leaves arguments to torch
_refusals: dict[Any, Callable[..., Refusal]] = {}


def functional(refuse: Callable[..., Refusal], otherwise: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function on tensors into a functional operator with eager's ``otherwise`` where ``refuse`` gives a text.

    All three have the same parameters. torch.compile puts a call of the operator into its graph as it is.
    """

    def decorate(ours: Callable[..., Any]) -> Any:
        @wraps(ours)
        def operator(*args: Any, **kwargs: Any) -> Any:
            chosen = otherwise if refuse(*args, **kwargs) else ours
            return chosen(*args, **kwargs)

        _refusals[operator] = refuse
        return torch.compiler.allow_in_graph(operator)

    return decorate


def refusal(operator: Any, *args: Any, **kwargs: Any) -> Refusal:
    """Why a functional operator would leave these arguments to torch; None if the kernels take them."""
    return _refusals[operator](*args, **kwargs)


__all__ = ["functional", "refusal"]
