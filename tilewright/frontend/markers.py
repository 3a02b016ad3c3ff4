"""What the names of the language are: markers that the frontend recognises by identity."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilewright.ir.types import DTYPES, DType, ViewType


class Builtin:
    """A function of the language. Its signature and docstring are the contract; calling it on the host is an error.

    ``host`` gives the meaning outside a kernel where there is one (`cdiv`).
    """

    def __init__(self, declaration: Callable[..., Any], host: Callable[..., Any] | None = None):
        self.name, self.__name__, self.__doc__ = declaration.__name__, declaration.__name__, declaration.__doc__
        self.__signature__ = inspect.signature(declaration)
        self.__module__, self.__qualname__ = declaration.__module__, declaration.__qualname__
        self.host = host

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.host is not None:
            return self.host(*args, **kwargs)
        raise RuntimeError(f"tw.{self.name} only works inside a @tw.kernel function")

    def __repr__(self) -> str:
        return f"tw.{self.name}"


def builtin(declaration: Callable[..., Any]) -> Builtin:
    """A function that exists inside kernels alone."""
    return Builtin(declaration)


class Tensor:
    """Annotation of a parameter: a strided view of global memory, of rank one or more, any strides."""


class Symmetric(Tensor):
    """Annotation of a parameter: a tensor of each rank, of one form; ``t`` is the own one, ``t.peer(r)`` rank r's."""


class constexpr:  # noqa: N801  (the field's spelling)
    """Annotation of a compile-time parameter. ``constexpr(x)`` is ``x`` itself, for module constants."""

    def __new__(cls, value: Any = None) -> Any:
        return value

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


@dataclass(frozen=True)
class TensorSpec:
    """A tensor argument described ahead of time. Named dimensions and strides are known at run time only."""

    dtype: DType
    shape: tuple[int | str, ...]
    strides: tuple[int | None, ...]
    align: int | None

    def view_type(self) -> ViewType:
        """The type of the kernel's parameter; without ``align``, aligned to its elements only."""
        shape = tuple(n if isinstance(n, int) else None for n in self.shape)
        return ViewType(shape, self.dtype, self.strides, self.align or self.dtype.bytes)


#: every spelling of a dtype that the language accepts as a string
DTYPE_NAMES: dict[str, DType] = DTYPES | {
    "bool": DTYPES["i1"],
    "bfloat16": DTYPES["bf16"],
    "float8_e4m3": DTYPES["f8e4m3"],
    "float8_e5m2": DTYPES["f8e5m2"],
    "float8_e4m3fn": DTYPES["f8e4m3"],
    **{f"int{n}": DTYPES[f"i{n}"] for n in (8, 16, 32, 64)},
    **{f"float{n}": DTYPES[f"f{n}"] for n in (16, 32, 64)},
}

#: how a program spells each dtype
PYTHON_NAMES: dict[DType, str] = {
    DTYPE_NAMES[name]: f"tw.{name}"
    for name in (
        "bool", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
        "float8_e4m3", "float8_e5m2",
    )
}  # fmt: skip


def as_dtype(value: DType | str) -> DType:
    """A dtype from itself or its name (``"bf16"``, ``"bfloat16"``); ValueError for an unknown name."""
    if isinstance(value, DType):
        return value
    if isinstance(value, str) and value in DTYPE_NAMES:
        return DTYPE_NAMES[value]
    raise ValueError(f"unknown dtype {value!r}; known: {', '.join(sorted(DTYPE_NAMES))}")


def row_major_strides(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Strides of a contiguous tensor, in elements; unknown where a dimension further right is unknown."""
    strides: list[int | None] = []
    step: int | None = 1
    for size in reversed(shape):
        strides.append(step)
        step = None if step is None or size is None else step * size
    return tuple(reversed(strides))


__all__ = [
    "DTYPE_NAMES",
    "PYTHON_NAMES",
    "Builtin",
    "Symmetric",
    "Tensor",
    "TensorSpec",
    "as_dtype",
    "builtin",
    "constexpr",
    "row_major_strides",
]
