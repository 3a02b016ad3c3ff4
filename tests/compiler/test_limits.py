"""Errors that only a target or a device can tell: dtypes, functions, registers and shared memory that it lacks."""

from __future__ import annotations

import pytest

import tilewright as tw
from tilewright.compiler.limits import warn_of
from tilewright.frontend.errors import CompileError
from tilewright.ir.core import Location


@tw.kernel
def exponential(x: tw.Tensor):
    tw.store(x, 0, tw.exp(tw.load(x, 0, 64)))


@tw.kernel
def chatty(x: tw.Tensor):
    tw.device_print("{}", x.shape[0])


@tw.kernel
def greedy(x: tw.Tensor, y: tw.Tensor):
    a = tw.load(x, (0, 0), (64, 256))
    for i in tw.range(x.shape[0]):
        a = a * tw.load(x, (i, 0), (64, 256)) + tw.load(y, (i, 1), (64, 256)) * a
    tw.store(y, (0, 0), a)


@tw.kernel
def product(x: tw.Tensor, y: tw.Tensor):
    tw.store(y, (0, 0), tw.dot(tw.load(x, (0, 0), (64, 1024)), tw.load(x, (0, 0), (1024, 64))))


VECTOR = tw.spec("f32", ("N",), align=16)
MATRIX = tw.spec("f32", ("N", 4096), align=16)


def error(kernel, target, **args) -> str:
    options = {k: v for k, v in args.items() if k.startswith("num_")}
    with pytest.raises(CompileError) as caught:
        tw.compile(kernel, target=target, args={k: v for k, v in args.items() if k not in options}, **options)
    assert caught.value.loc.file == __file__, "the error names the source line"
    return str(caught.value)


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_a_function_that_does_not_exist_for_the_dtype(target: str):
    text = error(exponential, target, x=tw.spec("f64", ("N",), align=16))
    assert "exp of f64" in text and "tw.exp(tw.load(x, 0, 64))" in text and "f32" in text


def test_prints_need_a_target_with_a_console():
    text = error(chatty, "gfx942", x=VECTOR)
    assert "device_print does not exist on gfx942" in text and "store the value" in text


def test_too_many_registers():
    text = error(greedy, "sm_90a", x=MATRIX, y=MATRIX, num_warps=1)
    assert "needs too many registers: a thread of sm_90a has 255" in text and "num_warps=" in text


def test_too_much_shared_memory_names_each_buffer():
    half = tw.spec("bf16", (1024, 1024), align=16)
    text = error(product, "gfx942", x=half, y=tw.spec("f32", (64, 64), align=16))
    assert "bytes of shared memory, gfx942 has 65536" in text
    assert "x: 131072 bytes (1 x 64x1024 bf16)" in text and "x: 131072 bytes (1 x 1024x64 bf16)" in text


@tw.kernel
def one_tile(a: tw.Tensor, b: tw.Tensor, c: tw.Tensor):
    acc = tw.zeros((64, 64), tw.float32)
    for k in tw.range(tw.cdiv(a.shape[1], 64)):
        acc = tw.dot(tw.load(a, (0, k), (64, 64)), tw.load(b, (k, 0), (64, 64)), acc)
    tw.store(c, (0, 0), acc.to(c.dtype))


def test_products_of_a_loop_that_may_run_no_time_are_not_serialised() -> None:
    """Its constants, merged behind the loop, once were: a PerformanceWarning, which is an error in these tests."""
    shapes = {"a": (64, "K"), "b": ("K", 64), "c": (64, 64)}
    tw.compile(one_tile, "sm_90a", {name: tw.spec("bf16", shape, align=16) for name, shape in shapes.items()})


def test_what_the_assembler_says_of_speed_is_a_warning_at_the_kernel() -> None:
    with pytest.warns(tw.PerformanceWarning, match=r"'product' would run slowly(?s:.*)\(C7514\)") as caught:
        warn_of(["info: (C7514) ..."], "product", Location(__file__, 7))
    assert (caught[0].filename, caught[0].lineno) == (__file__, 7)
