"""Scalars that decide control flow, computed on small inputs.

What cannot be known without data (a loaded index, a reduction of a tile) becomes a small number that depends on how
it was computed alone: two roles that compute the same thing get the same number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any
from zlib import crc32

from tilewright.ir.comm_ops import Peer, Rank, Turn, WorldSize
from tilewright.ir.core import Block, Operation, Value
from tilewright.ir.tile_ops import (
    Binary,
    BlockId,
    Cast,
    Compare,
    Constant,
    Dim,
    NumBlocks,
    NumPrograms,
    OffsetView,
    PermuteView,
    ProgramId,
    Select,
    Subview,
    Unary,
)
from tilewright.ir.types import ScalarType, ViewType

#: reads an environment, gives a number
Evaluate = Callable[[Any], Any]
#: what loaded numbers are at most
MOST_LOADED = 4


def _wrapped(x: Any, bits: int) -> Any:
    if not isinstance(x, int) or -(1 << bits - 1) <= x < 1 << bits - 1:
        return x
    return (x + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda x, y: x / y if y else 0.0,
    "floordiv": lambda x, y: x // y if y else 0,
    "mod": lambda x, y: x % y if y else 0,
    "max": max,
    "min": min,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": lambda x, y: x << (y & 63),
    "shr": lambda x, y: x >> (y & 63),
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
#: results that need no care about overflow for the small numbers at hand
_NARROWING = ("floordiv", "mod", "max", "min", "and", "or", "xor", "shr", "div")


def evaluator(op: Operation) -> Evaluate:
    """How a pure operation's (only) result follows from an execution's environment."""
    if isinstance(op.results[0].type, ScalarType):
        for cls, make in _RULES.items():
            if isinstance(op, cls):
                return make(op)
    return _guess(op)


def _binary(op: Any) -> Evaluate:
    fn, x, y = _BINARY[op.fn], op.lhs, op.rhs
    if op.fn in _NARROWING:
        return lambda run: fn(run.env[x], run.env[y])
    bits = op.result.type.dtype.bits
    return lambda run: _wrapped(fn(run.env[x], run.env[y]), bits)


def _compare(op: Any) -> Evaluate:
    fn, x, y = _COMPARE[op.fn], op.lhs, op.rhs
    return lambda run: fn(run.env[x], run.env[y])


def _unary(op: Any) -> Evaluate:
    x = op.source
    if op.fn == "neg":
        return lambda run: -run.env[x]
    if op.fn == "abs":
        return lambda run: abs(run.env[x])
    if op.fn == "not":
        return (lambda run: not run.env[x]) if op.result.type.dtype.name == "i1" else (lambda run: ~run.env[x])
    return _guess(op)


def _select(op: Any) -> Evaluate:
    c, x, y = op.condition, op.on_true, op.on_false
    return lambda run: run.env[x] if run.env[c] else run.env[y]


def _cast(op: Any) -> Evaluate:
    x, dtype = op.source, op.result.type.dtype
    convert = bool if dtype.name == "i1" else int if dtype.is_int else float
    return lambda run: convert(run.env[x])


def _dim(op: Any) -> Evaluate:
    root, axis = root_axis(op.view, op.axis)
    size = root.type.shape[axis] if isinstance(root.type, ViewType) else None
    if size is not None:
        return lambda run: size
    if root.op is not None:
        return _guess(op)
    return lambda run: run.inputs.dims[root, axis]


def _constant(op: Any) -> Evaluate:
    value = op.value
    return lambda run: value


def _grid(op: Any) -> Evaluate:
    axis = op.axis
    return lambda run: run.inputs.grid[axis]


def _id(op: Any) -> Evaluate:
    axis = op.axis
    return lambda run: run.inputs.ids[axis]


_RULES: dict[type[Operation], Callable[[Any], Evaluate]] = {
    Binary: _binary,
    Compare: _compare,
    Unary: _unary,
    Select: _select,
    Cast: _cast,
    Constant: _constant,
    Dim: _dim,
    NumPrograms: _grid,
    ProgramId: _id,
    BlockId: lambda op: lambda run: run.inputs.block,
    NumBlocks: lambda op: lambda run: run.inputs.blocks,
    Rank: lambda op: lambda run: run.inputs.rank,
    WorldSize: lambda op: lambda run: run.inputs.world,
    Turn: lambda op: lambda run: 0,  # the same on all ranks; which half it is changes nothing
}


def is_computed(op: Operation) -> bool:
    """Whether the checker computes the scalar that the operation gives, rather than to guess it."""
    return not op.results or (isinstance(op.results[0].type, ScalarType) and isinstance(op, tuple(_RULES)))


def root_axis(view: Value, axis: int) -> tuple[Value, int]:
    """The view that a view was derived from, and which of its dims ``axis`` is."""
    op = view.op
    if isinstance(op, Subview):
        return root_axis(op.view, axis + len(op.index))
    if isinstance(op, PermuteView):
        return root_axis(op.view, op.perm[axis])
    if isinstance(op, OffsetView | Peer):
        return root_axis(op.view, axis)
    return view, axis


def _guess(op: Operation) -> Evaluate:
    """A number for what is not known, the same wherever it is computed in the same way."""
    ignored = ("scratch", "shared", "engine")
    attributes = sorted((k, str(v)) for k, v in op.attributes.items() if k not in ignored)
    text = f"{op.name}{attributes}"
    operands, type_ = list(op.operands), op.results[0].type if op.results else None
    dtype = type_.dtype.name if isinstance(type_, ScalarType) else ""

    def evaluate(run: Any) -> Any:
        key = crc32(f"{text}{[run.env.get(v, 0) for v in operands]}{run.inputs.seed}".encode())
        if dtype == "i1":
            return bool(key >> 7 & 1)
        if not dtype:
            return key  # a tile or view: only what is computed from it matters
        return (key >> 7) % MOST_LOADED if dtype[0] == "i" else float(key >> 7 & 3)

    return evaluate


def parameter_key(value: Value) -> Any:
    """What stands for a parameter whose contents nobody knows."""
    return f"%{value.hint}" if isinstance(value.owner, Block) else value.hint
