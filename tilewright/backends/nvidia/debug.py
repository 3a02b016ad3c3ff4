"""Prints and assertions on NVIDIA GPUs: the functions ``vprintf`` and ``__assertfail`` that every driver has.

CUDA C++ Programming Guide, "Formatted Output" and "Assertion". ``vprintf`` takes the arguments as C would pass them,
one behind the other in memory, each aligned to its size.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.backends.lower.context import Lowering
from tilewright.backends.mlir_builder import ir as mlir


def print_line(lw: Lowering, text: str, values: Sequence[mlir.Value]) -> None:
    """vprintf(text, values): the text in printf's notation, values i32, i64 or f64."""
    fb, types = lw.fb, lw.fb.types
    pointer = types.ptr()
    arguments = fb.zero(pointer)
    if values:
        type_ = types.struct([value.type for value in values])
        arguments = fb.alloca(type_, align=8)
        for position, value in enumerate(values):
            size = 4 if value.type == types.i32 else 8
            fb.store(value, fb.gep(arguments, [0, position], type_), size)
    fb.module.declare("vprintf", [pointer, pointer], types.i32)
    fb.call("vprintf", types.i32, [fb.text(text), arguments])


def fail(lw: Lowering, text: str, file: str, line: int) -> None:
    """__assertfail(text, file, line, function, bytes of a character): reports and stops the kernel."""
    fb, types = lw.fb, lw.fb.types
    pointer = types.ptr()
    fb.module.declare("__assertfail", [pointer, pointer, types.i32, pointer, types.i64], None)
    function = lw.function.name
    fb.call("__assertfail", None, [fb.text(text), fb.text(file), fb.i32(line), fb.text(function), fb.i64(1)])
    fb.intrinsic("llvm.trap", None)
