"""The text of definitions: the same as `inspect` finds, whatever the layout of the source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

import pytest

from tilewright.frontend.source import source_lines


def plain(x):
    return x


def with_comment(x):
    print(x)  # a comment

    # one more


def with_strings(x):
    text = """
no indentation
"""
    return (x, text)


def quoted_at_the_end():
    """Only a docstring
    that is not indented."""


# fmt: off
def on_one_line(x): return x
# fmt: on


@functools.wraps(plain)
def signature_over_lines(
    x,
    *,
    y=1,
):
    def inner(z):
        return z

    if x:
        return inner
    # the end


class Holder:
    def method(self):
        for i in range(3):
            print(i)
        return [i]

    after = 1


def local():
    def nested(x):
        return x + 1

    return nested


FUNCTIONS = [plain, with_comment, with_strings, quoted_at_the_end, on_one_line, Holder.method, local(), local]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_as_inspect(fn):
    lines, first = source_lines(fn)
    expected, number = inspect.getsourcelines(fn)
    assert first == number
    assert parsed(lines) == parsed(expected)


def test_wrapped_functions_are_those_they_wrap():
    assert source_lines(signature_over_lines) == source_lines(plain)


def test_without_the_tokenizer(monkeypatch):
    monkeypatch.setattr(inspect, "getblock", lambda lines: pytest.fail("it costs more than the rest of a lookup"))
    for fn in (plain, Holder.method, local(), inspect.unwrap):
        source_lines(fn)


def test_no_source():
    namespace = {}
    exec("def made(): pass", namespace)
    with pytest.raises(OSError):
        source_lines(namespace["made"])


def parsed(lines):
    return ast.dump(ast.parse(textwrap.dedent("".join(lines)) if lines[0][:1].isspace() else "".join(lines)))
