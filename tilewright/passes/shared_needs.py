"""How much shared memory a function will need, asked before its buffers exist.

Passes that choose how many stages a load gets try a number and look at the worst moment. Loops that follow each other
share memory, so what counts is who lives at the same time (`shared_lifetimes`); places are found as `shared_plan` does.
What only later passes decide counts as if it came to the worst: operands that threads compute are exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tilewright.ir.async_ops import Alloc
from tilewright.ir.core import Function, Operation, Value
from tilewright.ir.scratch import SCRATCH_ALIGNMENT
from tilewright.ir.tile_ops import Dot, Reduce, Scan
from tilewright.ir.types import BufferType, SlotType, TileType, element_type
from tilewright.passes.analysis import trace_load
from tilewright.passes.shared_lifetimes import Item, Lifetime, Lifetimes, lowest_places

#: scratch takes turns
_SCRATCH = 0


class SharedNeeds:
    """The needs of a function as it is; buffers to come are asked about with `bytes_with`."""

    def __init__(self, function: Function):
        self._lifetimes = Lifetimes(function)
        self._fixed = [*self._allocated(function), *self._exchanged(function)]

    def lifetime(self, ops: Sequence[Operation]) -> Lifetime:
        """From the first to the last of some operations, with all that is inside them."""
        spans = [self._lifetimes.span[op] for op in ops]
        return Lifetime(min(s.first for s in spans), max(s.last for s in spans))

    def bytes_with(self, buffers: Iterable[tuple[Operation, SlotType, int, Lifetime]]) -> int:
        """Bytes at the worst moment with more buffers: their loads, slots, stages and lifetimes."""
        items = [
            Item(load, BufferType(stages, slot).bytes, slot.layout.alignment, life)
            for load, slot, stages, life in buffers
        ]
        items = sorted([*items, *self._fixed], key=lambda item: (item.group is not None, -item.alignment, -item.size))
        return max((area.first + area.size for area in lowest_places(items).values()), default=0)

    def _allocated(self, function: Function) -> Iterator[Item]:
        for op in function.walk():
            if isinstance(op, Alloc) and isinstance(op.result.type, BufferType):
                type_ = op.result.type
                yield Item(op, type_.bytes, type_.slot.layout.alignment, self._lifetimes.of(op))

    def _exchanged(self, function: Function) -> Iterator[Item]:
        """What reductions and layout conversions of computed operands may want later."""
        warps = int(function.attributes.get("num_warps", 0))
        for op in function.walk():
            if isinstance(op, Reduce | Scan):  # each warp its partial results, as far as there are elements for it
                size = op.result.type.size if isinstance(op.result.type, TileType) else 1
                tile = op.source.type
                parts = min(warps, tile.shape[op.axis]) if isinstance(tile, TileType) else 1
                yield self._scratch(op, parts * size * element_type(op.result.type).bytes, [op])
            if isinstance(op, Dot):
                computed = [(v, v.type) for v in (op.a, op.b) if isinstance(v.type, TileType) and not _is_placed(v)]
                if computed:
                    size = max(type_.size * type_.dtype.bytes for _, type_ in computed)
                    makers = [v.op for v, _ in computed if v.op is not None]
                    yield self._scratch(op, size, [op, *makers])

    def _scratch(self, owner: Operation, size: int, ops: Sequence[Operation]) -> Item:
        return Item(owner, size, SCRATCH_ALIGNMENT, self.lifetime(ops), _SCRATCH)


def _is_placed(value: Value) -> bool:
    load, _ = trace_load(value)
    return load is not None and load.shared is not None


__all__ = ["SharedNeeds"]
