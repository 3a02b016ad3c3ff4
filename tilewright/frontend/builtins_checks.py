"""Builtins that print, check and promise: device_print, device_assert, assume."""

from __future__ import annotations

from typing import Any

from tilewright.frontend import language as tw
from tilewright.frontend.builtins import implements
from tilewright.frontend.emitter import Emitter, broadcast_shapes, require_operands
from tilewright.frontend.errors import CompileError
from tilewright.frontend.values import describe, dtype_of, is_scalar, is_tile, tile_shape
from tilewright.ir.check_ops import text_parts
from tilewright.ir.core import Value
from tilewright.ir.types import f32, i1

#: values of one print: the arguments of CUDA's vprintf, of which the coordinates take a few
MOST_VALUES = 24


def _text(value: Any, what: str, argument: str) -> str:
    if not isinstance(value, str):
        raise CompileError(f"{what} must be a compile-time string, got {describe(value)}", argument=argument)
    if "\0" in value:
        raise CompileError(f"{what} contains a NUL character", argument=argument)
    return value


@implements(tw.device_print)
def device_print(emit: Emitter, text: Any, values: tuple[Any, ...] = ()) -> None:
    hint = 'write tw.device_print("x = {}", x)'
    if not isinstance(text, str):
        raise CompileError(f"tw.device_print begins with a string, got {describe(text)}", hint=hint, argument="text")
    try:
        count = len(text_parts(_text(text, "the text", "text"))) - 1
    except ValueError as error:
        raise CompileError(str(error), argument="text") from None
    if count != len(values):
        raise CompileError(f"tw.device_print: {len(values)} values for {count} '{{}}'", hint=hint, argument="text")
    if len(values) > MOST_VALUES:
        raise CompileError(f"tw.device_print takes at most {MOST_VALUES} values", hint="print in several lines")
    require_operands("tw.device_print", *values)
    shape = broadcast_shapes("tw.device_print", *(tile_shape(v) for v in values)) if values else ()
    emit.builder.print_(text, [emit.broadcast(_printable(emit, v), shape) for v in values])


def _printable(emit: Emitter, value: Any) -> Value:
    value = emit.materialise(value)
    dtype = dtype_of(value)
    return emit.cast(value, f32) if dtype.is_float and dtype.bits < 32 else value


@implements(tw.device_assert)
def device_assert(emit: Emitter, condition: Any, message: Any) -> None:
    text = _text(message, "the message of tw.device_assert", "message")
    if is_tile(condition):
        if dtype_of(condition) != i1:
            hint = "compare it: x != 0"
            given = describe(condition)
            raise CompileError(f"tw.device_assert needs bools, got {given}", hint=hint, argument="condition")
        emit.builder.check(condition, text)
        return
    holds = emit.truth(condition, "the condition of tw.device_assert")
    emit.builder.check(holds if isinstance(holds, Value) else emit.constant(holds, i1), text)


@implements(tw.assume)
def assume(emit: Emitter, condition: Any) -> None:
    if not is_scalar(condition):
        hint = "reduce it: tw.min(x) > 0"
        message = f"tw.assume needs a scalar condition, got {describe(condition)}"
        raise CompileError(message, hint=hint, argument="condition")
    holds = emit.truth(condition, "the condition of tw.assume")
    if isinstance(holds, Value):
        emit.builder.assume(holds)
    elif not holds:
        raise CompileError("the assumption is false at compile time", argument="condition")


__all__ = ["assume", "device_assert", "device_print"]
