# ruff: noqa: B007, B018, F821, F841, SIM108
"""Every error: its message, what it underlines, and its hint."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

import tilewright.frontend.language as tw
from tilewright.frontend.build import build_module
from tilewright.frontend.definition import KernelDefinition
from tilewright.frontend.errors import CompileError

TABLE = np.zeros(4)


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


@tw.function
def sometimes(n):
    if n > 0:
        return 1
    return 2


@KernelDefinition
def another_kernel(x):
    pass


# Each case: the kernel, the start of the message, the underlined text, a part of the hint.
CASES = []


def case(message, underlined, hint=""):
    def register(fn):
        CASES.append(pytest.param(fn, message, underlined, hint, id=fn.__name__))
        return fn

    return register


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


@case("'+' on tiles of shapes (4,) and (8,), which do not broadcast", "a + tw.load(x, 0, 8)", "x[:, None]")
def shape_mismatch(x, y, n):
    a = tw.load(x, 0, 4)
    b = a + tw.load(x, 0, 8)


@case("tw.dot: shapes (8, 4) and (8, 4) do not agree: K is 4 and 8", "tw.dot(a, a)", "use b.T")
def dot_shapes(x, y, n):
    a = tw.zeros((8, 4))
    tw.dot(a, a)


@case("tw.dot: operands of different dtypes, f16 and f32", "b", "b.to(tw.float16)")
def dot_dtypes(x, y, n):
    a, b = tw.zeros((4, 4), tw.float16), tw.zeros((4, 4))
    tw.dot(a, b)


@case(
    "tw.dot: the accumulator has shape (4, 8), the product (4, 4)", "tw.zeros((4, 8))", "tw.zeros((4, 4), tw.float32)"
)
def dot_accumulator(x, y, n):
    a = tw.zeros((4, 4), tw.float16)
    tw.dot(a, a, acc=tw.zeros((4, 8)))


@case("cannot store a f32 tile to a tensor of f16", "tile", ".to(c.dtype)")
def store_dtype(half):
    tile = tw.zeros((4,))
    tw.store(half, 0, tile)


@case("tw.store: a tile of shape (4, 4) to a tensor of rank 1", "tw.zeros((4, 4))", "reshape")
def store_rank(x, y, n):
    tw.store(y, 0, tw.zeros((4, 4)))


@case("tile shapes are compile-time constants: dimension 0 is a run-time value", "(n,)", "tw.constexpr")
def runtime_shape(x, y, n):
    tw.zeros((n,))


@case("tile shapes are compile-time constants: dimension 1 is the compile-time float 2.0", "(4, 8 / 4)", "'//'")
def float_shape(x, y, n):
    tw.zeros((4, 8 / 4))


@case("tile shapes are compile-time constants: dimension 0 is a run-time value", "x.shape", "tw.constexpr")
def dynamic_tensor_shape(x, y, n):
    tw.zeros(x.shape)


@case("tw.load: missing a required argument: 'index'", "tw.load(x)", "tw.load(view, index, shape")
def missing_argument(x, y, n):
    tw.load(x)


@case("tw.zeros: got an unexpected keyword argument 'type'", "tw.zeros((4,), type=tw.float32)", "dtype=tw.float32")
def unknown_keyword(x, y, n):
    tw.zeros((4,), type=tw.float32)


@case("tw.load: 2 indices for a tensor of rank 1", "(0, 0)", "one tile index per dimension")
def load_rank(x, y, n):
    tw.load(x, (0, 0), (4, 4))


@case("tw.load needs a tensor, got tile<4xf32>", "tile")
def load_of_a_tile(x, y, n):
    tile = tw.zeros((4,))
    tw.load(tile, 0, 4)


@case("a tile index must be an integer scalar, got the compile-time float 0.5", "0.5", "'//'")
def float_index(x, y, n):
    tw.load(x, 0.5, 4)


@case("a tile index must be an int32 scalar, got i64 scalar", "n.to(tw.int64)", "tw.int32")
def wide_index(x, y, n):
    tw.load(x, n.to(tw.int64), 4)


@case("axis 2 is out of range for a tile of rank 2", "2", "-2..1")
def axis_range(x, y, n):
    tw.sum(tw.zeros((4, 4)), axis=2)


@case("the axis must be a compile-time integer, got tile<4xf32>", "b", "tw.maximum")
def max_of_two(x, y, n):
    a, b = tw.zeros((4,)), tw.zeros((4,))
    tw.max(a, b)


@case("the axis must be a compile-time integer, got i32 scalar", "n")
def runtime_axis(x, y, n):
    tw.sum(tw.zeros((4, 4)), n)


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


@case("'return' inside a run-time 'if' or loop is not supported", "return", "at the end")
def early_return(x, y, n):
    if n > 0:
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


@case("'&' needs integers, got tw.float32", "tw.load(x, 0, 4) & 1")
def bitwise_float(x, y, n):
    tw.load(x, 0, 4) & 1


@case("300 does not fit tw.int8", "tile + 300", "wider dtype")
def literal_range(x, y, n):
    tile = tw.zeros((4,), tw.int8)
    tile + 300


@case("tw.float8_e4m3 has no arithmetic", "tile * 2", "x.to(tw.float32)")
def float8_arithmetic(x, y, n):
    tile = tw.zeros((4,), tw.float8_e4m3)
    tile * 2


@case("'//' divides by zero at compile time", "1 // 0")
def division_by_zero(x, y, n):
    1 // 0


@case("cannot reshape (4,) (4 elements) to (3, 2) (6 elements)", "tw.zeros((4,)).reshape(3, 2)", "-1")
def reshape_size(x, y, n):
    tw.zeros((4,)).reshape(3, 2)


@case("slice 2:9 is empty or leaves an axis of size 4", "tile[2:9]")
def slice_range(x, y, n):
    tile = tw.zeros((4,))
    tile[2:9]


@case("the index of a tile must be a compile-time integer, got i32 scalar", "tile[n]")
def runtime_tile_index(x, y, n):
    tile = tw.zeros((4,))
    tile[n]


@case("1 indices leave nothing of a tensor of rank 1", "x[0]", "tw.load")
def tensor_element(x, y, n):
    x[0]


@case("'+' does not apply to view<?xf32", "x + 1", "tw.load")
def tensor_arithmetic(x, y, n):
    x + 1


@case("grid axis 3 is out of range", "3", "0, 1 and 2")
def grid_axis(x, y, n):
    tw.program_id(3)


@case("tw.arange(4, 4) is empty", "tw.arange(4, 4)")
def empty_arange(x, y, n):
    tw.arange(4, 4)


@case("tw.bitcast: f32 has 32 bits, f16 has 16", "tw.float16", "same width")
def bitcast_width(x, y, n):
    tw.bitcast(tw.zeros((4,)), tw.float16)


@case("the condition of tw.where must be bool, got tile<4xf32>", "a", "x != 0")
def where_condition(x, y, n):
    a = tw.zeros((4,))
    tw.where(a, 1.0, 2.0)


@case("unknown precision 'fast'", "'fast'", "'ieee'")
def precision(x, y, n):
    tw.dot(tw.zeros((4, 4)), tw.zeros((4, 4)), precision='fast')  # fmt: skip


@case("this 'while' never ends", "True")
def endless(x, y, n):
    while True:
        pass


@case("tw.gather needs an integer tile, got the compile-time int 0", "0", "tw.load")
def gather_of_a_number(x, y, n):
    tw.gather(x, 0)


@case("an index must be a tile of integers, got tile<4xf32>", "tile", ".to(tw.int32)")
def gather_by_floats(x, y, n):
    tile = tw.load(x, 0, 4)
    tw.gather(x, tile)


@case("axis 1 is out of range for a tensor of rank 1", "1", "-1..0")
def gather_axis(x, y, n):
    tw.gather(x, tw.arange(4), axis=1)


@case("tw.gather: the size of axis 1 is known at run time only", "tw.arange(4)", "shape=(n, 64)")
def gather_without_shape(m):
    tw.gather(m, tw.arange(4), axis=0)


@case("tw.gather: an index of shape (4, 1) does not broadcast to (8, 16)", "(8, 16)", "sizes are equal")
def gather_shape(m):
    tw.gather(m, tw.arange(4), axis=0, shape=(8, 16))


@case("tw.gather: the tile index along axis 0 must be 0", "(1, 0)", "add to the index")
def gather_tile(m):
    tw.gather(m, tw.arange(4), axis=0, tile=(1, 0), shape=(4, 16))


@case("1 index tiles for the axes (0, 1)", "(0, 1)", "one integer tile for each axis")
def gather_axes(m):
    tw.gather(m, tw.arange(4), axis=(0, 1))


@case("cannot store a i32 tile to a tensor of f32", "tw.arange(4)", ".to(tw.float32)")
def scatter_dtype(x, y, n):
    tw.scatter(y, tw.arange(4), tw.arange(4))


@case(
    "'tw.scatter' on tiles of shapes (4,) and (8,), which do not broadcast",
    "tw.scatter(y, tw.arange(4), tw.zeros((8,)))",
)
def scatter_shape(x, y, n):
    tw.scatter(y, tw.arange(4), tw.zeros((8,)))


@case("tw.atomic_xor does not exist for tw.float32", "y", "tw.int32, tw.int64")
def atomic_dtype(x, y, n):
    tw.atomic_xor(y, 0, 1)


@case("tw.atomic_max does not exist for tw.float16", "half", "tw.float32")
def atomic_half(half):
    tw.atomic_max(half, 0, 1.0)


@case("an atomic update of a tensor of f32 takes f32, got i32 scalar", "n", ".to(tw.float32)")
def atomic_value(x, y, n):
    tw.atomic_add(y, 0, n)


@case("unknown order 'seq_cst'", '"seq_cst"', "'relaxed', 'acq_rel'")
def atomic_order(x, y, n):
    tw.atomic_add(y, 0, 1.0, order="seq_cst")


@case("axis= goes with integer tiles, not with a tile index", "0")
def atomic_axis(x, y, n):
    tw.atomic_add(y, n, 1.0, axis=0)


@case("axis 1 is out of range for a tile of rank 1", "1", "-1..0")
def cumsum_axis(x, y, n):
    tw.cumsum(tw.zeros((4,)), 1)


@case("tw.argmax takes one axis or None", "(0, 1)")
def argmax_axes(x, y, n):
    tw.argmax(tw.zeros((4, 4)), (0, 1))


@case("tw.cat takes a tuple or list of tiles, got tile<4xf32>", "tw.zeros((4,))", "tw.cat([a, b], axis=0)")
def cat_of_a_tile(x, y, n):
    tw.cat(tw.zeros((4,)))


@case("tw.cat: shapes (4, 4) and (4, 8) differ along an axis other than 0", "[a, b]")
def cat_shapes(x, y, n):
    a, b = tw.zeros((4, 4)), tw.zeros((4, 8))
    tw.cat([a, b], axis=0)


@case("tw.cat: tiles of different dtypes, f32 and i32", "[tw.zeros((4,)), tw.arange(4)]", ".to(tw.float32)")
def cat_dtypes(x, y, n):
    tw.cat([tw.zeros((4,)), tw.arange(4)])


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


@case("'return' inside a run-time 'if' or loop is not supported", "return 1", "in every branch")
def return_in_a_branch(x, y, n):
    tw.store(y, 0, sometimes(n))


@case("'**' needs a compile-time exponent", "2.0 ** n", "tw.exp2")
def general_power(x, y, n):
    2.0 ** n  # fmt: skip


@pytest.mark.parametrize(("kernel", "message", "underlined", "hint"), CASES)
def test_error(kernel, message, underlined, hint, fail, view):
    types = dict(
        x=view("f32", None), y=view("f32", None), half=view("f16", None), m=view("f32", None, None), n=tw.int32
    )
    failure = fail(kernel, **{name: t for name, t in types.items() if name in KernelDefinition(kernel).parameter})
    assert failure.message.startswith(message)
    assert failure.underlined == underlined
    assert hint in failure.hint
    assert f"hint: {failure.hint}" in str(failure.error) or not failure.hint
    assert failure.error.loc.file == __file__


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
