"""Builds kernels, checks that the IR verifies and re-parses, runs it on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tilewright.frontend.arguments import bind_arguments
from tilewright.frontend.build import build_module
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.errors import CompileError
from tilewright.frontend.markers import as_dtype, row_major_strides
from tilewright.ir.core import Module
from tilewright.ir.interpreter import run as interpret
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.types import ViewType
from tilewright.ir.verifier import verify


def view(dtype: str, *shape: int | None) -> ViewType:
    """A row-major view; None is a run-time size."""
    return ViewType(shape, as_dtype(dtype), row_major_strides(shape), 16)


def build(fn: Callable[..., Any], **args: Any) -> Module:
    """The kernel's module, verified, and equal to what its text reads back as."""
    module = build_module(KernelDefinition(fn), args)
    verify(module)
    for locations in (False, True):
        text = print_module(module, locations)
        assert print_module(parse_module(text), locations) == text
    return module


def body(fn: Callable[..., Any], **args: Any) -> list[str]:
    """The lines of the kernel's body, without indentation."""
    lines = print_module(build(fn, **args)).splitlines()
    return [line.strip() for line in lines[2:-2]]


def execute(fn: Callable[..., Any], *args: Any, grid: tuple[int, ...] = (1,), **kwargs: Any) -> None:
    """Bind launch arguments, build with run-time sizes, interpret."""
    definition = KernelDefinition(fn)
    bound = bind_arguments(definition, args, kwargs)
    views = {}
    for name, array in bound.tensors.items():
        strides = tuple(1 if s == array.itemsize else None for s in array.strides)
        views[name] = ViewType((None,) * array.ndim, as_dtype(array.dtype.name), strides, array.itemsize)
    module = build_module(definition, bound.types(views))
    verify(module)
    values = {**bound.tensors, **bound.scalars}
    for name, dtype in bound.dtypes.items():
        if name in bound.scalars and not isinstance(values[name], bool):
            values[name] = np.dtype(dtype.name.replace("i", "int").replace("f", "float")).type(values[name])
    interpret(module.functions[0], [values[p.hint] for p in module.functions[0].params], grid)


@dataclass
class Failure:
    """A compile error and the source text that it underlines."""

    error: CompileError

    @property
    def message(self) -> str:
        return self.error.message

    @property
    def hint(self) -> str:
        return self.error.hint

    @property
    def underlined(self) -> str:
        lines = str(self.error).splitlines()
        assert lines[0].startswith(f"{self.error.loc.file}:{self.error.loc.line}:{self.error.loc.column}: error: ")
        source, caret = lines[1], lines[2]
        start, end = caret.index("^"), caret.rindex("^") + 1
        assert source.index("|") == caret.index("|")
        return source[start:end]


def fail(fn: Callable[..., Any], **args: Any) -> Failure:
    """The error that building the kernel raises."""
    with pytest.raises(CompileError) as caught:
        build_module(KernelDefinition(fn), args)
    return Failure(caught.value)


@pytest.fixture(name="view")
def view_fixture() -> Callable[..., ViewType]:
    return view


@pytest.fixture(name="build")
def build_fixture() -> Callable[..., Module]:
    return build


@pytest.fixture(name="body")
def body_fixture() -> Callable[..., list[str]]:
    return body


@pytest.fixture(name="execute")
def execute_fixture() -> Callable[..., None]:
    return execute


@pytest.fixture(name="fail")
def fail_fixture() -> Callable[..., Failure]:
    return fail
