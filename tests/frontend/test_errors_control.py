# ruff: noqa: B007, F841, SIM108
"""Errors of statements, loops and conditionals."""

from __future__ import annotations

import pytest
from error_cases import Cases, check

import tilewright.frontend.language as tw

case = Cases()


@tw.function
def sometimes(n):
    if n > 0:
        return 1


@case(
    "loop-carried variable 'acc' changes type: f32 scalar before the loop, tile<4xf32> after an iteration",
    "acc = acc + tw.load(x, i, 4)",
    "start from a tile: acc = tw.full((4,), 0.0, tw.float32)",
)
def carried_shape(x, y, n):
    acc = 0.0
    for i in range(n):
        acc = acc + tw.load(x, i, 4)
    tw.store(y, 0, acc)


@case(
    "loop-carried variable 'acc' changes type: i32 scalar before the loop, f32 scalar after an iteration",
    "acc += tw.sum(tw.load(x, i, 4))",
    "start from a value of the final type: acc = 0.0",
)
def carried_literal(x, y, n):
    acc = 0
    for i in range(n):
        acc += tw.sum(tw.load(x, i, 4))
    tw.store(y, 0, acc)


@case(
    "loop-carried variable 'acc' changes type: tile<4xf16> before the loop, tile<4xf32> after an iteration",
    "acc = acc + tw.load(x, i, 4)",
    "acc = acc.to(tw.float16)",
)
def carried_dtype(x, y, n):
    acc = tw.zeros((4,), tw.float16)
    for i in range(n):
        acc = acc + tw.load(x, i, 4)
    tw.store(y, 0, acc)


@case("loop-carried variable 'view' changes type", "view = view.offset(4)", "only numbers, scalars and tiles")
def carried_view(x, y, n):
    view = x
    for i in range(n):
        tw.store(y, i, tw.load(view, 0, 4))
        view = view.offset(4)


@case("variable 'a' is assigned in one branch only of the 'if'", "a", "in both branches")
def one_branch(x, y, n):
    if n > 0:
        a = 1
    tw.store(y, 0, a)


@case("'a' has different types in the two branches: tile<4xf32> and tile<8xf32>", "if", "same shape")
def branch_types(x, y, n):
    if n > 0:
        a = tw.zeros((4,))
    else:
        a = tw.zeros((8,))
    tw.store(y, 0, a)


@case("variable 'a' is assigned only inside the loop", "a", "before the loop")
def loop_only(x, y, n):
    for i in range(n):
        a = i
    tw.store(y, 0, a)


@case("the loop variable 'i' of line", "i", "another variable")
def loop_variable_after(x, y, n):
    for i in range(n):
        tw.store(y, i, 1.0)
    tw.store(y, i, 1.0)


@case("'return' out of a loop at run time is not supported", "return", "into a 'while'")
def return_from_a_loop(x, y, n):
    for i in range(n):
        if i > 2:
            return
    tw.store(y, 0, 1.0)


@case("a kernel returns nothing", "return n", "tw.store")
def kernel_return(x, y, n):
    return n


@case("'break' is not supported", "break", "while")
def breaking(x, y, n):
    for i in range(n):
        break


@case("'continue' is not supported", "continue", "'if'")
def continuing(x, y, n):
    for i in range(n):
        continue


@case("'with' is not supported", "with")
def with_statement(x, y, n):
    with x:
        pass


@case("comprehensions are not supported", "[i for i in range(3)]", "static_range")
def comprehension(x, y, n):
    a = [i for i in range(3)]  # noqa: C416


@case("lambdas are not supported", "lambda v: v", "@tw.function")
def lambdas(x, y, n):
    f = lambda v: v  # noqa: E731


@case("tiles and tensors are not assigned by element", "y[0]", "tw.store")
def element_assignment(x, y, n):
    y[0] = 1.0


@case("cannot unpack 3 values into 2 names", "a, b")
def unpacking(x, y, n):
    a, b = 1, 2, 3


@case("the condition of 'if' must be a scalar, got tile<4xi1>", "tw.load(x, 0, 4) > 0", "tw.where")
def tile_condition(x, y, n):
    if tw.load(x, 0, 4) > 0:
        pass


@case("'and' applies to scalars, got tile<4xi1>", "a > 0", "'&'")
def and_of_tiles(x, y, n):
    a = tw.load(x, 0, 4)
    b = (a > 0) and (a < 1)


@case("the step of a run-time range must be positive, got -1", "range(n, 0, -1)", "hi - 1 - i")
def negative_step(x, y, n):
    for i in range(n, 0, -1):
        pass


@case("the stop of a range must be an integer, got f32 scalar", "range(n / 2)", "'//'")
def float_bound(x, y, n):
    for i in range(n / 2):
        pass


@case("a bound of tw.static_range must be a compile-time integer, got i32 scalar", "tw.static_range(n)", "tw.constexpr")
def runtime_static_range(x, y, n):
    for i in tw.static_range(n):
        pass


@case("cannot loop over tile<4xf32>", "tile", "tw.range")
def loop_over_tile(x, y, n):
    tile = tw.zeros((4,))
    for i in tile:
        pass


@case("static assertion failed: N is 3", "tw.static_assert(N == 4, f'N is {N}')")
def static_assertion(x, y, n, N: tw.constexpr = 3):
    tw.static_assert(N == 4, f'N is {N}')  # fmt: skip


@case("the condition of tw.static_assert is a run-time value", "n > 3", "tw.constexpr")
def runtime_static_assert(x, y, n):
    tw.static_assert(n > 3)


@case("assertion failed: odd", "3 % 2 == 0")
def python_assert(x, y, n):
    assert 3 % 2 == 0, "odd"


@case("this 'while' never ends", "True")
def endless(x, y, n):
    while True:
        pass


@case("'the returned value' has different types in the two branches: the compile-time int 1 and None", "if")
def return_in_a_branch(x, y, n):
    tw.store(y, 0, sometimes(n))


@pytest.mark.parametrize(("kernel", "message", "underlined", "hint"), case.all)
def test_error(kernel, message, underlined, hint, fail, view):
    check(kernel, message, underlined, hint, fail, view)
