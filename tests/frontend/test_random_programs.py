"""Random structured programs mean in a kernel what they mean in Python: carried, merged and folded alike."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tilewright.frontend.language as tw

NAMES = ("a", "b", "c")
ATOMS = st.sampled_from((*NAMES, "n", "m", "0", "1", "3", "-2"))
FILES = itertools.count()


@st.composite
def expression(draw: st.DrawFn, depth: int = 2) -> str:
    if depth == 0 or draw(st.booleans()):
        return draw(ATOMS)
    left, right = draw(expression(depth - 1)), draw(expression(depth - 1))
    form = draw(
        st.sampled_from(
            ("({0} + {1})", "({0} - {1})", "({0} * {1} % 97)", "({0} // 3 + {1})", "({0} if {1} > 1 else {1})")
        )
    )
    return form.format(left, right)


@st.composite
def condition(draw: st.DrawFn) -> str:
    left, right = draw(expression(1)), draw(expression(1))
    form = draw(
        st.sampled_from(("{0} < {1}", "{0} == {1}", "not {0} >= {1}", "0 <= {0} < {1}", "{0} > 0 or {1} > 0", "n > 1"))
    )
    return form.format(left, right)


@st.composite
def block(draw: st.DrawFn, depth: int, indent: str) -> list[str]:
    lines: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        lines += [indent + line for line in draw(statement(depth))]
    return lines


@st.composite
def statement(draw: st.DrawFn, depth: int) -> list[str]:
    kind = draw(st.sampled_from(("assign", "assign", "augment", "swap", "if", "for", "unroll", "while")))
    name = draw(st.sampled_from(NAMES))
    if kind == "swap":
        return ["a, b = b, a"]
    if kind == "augment":
        return [f"{name} += {draw(expression())}", f"{name} %= 1009"]
    if kind == "assign" or depth == 0:
        return [f"{name} = {draw(expression())} % 1009"]
    body = draw(block(depth - 1, "    "))
    if kind == "if":
        return [f"if {draw(condition())}:", *body, "else:", *draw(block(depth - 1, "    "))]
    index = f"i{depth}"
    body = [*body, f"    {name} += {index}"]
    if kind == "for":
        return [f"for {index} in range({draw(st.sampled_from(('n', '2', '1, 4, 2', 'n, 3')))}):", *body]
    if kind == "unroll":
        return [f"for {index} in static_range({draw(st.integers(0, 3))}):", *body]
    return [f"{index} = 0", f"while {index} < n:", *body, f"    {index} += 1"]


def compiled(lines: list[str]) -> tuple[Callable[..., Any], Any]:
    """The program as a Python function and as a helper of kernels."""
    text = "\n".join(
        ["def program(n, m):", "    a, b, c = 0, 1, m", *("    " + x for x in lines), "    return a, b, c", ""]
    )
    file = f"<random program {next(FILES)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    code = compile(text, file, "exec")
    host: dict[str, Any] = {"static_range": range}
    kernel: dict[str, Any] = {"static_range": tw.static_range}
    exec(code, host)
    exec(code, kernel)
    return host["program"], tw.function(kernel["program"])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block(2, ""), st.integers(-2, 3), st.integers(-5, 5))
def test_programs_mean_what_python_says(execute, lines, n, m):
    reference, program = compiled(lines)

    def kernel(y, n: tw.int32, m: tw.int32):
        a, b, c = program(n, m)
        tw.store(y, 0, a)
        tw.store(y, 1, b)
        tw.store(y, 2, c)

    y = np.full(3, -(2**31), "int32")
    execute(kernel, y, n, m)
    assert y.tolist() == list(reference(n, m))
