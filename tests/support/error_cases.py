"""Kernels with an error each: its message, what it underlines, and its hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tilewright.frontend.language as tw
from tilewright.frontend.definition import KernelDefinition


class Cases:
    """Decorates kernels: ``@case(start of the message, underlined text, part of the hint)``."""

    def __init__(self) -> None:
        #: parameters of a test: kernel, message, underlined, hint
        self.all: list[Any] = []

    def __call__(self, message: str, underlined: str, hint: str = "") -> Callable[[Any], Any]:
        def register(kernel: Any) -> Any:
            self.all.append(pytest.param(kernel, message, underlined, hint, id=kernel.__name__))
            return kernel

        return register


def check(kernel: Any, message: str, underlined: str, hint: str, fail: Any, view: Any) -> None:
    """``fail`` and ``view``: the fixtures."""
    types = dict(
        x=view("f32", None), y=view("f32", None), half=view("f16", None), m=view("f32", None, None), n=tw.int32
    )
    failure = fail(kernel, **{name: t for name, t in types.items() if name in KernelDefinition(kernel).parameter})
    assert failure.message.startswith(message)
    assert failure.underlined == underlined
    assert hint in failure.hint
    assert f"hint: {failure.hint}" in str(failure.error) or not failure.hint
    assert failure.error.loc.file == kernel.__code__.co_filename
