"""What a materialised mask of attention says, read from the part of Dynamo's graph that computes it.

Models build masks from positions: ``arange`` along keys compared with ``arange`` along queries, joined by "and", cast,
expanded, turned into 0 and -inf. A mask that is nothing but the causal one, or a window of it, need not exist.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.torch.graphs import CALLS, example, is_tensor, writes

_FOREVER = float("inf")


@dataclass(frozen=True)
class Positions:
    """Integers that count along one axis (-1: keys, -2: queries), from ``start``."""

    axis: int
    start: int


@dataclass(frozen=True)
class Band:
    """Where ``low <= key - query <= high``; None for either bound that is absent."""

    low: float = -_FOREVER
    high: float = _FOREVER

    def __and__(self, other: Band) -> Band:
        return Band(max(self.low, other.low), min(self.high, other.high))

    def inverted(self) -> Band | None:
        """Everything else, where that is a band too."""
        if self.low == -_FOREVER and self.high < _FOREVER:
            return Band(low=self.high + 1)
        if self.high == _FOREVER and self.low > -_FOREVER:
            return Band(high=self.low - 1)
        return None


@dataclass(frozen=True)
class Additive:
    """0 inside of a band, and outside what makes weights vanish."""

    band: Band


@dataclass(frozen=True)
class Constant:
    """The same number or truth value everywhere."""

    value: Any


Meaning = Positions | Band | Additive | Constant | None


def band_of(mask: Any) -> Band | None:
    """The band that is all a mask says, a truth value or a summand; None if it says more or nothing is known."""
    reader = _Reader()
    meaning = reader.read(mask)
    if meaning is None or reader.changed(mask.graph):
        return None
    if isinstance(meaning, Additive):
        return meaning.band
    return meaning if isinstance(meaning, Band) else None


class _Reader:
    """Meanings of nodes, each found once."""

    def __init__(self) -> None:
        self._known: dict[Any, Meaning] = {}

    def read(self, node: Any) -> Meaning:
        """What a node's value, or a constant, means."""
        if not isinstance(node, torch.fx.Node):
            return Constant(node) if isinstance(node, bool | int | float) else None
        if node not in self._known:
            rule = _RULES.get(node.target) if node.op in CALLS else None
            self._known[node] = rule(self, node) if rule is not None and is_tensor(node) else None
        return self._known[node]

    def changed(self, graph: Any) -> bool:
        """Whether the graph writes to one of the values that were read, or to a view of one."""
        for node in graph.nodes:
            target = node.args[0] if writes(node) and node.args else None
            while isinstance(target, torch.fx.Node):
                if target in self._known:
                    return True
                target = target.args[0] if target.args else None
        return False


def _argument(node: Any, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _arange(reader: _Reader, node: Any) -> Meaning:
    if len(node.args) > 2 or node.kwargs.get("step", 1) != 1:
        return None
    start = node.args[0] if len(node.args) == 2 else node.kwargs.get("start", 0)
    return Positions(-1, start) if isinstance(start, int) else None


def _same(reader: _Reader, node: Any) -> Meaning:
    """Casts and copies; a truth value that is cast to numbers is something else."""
    meaning = reader.read(node.args[0])
    if isinstance(meaning, Band) and example(node).dtype != torch.bool:
        return None
    if isinstance(meaning, Positions) and example(node).dtype == torch.bool:
        return None
    return meaning


def _unsqueeze(reader: _Reader, node: Any) -> Meaning:
    meaning, rank = reader.read(node.args[0]), example(node).ndim
    dim = _argument(node, 1, "dim") % rank
    return _moved(meaning, [None if i == dim else 0 for i in range(rank)])


def _getitem(reader: _Reader, node: Any) -> Meaning:
    """New axes of length one; parts are not followed."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(item is not None and item is not Ellipsis and item != slice(None) for item in index):
        return None
    missing = example(node.args[0]).ndim - sum(item == slice(None) for item in index if item is not Ellipsis)
    axes: list[Any] = []
    for item in index:
        axes += [0] * missing if item is Ellipsis else [item if item is None else 0]
    if Ellipsis not in index:
        axes += [0] * missing
    return _moved(reader.read(node.args[0]), axes)


def _moved(meaning: Meaning, axes: list[Any]) -> Meaning:
    """A meaning behind new axes, which are the Nones among the axes of the result."""
    new_behind = [sum(axis is None for axis in axes[i:]) for i, axis in enumerate(axes) if axis is not None]
    if isinstance(meaning, Positions):
        return Positions(meaning.axis - new_behind[meaning.axis], meaning.start)
    if isinstance(meaning, Band | Additive):
        return meaning if not any(new_behind[-2:]) else None
    return meaning


def _view(reader: _Reader, node: Any) -> Meaning:
    """A reshape that only puts axes of length one around an axis of positions."""
    meaning, shape = reader.read(node.args[0]), example(node).shape
    long = [i for i, size in enumerate(shape) if size != 1]
    if isinstance(meaning, Positions) and example(node.args[0]).ndim == 1 and len(long) == 1:
        return Positions(long[0] - len(shape), meaning.start)
    return None


def _expand(reader: _Reader, node: Any) -> Meaning:
    return reader.read(node.args[0]) if _covers(node.args[0], node) else None


def _covers(node: Any, result: Any) -> bool:
    """Whether a value has the queries and keys of a result: it was not one row or column that is repeated."""
    return example(node).shape[-2:] == example(result).shape[-2:]


def _shifted(sign: int) -> Callable[[_Reader, Any], Meaning]:
    def rule(reader: _Reader, node: Any) -> Meaning:
        left, right = map(reader.read, node.args[:2])
        if sign > 0 and isinstance(left, Constant):
            left, right = right, left
        if isinstance(left, Positions) and isinstance(right, Constant) and isinstance(right.value, int):
            return Positions(left.axis, left.start + sign * right.value)
        return None

    return rule


def _compared(low: int | None, high: int | None) -> Callable[[_Reader, Any], Meaning]:
    """A comparison of keys (left) with queries that holds where low <= key - query <= high."""

    def rule(reader: _Reader, node: Any) -> Meaning:
        left, right = map(reader.read, node.args[:2])
        if not isinstance(left, Positions) or not isinstance(right, Positions):
            return None
        shift = right.start - left.start  # of indices against positions
        bounds = (-_FOREVER if low is None else low + shift, _FOREVER if high is None else high + shift)
        if (left.axis, right.axis) == (-1, -2):
            return Band(*bounds)
        if (left.axis, right.axis) == (-2, -1):
            return Band(-bounds[1], -bounds[0])
        return None

    return rule


def _and(reader: _Reader, node: Any) -> Meaning:
    left, right = map(reader.read, node.args[:2])
    for known, other, operand in ((left, right, node.args[1]), (right, left, node.args[0])):
        if isinstance(known, Constant) and known.value is True:
            return other if _covers(operand, node) else None
    if not isinstance(left, Band) or not isinstance(right, Band) or not all(_covers(n, node) for n in node.args[:2]):
        return None
    return left & right


def _not(reader: _Reader, node: Any) -> Meaning:
    meaning = reader.read(node.args[0])
    return meaning.inverted() if isinstance(meaning, Band) else None


def _filled(value: Any) -> Callable[[_Reader, Any], Meaning]:
    def rule(reader: _Reader, node: Any) -> Meaning:
        return Constant(value if example(node).dtype != torch.bool else bool(value))

    return rule


def _full(reader: _Reader, node: Any) -> Meaning:
    value = _argument(node, 2 if node.target == "new_full" else 1, "fill_value")
    return reader.read(value)


def _triangle(upper: bool) -> Callable[[_Reader, Any], Meaning]:
    def rule(reader: _Reader, node: Any) -> Meaning:
        meaning, diagonal = reader.read(node.args[0]), _argument(node, 1, "diagonal", 0)
        if not isinstance(meaning, Constant) or not isinstance(diagonal, int):
            return None
        kept = Band(low=diagonal) if upper else Band(high=diagonal)
        if meaning.value is True:
            return kept
        outside = kept.inverted()  # zeros are there
        return Additive(outside) if _hides(meaning.value, example(node)) and outside is not None else None

    return rule


def _where(reader: _Reader, node: Any) -> Meaning:
    if len(node.args) != 3:
        return None
    band, inside, outside = map(reader.read, node.args)
    if not _covers(node.args[0], node):
        return None
    return _additive(band, inside, outside, example(node))


def _masked_fill(reader: _Reader, node: Any) -> Meaning:
    inside, band, value = map(reader.read, node.args[:3])
    kept = band.inverted() if isinstance(band, Band) and _covers(node.args[1], node) else None
    return _additive(kept, inside, value, example(node))


def _additive(band: Meaning, inside: Meaning, outside: Meaning, result: Any) -> Meaning:
    if not isinstance(band, Band) or not isinstance(inside, Constant) or not isinstance(outside, Constant):
        return None
    if inside.value is True and outside.value is False:
        return band
    return Additive(band) if inside.value == 0 and _hides(outside.value, result) else None


def _hides(value: Any, result: Any) -> bool:
    """Whether a summand makes every weight vanish: -inf, or the least finite number as models write it."""
    return isinstance(value, float) and result.dtype.is_floating_point and value <= torch.finfo(result.dtype).min


def _scalar(reader: _Reader, node: Any) -> Meaning:
    return reader.read(node.args[0]) if node.args else None


_RULES: dict[Any, Callable[[_Reader, Any], Meaning]] = {
    torch.arange: _arange,
    **dict.fromkeys(("to", "bool", "int", "long", "float", "contiguous", "clone", "type_as", "type"), _same),
    **dict.fromkeys(("expand", "expand_as", torch.broadcast_to, "broadcast_to"), _expand),
    **dict.fromkeys(("unsqueeze", torch.unsqueeze), _unsqueeze),
    operator.getitem: _getitem,
    **dict.fromkeys(("view", "reshape", torch.reshape), _view),
    **dict.fromkeys((operator.add, torch.add, "add"), _shifted(1)),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _shifted(-1)),
    **dict.fromkeys((operator.le, torch.le, "le"), _compared(None, 0)),
    **dict.fromkeys((operator.lt, torch.lt, "lt"), _compared(None, -1)),
    **dict.fromkeys((operator.ge, torch.ge, "ge"), _compared(0, None)),
    **dict.fromkeys((operator.gt, torch.gt, "gt"), _compared(1, None)),
    **dict.fromkeys((operator.and_, torch.logical_and, torch.bitwise_and, "logical_and"), _and),
    **dict.fromkeys((operator.invert, torch.logical_not, torch.bitwise_not, "logical_not"), _not),
    **dict.fromkeys((torch.ones, torch.ones_like, "new_ones"), _filled(1)),
    **dict.fromkeys((torch.zeros, torch.zeros_like, "new_zeros"), _filled(0)),
    **dict.fromkeys((torch.full, torch.full_like, "new_full"), _full),
    **dict.fromkeys((torch.tril, "tril"), _triangle(upper=False)),
    **dict.fromkeys((torch.triu, "triu"), _triangle(upper=True)),
    torch.where: _where,
    **dict.fromkeys((torch.masked_fill, "masked_fill"), _masked_fill),
    torch.tensor: _scalar,
}


__all__ = ["Band", "band_of"]
