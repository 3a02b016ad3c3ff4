"""Lowering of `tile.convert`: a renaming of registers, shuffles inside the warp, or slices through scratch memory.

`tilewright.ir.layout_convert` plans; here the plan is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

from tilewright.backends.lower.context import Lowering, Registers, lowers
from tilewright.backends.lower.coordinates import check_threads, sole_holder
from tilewright.backends.lower.elements import (
    element,
    from_memory,
    from_words,
    join_vector,
    memory_type,
    split_vector,
    to_memory,
    to_words,
)
from tilewright.backends.lower.memory import run_if
from tilewright.backends.lower.shared import SharedAccess, shared_address
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir import tile_ops
from tilewright.ir.layout import ExchangePlan, LinearLayout, SharedLayout, ShufflePlan
from tilewright.ir.layout_exchange import Part
from tilewright.ir.layout_shuffle import Turn
from tilewright.ir.scratch import convert_plan
from tilewright.ir.types import DType, element_type


@lowers(tile_ops.Convert)
def lower_convert(lw: Lowering, op: tile_ops.Convert) -> None:
    plan, held, dtype = convert_plan(op), lw.registers(op.source), element_type(op.source.type)
    source, result = lw.layout(op.source), lw.layout(op.result)
    if plan.registers is not None:
        lw.define(op.result, [held[position] for position in plan.registers])
        return
    check_threads(lw, source)
    check_threads(lw, result)
    if plan.shuffles is not None:
        lw.define(op.result, _shuffled(lw, plan.shuffles, held, dtype))
        return
    if op.scratch is None:
        raise lw.error("the conversion goes through shared memory, but no scratch is set: run the shared-memory plan")
    base = shared_address(lw, op.scratch)
    if plan.exchange is not None:
        lw.define(op.result, _exchanged(lw, plan.exchange, base, source, held, dtype))
    elif plan.whole is not None:
        lw.define(op.result, _through(lw, plan.whole, base, source, result, held, dtype))


# --- shuffles -------------------------------------------------------------------------------------


def _shuffled(lw: Lowering, plan: ShufflePlan, held: Registers, dtype: DType) -> Registers:
    received: list[list[list[mlir.Value]]] = []
    for copy in plan.sent:
        words = [_pack(lw, [held[register] for register in word], dtype) for word in copy]
        words = _turned(lw, words, plan.before)
        asked = _asked_lane(lw, plan)
        arrived = [[_taken(lw, plan, part, step.lane, asked) for part in words[step.word]] for step in plan.rounds]
        received.append([_unpack(lw, w, dtype, len(copy[0])) for w in _turned(lw, arrived, plan.after)])
    return [received[copy][word][position] for copy, word, position in plan.received]


def _asked_lane(lw: Lowering, plan: ShufflePlan) -> mlir.Value | None:
    """The lane asked in a round, without the round's own part; None where shuffles are at a fixed XOR distance."""
    if plan.is_xor:
        return None
    math, scope = lw.index, lw.scope
    lane = math.xor(math.linear_map(scope.lane, plan.lane_map), math.linear_map(scope.warp, plan.warp_map))
    return math.value(lane)


def _taken(lw: Lowering, plan: ShufflePlan, word: mlir.Value, lane: int, asked: mlir.Value | None) -> mlir.Value:
    if asked is None:
        return lw.ops.shuffle_xor(lw, word, lane) if lane else word
    return lw.ops.shuffle(lw, word, lw.index.value(lw.index.xor(asked, lane)))


def _turned(lw: Lowering, words: list[list[mlir.Value]], turns: Sequence[Turn]) -> list[list[mlir.Value]]:
    for turn in turns:
        odd = _parity(lw, turn)
        words = [
            [lw.fb.select(odd, other, own) for own, other in zip(word, words[j ^ turn.step], strict=True)]
            for j, word in enumerate(words)
        ]
    return words


def _parity(lw: Lowering, turn: Turn) -> mlir.Value:
    """i1: whether an odd number of the turn's bits is set in this thread's lane and warp."""
    fb, scope = lw.fb, lw.scope
    sides = [(scope.lane, turn.lanes), (scope.warp, turn.warps)]
    parts = [fb.and_(value, fb.i32(mask)) for value, mask in sides if mask]
    if len(parts) == 1 and (turn.lanes | turn.warps).bit_count() == 1:
        return fb.icmp("ne", parts[0], 0)
    counts = [fb.intrinsic("llvm.ctpop.i32", fb.types.i32, [part]) for part in parts]
    return fb.icmp("ne", fb.and_(reduce(fb.add, counts), fb.i32(1)), 0)


def _pack(lw: Lowering, elements: Registers, dtype: DType) -> list[mlir.Value]:
    """Elements as one i32 (two for 64 bits)."""
    if len(elements) == 1:
        return to_words(lw, elements[0], dtype)
    fb, bits = lw.fb, len(elements) * max(8, dtype.bits)
    whole = fb.bitcast(join_vector(lw, [to_memory(lw, x, dtype) for x in elements]), fb.types.int(bits))
    return [whole if bits == 32 else fb.zext(whole, fb.types.i32)]


def _unpack(lw: Lowering, words: Sequence[mlir.Value], dtype: DType, count: int) -> Registers:
    if count == 1:
        return [from_words(lw, words, dtype)]
    fb, bits = lw.fb, count * max(8, dtype.bits)
    whole = words[0] if bits == 32 else fb.trunc(words[0], fb.types.int(bits))
    elements = split_vector(lw, fb.bitcast(whole, memory_type(lw, dtype, count)), count)
    return [from_memory(lw, x, dtype) for x in elements]


# --- scratch memory -------------------------------------------------------------------------------


def _exchanged(
    lw: Lowering, plan: ExchangePlan, base: mlir.Value, source: LinearLayout, held: Registers, dtype: DType
) -> Registers:
    writer = SharedAccess(lw, base, plan.memory, plan.writer, dtype)
    reader = SharedAccess(lw, base, plan.memory, plan.reader, dtype)
    holder = sole_holder(lw, source)
    results: dict[int, mlir.Value] = {}
    for write, read in zip(plan.writes, plan.reads, strict=True):
        lw.ops.barrier(lw, "role")  # whoever used the scratch before has read it
        values = [held[register] for register in write.registers]
        run_if(lw, _both(lw, holder, _takes_part(lw, write)), partial(writer.fresh().store, values))
        lw.ops.barrier(lw, "role")
        results |= zip(read.registers, _read(lw, reader, read, results, dtype), strict=True)
    return [results[register] for register in plan.equal]


def _read(lw: Lowering, reader: SharedAccess, part: Part, results: dict[int, mlir.Value], dtype: DType) -> Registers:
    """One slice; threads that take no part keep what they have."""
    condition = _takes_part(lw, part)
    if condition is None:
        return reader.load()
    type_ = element(lw, dtype)
    before = [results[r] if r in results else lw.fb.poison(type_) for r in part.registers]
    return list(lw.fb.if_else(condition, [type_] * len(before), reader.fresh().load, lambda: before))


def _takes_part(lw: Lowering, part: Part) -> mlir.Value | None:
    condition = None
    for lanes, warps, odd in part.threads:
        parity = _parity(lw, Turn(lanes, warps, 0))
        condition = _both(lw, condition, parity if odd else lw.fb.not_(parity))
    return condition


def _both(lw: Lowering, x: mlir.Value | None, y: mlir.Value | None) -> mlir.Value | None:
    if x is None or y is None:
        return y if x is None else x
    return lw.fb.and_(x, y)


def _through(
    lw: Lowering,
    shared: SharedLayout,
    base: mlir.Value,
    source: LinearLayout,
    result: LinearLayout,
    held: Registers,
    dtype: DType,
) -> Registers:
    """The whole tile at once."""
    lw.ops.barrier(lw, "role")  # whoever used the scratch before has read it
    writer = SharedAccess(lw, base, shared, source, dtype)
    run_if(lw, sole_holder(lw, source), lambda: writer.store(held))
    lw.ops.barrier(lw, "role")
    return SharedAccess(lw, base, shared, result, dtype).load()
