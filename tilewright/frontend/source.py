"""The text of a function, as `inspect.getsourcelines` finds it but without tokenizing.

Compiling the tokenizer's regular expressions alone takes longer than all else that finding a kernel in the cache needs.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType


def source_lines(fn: FunctionType) -> tuple[list[str], int]:
    """The lines of a definition, decorators included, and the number of the first. OSError where there are none."""
    fn = inspect.unwrap(fn)
    first = fn.__code__.co_firstlineno
    linecache.checkcache(fn.__code__.co_filename)
    lines = linecache.getlines(fn.__code__.co_filename, fn.__globals__)[first - 1 :]
    if not lines:
        return inspect.getsourcelines(fn)
    block = _indented_block(lines, max(_line_numbers(fn.__code__)) - first + 1)
    return block if _is_definition(block) else inspect.getblock(lines), first


def _line_numbers(code: CodeType) -> Iterator[int]:
    """The lines that a function and those inside it have instructions for."""
    yield code.co_firstlineno
    for _, _, line in code.co_lines():
        yield line or 0
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _line_numbers(constant)


def _indented_block(lines: Sequence[str], certain: int) -> list[str]:
    """The first ``certain`` lines and all that follow deeper indented than the first line."""
    margin, end = _indentation(lines[0]), certain
    while end < len(lines) and (not lines[end].strip() or _indentation(lines[end]) > margin):
        end += 1
    while end > certain and not lines[end - 1].strip():
        end -= 1
    return list(lines[:end])


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_definition(lines: Sequence[str]) -> bool:
    """Whether the lines are one definition; not where text in quotes or brackets is indented less than the rest."""
    text = "".join(lines)
    try:
        body = ast.parse("if True:\n" + text if text[:1].isspace() else text).body
    except SyntaxError:
        return False
    inner = body[0].body if len(body) == 1 and isinstance(body[0], ast.If) else body
    return len(inner) == 1 and isinstance(inner[0], ast.FunctionDef)


__all__ = ["source_lines"]
