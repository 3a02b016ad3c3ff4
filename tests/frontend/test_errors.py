# ruff: noqa: F821, F841
"""Errors of names, calls and arguments, and how errors are shown."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from error_cases import Cases, check

import tilewright.frontend.language as tw
from tilewright.frontend.build import build_module
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.errors import CompileError

TABLE = np.zeros(4)


case = Cases()


def plain_helper(x):
    return x + 1


@tw.function
def countdown(n: tw.constexpr):
    return countdown(n)


@tw.function
def inner(a, b):
    return tw.dot(a, b)


@tw.function
def outer(a):
    return inner(a, a)


@tw.function
def typed(x: tw.float32, n: tw.constexpr, t: tw.Tensor = None):
    return x * n


@tw.function
def no_result(n):
    n + 1


@KernelDefinition
def another_kernel(x):
    pass


@case("name 'acumulator' is not defined", "acumulator", "did you mean 'accumulator'?")
def unknown_name(x, y, n):
    accumulator = tw.zeros((4,))
    tw.store(y, 0, acumulator + accumulator)


@case("the module 'tilewright.frontend.language' has no attribute 'laod'", "tw.laod", "did you mean 'load'")
def unknown_builtin(x, y, n):
    tw.laod(x, 0, 4)


@case("variable 'tile' is read before it is assigned", "tile")
def read_before_assignment(x, y, n):
    tw.store(y, 0, tile)
    tile = 3


@case("a tile has no attribute 'resape'", "tile.resape", "did you mean 'reshape'")
def unknown_attribute(x, y, n):
    tile = tw.load(x, 0, 4)
    tile.resape(2, 2)


@case("a tile of shape (4096, 8192) has 33554432 elements", "a + tw.zeros((1, 8192))", "smaller tiles")
def too_large(x, y, n):
    a = tw.zeros((4096, 1))
    a + tw.zeros((1, 8192))


@case("'exp' cannot be called in a kernel", "np.exp(tw.load(x, 0, 4))", "tw.* functions")
def numpy_function(x, y, n):
    tw.store(y, 0, np.exp(tw.load(x, 0, 4)))


@case("a tile has no attribute 'sum'", "tw.load(x, 0, 4).sum", "tw.sum(...)")
def function_as_method(x, y, n):
    tw.store(y, 0, tw.load(x, 0, 4).sum())


@case("tw.load: missing a required argument: 'index'", "tw.load(x)", "tw.load(view, index, shape")
def missing_argument(x, y, n):
    tw.load(x)


@case("tw.zeros: got an unexpected keyword argument 'type'", "tw.zeros((4,), type=tw.float32)", "dtype=tw.float32")
def unknown_keyword(x, y, n):
    tw.zeros((4,), type=tw.float32)


@case("argument 'n' of 'typed' must be a compile-time value, got i32 scalar", "n", "tw.constexpr")
def constexpr_misuse(x, y, n):
    typed(1.0, n)


@case("argument 'x' of 'typed' must be tw.float32, got i32 scalar", "n", "x.to(tw.float32)")
def helper_scalar(x, y, n):
    typed(n, n=2)


@case("argument 't' of 'typed' must be a tensor, got the compile-time int 3", "3")
def helper_tensor(x, y, n):
    typed(2.0, 2, t=3)


@case("typed: missing a required argument: 'n'", "typed(2.0)", "typed(x, n, t=None)")
def helper_arguments(x, y, n):
    typed(2.0)


@case("a tw.constexpr variable needs a compile-time value, got i32 scalar", "n + 1", "drop the annotation")
def constexpr_variable(x, y, n):
    size: tw.constexpr = n + 1


@case("'countdown' calls itself: recursive -> countdown -> countdown", "countdown(n)", "loop")
def recursive(x, y, n):
    countdown(3)


@case("'plain_helper' is a plain Python function", "plain_helper(n)", "@tw.function")
def undecorated(x, y, n):
    plain_helper(n)


@case("a kernel cannot call the kernel 'another_kernel'", "another_kernel(x)", "@tw.function")
def kernel_call(x, y, n):
    another_kernel(x)


@case("math.sqrt needs compile-time numbers", "math.sqrt(n)", "tw.sqrt")
def host_math(x, y, n):
    math.sqrt(n)


@case("print does not work in a kernel", "print(n)")
def printing(x, y, n):
    print(n)


@case("'TABLE' is an array: a kernel cannot capture arrays", "TABLE", "tw.Tensor parameter")
def captured_array(x, y, n):
    tw.store(y, 0, TABLE[0])


@case("tw.device_print: 1 values for 2 '{}'", '"{} {}"', "tw.device_print")
def print_count(x, y, n):
    tw.device_print("{} {}", n)


@case("'{' at character 0 of '{n}'", '"{n}"')
def print_format(x, y, n):
    tw.device_print("{n}", n)


@case("tw.device_assert needs bools, got tile<4xi32>", "tw.arange(4)", "x != 0")
def assert_tile(x, y, n):
    tw.device_assert(tw.arange(4))


@case("tw.assume needs a scalar condition, got tile<4xi1>", "tw.arange(4) > 0", "tw.min")
def assume_tile(x, y, n):
    tw.assume(tw.arange(4) > 0)


@case("the assumption is false at compile time", "1 > 2")
def false_assumption(x, y, n):
    tw.assume(1 > 2)


@case("'+' does not apply to None", "no_result(n) + 1", "without 'return'")
def missing_return(x, y, n):
    tw.store(y, 0, no_result(n) + 1)


@pytest.mark.parametrize(("kernel", "message", "underlined", "hint"), case.all)
def test_error(kernel, message, underlined, hint, fail, view):
    check(kernel, message, underlined, hint, fail, view)


def test_every_builtin_is_implemented():
    from tilewright.frontend.builtins import IMPLEMENTATIONS

    assert {m.name for m in IMPLEMENTATIONS} == set(tw.BUILTINS)


def test_chain_of_inlined_calls(view):
    def kernel(x):
        tile = tw.load(x, (0, 0), (8, 4))
        outer(tile)

    with pytest.raises(CompileError) as caught:
        build_module(KernelDefinition(kernel), {"x": view("f32", None, None)})
    text = str(caught.value).splitlines()
    first, helper, middle = (f.__code__.co_firstlineno for f in (kernel, inner.fn, outer.fn))
    assert text == [
        f"{__file__}:{helper + 2}:12: error: tw.dot: shapes (8, 4) and (8, 4) do not agree: K is 4 and 8",
        f"{helper + 2:>5} |     return tw.dot(a, b)",
        "      |            ^^^^^^^^^^^^",
        f"  called from {__file__}:{middle + 2}:12",
        f"{middle + 2:>5} |     return inner(a, a)",
        f"  called from {__file__}:{first + 2}:9",
        f"{first + 2:>5} |         outer(tile)",
        "  hint: a is (M, K) and b is (K, N); b looks transposed: use b.T",
    ]
    assert [loc.line for loc in caught.value.trace] == [middle + 2, first + 2]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_columns_count_characters(fail, view):
    def kernel(x):
        größe = "äöü", tw.load(x, 0, wiedth)

    assert fail(kernel, x=view("f32", None)).underlined == "wiedth"
