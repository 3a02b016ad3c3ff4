"""Lowering of ``comm.send`` and ``comm.receive``: each thread's words of a tile with the launch's number beside them.

A packet is one int64 that is written and read atomically, so that its upper half vouches for the lower one. Every
thread polls the packets of the elements that it holds, and needs neither barriers nor fences for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import gcd

from tilewright.backends.lower.comm import Awaited, launch_number, line_of, poll
from tilewright.backends.lower.context import Lowering, Registers, lowers
from tilewright.backends.lower.coordinates import TileCoordinates, sole_holder
from tilewright.backends.lower.elements import from_memory, join_vector, memory_type, split_vector, to_memory
from tilewright.backends.lower.index import IntLike
from tilewright.backends.lower.memory import run_if
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import packet_ops
from tilewright.ir.comm_ops import view_root
from tilewright.ir.core import Value
from tilewright.ir.layout import LinearLayout
from tilewright.ir.types import DType, TileType

#: bytes of a packet, and packets of one access
PACKET, ACROSS = 8, 2


@dataclass
class _Words:
    """The packets that a thread writes or reads: ``registers`` of each in the order of bytes, and their addresses."""

    registers: list[list[int]]
    #: of the first packet of each access, with how many follow each other there
    runs: list[tuple[mlir.Value, int]]

    @classmethod
    def of(cls, lw: Lowering, view: Value, tile: Value, layout: LinearLayout) -> _Words:
        math, fb, bytes_ = lw.index, lw.fb, _dtype(tile).bytes
        shape, coordinates = layout.tile_shape, TileCoordinates(lw, layout)
        steps = [1]
        for size in reversed(shape[1:]):
            steps.insert(0, steps[0] * size)
        each = max(1, packet_ops.PAYLOAD // bytes_)
        places = {sum(c * s for c, s in zip(own, steps, strict=True)): r for r, own in _once(coordinates.register)}
        firsts = [place for place in sorted(places) if place % each == 0]
        whole = len(firsts) * each == len(places) and all(p + i in places for p in firsts for i in range(each))
        if not whole or bytes_ > packet_ops.PAYLOAD or not _thread_has(coordinates, each):
            raise lw.error("a thread holds parts of packets only: the tile's layout does not suit them")
        base, held, runs, number = lw.view(view), set(firsts), [], 0
        aligned = gcd(base.align, base.stride_align) % (ACROSS * PACKET) == 0
        across = ACROSS if aligned and _thread_has(coordinates, ACROSS * each) else 1
        while number < len(firsts):
            place = firsts[number]
            count = across if place % (across * each) == 0 and place + (across - 1) * each in held else 1
            element: IntLike = 0
            for axis, (step, part) in enumerate(zip(steps, coordinates.register[places[place]], strict=True)):
                element = math.add(element, math.mul(coordinates.along(axis, part), step))
            packet = math.add(base.offset, math.wide(fb.lshr(math.value(element), each.bit_length() - 1)))
            runs.append((fb.gep(base.base, math.value(math.mul(packet, PACKET), 64)), count))
            number += count
        return cls([[places[place + i] for i in range(each)] for place in firsts], runs)


def _once(registers: list[list[int]]) -> list[tuple[int, list[int]]]:
    """The registers that hold different elements."""
    seen: dict[tuple[int, ...], int] = {}
    for number, own in enumerate(registers):
        seen.setdefault(tuple(own), number)
    return [(number, list(own)) for own, number in seen.items()]


def _thread_has(coordinates: TileCoordinates, run: int) -> bool:
    """Whether a thread's elements come in aligned runs of so many in memory: lanes and warps move by whole runs."""
    last = coordinates.layout.rank - 1
    return coordinates.layout.tile_shape[last] % run == 0 and not coordinates.masks[last] & (run - 1)


def _dtype(tile: Value) -> DType:
    assert isinstance(tile.type, TileType)
    return tile.type.dtype


@lowers(packet_ops.Send)
def lower_send(lw: Lowering, op: packet_ops.Send) -> None:
    fb, layout, values = lw.fb, lw.layout(op.value), lw.registers(op.value)
    dtype = _dtype(op.value)

    def send() -> None:
        words = _Words.of(lw, op.view, op.value, layout)
        number = fb.shl(fb.zext(launch_number(lw), fb.types.i64), 32)
        packets = []
        for registers in words.registers:
            parts = [to_memory(lw, values[r], dtype) for r in registers]
            payload = fb.bitcast(join_vector(lw, parts), fb.types.i32)
            packets.append(fb.or_(fb.zext(payload, fb.types.i64), number))
        for pointer, count in words.runs:
            lw.ops.store_words(lw, pointer, [packets.pop(0) for _ in range(count)])

    run_if(lw, sole_holder(lw, layout), send)


@lowers(packet_ops.Receive)
def lower_receive(lw: Lowering, op: packet_ops.Receive) -> None:
    fb, layout, i64 = lw.fb, lw.layout(op.result), lw.fb.types.i64
    words, number = _Words.of(lw, op.view, op.result, layout), launch_number(lw)
    dtype, count = _dtype(op.result), len(words.registers)

    def look() -> tuple[mlir.Value, Registers]:
        found = [word for pointer, run in words.runs for word in lw.ops.load_words(lw, pointer, run)]
        tags = [fb.icmp("eq", fb.trunc(fb.lshr(word, 32), fb.types.i32), number) for word in found]
        return reduce(fb.and_, tags), found

    view = lw.view(op.view)
    param = lw.function.params.index(view_root(op.view))
    awaited = Awaited(
        words.runs[0][0], lw.index.value(lw.index.narrow(view.offset)), fb.i32(-1), line_of(op.loc), param
    )
    found = poll(lw, look, awaited, types=[i64] * count)
    registers: dict[int, mlir.Value] = {}
    for word, held in zip(found, words.registers, strict=True):
        payload = fb.bitcast(fb.trunc(word, fb.types.i32), memory_type(lw, dtype, len(held)))
        for register, part in zip(held, split_vector(lw, payload, len(held)), strict=True):
            registers[register] = from_memory(lw, part, dtype)
    firsts = {tuple(own): r for r, own in reversed(list(enumerate(layout.table("register").tolist())))}
    lw.define(op.result, [registers[firsts[tuple(own)]] for own in layout.table("register").tolist()])
