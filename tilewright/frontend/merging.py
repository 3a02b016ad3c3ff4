"""Variables that cross run-time control flow: what a loop carries, what branches agree on.

A variable's value is a tree: tuples with leaves. Run-time values and Python numbers are leaves
that can change at run time; any other leaf (a tensor, a dtype, a string) must stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tilewright.frontend.errors import CompileError
from tilewright.frontend.promotion import literal_dtype, promote
from tilewright.frontend.values import (
    Undefined,
    describe,
    dtype_name,
    dtype_of,
    is_number,
    is_operand,
    is_scalar,
    tile_shape,
    type_text,
)
from tilewright.ir.comm_ops import PUT
from tilewright.ir.core import Value
from tilewright.ir.types import ScalarType, TileType, Type, element_type, f32


def leaves(value: Any) -> list[Any]:
    """The leaves of a value in order."""
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else [value]


def rebuild(template: Any, items: Iterator[Any]) -> Any:
    """A value of the template's structure with other leaves."""
    return tuple(rebuild(t, items) for t in template) if isinstance(template, tuple) else next(items)


def is_put(value: Any) -> bool:
    """A token of puts, which a signal takes wherever control flow has taken it."""
    return isinstance(value, Value) and value.type == PUT


def same_structure(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same_structure(x, y) for x, y in zip(a, b, strict=True))
    return not isinstance(a, tuple) and not isinstance(b, tuple)


def same_leaf(a: Any, b: Any) -> bool:
    """The same run-time value, or equal compile-time values of one type."""
    if isinstance(a, Value) or isinstance(b, Value):
        return a is b
    return a is b or (type(a) is type(b) and bool(a == b))


@dataclass
class Variable:
    """A variable carried by a loop: its value before, and the types of its run-time leaves."""

    name: str
    before: Any

    @property
    def runtime(self) -> list[Any]:
        """The leaves that become loop-carried values."""
        return [leaf for leaf in leaves(self.before) if is_operand(leaf)]

    @property
    def hints(self) -> list[str]:
        count = len(self.runtime)
        return [self.name] if count == 1 else [f"{self.name}_{i}" for i in range(count)]

    def with_values(self, values: Iterator[Value]) -> Any:
        """The variable's value with its run-time leaves replaced."""
        merged = [next(values) if is_operand(leaf) else leaf for leaf in leaves(self.before)]
        return rebuild(self.before, iter(merged))

    def next_values(self, after: Any, inits: Iterator[Value], constant: Callable[[Any, Type], Value]) -> list[Value]:
        """The leaves at the end of an iteration, which must have the types they started with."""
        if not same_structure(self.before, after):
            raise self._changed(describe(self.before), describe(after), "keep the number of items in the tuple")
        result = []
        for old, new in zip(leaves(self.before), leaves(after), strict=True):
            if not is_operand(old):
                if not same_leaf(old, new):
                    raise self._changed(
                        describe(old), describe(new), "only numbers, scalars and tiles can change in a loop"
                    )
                continue
            init = next(inits)
            result.append(self._next_value(old, new, init, constant))
        return result

    def _next_value(self, old: Any, new: Any, init: Value, constant: Callable[[Any, Type], Value]) -> Value:
        if isinstance(new, Value) and new.type == init.type:
            return new
        if is_number(new) and isinstance(init.type, ScalarType) and _holds(init.type, new):
            return constant(new, init.type)
        raise self._changed(type_text(init.type), describe(new), self._hint(old, new, init))

    def _hint(self, old: Any, new: Any, init: Value) -> str:
        """What to write instead."""
        if tile_shape(new) != tile_shape(init):
            if is_scalar(init):
                value = repr(old) if is_number(old) else "value"
                dtype = dtype_name(dtype_of(new))
                return f"start from a tile: {self.name} = tw.full({tile_shape(new)}, {value}, {dtype})"
            return "a loop-carried tile keeps its shape: use another variable inside the loop"
        if is_number(old):
            final = dtype_of(new) if isinstance(new, Value) else literal_dtype(new)
            start = repr(float(old)) if final == f32 else f"tw.cast({old!r}, {dtype_name(final)})"
            return f"start from a value of the final type: {self.name} = {start}"
        dtype = dtype_name(dtype_of(init))
        return f"convert at the end of the body: {self.name} = {self.name}.to({dtype}), or start with the final dtype"

    def _changed(self, before: str, after: str, hint: str) -> CompileError:
        message = (
            f"loop-carried variable '{self.name}' changes type: {before} before the loop, {after} after an iteration"
        )
        return CompileError(message, hint=hint)


def _holds(type_: ScalarType, number: Any) -> bool:
    if isinstance(number, float):
        return type_.dtype.is_float
    return isinstance(number, bool) == (type_.dtype.kind == "bool")


# --- branches -----------------------------------------------------------------------------------------


def merged_type(name: str, a: Any, b: Any) -> Type | None:
    """The type two branches agree on for a leaf; None where the leaf is the same in both."""
    if same_leaf(a, b):
        return None
    if not all(is_operand(v) or is_put(v) for v in (a, b)):
        raise _disagree(name, a, b, "only numbers, scalars and tiles can depend on a run-time condition")
    if isinstance(a, Value) and isinstance(b, Value):
        if a.type != b.type:
            raise _disagree(name, a, b, _branch_hint(name, a, b))
        return a.type
    if isinstance(a, Value) or isinstance(b, Value):
        typed, number = (a, b) if isinstance(a, Value) else (b, a)
        if isinstance(typed.type, TileType):
            raise _disagree(
                name, a, b, f"write tw.full({tile_shape(typed)}, {number!r}, {dtype_name(dtype_of(typed))})"
            )
        assert isinstance(typed.type, ScalarType)
        if not _holds(typed.type, number):
            raise _disagree(name, a, b, f"write tw.cast({number!r}, {dtype_name(element_type(typed.type))})")
        return typed.type
    if isinstance(a, bool) != isinstance(b, bool):
        raise _disagree(name, a, b, "give both branches the same kind of value")
    return ScalarType(promote(a, b))


def _branch_hint(name: str, a: Value, b: Value) -> str:
    if tile_shape(a) == tile_shape(b):
        return f"convert in one branch: {name}.to({dtype_name(dtype_of(a))})"
    return "give both branches the same shape"


def _disagree(name: str, a: Any, b: Any, hint: str) -> CompileError:
    message = f"'{name}' has different types in the two branches: {describe(a)} and {describe(b)}"
    return CompileError(message, hint=hint)


def one_branch_only(name: str, line: int) -> Undefined:
    return Undefined(
        f"variable '{name}' is assigned in one branch only of the 'if' at line {line}",
        f"assign '{name}' before the 'if' or in both branches",
    )


def loop_only(name: str, line: int) -> Undefined:
    return Undefined(
        f"variable '{name}' is assigned only inside the loop at line {line}, which may not run",
        f"assign '{name}' before the loop",
    )


def loop_index(name: str, line: int) -> Undefined:
    return Undefined(
        f"the loop variable '{name}' of line {line} has no value after the loop",
        "keep the value in another variable that is assigned before the loop",
    )


__all__ = [
    "Variable",
    "is_put",
    "leaves",
    "loop_index",
    "loop_only",
    "merged_type",
    "one_branch_only",
    "rebuild",
    "same_leaf",
    "same_structure",
]
