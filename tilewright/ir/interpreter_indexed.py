"""The interpreter's rules of gather, scatter, atomic updates, prints, assertions and assumptions.

Updates of one operation happen in row-major order of the tile's elements; hardware promises no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.ir import check_ops, indexed_ops
from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir.core import Value
from tilewright.ir.interpreter_machine import Frame, Trap, View, load_tile, rule, store_tile
from tilewright.ir.types import TileType

Array = Any


def _places(
    view: View, index: Sequence[int], indices: Sequence[Array], axes: Sequence[int], shape: tuple[int, ...]
) -> tuple[tuple[Array, ...], Array]:
    """Coordinates in the view's array of every element (0 where outside), and which elements are inside."""
    free = iter(index)
    own = np.indices(shape)
    places, inside = [], np.ones(shape, np.bool_)
    for axis, (origin, size) in enumerate(zip(view.origin, view.array.shape, strict=True)):
        if axis in axes:
            place = origin + indices[list(axes).index(axis)].astype(np.int64)
        else:
            place = origin + next(free) * shape[axis] + own[axis]
        inside &= (place >= 0) & (place < size)
        places.append(place)
    return tuple(np.where(inside, place, 0) for place in places), inside


def _shape(value: Value) -> tuple[int, ...]:
    assert isinstance(value.type, TileType)
    return value.type.shape


@rule(indexed_ops.Gather)
def _gather(frame: Frame, op: indexed_ops.Gather) -> Array:
    view, shape = frame.read(op.view), _shape(op.result)
    places, inside = _places(view, frame.ints(op.index), frame.reads(op.indices), op.axes, shape)
    result = np.full(shape, numerics.constant(op.pad, numerics.dtype_of(view.array)), view.array.dtype)
    result[inside] = view.array[tuple(place[inside] for place in places)]
    return result


@rule(indexed_ops.Scatter)
def _scatter(frame: Frame, op: indexed_ops.Scatter) -> None:
    view, value = frame.read(op.view), frame.read(op.value)
    places, inside = _places(view, frame.ints(op.index), frame.reads(op.indices), op.axes, value.shape)
    view.array[tuple(place[inside] for place in places)] = value[inside]


@rule(indexed_ops.Atomic)
def _atomic(frame: Frame, op: indexed_ops.Atomic) -> Array:
    view, value = frame.read(op.view), frame.read(op.value)
    expected = frame.read(op.expected) if op.expected is not None else value
    if not op.indices and op.expected is None:  # every element has a place of its own
        old = load_tile(view, frame.ints(op.index), value.shape, 0)
        store_tile(view, frame.ints(op.index), _update(op.fn, old, value, value))
        return old
    places, inside = _places(view, frame.ints(op.index), frame.reads(op.indices), op.axes, value.shape)
    old = np.zeros_like(value)
    for element in zip(*np.nonzero(inside), strict=True):
        place = tuple(p[element] for p in places)
        before = view.array[place]
        old[element] = before
        view.array[place] = _update(op.fn, before, value[element], expected[element])
    return old


def _update(fn: str, old: Array, value: Array, expected: Array) -> Array:
    if fn == "exchange":
        return value
    if fn == "cas":
        return value if old.tobytes() == expected.tobytes() else old
    return numerics.binary(fn, old, value)


# --- checks -------------------------------------------------------------------------------------


@rule(check_ops.Print)
def _print(frame: Frame, op: check_ops.Print) -> None:
    parts, values = check_ops.text_parts(op.text), frame.reads(op.values)
    shape = np.shape(values[0]) if values else ()
    for element in np.ndindex(*shape):
        texts = [number_text(np.asarray(value)[element]) for value in values]
        line = parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))
        print(f"[{', '.join(map(str, element))}] {line}" if element else line)


def number_text(value: Array) -> str:
    """A number as C's printf writes it: ``%d`` for integers and bools, ``%g`` for floats."""
    is_float = numerics.dtype_of(value).is_float
    return f"{float(numerics.widen(value)):g}" if is_float else f"{int(value)}"


@rule(check_ops.Assert)
def _assert(frame: Frame, op: check_ops.Assert) -> None:
    condition = np.asarray(frame.read(op.condition))
    if not condition.all():
        where = ", ".join(map(str, np.argwhere(~condition)[0].tolist()))
        raise Trap("assertion failed" + (f": {op.text}" if op.text else "") + (f" (at [{where}])" if where else ""))


@rule(check_ops.Assume)
def _assume(frame: Frame, op: check_ops.Assume) -> None:
    if not frame.read(op.condition):
        raise Trap("the assumption does not hold: compiled code may do anything")
