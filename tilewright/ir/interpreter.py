"""Runs the IR of any level on NumPy arrays: the meaning of a program, and the judge of every pass.

Scalars are NumPy scalars, tiles NumPy arrays (never written to), views strided NumPy arrays. Layouts have no numeric
meaning. Here: `run`, `run_ranks`, the rules of ``tile.*``. Elsewhere: the rules of ``async.*`` (`interpreter_async`),
of gathers, atomic updates and checks (`interpreter_indexed`), of blocks that run one program together
(`interpreter_cluster`), of ``comm.*`` (`interpreter_comm`), the meaning of arithmetic (`interpreter_numerics`), and how
operations execute (`interpreter_machine`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from tilewright.ir import (
    interpreter_async,
    interpreter_cluster,
    interpreter_comm,
    interpreter_indexed,
    interpreter_packets,
)
from tilewright.ir import interpreter_numerics as numerics
from tilewright.ir import tile_ops as t
from tilewright.ir.core import Function, IRError, Value
from tilewright.ir.interpreter_machine import (
    Frame,
    Program,
    Steps,
    Thread,
    Trap,
    View,
    execute,
    load_tile,
    rule,
    run_region,
    store_tile,
)
from tilewright.ir.interpreter_numerics import NUMPY
from tilewright.ir.types import ScalarType, TileType, ViewType, element_type

#: blocks that a persistent kernel runs with when the caller does not say: few, so that each gets several programs
DEFAULT_BLOCKS = 4


# --- running --------------------------------------------------------------------------------


def run(
    function: Function,
    arguments: Mapping[str, Any] | Sequence[Any],
    grid: Sequence[int] = (1, 1, 1),
    blocks: int | None = None,
) -> None:
    """Execute a kernel on NumPy arrays and scalars, in place.

    ``arguments``: by position, or by parameter name. The programs of the grid run one after the other, x fastest.
    A persistent kernel (function attribute ``persistent``) runs as ``blocks`` blocks instead, those of a cluster
    (``num_ctas``) side by side; so do the blocks over which each program is ``spread``. A kernel that communicates runs
    in a world of one rank, see `run_ranks`. Array dtypes are those of NumPy and ml_dtypes and must match the
    parameters; nothing is converted. Raises `IRError`.
    """
    if function.attributes.get("communicates"):
        run_ranks(function, [arguments], grid, blocks)
        return
    values = _bind(function, arguments)
    full = _full_grid(grid)
    total = math.prod(full)
    users, ctas = interpreter_async.ring_users(function), int(function.attributes.get("num_ctas", 1))
    with np.errstate(all="ignore"):
        if function.attributes.get("persistent") or blocks is not None:
            count = max(ctas, min(total, DEFAULT_BLOCKS) // ctas * ctas) if blocks is None else blocks
            if count % ctas:
                raise IRError(f"{count} blocks do not make clusters of {ctas}", function.loc)
            for first in range(0, count, ctas):
                ranks = range(first, first + ctas)
                _run_blocks([Program(function, full, None, n, count) for n in ranks], values, users)
            return
        members = ctas if function.attributes.get("spread") else 1
        for number in range(total):
            ranks = range(number * members, (number + 1) * members)
            _run_blocks(
                [Program(function, full, _place(number, full), n, total * members) for n in ranks], values, users
            )


def run_ranks(
    function: Function,
    arguments: Sequence[Mapping[str, Any] | Sequence[Any]],
    grid: Sequence[int] = (1, 1, 1),
    blocks: int | None = None,
    seed: int | None = None,
    turn: int = 0,
) -> None:
    """Execute a kernel that communicates on all ranks of a world side by side, in place.

    ``arguments``: for each rank what `run` takes; arrays of symmetric parameters have one form on all of them. Each
    rank runs ``blocks`` blocks at a time, block b the programs b, b + blocks, ... of the grid in this order, as a
    persistent kernel does. ``seed``: blocks go on in any order, and puts land at any time. ``turn``: 0 or 1, what
    `tw.turn` gives. Raises `IRError`, also where all wait for flags that nobody is left to signal.
    """
    if function.attributes.get("num_ctas", 1) != 1:
        raise IRError("kernels that communicate do not run in clusters", function.loc)
    bound = [_bind(function, given) for given in arguments]
    interpreter_comm.link_ranks(function.params, bound)
    random = None if seed is None else Random(seed)
    world = interpreter_comm.World(len(bound), random, turn)
    full = _full_grid(grid)
    total = math.prod(full)
    count = min(total, DEFAULT_BLOCKS) if blocks is None else blocks
    users = interpreter_async.ring_users(function)
    steps = []
    for rank, values in enumerate(bound):
        for block in range(count):
            thread = Thread(f"rank {rank}, block {block}")
            if function.attributes.get("persistent"):
                programs = [Program(function, full, None, block, count, ring_users=users)]
            else:
                numbers = range(block, total, count)
                programs = [Program(function, full, _place(n, full), n, total, ring_users=users) for n in numbers]
            for program in programs:
                program.world, program.world_rank = world, rank
            steps.append((thread, _run_in_turn(thread, programs, values)))
    with np.errstate(all="ignore"):
        interpreter_async.drive(steps, random)
    world.finish()


def _run_in_turn(block: Thread, programs: Sequence[Program], arguments: dict[Value, Any]) -> Steps:
    """What one block executes, one program after the other."""
    name = block.name
    for program in programs:
        block.name = name if program.ids is None else f"{name}, program {program.ids}"
        thread = Thread(block.name)
        program.threads, program.peers = [thread], [program]
        yield from _function_body(Frame(program, thread, dict(arguments)))
        interpreter_async.finish_program(program)


def _full_grid(grid: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(int(n) for n in grid), 1, 1, 1)[:3]
    return x, y, z


def _place(number: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """A program's place in the grid; x runs fastest."""
    return number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1])


def _run_blocks(programs: list[Program], arguments: dict[Value, Any], users: dict[Value, Any]) -> None:
    """Run one program, or the blocks of a cluster."""
    steps = []
    for rank, program in enumerate(programs):
        thread = Thread("the kernel" if len(programs) == 1 else f"block {rank}")
        program.threads, program.peers, program.ring_users = [thread], programs, users
        steps.append((thread, _function_body(Frame(program, thread, dict(arguments)))))
    interpreter_async.drive(steps)
    for program in programs:
        interpreter_async.finish_program(program)


def _function_body(frame: Frame) -> Steps:
    """The code outside roles; roles that follow each other start together."""
    for op in frame.program.function.body.block.ops:
        if frame.pending_roles and op.effect and type(op) not in interpreter_async.ROLES:
            yield from interpreter_async.run_roles(frame)
        yield from execute(frame, op)
    yield from interpreter_async.run_roles(frame)
    interpreter_async.finish_thread(frame.thread, None)
    frame.program.ended = True


# --- arguments --------------------------------------------------------------------------------


def _bind(function: Function, arguments: Mapping[str, Any] | Sequence[Any]) -> dict[Value, Any]:
    names = [p.hint for p in function.params]
    if isinstance(arguments, Mapping):
        if set(arguments) != set(names):
            raise IRError(f"@{function.name} takes {', '.join(names)}; got {', '.join(arguments)}", function.loc)
        arguments = [arguments[name] for name in names]
    if len(arguments) != len(names):
        raise IRError(f"@{function.name} takes {len(names)} arguments, got {len(arguments)}", function.loc)
    values: dict[Value, Any] = {}
    for param, argument in zip(function.params, arguments, strict=True):
        try:
            values[param] = _argument(param, argument)
        except (Trap, TypeError) as error:
            raise IRError(f"argument %{param.hint} of @{function.name}: {error}", function.loc) from None
    return values


def _argument(param: Value, argument: Any) -> Any:
    type_ = param.type
    if isinstance(type_, ScalarType):
        return numerics.constant(argument, type_.dtype)
    if not isinstance(type_, ViewType):
        raise Trap(f"the interpreter takes no arguments of type {type_}")
    array = argument
    if not isinstance(array, np.ndarray) or array.dtype != NUMPY[type_.dtype]:
        raise Trap(f"expected an array of {NUMPY[type_.dtype]}, got {getattr(array, 'dtype', type(array).__name__)}")
    if array.ndim != type_.rank or any(n not in (None, m) for n, m in zip(type_.shape, array.shape, strict=True)):
        raise Trap(f"an array of shape {array.shape} is no {type_}")
    for want, stride, size in zip(type_.strides, array.strides, array.shape, strict=True):
        if array.size and size > 1 and want is not None and want * array.itemsize != stride:
            raise Trap(f"an array with strides of {array.strides} bytes is no {type_}")
    return View(array, (0,) * array.ndim)


# --- memory -----------------------------------------------------------------------------------


@rule(t.Load)
def _load(frame: Frame, op: t.Load) -> Any:
    return load_tile(frame.read(op.view), frame.ints(op.index), _shape(op.result), op.pad)


@rule(t.Element)
def _element(frame: Frame, op: t.Element) -> Any:
    index = frame.ints(op.index)
    return load_tile(frame.read(op.view), index, (1,) * len(index), op.pad).reshape(())[()]


@rule(t.Store)
def _store(frame: Frame, op: t.Store) -> None:
    store_tile(frame.read(op.view), frame.ints(op.index), frame.read(op.value))


@rule(t.Dim)
def _dim(frame: Frame, op: t.Dim) -> Any:
    return np.int32(frame.read(op.view).array.shape[op.axis])


@rule(t.Subview)
def _subview(frame: Frame, op: t.Subview) -> View:
    view, index = frame.read(op.view), frame.ints(op.index)
    places = [o + i for o, i in zip(view.origin, index, strict=False)]
    for place, size in zip(places, view.array.shape, strict=False):
        if not 0 <= place < size:
            raise Trap(f"index {place} is outside a dimension of size {size}")
    # an empty tuple selects the whole array, as it should; with the ellipsis an element stays an array
    return view.derive(lambda array: array[(*places, ...)], view.origin[len(places) :])


@rule(t.PermuteView)
def _permute_view(frame: Frame, op: t.PermuteView) -> View:
    view = frame.read(op.view)
    return view.derive(lambda array: array.transpose(op.perm), tuple(view.origin[p] for p in op.perm))


@rule(t.OffsetView)
def _offset_view(frame: Frame, op: t.OffsetView) -> View:
    view = frame.read(op.view)
    origin = tuple(o + d for o, d in zip(view.origin, frame.ints(op.offsets), strict=True))
    return View(view.array, origin, view.ranks)


# --- values -----------------------------------------------------------------------------------


@rule(t.Constant)
def _constant(frame: Frame, op: t.Constant) -> Any:
    # made once a program: constants inside loops are common
    value = frame.program.cache.get(op.result)
    if value is None:
        scalar = numerics.constant(op.value, element_type(op.result.type))
        value = np.broadcast_to(scalar, _shape(op.result)) if isinstance(op.result.type, TileType) else scalar
        frame.program.cache[op.result] = value
    return value


@rule(t.Iota)
def _iota(frame: Frame, op: t.Iota) -> Any:
    (size,) = _shape(op.result)
    return np.arange(op.start, op.start + size).astype(_dtype(op.result))


@rule(t.Splat)
def _splat(frame: Frame, op: t.Splat) -> Any:
    return np.broadcast_to(frame.read(op.source), _shape(op.result))


@rule(t.ExpandDims)
def _expand_dims(frame: Frame, op: t.ExpandDims) -> Any:
    return np.expand_dims(frame.read(op.source), op.axis)


@rule(t.Broadcast)
def _broadcast(frame: Frame, op: t.Broadcast) -> Any:
    return np.broadcast_to(frame.read(op.source), _shape(op.result))


@rule(t.Reshape)
def _reshape(frame: Frame, op: t.Reshape) -> Any:
    return frame.read(op.source).reshape(_shape(op.result))


@rule(t.Transpose)
def _transpose(frame: Frame, op: t.Transpose) -> Any:
    return frame.read(op.source).transpose(op.perm)


@rule(t.Pick)
def _pick(frame: Frame, op: t.Pick) -> Any:
    return frame.read(op.source)[frame.read(op.index)]


@rule(t.Extract)
def _extract(frame: Frame, op: t.Extract) -> Any:
    where = tuple(slice(o, o + n) for o, n in zip(op.offsets, _shape(op.result), strict=True))
    return frame.read(op.source)[where]


@rule(t.Unary)
def _unary(frame: Frame, op: t.Unary) -> Any:
    return numerics.unary(op.fn, frame.read(op.source))


@rule(t.Binary)
def _binary(frame: Frame, op: t.Binary) -> Any:
    return numerics.binary(op.fn, frame.read(op.lhs), frame.read(op.rhs))


@rule(t.Compare)
def _compare(frame: Frame, op: t.Compare) -> Any:
    return numerics.compare(op.fn, frame.read(op.lhs), frame.read(op.rhs))


@rule(t.Select)
def _select(frame: Frame, op: t.Select) -> Any:
    return np.where(frame.read(op.condition), frame.read(op.on_true), frame.read(op.on_false))


@rule(t.Cast)
def _cast(frame: Frame, op: t.Cast) -> Any:
    return numerics.cast(frame.read(op.source), element_type(op.result.type))


@rule(t.Bitcast)
def _bitcast(frame: Frame, op: t.Bitcast) -> Any:
    return numerics.bitcast(frame.read(op.source), element_type(op.result.type))


@rule(t.Reduce)
def _reduce(frame: Frame, op: t.Reduce) -> Any:
    return numerics.reduce(op.fn, frame.read(op.source), op.axis)


@rule(t.Scan)
def _scan(frame: Frame, op: t.Scan) -> Any:
    return numerics.scan(op.fn, frame.read(op.source), op.axis)


@rule(t.Cat)
def _cat(frame: Frame, op: t.Cat) -> Any:
    return np.concatenate(frame.reads(op.sources), axis=op.axis)


@rule(t.Dot)
def _dot(frame: Frame, op: t.Dot) -> Any:
    a, b = (interpreter_async.tile_or_slot(frame, v) for v in (op.a, op.b))
    return numerics.dot(a, b, frame.read(op.acc))


@rule(t.Convert)
def _convert(frame: Frame, op: t.Convert) -> Any:
    return frame.read(op.source)


# --- program and control flow -----------------------------------------------------------------


@rule(t.ProgramId)
def _program_id(frame: Frame, op: t.ProgramId) -> Any:
    if frame.program.ids is None:
        raise Trap("a persistent kernel has no program_id; it walks the grid by block_id")
    return np.int32(frame.program.ids[op.axis])


@rule(t.NumPrograms)
def _num_programs(frame: Frame, op: t.NumPrograms) -> Any:
    return np.int32(frame.program.grid[op.axis])


@rule(t.BlockId)
def _block_id(frame: Frame, op: t.BlockId) -> Any:
    return np.int32(frame.program.block_id)


@rule(t.NumBlocks)
def _num_blocks(frame: Frame, op: t.NumBlocks) -> Any:
    return np.int32(frame.program.num_blocks)


@rule(t.For)
def _for(frame: Frame, op: t.For) -> Steps:
    lo, hi, step = frame.ints([op.lo, op.hi, op.step])
    if step <= 0:
        raise Trap(f"step {step} is not positive")
    index, carried = _dtype(op.index).type, [frame.raw(v) for v in op.inits]
    for i in range(lo, hi, step):
        carried = yield from run_region(frame, op.body, [index(i), *carried])
    return carried


@rule(t.If)
def _if(frame: Frame, op: t.If) -> Steps:
    chosen = op.then_body if frame.read(op.condition) else op.else_body
    return (yield from run_region(frame, chosen))


@rule(t.While)
def _while(frame: Frame, op: t.While) -> Steps:
    carried = [frame.raw(v) for v in op.inits]
    while True:
        (go_on,) = yield from run_region(frame, op.condition, carried)
        if not go_on:
            return carried
        carried = yield from run_region(frame, op.body, carried)


def _shape(value: Value) -> tuple[int, ...]:
    assert isinstance(value.type, TileType)
    return value.type.shape


def _dtype(value: Value) -> np.dtype[Any]:
    return NUMPY[element_type(value.type)]


__all__ = ["DEFAULT_BLOCKS", "interpreter_cluster", "interpreter_indexed", "interpreter_packets", "run", "run_ranks"]
