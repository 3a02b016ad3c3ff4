"""Exchange between the lanes of a warp (PTX ISA 9.7.9.6 shfl, 9.7.12.9 to 9.7.12.15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.decode import Instruction
from tilewright.runtime.emulator.nvidia.operands import Reader, dest, source
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import LANES, TYPES, Array

_U32 = np.uint32
_LANE = np.arange(LANES)


def unpack_mask(words: Array) -> Array:
    """uint32 [...] -> bool [..., 32]."""
    return (words[..., None] >> _LANE.astype(_U32) & _U32(1)).astype(np.bool_)


def ballot(lanes: Array) -> Array:
    """bool [warps, 32] -> uint32 [warps, 1]."""
    return np.packbits(lanes, axis=1, bitorder="little").view(_U32)


def members(inst: Instruction, operand: syntax.Operand) -> Reader:
    """Lanes named by the membermask of each warp: bool [selected, 32]. Faults where lanes disagree on it."""
    read = inst.membermask = source(inst, operand, "b32")

    def get(state: State) -> Array:
        mask = np.broadcast_to(read(state), state.lanes.shape)
        state.require_defined("the membermask")
        first = mask[np.arange(state.count), state.lanes.argmax(axis=1)]
        if (state.lanes & (mask != first[:, None])).any():
            state.fault("the lanes of a warp name different membermasks")
        named = unpack_mask(first)
        missing = named & ~state.lanes & ~state.exited[state.w] & np.any(state.lanes, axis=1, keepdims=True)
        if missing.any():
            state.fault("the membermask names lanes that do not execute this instruction", missing.any(axis=1))
        absent = state.lanes & ~named
        if absent.any():
            state.fault("a lane that is not in its own membermask", absent)
        return named

    return get


@instruction("shfl.sync", gathers="warp")
def _shuffle(inst: Instruction) -> Execute:
    """d{|p}, a, b, c, membermask: c holds the clamp (bits 4:0) and the segment mask (12:8)."""
    mode = inst.one_of("up", "down", "bfly", "idx")
    inst.type("b32")
    destination = inst.operands[0]
    first = destination.first if isinstance(destination, syntax.Pair) else destination
    write = dest(inst, first, "b32")
    write_inside = dest(inst, destination.second, "pred") if isinstance(destination, syntax.Pair) else None
    value, offset, clamp = (source(inst, operand, "b32") for operand in inst.operands[1:4])
    mask = members(inst, inst.operands[4])

    def execute(state: State) -> None:
        mask(state)
        shape = state.lanes.shape
        b = np.broadcast_to(offset(state), shape).astype(np.int64) & 31
        c = np.broadcast_to(clamp(state), shape).astype(np.int64)
        state.require_defined("a lane number")
        segment, limit = c >> 8 & 31, c & 31
        low = _LANE & segment
        high = low | limit & ~segment
        if mode == "up":
            lane = _LANE - b
            inside = lane >= low | limit & ~segment
        elif mode == "down":
            lane = _LANE + b
            inside = lane <= high
        elif mode == "bfly":
            lane = _LANE ^ b
            inside = lane <= high
        else:
            lane = low | b & ~segment
            inside = lane <= high
        lane = np.where(inside, lane, np.broadcast_to(_LANE, shape))
        data = np.broadcast_to(value(state), shape)
        if state.taint is not None:  # what is received is as undefined as what its lane sent
            sent = np.take_along_axis(state.taint, lane, axis=1)
            state.taint = None
            state.add_taint(sent)
        asleep = ~np.take_along_axis(state.lanes, lane, axis=1)
        if asleep.any():
            state.add_taint(asleep)  # the value of a lane that takes no part is undefined
        write(state, np.take_along_axis(data, lane, axis=1))
        if write_inside is not None:
            state.taint = None
            write_inside(state, inside)

    return execute


@instruction("vote.sync", gathers="warp")
def _vote(inst: Instruction) -> Execute:
    mode = inst.one_of("all", "any", "uni", "ballot")
    inst.type("pred", "b32")
    read, mask = source(inst, inst.operands[1], "pred"), members(inst, inst.operands[2])
    write = dest(inst, inst.operands[0], "b32" if mode == "ballot" else "pred")

    def execute(state: State) -> None:
        mask(state)
        value = read(state) & state.lanes
        if state.taint is not None:
            state.taint = np.broadcast_to(state.taint.any(axis=1, keepdims=True), state.lanes.shape)
        everyone = (value == state.lanes).all(axis=1, keepdims=True)
        anyone = value.any(axis=1, keepdims=True)
        if mode == "ballot":
            write(state, ballot(value))
        else:
            write(state, {"all": everyone, "any": anyone, "uni": everyone | ~anyone}[mode])

    return execute


@instruction("match.any.sync", "match.all.sync", gathers="warp")
def _match(inst: Instruction) -> Execute:
    type_ = inst.type("b32", "b64")
    destination = inst.operands[0]
    pair = isinstance(destination, syntax.Pair)
    first = destination.first if isinstance(destination, syntax.Pair) else destination
    write = dest(inst, first, "b32")
    write_all = dest(inst, destination.second, "pred") if isinstance(destination, syntax.Pair) else None
    read, mask = source(inst, inst.operands[1], type_), members(inst, inst.operands[2])
    every = inst.name == "match.all.sync"

    def execute(state: State) -> None:
        mask(state)
        value = np.broadcast_to(read(state), state.lanes.shape)
        state.require_defined("a matched value")
        same = (value[:, :, None] == value[:, None, :]) & state.lanes[:, None, :]
        words = np.packbits(same, axis=2, bitorder="little").view(_U32)[..., 0]
        if every:
            agreed = (same | ~state.lanes[:, None, :]).all(axis=2)
            words = np.where(agreed, ballot(state.lanes), _U32(0))
            if write_all is not None:
                write_all(state, agreed)
        write(state, words)

    assert every or not pair
    return execute


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("redux.sync", gathers="warp")
def _redux(inst: Instruction) -> Execute:
    operation = inst.one_of(*_REDUCTIONS)
    type_ = inst.type("u32", "s32", "b32")
    write = dest(inst, inst.operands[0], type_)
    read, mask = source(inst, inst.operands[1], type_), members(inst, inst.operands[2])
    ufunc: Any = _REDUCTIONS[operation]
    info = np.iinfo(type_.dtype)
    neutral = {"min": info.max, "max": info.min, "and": type_.dtype(-1) if type_.kind == "s" else info.max}

    def execute(state: State) -> None:
        mask(state)
        value = read(state)
        state.require_defined("a reduced value")
        value = np.where(state.lanes, value, type_.dtype(neutral.get(operation, 0)))
        write(state, ufunc.reduce(value, axis=1, keepdims=True, dtype=type_.dtype))

    return execute


@instruction("elect.sync", gathers="warp")
def _elect(inst: Instruction) -> Execute:
    """d|p: the leader's lane and whether this is it. The lowest lane of the mask leads."""
    destination = inst.operands[0]
    assert isinstance(destination, syntax.Pair)
    write, write_leads = dest(inst, destination.first, "b32"), dest(inst, destination.second, "pred")
    mask = members(inst, inst.operands[1])

    def execute(state: State) -> None:
        leader = mask(state).argmax(axis=1)[:, None]
        write(state, leader.astype(_U32))
        write_leads(state, leader == _LANE)

    return execute


@instruction("activemask")
def _activemask(inst: Instruction) -> Execute:
    write = dest(inst, inst.operands[0], inst.type("b32"))
    return lambda state: write(state, ballot(state.lanes))


@instruction("bar.warp.sync", gathers="warp")
def _warp_barrier(inst: Instruction) -> Execute:
    mask = members(inst, inst.operands[0])

    def execute(state: State) -> None:
        mask(state)
        if state.launch.ordering is not None:
            state.launch.ordering.meet(state)

    return execute


__all__ = ["TYPES", "ballot", "members", "unpack_mask"]
