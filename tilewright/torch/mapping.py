"""Operators under `torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def mapped(operator: Any, names: list[str], leading: frozenset[str]) -> Callable[..., Any]:
    """The rule of an operator for `torch.library.register_vmap`; ``names`` are those of its arguments."""

    def rule(info: Any, dims: Any, *args: Any, **named: Any) -> Any:
        mapped_names = [name for name, dim in zip(names, dims, strict=False) if dim is not None]
        if leading.issuperset(mapped_names):
            rows = [
                _in_front(value, dim, info.batch_size) if name in leading and value is not None else value
                for name, value, dim in zip(names, args, dims, strict=False)
            ]
            made = operator(*rows, **named)
        else:
            made = _stacked([operator(*_element(args, dims, i), **named) for i in range(info.batch_size)])
        return made, (0,) * len(made) if isinstance(made, tuple) else 0

    return rule


def _in_front(value: Any, dim: int | None, size: int) -> Any:
    """The mapped dimension in front; one of that size where the tensor has none."""
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _element(args: Any, dims: Any, index: int) -> list[Any]:
    return [value if dim is None else value.select(dim, index) for value, dim in zip(args, dims, strict=False)]


def _stacked(results: list[Any]) -> Any:
    if isinstance(results[0], tuple):
        return tuple(torch.stack(each) for each in zip(*results, strict=True))
    return torch.stack(results)


__all__ = ["mapped"]
