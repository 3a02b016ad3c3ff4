"""Asynchronous copies (PTX ISA 9.7.9.25 "Asynchronous copy"): cp.async, bulk and tensor copies.

A copy into shared memory lands as late as it can: when no warp can run without it, or with a seed at
any time before. A bulk store reads shared memory as late as its ``wait_group.read``, and writes as
late as its ``wait_group``, or the end of the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.memory import BASE
from tilewright.runtime.emulator.nvidia import syntax
from tilewright.runtime.emulator.nvidia.access import atomic_function
from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.launch import BulkStore, Work
from tilewright.runtime.emulator.nvidia.mbarrier import change, find_barrier, landed
from tilewright.runtime.emulator.nvidia.operands import Reader, integer, location, source
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.shared_memory import GRAIN
from tilewright.runtime.emulator.nvidia.spaces import SHARED_WINDOW, peer
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.tensor_map import TensorMap, decode_tensor_map
from tilewright.runtime.emulator.nvidia.types import TYPES, Array, Type
from tilewright.runtime.emulator.races import DEVICE, WEAK

SHARED_SPACES = ("shared::cta", "shared::cluster", "shared")


def swizzled_grains(first: int, count: int, swizzle: int) -> Array:
    """Where ``count`` 16-byte grains from grain ``first`` on lie: address bits 4-6 are XORed with bits 7-9
    (PTX ISA 5.5.7 "Swizzling modes"; 64 and 32 bytes use the low two and one of them)."""
    grains = first + np.arange(count)
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    result: Array = grains ^ (grains >> 3 & mask) if swizzle else grains
    return result


# --- what both kinds of bulk copies share -----------------------------------------------------------


class _Operands:
    """Readers of the operands of a bulk copy, which one lane usually executes."""

    def __init__(self, inst: Instruction) -> None:
        self.inst = inst
        self.reads: dict[str, Reader] = {}

    def add(self, name: str, read: Reader) -> None:
        self.reads[name] = read

    def rows(self, state: State) -> list[tuple[int, int, dict[str, int]]]:
        """(warp, lane, operand values) of every active lane."""
        values = {name: np.broadcast_to(read(state), state.lanes.shape) for name, read in self.reads.items()}
        state.require_defined("an operand of the copy")
        warps = state.selected().tolist()
        rows, lanes = np.nonzero(state.lanes)
        return [
            (warps[row], lane, {name: int(value[row, lane]) for name, value in values.items()})
            for row, lane in zip(rows.tolist(), lanes.tolist(), strict=True)
        ]


def _memory(operand: syntax.Operand) -> syntax.Memory:
    if not isinstance(operand, syntax.Memory):
        raise Problem("an operand must be an address")
    return operand


def address_of(inst: Instruction, operand: syntax.Operand) -> Reader:
    memory = _memory(operand)
    return location(inst, memory.base, memory.offset)


def shared_place(address: int) -> int:
    """A shared address given as such or as a generic one."""
    return address - SHARED_WINDOW if address >= SHARED_WINDOW else address


def take_hints(inst: Instruction) -> bool:
    """Take the hints; drop the operands that belong to them. Whether this copy multicasts."""
    if inst.flag("L2::cache_hint"):
        inst.operands = inst.operands[:-1]
    return inst.flag("multicast::cluster")


def _publish_check(state: State, warp: int, place: int, block: int) -> None:
    if not find_barrier(state, warp, place, block).published:
        state.fault(
            "the mbarrier has been initialised, but no fence (mbarrier_init or proxy.async) has made it visible to "
            "the async proxy",
            warp=warp,
        )


def _start_load(
    state: State,
    warp: int,
    lane: int,
    start: int,
    size: int,
    barrier_place: int,
    fetch: Callable[[], Array],
    swizzle: int,
    touched: tuple[Array, int],
    block: int | None = None,
) -> None:
    """Queue a copy of ``size`` bytes, which ``fetch`` reads when it lands, to ``start`` of a block (the warp's).

    ``touched``: the offsets in global memory that it reads, and the bytes at each.
    """
    launch, block = state.launch, int(state.block[warp]) if block is None else block
    _publish_check(state, warp, barrier_place, block)
    launch.shared.expect(state, block, start, size)
    records = []
    if launch.ordering is not None:
        target = block * launch.shared.pitch + np.arange(start, start + size, GRAIN)
        records = [
            launch.ordering.issue(state, "shared", [warp], lane, target, GRAIN, writes=True),
            launch.ordering.issue(state, "global", [warp], lane, *touched, writes=False),
        ]

    def complete(state: State) -> None:
        shared = launch.shared
        data = fetch()
        where = swizzled_grains(start // GRAIN, size // GRAIN, swizzle) + block * shared.grains_per_block
        shared.grains[where] = data.view(np.uint8).reshape(-1, GRAIN)
        shared.arrived(block, start, size)
        barrier = find_barrier(state, warp, barrier_place, block)
        landed(state, block, barrier, records)
        change(state, block, barrier, 0, -size, warp)

    assert state.instruction is not None
    launch.copies.append(Work(block, warp, state.instruction, complete))
    launch.effects += 1


def _start_store(
    state: State,
    warp: int,
    lane: int,
    start: int,
    size: int,
    swizzle: int,
    write: Callable[[Array], None],
    touched: tuple[Array, int],
    reduces: bool,
) -> None:
    """Queue a copy of ``size`` bytes from ``start`` of the warp's block; ``write`` takes them in order.

    ``touched`` as of `_start_load`; what ``reduces`` does so atomically, .relaxed.gpu (9.7.9.25.4.2).
    """
    launch, block = state.launch, int(state.block[warp])
    shared = launch.shared
    if not shared.first <= start <= start + size <= shared.size:
        state.fault(f"a bulk copy from shared memory out of range: {size} bytes at {start} of {shared.size}", warp=warp)
    grains = swizzled_grains(start // GRAIN, size // GRAIN, swizzle) + block * shared.grains_per_block
    shared.check_async_read(state, grains, "a bulk copy reads")
    if not shared.written_grains[grains].view(np.uint8).all():
        state.fault("a bulk copy reads shared memory that was never written", warp=warp)
    shared.hold(grains)
    buffer: list[Array] = []

    assert state.instruction is not None
    store = BulkStore(
        block, state.instruction, lambda: buffer.append(shared.grains[grains].copy()), lambda: write(buffer[0]),
        lambda: shared.release(grains),
    )  # fmt: skip
    ordering = launch.ordering
    if ordering is not None:
        strength = DEVICE if reduces else WEAK
        store.reads.append(ordering.issue(state, "shared", [warp], lane, grains * GRAIN, GRAIN, writes=False))
        store.writes.append(ordering.issue(state, "global", [warp], lane, *touched, writes=True, strength=strength))
    groups = launch.stores.setdefault((warp, lane), [[]])
    groups[-1].append(store)
    launch.effects += 1


# --- tensor copies ---------------------------------------------------------------------------------


def _read_map(state: State, warp: int, address: int) -> TensorMap:
    memory = state.launch.memory
    offset = address - BASE
    if address % 64 or memory.outside(np.array([offset]), 128) is not None:
        state.fault(f"no tensor map at {address:#x}", warp=warp)
    found = decode_tensor_map(memory.data[offset : offset + 128].tobytes())
    if found is None:
        state.fault(f"what lies at {address:#x} is no tensor map", warp=warp)
    launch = state.launch
    parameters = range(launch.param_address, launch.param_address + launch.kernel.param_bytes)
    if address not in parameters and (int(state.block[warp]), address) not in launch.acquired_maps:
        state.fault(f"no fence.proxy.tensormap in the block before it uses the tensor map at {address:#x}", warp=warp)
    return found


def _window(map_: TensorMap, start: tuple[int, ...]) -> tuple[int, list[slice], list[int], list[int]]:
    """The part of a box inside the tensor: byte offset, places in the box, extents, byte strides; outermost first."""
    offset = 0
    places, extents, strides = [], [], []
    for at, dim, count, step, stride in zip(start, map_.dims, map_.box_shape, map_.steps, map_.strides, strict=True):
        low = max(0, -(at // step)) if at < 0 else 0
        high = min(count, -(-(dim - at) // step))
        high = max(high, low)
        offset += (at + low * step) * stride
        places.append(slice(low, high))
        extents.append(high - low)
        strides.append(stride * step)
    return offset, places[::-1], extents[::-1], strides[::-1]


def _view(state: State, map_: TensorMap, start: tuple[int, ...], warp: int) -> tuple[list[slice], Array] | None:
    """The elements of a box inside the tensor, shared with global memory; None if there are none."""
    offset, places, extents, strides = _window(map_, start)
    if 0 in extents:
        return None
    item = map_.dtype.itemsize
    first = map_.address - BASE + offset
    last = first + sum((n - 1) * s for n, s in zip(extents, strides, strict=True))
    memory = state.launch.memory
    if memory.outside(np.array([first, last]), item) is not None:
        state.fault(f"the tensor of the map does not lie in one allocation: {memory.describe(first + BASE)}", warp=warp)
    data = memory.data[first : last + item]
    elements = np.ndarray(tuple(extents), map_.dtype, data, 0, tuple(strides))
    return places, elements


def _touched(map_: TensorMap, start: tuple[int, ...]) -> tuple[Array, int]:
    """The offsets in global memory of a box, and the bytes at each."""
    offset, _, extents, strides = _window(map_, start)
    item = int(map_.dtype.itemsize)
    first = map_.address - BASE + offset
    if strides[-1] == item and extents[-1] * item % GRAIN == 0 and first % GRAIN == 0:
        extents, strides, item = [*extents[:-1], extents[-1] * item // GRAIN], [*strides[:-1], GRAIN], GRAIN
    places = np.full(1, first)
    for extent, stride in zip(extents, strides, strict=True):
        places = (places[:, None] + np.arange(extent) * stride).reshape(-1)
    return places, item


def _fetch_box(state: State, map_: TensorMap, start: tuple[int, ...], warp: int) -> Array:
    box = np.zeros(map_.box_shape[::-1], map_.dtype)
    found = _view(state, map_, start, warp)
    if found is not None:
        places, elements = found
        box[tuple(places)] = elements
    return box


def _rank(inst: Instruction) -> int:
    return int(inst.one_of("1d", "2d", "3d", "4d", "5d")[0])


def _tensor_operands(inst: Instruction, operands: _Operands, memory: syntax.Memory, rank: int) -> None:
    """``[map, {c0, ...}]``"""
    operands.add("map", location(inst, memory.base, memory.offset))
    (group,) = memory.extra
    parts = group.parts if isinstance(group, syntax.Group) else (group,)
    if len(parts) != rank:
        raise Problem(f"takes {rank} coordinates")
    for axis, part in enumerate(parts):
        operands.add(f"c{axis}", source(inst, part, "s32"))


def _checked_map(state: State, warp: int, rank: int, values: dict[str, int]) -> tuple[TensorMap, tuple[int, ...]]:
    map_ = _read_map(state, warp, values["map"])
    if len(map_.dims) != rank:
        state.fault(f"a copy of {rank} dimensions with a tensor map of {len(map_.dims)}", warp=warp)
    place = shared_place(values["shared"])
    if place % 128:
        state.fault(f"a tensor copy needs shared memory aligned to 128 bytes, not {place}", warp=warp)
    first = values["c0"] * map_.dtype.itemsize
    if first % 16:
        state.fault(
            f"a tensor copy begins {first} bytes into the innermost dimension, no multiple of 16: an illegal "
            "instruction on a GPU",
            warp=warp,
        )
    return map_, tuple(values[f"c{axis}"] for axis in range(rank))


@instruction("cp.async.bulk.tensor", ends_run=True)
def _tensor_copy(inst: Instruction) -> Execute:
    """Boxes of a tensor, tile mode (9.7.9.27.1.2)."""
    rank = _rank(inst)
    inst.flag("tile")
    if (inst.flag("global") and inst.modifiers and inst.modifiers[0] == "bulk_group") or "bulk_group" in inst.modifiers:
        inst.one_of(*SHARED_SPACES)
        return _tensor_store(inst, rank, None)
    inst.one_of(*SHARED_SPACES)
    inst.flag("mbarrier::complete_tx::bytes")
    multicast = take_hints(inst)
    operands = _Operands(inst)
    operands.add("shared", address_of(inst, inst.operands[0]))
    _tensor_operands(inst, operands, _memory(inst.operands[1]), rank)
    operands.add("barrier", address_of(inst, inst.operands[2]))
    if multicast:
        operands.add("mask", source(inst, inst.operands[3], "u16"))

    def execute(state: State) -> None:
        for warp, lane, values in operands.rows(state):
            map_, start = _checked_map(state, warp, rank, values)
            blocks: list[int | None] = [None]
            if multicast:
                blocks = [peer(state, warp, place) for place in range(16) if values["mask"] >> place & 1]
            for block in blocks:
                _start_load(
                    state,
                    warp,
                    lane,
                    shared_place(values["shared"]),
                    map_.box_bytes,
                    shared_place(values["barrier"]),
                    lambda map_=map_, start=start, warp=warp: _fetch_box(state, map_, start, warp),  # type: ignore[misc]
                    map_.swizzle,
                    _touched(map_, start),
                    block,
                )

    return execute


def _tensor_store(inst: Instruction, rank: int, function: str | None) -> Execute:
    inst.flag("bulk_group")
    take_hints(inst)
    operands = _Operands(inst)
    _tensor_operands(inst, operands, _memory(inst.operands[0]), rank)
    operands.add("shared", address_of(inst, inst.operands[1]))

    def execute(state: State) -> None:
        for warp, lane, values in operands.rows(state):
            map_, start = _checked_map(state, warp, rank, values)
            line = map_.dims[0] * map_.dtype.itemsize
            if line % 16 and 0 <= start[0] < map_.dims[0] < start[0] + map_.box[0]:
                state.fault(
                    f"a tensor copy stores to the end of lines of {line} bytes; a GPU goes on to a multiple of 16",
                    warp=warp,
                )

            def write(data: Array, map_: TensorMap = map_, start: tuple[int, ...] = start, warp: int = warp) -> None:
                found = _view(state, map_, start, warp)
                if found is None:
                    return
                places, elements = found
                box = data.reshape(-1).view(map_.dtype).reshape(map_.box_shape[::-1])[tuple(places)]
                elements[...] = box if function is None else _combine(function, map_.element, elements, box)

            _start_store(
                state, warp, lane, shared_place(values["shared"]), map_.box_bytes, map_.swizzle, write,
                _touched(map_, start), function is not None,
            )  # fmt: skip

    return execute


def _combine(function: str, element: str, old: Array, new: Array) -> Array:
    type_ = _element_type(element)
    result: Array = atomic_function(function, type_)(np.ascontiguousarray(old), np.ascontiguousarray(new))
    return result


def _element_type(element: str) -> Type:
    if element == "BFLOAT16":
        return TYPES["bf16"]
    prefix = {"FLOAT": "f", "UINT": "u", "INT": "s"}[element.rstrip("0123456789").removesuffix("_FTZ")]
    return TYPES[prefix + "".join(c for c in element if c.isdigit())]


@instruction("cp.reduce.async.bulk.tensor", ends_run=True)
def _tensor_reduce(inst: Instruction) -> Execute:
    """Like a store, combining with what is there."""
    rank = _rank(inst)
    inst.flag("tile"), inst.flag("global"), inst.one_of(*SHARED_SPACES)
    return _tensor_store(inst, rank, inst.one_of("add", "min", "max", "inc", "dec", "and", "or", "xor"))


@instruction("cp.async.bulk.prefetch", "cp.async.bulk.prefetch.tensor", "prefetch.tensormap")
def _prefetch(inst: Instruction) -> Execute:
    inst.modifiers.clear()
    return lambda state: None


# --- bulk copies without a tensor map ----------------------------------------------------------------


@instruction("cp.async.bulk", ends_run=True)
def _bulk_copy(inst: Instruction) -> Execute:
    """Contiguous bytes: [dst], [src], size, [mbarrier], or to global memory as part of a bulk group."""
    to_global = "bulk_group" in inst.modifiers
    inst.flag("global"), inst.one_of(*SHARED_SPACES)
    if to_global:
        return _bulk_store(inst, None)
    if inst.modifiers and inst.modifiers[0] in SHARED_SPACES:
        raise Problem("copies between shared memories are not implemented")
    inst.flag("mbarrier::complete_tx::bytes")
    take_hints(inst)
    operands = _Operands(inst)
    operands.add("shared", address_of(inst, inst.operands[0]))
    operands.add("global", address_of(inst, inst.operands[1]))
    operands.add("size", source(inst, inst.operands[2], "u32"))
    operands.add("barrier", address_of(inst, inst.operands[3]))

    def execute(state: State) -> None:
        for warp, lane, values in operands.rows(state):
            offset, size, start = _checked_range(state, warp, values)
            _start_load(
                state,
                warp,
                lane,
                start,
                size,
                shared_place(values["barrier"]),
                lambda offset=offset, size=size: state.launch.memory.data[offset : offset + size].copy(),  # type: ignore[misc]
                0,
                (np.arange(offset, offset + size, GRAIN), GRAIN),
            )

    return execute


def _checked_range(state: State, warp: int, values: dict[str, int]) -> tuple[int, int, int]:
    """Global offset, size and shared address, all multiples of 16."""
    offset, size, start = values["global"] - BASE, values["size"], shared_place(values["shared"])
    if offset % 16 or size % 16 or start % 16 or size <= 0:
        state.fault(
            f"a bulk copy of {size} bytes from or to {start} and {values['global']:#x}: not multiples of 16", warp=warp
        )
    if state.launch.memory.outside(np.array([offset]), size) is not None:
        state.fault(f"a bulk copy outside any allocation: {state.launch.memory.describe(values['global'])}", warp=warp)
    return offset, size, start


def _bulk_store(inst: Instruction, combine: Callable[[Array, Array], Array] | None) -> Execute:
    inst.flag("bulk_group")
    take_hints(inst)
    operands = _Operands(inst)
    operands.add("global", address_of(inst, inst.operands[0]))
    operands.add("shared", address_of(inst, inst.operands[1]))
    operands.add("size", source(inst, inst.operands[2], "u32"))

    def execute(state: State) -> None:
        for warp, lane, values in operands.rows(state):
            offset, size, start = _checked_range(state, warp, values)

            def write(data: Array, offset: int = offset, size: int = size) -> None:
                old = state.launch.memory.data[offset : offset + size]
                octets = data.reshape(-1)
                old[:] = octets if combine is None else combine(old, octets)

            touched = np.arange(offset, offset + size, GRAIN), GRAIN
            _start_store(state, warp, lane, start, size, 0, write, touched, combine is not None)

    return execute


@instruction("cp.reduce.async.bulk", ends_run=True)
def _bulk_reduce(inst: Instruction) -> Execute:
    inst.flag("global"), inst.one_of(*SHARED_SPACES), inst.flag("noftz")
    name = inst.one_of("add", "min", "max", "inc", "dec", "and", "or", "xor")
    type_ = inst.type()
    function = atomic_function(name, type_)

    def combine(old: Array, new: Array) -> Array:
        result: Any = function(old.view(type_.dtype), new.view(type_.dtype))
        octets: Array = np.ascontiguousarray(result).view(np.uint8)
        return octets

    return _bulk_store(inst, combine)


@instruction("cp.async.bulk.commit_group")
def _bulk_commit(inst: Instruction) -> Execute:
    def execute(state: State) -> None:
        warps = dict(zip(state.selected().tolist(), state.lanes, strict=True))
        for (warp, lane), groups in state.launch.stores.items():
            if warp in warps and warps[warp][lane]:
                groups.append([])

    return execute


@instruction("cp.async.bulk.wait_group", ends_run=True)
def _bulk_wait(inst: Instruction) -> Execute:
    """At most N of the thread's groups stay pending; .read: their sources may be overwritten (9.7.9.25.5.3)."""
    reading, pending = inst.flag("read"), integer(inst.operands[0])

    def execute(state: State) -> None:
        warps = dict(zip(state.selected().tolist(), state.lanes, strict=True))
        for (warp, lane), groups in state.launch.stores.items():
            if warp not in warps or not warps[warp][lane]:
                continue
            closed = groups[:-1]
            for group in closed[: max(0, len(closed) - pending)]:
                for store in group:
                    store.wait(state, reading)
            groups[:-1] = [g for g in closed if any(not store.waited for store in g)]

    return execute
