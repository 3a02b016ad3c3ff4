"""Which small inputs the checker tries: sizes that make loops run 0, 1, 2 and more times than a ring has stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import lcm
from random import Random
from typing import Any

from tilewright.ir.async_ops import Acquire, Await
from tilewright.ir.core import Block, Operation, Value
from tilewright.ir.tile_ops import Binary, Constant, Dim, For, While
from tilewright.ir.types import ScalarType, ViewType
from tilewright.passes.analysis import backward_slice, enclosing_operations
from tilewright.passes.checker.model import Model
from tilewright.passes.checker.scalars import root_axis

#: longer periods of stage counts are not kept when loops are shortened
MOST_PERIOD = 24


@dataclass(eq=False)
class Inputs:
    """Sizes, scalars and the place in the grid of one block. ``most_trips``: of longer loops only so many run."""

    dims: dict[tuple[Value, int], int] = field(default_factory=dict)
    scalars: dict[Value, Any] = field(default_factory=dict)
    grid: tuple[int, int, int] = (1, 1, 1)
    ids: tuple[int, int, int] = (0, 0, 0)
    block: int = 0
    blocks: int = 1
    #: of a kernel that communicates
    rank: int = 0
    world: int = 2
    seed: int = 0
    most_trips: int | None = None
    period: int = 1

    def of_block(self, rank: int) -> Inputs:
        """The same for another block of the cluster whose first one this is."""
        return self if rank == 0 else replace(self, block=self.block + rank)

    def __str__(self) -> str:
        parts = [f"{param.hint}.shape[{axis}] = {size}" for (param, axis), size in self.dims.items()]
        parts += [f"{param.hint} = {value}" for param, value in self.scalars.items()]
        parts.append(f"grid {'x'.join(map(str, self.grid))}, block {self.block} of {self.blocks}")
        return ", ".join(parts)


@dataclass
class Leaves:
    """The sizes and scalars that decide control flow, each with the step at which loops run once more."""

    dims: dict[tuple[Value, int], int] = field(default_factory=dict)
    scalars: dict[Value, int] = field(default_factory=dict)


def find_leaves(model: Model, needed: Iterable[Value]) -> Leaves:
    """``needed``: the values that decide the schedule's course."""
    leaves, loops = Leaves(), enclosing_operations(model.function)
    params = set(model.function.params)
    steps: list[tuple[Value, int]] = []
    for value in needed:
        op = value.op
        found = _leaf(value, params)
        if isinstance(found, tuple):
            leaves.dims.setdefault(found, 1)
        elif found is not None:
            leaves.scalars.setdefault(found, 1)
        if isinstance(op, Binary) and op.fn == "floordiv" and isinstance(op.rhs.op, Constant):
            steps.append((op.lhs, int(op.rhs.op.value)))
    for loop in loops.values():
        if isinstance(loop, For) and isinstance(loop.step.op, Constant):
            steps.append((loop.hi, int(loop.step.op.value)))
    for value, step in steps:
        if step > 1:
            _set_steps(leaves, backward_slice([value], loops), step, params)
    order = {param: number for number, param in enumerate(model.function.params)}
    leaves.dims = dict(sorted(leaves.dims.items(), key=lambda item: (order[item[0][0]], item[0][1])))
    leaves.scalars = dict(sorted(leaves.scalars.items(), key=lambda item: order[item[0]]))
    return leaves


def _leaf(value: Value, params: set[Value]) -> tuple[Value, int] | Value | None:
    op = value.op
    if isinstance(op, Dim):
        root, axis = root_axis(op.view, op.axis)
        known = isinstance(root.type, ViewType) and root.type.shape[axis] is not None
        return None if known or root.op is not None else (root, axis)
    return value if value in params and isinstance(value.type, ScalarType) else None


def _set_steps(leaves: Leaves, values: Iterable[Value], step: int, params: set[Value]) -> None:
    for value in values:
        found = _leaf(value, params)
        if isinstance(found, tuple) and found in leaves.dims:
            leaves.dims[found] = max(leaves.dims[found], step)
        elif found in leaves.scalars and isinstance(found, Value):
            leaves.scalars[found] = max(leaves.scalars[found], step)


def scenarios(model: Model, leaves: Leaves) -> Iterator[Inputs]:
    """Inputs to try, the smallest first: the first to fail gives the shortest sequence."""
    many = model.most_stages + 2
    period = lcm(*(len(slots) for slots in model.buffers.values()), *(r.stages for r in model.rings.values()))
    period = period if period <= MOST_PERIOD else model.most_stages
    # where loops do not run, the tile behind the last stage's shows whether the first was handed over
    patterns: list[tuple[tuple[int, ...], int]] = [((1,), 1), ((2,), 2), ((0,), _few_tiles(model))]
    if len(leaves.dims) + len(leaves.scalars) > 1:
        patterns += [((1, 3), 2), ((many, 1), 2), ((0, many), 2)]  # one ring wraps while others stand still
    patterns.append(((many,), 2))
    if model.rings:
        patterns.append(((1,), _outer_stages(model) + 2))
    for number, (trips, tiles) in enumerate(patterns):
        yield _inputs(model, leaves, trips, tiles, number, many, period)


def _inputs(
    model: Model, leaves: Leaves, trips: tuple[int, ...], tiles: int, number: int, many: int, period: int
) -> Inputs:
    persistent = bool(model.function.attributes.get("persistent"))
    inputs = Inputs(seed=number, most_trips=many + 1, period=period, world=1 + number % 3)
    inputs.rank = number // 3 % inputs.world
    items: list[tuple[Any, int]] = [*leaves.dims.items(), *leaves.scalars.items()]
    for position, (leaf, step) in enumerate(items):
        size = trips[position % len(trips)] * step
        if isinstance(leaf, tuple):
            inputs.dims[leaf] = size - step // 2 if size and number % 2 else size  # ragged every other time
        elif leaf.type.dtype.name == "i1":
            inputs.scalars[leaf] = bool(number % 2)
        elif leaf.type.dtype.is_float:
            inputs.scalars[leaf] = float(size)
        else:
            inputs.scalars[leaf] = size
    if persistent:
        inputs.grid, inputs.blocks = (tiles, 1, 1) if number % 2 else (1, tiles, 1), model.program_blocks
        if model.ctas > 1:
            inputs.grid, inputs.blocks = _cluster_grid(model, tiles, number), model.ctas
    else:
        inputs.grid, inputs.blocks = (2, 2, 1), 4
        inputs.ids = (number % 2, number // 2 % 2, 0)
        inputs.block = inputs.ids[0] + 2 * inputs.ids[1]
    return inputs


def _cluster_grid(model: Model, tiles: int, number: int) -> tuple[int, int, int]:
    """A grid of ``tiles`` groups of programs for one cluster, across its axis or along it, where the last is short."""
    axis = int(model.function.attributes.get("cluster_axis", 0))
    along, across = (tiles * model.ctas, 1) if number % 2 else (1 + number % model.ctas, tiles)
    sizes = [1, 1, 1]
    sizes[axis], sizes[(axis + 1) % 3] = max(1, along - number % 3 // 2), across
    return (sizes[0], sizes[1], sizes[2])


def more_scenarios(model: Model, leaves: Leaves, count: int) -> Iterator[Inputs]:
    """Sizes that have nothing to do with each other, for code that the usual ones do not reach."""
    random = Random(0)
    for number in range(count):
        inputs = _inputs(model, leaves, (2,), 2, number, model.most_stages + 2, 1)
        for leaf, step in leaves.dims.items():
            inputs.dims[leaf] = _any_size(random, step)
        for scalar, step in leaves.scalars.items():
            if isinstance(inputs.scalars[scalar], int) and not isinstance(inputs.scalars[scalar], bool):
                inputs.scalars[scalar] = _any_size(random, step)
        yield inputs


def _any_size(random: Random, step: int) -> int:
    return max(0, random.randrange(4) * step + random.choice((0, 0, 1, step // 2)))


def with_more_tiles(model: Model, inputs: Inputs) -> Inputs:
    """The same sizes for a persistent block that runs so many tiles that its rings wrap around."""
    if not model.function.attributes.get("persistent"):
        return inputs
    if model.ctas > 1:
        return replace(inputs, grid=_cluster_grid(model, model.most_stages + 2, inputs.seed))
    x, _, _ = inputs.grid
    return replace(inputs, grid=(x, -(-(model.most_stages + 2) // x), 1))


def larger(model: Model, leaves: Leaves, inputs: Inputs) -> Iterator[Inputs]:
    """The same with one size at a time so much larger that rings wrap around in loops that it bounds."""
    for leaf, step in leaves.dims.items():
        yield replace(inputs, dims={**inputs.dims, leaf: inputs.dims[leaf] + (model.most_stages + 2) * step})


def _few_tiles(model: Model) -> int:
    """One more than the stages of any ring that is used once a tile, and than roles that take tiles in turn."""
    return 1 + max(_stages_by_tile(model), 2 if _tiles_in_turn(model) else 1)


def _outer_stages(model: Model) -> int:
    """The stages of the deepest ring that is used once a tile; of any ring where roles take tiles in turn."""
    return model.most_stages + 1 if _tiles_in_turn(model) else _stages_by_tile(model)


def _stages_by_tile(model: Model) -> int:
    deepest, loops = 1, enclosing_operations(model.function)
    for op in model.ops:
        if isinstance(op, Acquire) and _depth(op, loops) <= 1:
            deepest = max(deepest, model.rings[op.ring].stages)
    return deepest


def _tiles_in_turn(model: Model) -> bool:
    """Whether roles hand turns to each other: by rings that nobody needs to acquire."""
    acquired = {op.ring for op in model.ops if isinstance(op, Acquire)}
    return any(isinstance(op, Await) and op.ring not in acquired for op in model.ops)


def _depth(op: Operation, loops: dict[Block, Operation]) -> int:
    depth, block = 0, op.parent
    while block in loops:
        depth += isinstance(loops[block], For | While)
        block = loops[block].parent
    return depth
