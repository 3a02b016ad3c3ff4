"""Launch arguments against a kernel's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.frontend.definition import KernelDefinition, Parameter
from tilewright.frontend.errors import ArgumentError, suggestion
from tilewright.frontend.markers import as_dtype
from tilewright.frontend.promotion import fits
from tilewright.frontend.values import dtype_name
from tilewright.ir.types import DType, ViewType, f32, i1, i32, i64


@dataclass(frozen=True)
class BoundArguments:
    """The arguments of a launch by what they are, each dict in parameter order.

    ``tensors``: objects with ``shape`` and ``dtype``, untouched. ``scalars``: Python numbers whose
    dtypes are in ``dtypes``. ``constexprs``: compile-time values, defaults filled in; also each
    tensor or scalar parameter for which None was passed.
    """

    tensors: dict[str, Any]
    scalars: dict[str, int | float | bool]
    dtypes: dict[str, DType]
    constexprs: dict[str, Any]

    def types(self, views: dict[str, ViewType]) -> dict[str, Any]:
        """The arguments of `build_module`, given the view type of each tensor."""
        return {**views, **self.dtypes, **self.constexprs}


def bind_arguments(definition: KernelDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundArguments:
    """Match positional and keyword arguments to parameters and sort them by kind.

    Raises `ArgumentError`, naming the parameter, for missing, unknown, duplicate or ill-typed ones.
    """
    values = _match(definition, args, kwargs)
    bound = BoundArguments({}, {}, {}, {})
    for parameter in definition.parameters:
        value = values.get(parameter.name, parameter.default)
        if parameter.required and parameter.name not in values:
            kind = {"plain": "argument", "constexpr": "constexpr"}.get(parameter.kind, parameter.kind)
            raise _error(definition, parameter, f"missing {kind} '{parameter.name}'", "")
        _sort(definition, parameter, value, bound)
    return bound


def _match(definition: KernelDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    positional = [p.name for p in definition.parameters if not p.keyword_only]
    if len(args) > len(positional):
        message = f"kernel '{definition.name}' takes {len(positional)} positional arguments, got {len(args)}"
        raise ArgumentError(message, definition.loc, f"they are: {', '.join(positional)}")
    values = dict(zip(positional, args, strict=False))
    for name, value in kwargs.items():
        if name not in definition.parameter:
            hint = suggestion(name, definition.parameter) or f"parameters: {', '.join(definition.parameter)}"
            raise ArgumentError(f"kernel '{definition.name}' has no parameter '{name}'", definition.loc, hint)
        if name in values:
            raise _error(definition, definition.parameter[name], f"argument '{name}' is given twice", "")
        values[name] = value
    return values


def _sort(definition: KernelDefinition, parameter: Parameter, value: Any, bound: BoundArguments) -> None:
    name = parameter.name
    if parameter.kind == "constexpr":
        bound.constexprs[name] = _constexpr(definition, parameter, value)
    elif value is None:
        bound.constexprs[name] = None
    elif _is_tensor(value) and parameter.kind != "scalar":
        if len(value.shape) == 0:
            hint = "pass a scalar or a tensor of one element"
            raise _error(definition, parameter, f"argument '{name}' is a tensor of rank 0", hint)
        bound.tensors[name] = value
    elif parameter.kind in ("tensor", "symmetric"):
        hint = "pass a NumPy array or a torch tensor"
        raise _error(definition, parameter, f"argument '{name}' must be a tensor, got {type(value).__name__}", hint)
    else:
        bound.scalars[name], bound.dtypes[name] = _scalar(definition, parameter, value)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def _constexpr(definition: KernelDefinition, parameter: Parameter, value: Any) -> Any:
    """A compile-time value; lists become tuples so that it can be a key."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list):
        value = tuple(value)
    if _is_tensor(value):
        message = f"argument '{parameter.name}' is a tensor, but the parameter is a tw.constexpr"
        raise _error(definition, parameter, message, "annotate it tw.Tensor")
    try:
        hash(value)
    except TypeError:
        message = f"argument '{parameter.name}' is not hashable ({type(value).__name__})"
        raise _error(
            definition, parameter, message, "compile-time values are numbers, strings, tuples, dtypes"
        ) from None
    return value


def _scalar(definition: KernelDefinition, parameter: Parameter, value: Any) -> tuple[int | float | bool, DType]:
    """A Python number and its dtype."""
    name, wanted = parameter.name, parameter.dtype
    given = _scalar_dtype(value)
    if given is None and isinstance(value, int):
        raise _error(definition, parameter, f"argument '{name}' is {value}, which no integer dtype holds", "")
    if given is None:
        message = f"argument '{name}' must be a {'scalar' if parameter.kind == 'scalar' else 'tensor or scalar'}"
        hint = "annotate the parameter tw.constexpr to pass a compile-time value"
        raise _error(definition, parameter, f"{message}, got {type(value).__name__}", hint)
    number = value.item() if isinstance(value, np.generic) else value
    if wanted is None:
        return number, given
    if wanted.is_float and given != i1:
        return float(number), wanted
    if wanted.kind == given.kind and (wanted == i1 or fits(number, wanted)):
        return number, wanted
    raise _error(definition, parameter, f"argument '{name}' is {dtype_name(wanted)}, and {number!r} does not fit", "")


def _scalar_dtype(value: Any) -> DType | None:
    """The dtype of a number: int32 or int64 by size, float32, bool; a NumPy scalar keeps its own."""
    if isinstance(value, np.generic):
        try:
            return as_dtype(value.dtype.name)
        except ValueError:
            return None
    if isinstance(value, bool):
        return i1
    if isinstance(value, int):
        return i32 if fits(value, i32) else i64 if fits(value, i64) else None
    return f32 if isinstance(value, float) else None


def _error(definition: KernelDefinition, parameter: Parameter, message: str, hint: str) -> ArgumentError:
    return ArgumentError(f"kernel '{definition.name}': {message}", parameter.loc, hint, len(parameter.name))


__all__ = ["BoundArguments", "bind_arguments"]
