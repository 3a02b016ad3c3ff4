"""Calls: builtins, methods, inlined helpers, and the few Python functions that make sense in a kernel."""

from __future__ import annotations

import ast
import builtins as python
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tilewright.frontend import (
    builtins,
    builtins_checks,
    builtins_comm,
    builtins_indexed,
    builtins_tiles,
    language,
)
from tilewright.frontend.definition import FunctionDefinition, Parameter, as_kernel
from tilewright.frontend.emitter import Emitter
from tilewright.frontend.errors import CompileError, place
from tilewright.frontend.markers import Builtin
from tilewright.frontend.scope import Frame, VisitorBase, name_value
from tilewright.frontend.values import (
    BoundMethod,
    RangeValue,
    ViewShape,
    contains_value,
    describe,
    dtype_name,
    dtype_of,
    is_number,
    is_scalar,
    is_tile,
    is_view,
    tile_shape,
    view_type,
)
from tilewright.ir.core import Location, Value
from tilewright.ir.types import DType, f32, i32


class Calls(VisitorBase):
    """``f(...)``."""

    def visit_Call(self, node: ast.Call) -> Any:
        callee = self.visit(node.func)
        args, kwargs = self._arguments(node)
        with self._blame(node, callee):
            return self.call(callee, args, kwargs, node)

    def _arguments(self, node: ast.Call) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        for item in node.args:
            if isinstance(item, ast.Starred):
                value = self.emit.plain(self.visit(item.value))
                if not isinstance(value, tuple):
                    raise self.error_at(item, f"cannot unpack {describe(value)}")
                args += value
            else:
                args.append(self.visit(item))
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.error_at(keyword.value, "'**' arguments are not supported", "name the arguments")
        return args, {k.arg: self.visit(k.value) for k in node.keywords if k.arg is not None}

    @contextmanager
    def _blame(self, node: ast.Call, callee: Any) -> Iterator[None]:
        """Point an error that names an argument at that argument."""
        try:
            yield
        except CompileError as error:
            if error.argument is not None:
                target = _argument_node(node, callee, error.argument)
                error.locate(self.location(target), self.length(target))
            raise

    def call(self, callee: Any, args: list[Any], kwargs: dict[str, Any], node: ast.Call) -> Any:
        """Dispatch on what is called."""
        if isinstance(callee, BoundMethod):
            return self._method(callee, args, kwargs)
        if isinstance(callee, Builtin):
            return self._builtin(callee, args, kwargs)
        if isinstance(callee, FunctionDefinition):
            return self.inline(callee, args, kwargs, self.location(node))
        if isinstance(callee, DType):
            return self._dtype_call(callee, args, kwargs)
        if (kernel := as_kernel(callee)) is not None:
            hint = "make the shared part a @tw.function and call that"
            raise CompileError(f"a kernel cannot call the kernel '{kernel.name}'", hint=hint)
        return self._python_call(callee, args, kwargs)

    def _builtin(self, callee: Builtin, args: list[Any], kwargs: dict[str, Any]) -> Any:
        bound = _bind(callee.__signature__, f"tw.{callee.name}", args, kwargs)
        return builtins.IMPLEMENTATIONS[callee](self.emit, **bound)

    def _method(self, callee: BoundMethod, args: list[Any], kwargs: dict[str, Any]) -> Any:
        signature = inspect.signature(callee.implementation)
        parameters = list(signature.parameters.values())[2:]
        _bind(signature.replace(parameters=parameters), f".{callee.name}", args, kwargs)
        return callee.implementation(self.emit, callee.receiver, *args, **kwargs)

    def _dtype_call(self, dtype: DType, args: list[Any], kwargs: dict[str, Any]) -> Value:
        if len(args) != 1 or kwargs:
            raise CompileError(f"{dtype_name(dtype)}(x) converts exactly one value")
        return builtins.cast(self.emit, args[0], dtype)

    # --- helpers --------------------------------------------------------------------------------------

    def inline(self, callee: FunctionDefinition, args: list[Any], kwargs: dict[str, Any], loc: Location) -> Any:
        """Build the helper's body here and give back what it returns."""
        if any(frame.definition is callee for frame in self.frames):
            chain = [frame.definition.name for frame in self.frames] + [callee.name]
            hint = "helpers are inlined: use a loop instead"
            raise CompileError(f"'{callee.name}' calls itself: {' -> '.join(chain)}", hint=hint)
        parameters = callee.parameter
        bound = _bind(inspect.signature(callee.fn), callee.name, args, kwargs)
        frame = Frame(callee, caller=loc)
        for name, value in bound.items():
            frame.locals[name] = self._helper_argument(callee, parameters[name], value)
            name_value(name, frame.locals[name])
        saved, self.frame = self.frame, frame
        self.frames.append(frame)
        try:
            self.visit_block(callee.tree.body)
        finally:
            self.frame = saved
            self.frames.pop()
        return frame.result

    def _helper_argument(self, callee: FunctionDefinition, parameter: Parameter, value: Any) -> Any:
        what = f"argument '{parameter.name}' of '{callee.name}'"
        if parameter.kind == "constexpr" and contains_value(value):
            raise CompileError(
                f"{what} must be a compile-time value, got {describe(value)}",
                hint="it is annotated tw.constexpr: pass a constant or a tw.constexpr parameter",
                argument=parameter.name,
            )
        if parameter.kind in ("tensor", "symmetric") and not is_view(value) and value is not None:
            raise CompileError(f"{what} must be a tensor, got {describe(value)}", argument=parameter.name)
        if parameter.kind == "symmetric" and value is not None and not view_type(value).symmetric:
            hint = "annotate the kernel's parameter tw.Symmetric, and pass the tensor itself, not .peer(r)"
            message = f"{what} must be a symmetric tensor, got {describe(value)}"
            raise CompileError(message, hint=hint, argument=parameter.name)
        if parameter.kind == "scalar":
            return self._helper_scalar(what, parameter, value)
        return value

    def _helper_scalar(self, what: str, parameter: Parameter, value: Any) -> Any:
        if not is_scalar(value):
            raise CompileError(f"{what} must be a scalar, got {describe(value)}", argument=parameter.name)
        if parameter.dtype is None:
            return value
        if is_number(value):
            return self.emit.constant(value, parameter.dtype)
        if dtype_of(value) != parameter.dtype:
            raise CompileError(
                f"{what} must be {dtype_name(parameter.dtype)}, got {describe(value)}",
                hint=f"convert it: x.to({dtype_name(parameter.dtype)})",
                argument=parameter.name,
            )
        return value

    # --- Python's own functions -------------------------------------------------------------------------

    def _python_call(self, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        args = [self.emit.plain(a) if isinstance(a, ViewShape) else a for a in args]
        known = _hashable_lookup(PYTHON_FUNCTIONS, callee)
        if known is not None:
            if kwargs:
                raise CompileError(f"{callee.__name__} takes no keyword arguments in a kernel")
            signature = inspect.signature(known)
            parameters = list(signature.parameters.values())[1:]
            _bind(signature.replace(parameters=parameters), callee.__name__, args, {})
            return known(self.emit, *args)
        if not any(contains_value(v) for v in (*args, *kwargs.values())) and _is_pure(callee):
            return _call_on_host(callee, args, kwargs)
        raise self._not_callable(callee)

    def _not_callable(self, callee: Any) -> CompileError:
        name = getattr(callee, "__name__", type(callee).__name__)
        if callee is print:
            hint = 'use tw.device_print("x = {}", x)'
            return CompileError("print does not work in a kernel", hint=hint)
        if getattr(callee, "__module__", None) == "math":
            hint = f"use tw.{name} on run-time values" if name in language.BUILTINS else ""
            return CompileError(f"math.{name} needs compile-time numbers", hint=hint)
        if inspect.isfunction(callee):
            where = place(Location(callee.__code__.co_filename, callee.__code__.co_firstlineno, 1))
            hint = f"decorate it with @tw.function ({where})"
            return CompileError(f"'{name}' is a plain Python function", hint=hint)
        if callable(callee):
            return CompileError(
                f"'{name}' cannot be called in a kernel", hint="use tw.* functions and @tw.function helpers"
            )
        return CompileError(f"{describe(callee)} is not callable")


def _bind(signature: inspect.Signature, what: str, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        text = ", ".join(_parameter_text(p) for p in signature.parameters.values())
        raise CompileError(f"{what}: {error}", hint=f"the signature is {what}({text})") from None
    bound.apply_defaults()
    return bound.arguments


def _parameter_text(parameter: inspect.Parameter) -> str:
    kind = parameter.kind
    stars = "*" if kind is parameter.VAR_POSITIONAL else "**" if kind is parameter.VAR_KEYWORD else ""
    if parameter.default is inspect.Parameter.empty:
        return stars + parameter.name
    default = dtype_name(parameter.default) if isinstance(parameter.default, DType) else repr(parameter.default)
    return f"{parameter.name}={default}"


def _argument_node(node: ast.Call, callee: Any, name: str) -> ast.AST:
    """The expression that was passed for a parameter; the call itself where the default was used."""
    for keyword in node.keywords:
        if keyword.arg == name:
            return keyword.value
    signature = getattr(callee, "__signature__", None)
    if isinstance(callee, FunctionDefinition):
        signature = inspect.signature(callee.fn)
    names = list(signature.parameters) if signature is not None else []
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else node


# --- Python functions with a meaning in kernels -----------------------------------------------------------


def _extremum(fn: Callable[..., Any]) -> Callable[..., Any]:
    def implementation(emit: Emitter, *items: Any) -> Any:
        values = items[0] if len(items) == 1 and isinstance(items[0], tuple) else items
        if not values or (len(items) == 1 and not isinstance(items[0], tuple)):
            name = "max" if fn is builtins.maximum else "min"
            hint = f"tw.{name} reduces a tile"
            raise CompileError(f"{name} needs two values or a tuple", hint=hint)
        result = values[0]
        for value in values[1:]:
            result = fn(emit, result, value)
        return result

    return implementation


def _length(emit: Emitter, value: Any) -> int:
    if isinstance(value, tuple | str):
        return len(value)
    if is_tile(value):
        return tile_shape(value)[0]
    raise CompileError(f"len of {describe(value)}", hint="use .shape")


def _conversion(python_type: type, dtype: DType) -> Callable[..., Any]:
    def implementation(emit: Emitter, value: Any = 0) -> Any:
        if not isinstance(value, Value):
            return _call_on_host(python_type, [value], {})
        return emit.truth(value, "the operand of bool") if python_type is bool else emit.cast(value, dtype)

    return implementation


def _range(emit: Emitter, start: Any, stop: Any = None, step: Any = 1) -> RangeValue:
    return builtins.range_(emit, start, stop, step)


def _sum(emit: Emitter, items: Any) -> Any:
    if not isinstance(items, tuple):
        raise CompileError(f"sum of {describe(items)}", hint="tw.sum reduces a tile")
    result: Any = 0
    for position, item in enumerate(items):
        result = item if position == 0 else emit.binary("add", result, item)
    return result


def _tuple_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    def implementation(emit: Emitter, *items: Any) -> Any:
        if not all(isinstance(item, tuple) for item in items):
            raise CompileError(f"{fn.__name__} works on tuples in a kernel", hint="use tw.static_range for numbers")
        return tuple(fn(*items))

    return implementation


PYTHON_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    python.range: _range,
    python.max: _extremum(builtins.maximum),
    python.min: _extremum(builtins.minimum),
    python.abs: builtins.absolute,
    python.len: _length,
    python.int: _conversion(int, i32),
    python.float: _conversion(float, f32),
    python.bool: _conversion(bool, i32),
    python.sum: _sum,
    **{fn: _tuple_of(fn) for fn in (python.tuple, python.list, python.zip, python.enumerate, python.reversed)},
}
#: callables that may run at compile time, besides everything in ``math``
PURE = (round, divmod, pow, str, repr, isinstance, sorted, all, any, type, getattr, hasattr)


def _is_pure(callee: Any) -> bool:
    return getattr(callee, "__module__", None) == "math" or any(callee is fn for fn in PURE)


def _call_on_host(callee: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return callee(*args, **kwargs)
    except Exception as error:
        raise CompileError(f"{getattr(callee, '__name__', callee)}: {error}") from None


def _hashable_lookup(table: dict[Any, Any], key: Any) -> Any:
    try:
        return table.get(key)
    except TypeError:
        return None


#: importing these fills `builtins.IMPLEMENTATIONS`
TABLES = (builtins, builtins_checks, builtins_comm, builtins_indexed, builtins_tiles)

__all__ = ["Calls"]
