# ruff: noqa: B007, PIE790, SIM108
"""Loops, branches, helpers: what is carried, merged, unrolled and folded."""

from __future__ import annotations

import numpy as np

import tilewright.frontend.language as tw

LIMIT = 3


def ops(module, name):
    return [op for op in module.walk() if op.name == name]


def test_only_live_variables_are_carried(build, view):
    def kernel(x, y):
        scratch = tw.load(x, 0, 8)
        total = tw.zeros((8,))
        for i in tw.range(4):
            scratch = tw.load(x, i, 16)  # another shape: not the same variable really
            total = total + scratch[:8]
        tw.store(y, 0, total)

    module = build(kernel, x=view("f32", None), y=view("f32", None))
    (loop,) = ops(module, "tile.for")
    assert [v.hint for v in loop.carried] == ["total"]


def test_literal_becomes_a_carried_scalar(body, view):
    def kernel(y):
        count = 0
        weight = 1.0
        for i in range(5):
            count += 2
            weight = weight * 0.5
        tw.store(y, 0, count * weight)

    lines = body(kernel, y=view("f32", None))
    assert any("iter(%count_1 = %count, %weight_1 = %weight) : i32, f32 {" in line for line in lines)


@tw.function
def collatz(n):
    if n == 1:
        return n, 0
    if n % 2 == 0:
        half = n // 2
        return half, 1
    return 3 * n + 1, 2


def test_early_returns(execute):
    def kernel(x, y):
        i = tw.program_id(0)
        n = tw.load(x, i)
        if n > 8:
            return
        if n != 5:
            if n == 4:
                return
            tw.store(y, i, 1)
        value, kind = collatz(n)
        tw.store(y, i, 10 * value + kind)

    x, y = np.array([1, 2, 3, 4, 5, 9], "int32"), np.zeros(6, "int32")
    execute(kernel, x, y, grid=(6,))
    assert y.tolist() == [10, 11, 102, 0, 162, 0]


def test_loop_numbers(execute):
    def kernel(x, y):
        total = 0.0
        for i in tw.range(1, x.shape[0], 3):
            if i != 4:
                total += tw.sum(tw.load(x, i, 1))
        tw.store(y, 0, total)

    x, y = np.arange(12, dtype="float32"), np.zeros(1, "float32")
    execute(kernel, x, y)
    assert y[0] == 1 + 7 + 10


def test_nested_loops_and_zero_trips(execute):
    def kernel(y, n: tw.int32):
        total = 7
        for i in range(n):
            for j in range(i):
                total += i * j
            total = total + 1
        tw.store(y, 0, total)

    for n in (0, 1, 4):
        y = np.zeros(1, "int32")
        execute(kernel, y, n)
        assert y[0] == 7 + sum(sum(i * j for j in range(i)) + 1 for i in range(n))


def test_static_range_unrolls(body, view):
    def kernel(y):
        for i in tw.static_range(6, 0, -2):
            tw.store(y, i, tw.full((4,), i, tw.int32))
        for scale in (1, 2):
            tw.store(y, scale, tw.full((4,), scale, tw.int32))

    lines = body(kernel, y=view("i32", None))
    assert not any("tile.for" in line for line in lines)
    assert [line for line in lines if "tile<4xi32>" in line and "constant" in line] == [
        f"%{n} = tile.constant {{value = {v}}} : tile<4xi32>"
        for n, v in zip((0, 2, 4, 6, 8), (6, 4, 2, 1, 2), strict=True)
    ]


def test_tuples_are_carried_by_item(execute):
    @tw.function
    def step(state, i):
        a, b = state
        return b, a + b

    def kernel(y, n: tw.int32):
        state = (0, 1)
        for i in range(n):
            state = step(state, i)
        tw.store(y, 0, state[0])

    y = np.zeros(1, "int32")
    execute(kernel, y, 10)
    assert y[0] == 55


def test_while(execute, build, view):
    def kernel(y, n: tw.int32):
        steps, value = 0, n
        while value != 1 and steps < 1000:
            value = value // 2 if value % 2 == 0 else 3 * value + 1
            steps += 1
        tw.store(y, 0, steps)

    y = np.zeros(1, "int32")
    execute(kernel, y, 27)
    assert y[0] == 111
    (loop,) = ops(build(kernel, y=view("i32", None), n=tw.int32), "tile.while")
    assert {v.hint for v in loop.results} == {"steps", "value"}


def test_while_known_false_disappears(body, view):
    def kernel(y, N: tw.constexpr):
        while N < 0:
            tw.store(y, 0, 1)
        tw.store(y, 0, 2)

    assert not any("while" in line for line in body(kernel, y=view("i32", None), N=3))


def test_compile_time_if_picks_a_branch(body, view):
    def kernel(x, y, bias=None, MODE: tw.constexpr = "add"):
        value = tw.load(x, 0, 8)
        if bias is not None:
            value += tw.load(bias, 0, 8)
        if MODE == "add":
            value = value + 1.0
        elif MODE in ("mul", "scale"):
            value = value * 2.0
        tw.store(y, 0, value)

    types = dict(x=view("f32", None), y=view("f32", None))
    assert not any("tile.if" in line or "tile.mul" in line for line in body(kernel, **types))
    assert any("tile.mul" in line for line in body(kernel, **types, MODE="mul", bias=view("f32", None)))
    assert sum("tile.load" in line for line in body(kernel, **types, bias=view("f32", None))) == 2


def test_runtime_if_merges(execute, build, view):
    def kernel(x, y, flag: tw.bool):
        value = tw.load(x, 0, 4)
        factor = 1
        if flag:
            value = value * 2.0
            factor = 2.5
        elif tw.program_id(0) == 0:
            value = value - 1.0
        tw.store(y, 0, value * factor)

    module = build(kernel, x=view("f32", None), y=view("f32", None), flag=tw.bool)
    outer = ops(module, "tile.if")[0]
    assert [str(v.type) for v in outer.results] == ["tile<4xf32>", "f32"]
    for flag, expected in ((True, [0, 5, 10, 15]), (False, [-1, 0, 1, 2])):
        y = np.zeros(4, "float32")
        execute(kernel, np.arange(4, dtype="float32"), y, flag)
        np.testing.assert_array_equal(y, expected)


def test_dead_merges_are_not_results(build, view):
    def kernel(x, y, n: tw.int32):
        if n > 0:
            value = tw.load(x, 0, 4)
            tw.store(y, 0, value)
        else:
            value = tw.load(x, 0, 8)
            tw.store(y, 0, value)

    (op,) = ops(build(kernel, x=view("f32", None), y=view("f32", None), n=tw.int32), "tile.if")
    assert op.results == []


def test_equal_constants_stay_compile_time(body, view):
    def kernel(y, n: tw.int32):
        if n > 0:
            size, which = 8, 1
        else:
            size, which = 8, 2
        tw.store(y, 0, tw.full((size,), which))

    assert any("tile.splat %which" in line for line in body(kernel, y=view("i32", None), n=tw.int32))


def test_conditional_expressions(body, execute, view):
    def kernel(x, y, n: tw.int32, N: tw.constexpr = 4):
        small = 1 if n < 3 else 2
        size = 4 if N > 2 else 8
        value = tw.load(x, 0, size) if n < 3 else tw.load(x, 1, size)
        tw.store(y, 0, value * small)

    lines = body(kernel, x=view("f32", None), y=view("f32", None), n=tw.int32)
    assert any(line.startswith("%small = tile.select") for line in lines)
    assert any(line.startswith("%value = tile.if") or ": tile<4xf32> {" in line for line in lines)
    y = np.zeros(4, "float32")
    execute(kernel, np.arange(8, dtype="float32"), y, 5)
    np.testing.assert_array_equal(y, [8, 10, 12, 14])


def test_and_or_not(execute):
    def kernel(y, a: tw.int32, b: tw.int32):
        both = a > 0 and not b > 0
        if both or (a == -1 and True):
            tw.store(y, 0, 1)
        if 0 <= a < b:
            tw.store(y, 1, 1)

    for a, b, expected in ((1, 0, [1, 0]), (-1, 5, [1, 0]), (1, 2, [0, 1]), (3, 3, [0, 0])):
        y = np.zeros(2, "int32")
        execute(kernel, y, a, b)
        assert y.tolist() == expected


def test_and_stops_at_a_known_value(build, view):
    def kernel(x, y, bias=None):
        if bias is not None and bias.shape[0] > 3:
            tw.store(y, 0, 1)

    assert not ops(build(kernel, x=view("f32", None), y=view("i32", None)), "tile.if")


def test_helpers_take_defaults_keywords_and_functions(execute):
    @tw.function
    def relu(x):
        """Negative values become zero."""
        return tw.maximum(x, 0.0)

    @tw.function
    def finish(x, scale: tw.float32 = 2.0, *, activation: tw.constexpr = None):
        if activation is None:
            return x * scale
        return activation(x) * scale

    def kernel(x, y, ACTIVATION: tw.constexpr):
        tile = tw.load(x, 0, 4)
        tw.store(y, 0, finish(tile))
        tw.store(y, 1, finish(tile, activation=ACTIVATION, scale=3))

    x, y = np.array([-1, 2, -3, 4], "float32"), np.zeros(8, "float32")
    execute(kernel, x, y, relu)
    assert y.tolist() == [-2, 4, -6, 8, 0, 6, 0, 12]


def test_helper_without_return_gives_none(execute):
    @tw.function
    def put(y, value):
        tw.store(y, 0, value)

    def kernel(y):
        result = put(y, 4)
        if result is None:
            tw.store(y, 1, 5)

    y = np.zeros(2, "int32")
    execute(kernel, y)
    assert y.tolist() == [4, 5]


def test_module_constants_and_asserts(body, view):
    def kernel(y, N: tw.constexpr = 4):
        """Uses a constant of this module."""
        assert N % 2 == 0, "even"
        tw.static_assert(LIMIT == 3, f"LIMIT is {LIMIT}")
        tw.store(y, 0, LIMIT)
        pass

    assert "%1 = tile.constant {value = 3} : tile<1xi32>" in body(kernel, y=view("i32", None))


def test_unrolled_loop_carries_through_branches(execute):
    def kernel(y, n: tw.int32):
        total = 0
        for i in tw.static_range(4):
            if n > i:
                total = total + i * 10
            else:
                total = total + 1
        tw.store(y, 0, total)

    y = np.zeros(1, "int32")
    execute(kernel, y, 2)
    assert y[0] == 0 + 10 + 1 + 1


def test_int64_bounds(build, view):
    def kernel(y, n: tw.int64):
        for i in range(n):
            tw.store(y, i.to(tw.int32), 1)

    (loop,) = ops(build(kernel, y=view("i32", None), n=tw.int64), "tile.for")
    assert str(loop.index.type) == "i64"
