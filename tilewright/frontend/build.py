"""Kernel definition and argument types -> module of Tile IR."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import Any

from tilewright.frontend.calls import Calls
from tilewright.frontend.control import Control
from tilewright.frontend.definition import KernelDefinition, Parameter
from tilewright.frontend.errors import ArgumentError, CompileError
from tilewright.frontend.scope import Frame
from tilewright.frontend.values import dtype_name
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, IRError, Module, Region
from tilewright.ir.types import DType, ScalarType, Type, ViewType
from tilewright.ir.verifier_comm import verify_communication


class Visitor(Control, Calls):
    """The whole language."""


def build_module(definition: KernelDefinition, args: dict[str, Any], name: str | None = None) -> Module:
    """Build the kernel for parameter types and compile-time values.

    ``args`` maps each parameter to a `ViewType` (tensor), a `DType` (run-time scalar), or the value
    of a ``tw.constexpr`` parameter; constexprs with a default may be absent, and None for a tensor
    or scalar parameter makes it the compile-time None. Static sizes of a view are Python ints in
    the kernel. The function's parameters are the tensors and scalars in order.

    Raises `CompileError` with the place in the user's source.
    """
    values, types = _split(definition, args)
    block = Block(list(types.items()))
    builder = Builder(block, definition.loc)
    frame = Frame(definition, locals=values | dict(zip(types, block.args, strict=True)))
    Visitor(builder, frame).visit_block(_without_docstring(definition.tree))
    function = Function(name or definition.name, Region(block), loc=definition.loc)
    if any(op.name.startswith("comm.") for op in function.walk()):
        function.attributes["communicates"] = True
        _check_communication(function)
    return Module([function])


def _check_communication(function: Function) -> None:
    """Rules that only the whole program can break, such as a put that no signal tells of."""
    try:
        verify_communication(function)
    except IRError as error:
        raise CompileError(error.message, error.loc, error.hint) from None


def _without_docstring(tree: ast.FunctionDef) -> list[ast.stmt]:
    has_docstring = ast.get_docstring(tree, clean=False) is not None
    return tree.body[1:] if has_docstring else tree.body


def _split(definition: KernelDefinition, args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Type]]:
    """Compile-time values, and the types of the run-time parameters."""
    unknown = [name for name in args if name not in definition.parameter]
    if unknown:
        raise ArgumentError(f"kernel '{definition.name}' has no parameter '{unknown[0]}'", definition.loc)
    values: dict[str, Any] = {}
    types: dict[str, Type] = {}
    for parameter in definition.parameters:
        value = args.get(parameter.name, parameter.default)
        if parameter.required and parameter.name not in args:
            raise _error(definition, parameter, "is missing", "give its type, or its value if it is a tw.constexpr")
        if parameter.kind == "constexpr" or value is None:
            values[parameter.name] = value
        else:
            types[parameter.name] = _parameter_type(definition, parameter, value)
    return values, types


def _parameter_type(definition: KernelDefinition, parameter: Parameter, value: Any) -> Type:
    if isinstance(value, ScalarType):
        value = value.dtype
    if isinstance(value, ViewType) and parameter.kind in ("tensor", "symmetric", "plain"):
        if value.rank == 0:
            raise _error(definition, parameter, "is a tensor of rank 0", "pass a scalar or a tensor of one element")
        return replace(value, symmetric=parameter.kind == "symmetric")
    if isinstance(value, DType) and parameter.kind in ("scalar", "plain"):
        if parameter.dtype is not None and parameter.dtype != value:
            raise _error(definition, parameter, f"is {dtype_name(parameter.dtype)}, got {dtype_name(value)}", "")
        return ScalarType(value)
    wanted = {"tensor": "a ViewType", "symmetric": "a ViewType", "scalar": "a DType"}.get(
        parameter.kind, "a ViewType or a DType"
    )
    hint = "annotate the parameter tw.constexpr to pass a compile-time value"
    raise _error(definition, parameter, f"needs {wanted}, got {value!r}", hint)


def _error(definition: KernelDefinition, parameter: Parameter, what: str, hint: str) -> ArgumentError:
    message = f"kernel '{definition.name}': parameter '{parameter.name}' {what}"
    return ArgumentError(message, parameter.loc, hint, len(parameter.name))


__all__ = ["Visitor", "build_module"]
