"""What an expression of a kernel evaluates to.

A run-time value is an `ir.Value` (scalar, tile or view). Everything else is a compile-time value: a
Python number, string, tuple, dtype, function, module. Tuples may hold run-time values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tilewright.frontend.definition import Definition
from tilewright.frontend.errors import CompileError
from tilewright.frontend.markers import PYTHON_NAMES, Builtin
from tilewright.ir.core import Value
from tilewright.ir.types import DType, ScalarType, TileType, Type, ViewType, element_type


@dataclass(frozen=True)
class Undefined:
    """A variable that has no value here, and why."""

    reason: str
    hint: str


@dataclass(frozen=True)
class RangeValue:
    """The result of ``range``: bounds of a run-time loop, or of an unrolled one."""

    start: Any
    stop: Any
    step: Any
    unrolled: bool = False


@dataclass(frozen=True)
class ViewShape:
    """``t.shape`` of a tensor: run-time sizes are read when they are used."""

    view: Value

    @property
    def sizes(self) -> tuple[int | None, ...]:
        return view_type(self.view).shape


@dataclass(frozen=True)
class BoundMethod:
    """``x.to`` before its call."""

    receiver: Any
    name: str
    implementation: Callable[..., Any]


Number = int | float  # bool is an int


def is_number(value: Any) -> bool:
    """A compile-time int, float or bool."""
    return isinstance(value, int | float)


def is_scalar(value: Any) -> bool:
    """A run-time scalar or a compile-time number."""
    return is_number(value) or (isinstance(value, Value) and isinstance(value.type, ScalarType))


def is_tile(value: Any) -> bool:
    return isinstance(value, Value) and isinstance(value.type, TileType)


def is_view(value: Any) -> bool:
    return isinstance(value, Value) and isinstance(value.type, ViewType)


def is_operand(value: Any) -> bool:
    """Something arithmetic applies to: a number, a run-time scalar or a tile."""
    return is_scalar(value) or is_tile(value)


def contains_value(value: Any) -> bool:
    """A run-time value, or a tuple with one inside."""
    if isinstance(value, tuple):
        return any(contains_value(v) for v in value)
    return isinstance(value, Value | ViewShape)


def view_type(value: Value) -> ViewType:
    assert isinstance(value.type, ViewType)
    return value.type


def tile_shape(value: Any) -> tuple[int, ...]:
    """The shape of a tile; () for scalars and numbers."""
    return value.type.shape if is_tile(value) else ()


def dtype_of(value: Value) -> DType:
    return element_type(value.type)


def dtype_name(dtype: DType) -> str:
    """How a program spells a dtype: ``tw.float32``."""
    return PYTHON_NAMES.get(dtype, str(dtype))


def type_text(type_: Type) -> str:
    return f"{type_} scalar" if isinstance(type_, ScalarType) else str(type_)


def describe(value: Any) -> str:
    """A value as an error message calls it."""
    if isinstance(value, Value):
        return type_text(value.type)
    if isinstance(value, tuple):
        return "a tuple (" + ", ".join(describe(v) for v in value) + ")"
    if isinstance(value, DType):
        return f"the dtype {dtype_name(value)}"
    if isinstance(value, RangeValue):
        return "a range"
    if isinstance(value, ViewShape):
        return "the shape of a tensor"
    if isinstance(value, Builtin):
        return f"the function {value!r}"
    if isinstance(value, Definition):
        return f"the {value.what} '{value.name}'"
    if isinstance(value, ModuleType):
        return f"the module '{value.__name__}'"
    if is_number(value) or isinstance(value, str):
        return f"the compile-time {type(value).__name__} {value!r}"
    return "None" if value is None else f"a Python {type(value).__name__}"


def known_int(value: Any, what: str, argument: str | None = None) -> int:
    """A compile-time integer, or an error that says what needs one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float):
        hint = "use an integer; '//' divides integers, '/' gives a float"
    elif isinstance(value, Value):
        hint = "use a literal, a tw.constexpr parameter or a module constant"
    else:
        hint = "use an integer"
    raise CompileError(f"{what} must be a compile-time integer, got {describe(value)}", hint=hint, argument=argument)


__all__ = [
    "BoundMethod",
    "Number",
    "RangeValue",
    "Undefined",
    "ViewShape",
    "contains_value",
    "describe",
    "dtype_name",
    "dtype_of",
    "is_number",
    "is_operand",
    "is_scalar",
    "is_tile",
    "is_view",
    "known_int",
    "tile_shape",
    "type_text",
    "view_type",
]
