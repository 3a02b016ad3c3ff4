"""Lowering of `tile.scan`: running totals by doubling, one bit of the coordinate at a time.

Before step b every element knows the total of its run of 2^b elements up to itself, and the total of the whole run.
A step joins neighbouring runs: the elements of the upper one add the lower run's total. Who owns the bit decides how
the totals meet: registers of one thread, a shuffle between lanes, scratch memory between warps. Copies of the core
(sizes that are no power of two) follow one after the other. The order depends on the layout alone.
"""

from __future__ import annotations

from tilewright.backends.lower import arithmetic
from tilewright.backends.lower.context import Lowering, Registers, lowers
from tilewright.backends.lower.coordinates import check_threads
from tilewright.backends.lower.elements import (
    from_memory,
    from_words,
    is_small_float,
    memory_type,
    round_to,
    to_memory,
    to_words,
    widen,
)
from tilewright.backends.lower.shared import shared_address, shared_pointer
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import tile_ops
from tilewright.ir.layout import LinearLayout
from tilewright.ir.scratch import AxisBit, scan_bits
from tilewright.ir.types import DType, element_type, f32

_COMBINE = {"sum": "add"}
_ANY = (-(2**63), 2**63 - 1)
Coordinate = tuple[int, ...]


@lowers(tile_ops.Scan)
def lower_scan(lw: Lowering, op: tile_ops.Scan) -> None:
    layout, dtype = lw.layout(op.source), element_type(op.source.type)
    if layout != lw.layout(op.result):
        raise lw.error("source and result have different layouts: the layout pass must insert tile.convert")
    check_threads(lw, layout)
    held = [widen(lw, x, dtype) for x in lw.registers(op.source)]
    scan = _Scan(lw, op, layout, f32 if is_small_float(dtype) else dtype, held)
    for bit, owner in enumerate(scan_bits(layout, op.axis)):
        scan.step(1 << bit, owner)
    scan.join_copies()
    lw.define(op.result, round_to(lw, scan.results(), dtype))


class _Scan:
    """The running totals (``prefix``) and run totals of the elements that the thread holds, by coordinate."""

    def __init__(self, lw: Lowering, op: tile_ops.Scan, layout: LinearLayout, dtype: DType, held: Registers):
        self.lw, self.op, self.layout, self.dtype, self.axis = lw, op, layout, dtype, op.axis
        self.table: list[Coordinate] = [tuple(c) for c in layout.table("register").tolist()]
        self.prefix: dict[Coordinate, mlir.Value] = dict(zip(self.table, held, strict=True))
        self.total = dict(self.prefix)

    def combine(self, low: mlir.Value, high: mlir.Value) -> mlir.Value:
        return arithmetic.binary(self.lw, _COMBINE[self.op.fn], low, high, self.dtype, (_ANY, _ANY))

    def results(self) -> Registers:
        return [self.prefix[coordinate] for coordinate in self.table]

    def step(self, distance: int, owner: AxisBit) -> None:
        if owner.dim == "register":
            self._step_in_thread(distance)
        else:
            self._step_across(owner)

    def _step_in_thread(self, distance: int) -> None:
        joined: dict[tuple[mlir.Value, mlir.Value], mlir.Value] = {}
        total = {}
        for coordinate, own in self.total.items():
            other = self.total[self._moved(coordinate, coordinate[self.axis] ^ distance)]
            upper = bool(coordinate[self.axis] & distance)
            pair = (other, own) if upper else (own, other)
            if pair not in joined:
                joined[pair] = self.combine(*pair)
            total[coordinate] = joined[pair]
            if upper:
                self.prefix[coordinate] = self.combine(other, self.prefix[coordinate])
        self.total = total

    def _moved(self, coordinate: Coordinate, place: int) -> Coordinate:
        return (*coordinate[: self.axis], place, *coordinate[self.axis + 1 :])

    def _step_across(self, owner: AxisBit) -> None:
        lw, fb = self.lw, self.lw.fb
        index = lw.scope.lane if owner.dim == "lane" else lw.scope.warp
        upper = fb.icmp("ne", fb.and_(index, 1 << owner.position), 0)
        distinct = list(dict.fromkeys(self.total.values()))
        exchange = self._from_lane if owner.dim == "lane" else self._from_warp
        others = dict(zip(distinct, exchange(distinct, owner.position), strict=True))
        joined = {own: self.combine(own, other) for own, other in others.items()}  # sums commute
        for coordinate, own in self.total.items():
            before = self.prefix[coordinate]
            self.prefix[coordinate] = fb.select(upper, self.combine(others[own], before), before)
            self.total[coordinate] = joined[own]

    def _from_lane(self, values: Registers, position: int) -> Registers:
        lw, received = self.lw, []
        for value in values:
            words = [lw.ops.shuffle_xor(lw, word, 1 << position) for word in to_words(lw, value, self.dtype)]
            received.append(from_words(lw, words, self.dtype))
        return received

    def _from_warp(self, values: Registers, position: int) -> Registers:
        lw, fb = self.lw, self.lw.fb
        if self.op.scratch is None:
            raise lw.error("warps exchange totals, but no scratch is set: the shared-memory plan must run first")
        base, size = shared_address(lw, self.op.scratch), self.dtype.bytes
        threads = self.layout.num_lanes * self.layout.num_warps
        partner = fb.xor(lw.scope.thread, self.layout.num_lanes << position)

        def place(number: int, thread: mlir.Value) -> mlir.Value:
            return shared_pointer(lw, fb.add(base, fb.mul(fb.add(thread, number * threads), size)))

        lw.ops.barrier(lw, "role")  # whoever used the scratch before has read it
        for number, value in enumerate(values):
            fb.store(to_memory(lw, value, self.dtype), place(number, lw.scope.thread), size)
        lw.ops.barrier(lw, "role")
        type_ = memory_type(lw, self.dtype)
        return [from_memory(lw, fb.load(place(n, partner), type_, size), self.dtype) for n in range(len(values))]

    def join_copies(self) -> None:
        """Add to each copy of the core along the axis the total of those before it."""
        length = self.layout.shape[self.axis]
        carries: dict[Coordinate, mlir.Value] = {}
        for copy in range(1, self.layout.repeat[self.axis]):
            for coordinate in [c for c in self.prefix if c[self.axis] // length == copy]:
                before = self._moved(coordinate, coordinate[self.axis] - length)
                last = self.total[before]
                carry = last if copy == 1 else self._joined(carries, before, last)
                carries[coordinate] = carry
                self.prefix[coordinate] = self.combine(carry, self.prefix[coordinate])

    def _joined(self, carries: dict[Coordinate, mlir.Value], before: Coordinate, last: mlir.Value) -> mlir.Value:
        return self.combine(carries[before], last)
