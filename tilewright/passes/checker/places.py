"""Places in the memory that ranks share: boxes of elements of one rank's tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.ir.comm_ops import Peer
from tilewright.ir.core import Value
from tilewright.ir.tile_ops import OffsetView, PermuteView, Subview
from tilewright.ir.types import ViewType
from tilewright.passes.checker.trace import Run

#: for each dimension the first element and the one behind the last
Box = tuple[tuple[int, int], ...]
#: all of a dimension, whatever its size
EVERYTHING = (-(1 << 40), 1 << 40)


@dataclass(frozen=True, slots=True)
class Place:
    """Elements of the tensor ``root`` of a rank. ``exact``: the program alone decides which, not its data."""

    root: Value
    rank: int
    box: Box
    exact: bool = True

    @property
    def label(self) -> str:
        """The tensor as a message names it."""
        return f"%{self.root.hint} of rank {self.rank}"

    def elements(self) -> list[tuple[int, ...]]:
        """Each element's index, row-major."""
        found: list[tuple[int, ...]] = [()]
        for first, end in self.box:
            found = [(*index, i) for index in found for i in range(first, end)]
        return found

    def __str__(self) -> str:
        parts = [str(first) if end == first + 1 else f"{first}:{end}" for first, end in self.box]
        return f"[{', '.join(parts)}] of {self.label}"


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes of one tensor have an element in common."""
    for (a, b), (c, d) in zip(one, other, strict=True):
        if a >= d or c >= b:
            break
    else:
        return True
    return False


#: what gives a place, from an execution's environment
FindPlace = Callable[[Run], Place]


def tile_place(view: Value, index: Sequence[Value], shape: Sequence[int], exact: bool) -> FindPlace:
    """The tile at ``index``, counted in tiles."""
    sizes = list(zip(index, shape, strict=True))
    return _find(view, lambda run: [(run.env[i] * n, run.env[i] * n + n) for i, n in sizes], exact)


def gathered_place(
    view: Value, index: Sequence[Value], shape: Sequence[int], axes: Sequence[int], exact: bool
) -> FindPlace:
    """A tile whose coordinates along ``axes`` are data: they may be any."""
    free = [axis for axis in range(_rank(view)) if axis not in axes]

    def box(run: Run) -> list[tuple[int, int]]:
        found = [EVERYTHING] * _rank(view)
        for axis, value in zip(free, index, strict=True):
            found[axis] = run.env[value] * shape[axis], (run.env[value] + 1) * shape[axis]
        return found

    return _find(view, box, exact)


def whole_place(view: Value, size: Callable[[Run, int], int], exact: bool) -> FindPlace:
    """All of a view. ``size`` gives that of each of its dimensions."""
    return _find(view, lambda run: [(0, size(run, axis)) for axis in range(_rank(view))], exact)


def first_place(view: Value) -> FindPlace:
    """The first element of a view, which stands for all of it."""
    return _find(view, lambda run: [(0, 1)] * _rank(view), True)


def _rank(view: Value) -> int:
    assert isinstance(view.type, ViewType)
    return view.type.rank


def _find(view: Value, box: Callable[[Run], list[tuple[int, int]]], exact: bool) -> FindPlace:
    """From a box of a view to one of the tensor that it was derived from, and whose tensor that is."""
    chain: list[Any] = []
    while isinstance(view.op, Subview | PermuteView | OffsetView | Peer):
        chain.append(view.op)
        view = view.op.view
    root, peers = view, [op.rank for op in chain if isinstance(op, Peer)]

    def find(run: Run) -> Place:
        found = box(run)
        for op in chain:
            found = _STEPS[type(op)](run, op, found)
        rank = run.env[peers[0]] if peers else run.inputs.rank
        return Place(root, rank, tuple(found), exact)

    return find


def _out_of_subview(run: Run, op: Any, box: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [*((run.env[i], run.env[i] + 1) for i in op.index), *box]


def _out_of_permuted(run: Run, op: Any, box: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found = list(box)
    for axis, source in enumerate(op.perm):
        found[source] = box[axis]
    return found


def _out_of_moved(run: Run, op: Any, box: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(a + run.env[o], b + run.env[o]) for (a, b), o in zip(box, op.offsets, strict=True)]


_STEPS: dict[type, Callable[[Run, Any, list[tuple[int, int]]], list[tuple[int, int]]]] = {
    Subview: _out_of_subview,
    PermuteView: _out_of_permuted,
    OffsetView: _out_of_moved,
    Peer: lambda run, op, box: box,
}

__all__ = ["Box", "FindPlace", "Place", "first_place", "gathered_place", "overlap", "tile_place", "whole_place"]
