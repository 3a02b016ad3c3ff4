"""Loads, stores and atomics (PTX ISA 9.7.9.8 ld, 9.7.9.11 st, 9.7.12.5 atom, 9.7.12.7 red)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.runtime.emulator.memory import ranks
from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.discarded import used_lanes
from tilewright.runtime.emulator.nvidia.messages import store_async
from tilewright.runtime.emulator.nvidia.numerics import bf16_to_f32, f32_to_bf16
from tilewright.runtime.emulator.nvidia.operands import address, dest, parts, source
from tilewright.runtime.emulator.nvidia.ordering import SCOPES
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.spaces import beyond, global_offsets, local_offsets, split_generic
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import TYPES, Array, Type, unsigned_of
from tilewright.runtime.emulator.races import WEAK

_SPACES = (
    "global", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry", "param::func", "const",
)  # fmt: skip
_ORDER = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "unified")


@dataclass(frozen=True)
class _Qualifiers:
    """State space ("" for generic) and memory order of an access; ``strength`` is its scope if it is strong, else 0."""

    space: str
    order: str
    strength: int

    @property
    def ordered(self) -> bool:
        """Parameters and constants never change."""
        return self.space not in ("param", "const")


def _qualifiers(inst: Instruction, strong: bool = False) -> _Qualifiers:
    """Take order, scope, hints and the state space. Atomics are ``strong``: .relaxed.gpu unless they say more."""
    order = inst.one_of(*_ORDER, default="relaxed" if strong else "weak")
    scope = SCOPES[inst.one_of(*_SCOPES, default="gpu" if strong else "sys")]  # .volatile and .mmio name none
    inst.one_of(*_CACHE, default="")
    hints = [m for m in inst.modifiers if m.startswith(("L1::", "L2::", "level::"))]
    for hint in hints:
        inst.modifiers.remove(hint)
    if "L2::cache_hint" in hints:
        inst.operands = inst.operands[:-1]
    space = inst.one_of(*_SPACES, default="").partition("::")[0]
    return _Qualifiers(space, order, WEAK if order == "weak" else scope)


def _note_load(
    state: State, offsets: Array, size: int, how: _Qualifiers, used_lanes: Callable[[State], Array | None]
) -> None:
    """Tell the race detector of a load from global memory, of the lanes that use its value."""
    ordering = state.launch.ordering
    if ordering is None or not how.ordered:
        return
    used = used_lanes(state)
    if used is None:
        ordering.touch(state, "global", offsets, size, writes=False, strength=how.strength)
    else:
        taken = used[state.lanes]
        with state.restricted(state.lanes & used):
            ordering.touch(state, "global", offsets[taken], size, writes=False, strength=how.strength)


def _note_order(state: State, part: str, offsets: Array, how: _Qualifiers, *, reads: bool, writes: bool) -> None:
    """Tell the race detector what a strong access orders."""
    if state.launch.ordering is not None and how.strength and part != "local":
        state.launch.ordering.strong(state, part, offsets, how.strength, how.order, reads=reads, writes=writes)


def _put(state: State, part: str, data: Array, offsets: Array, type_: Type, values: list[Array], strength: int) -> None:
    """Store vectors: a value for each access in each of ``values``. The race detector hears of it."""
    view = data[: data.size - data.size % type_.bytes].view(type_.unsigned)
    index = offsets // type_.bytes

    def store() -> None:
        for i, value in enumerate(values):
            view[index + i if i else index] = value

    ordering = state.launch.ordering
    if ordering is None or part == "local":
        store()
        return
    octets = np.ascontiguousarray(np.stack(values, axis=-1)).view(np.uint8)
    with ordering.storing(state, part, data, offsets, octets, strength):
        store()


def _as_global(state: State, space: str, where: Array) -> Array:
    return where + state.launch.param_address if space == "param" else where


def _placed(state: State, space: str, where: Array) -> list[tuple[str, Array, Array]]:
    """(space, lanes, addresses): which memory each active lane's address means."""
    where = np.broadcast_to(where, state.lanes.shape)
    if space in ("global", "const", "param"):
        return [("global", state.lanes, _as_global(state, space, where))]
    if space:
        return [(space, state.lanes, where)]
    return split_generic(state, where)


def _bytes(state: State, space: str, where: Array, size: int, what: str, needed: int = 0) -> tuple[Array, Array]:
    """The flat bytes of a space and checked offsets of the active lanes."""
    if space == "global":
        return state.launch.memory.data, global_offsets(state, where, size, needed)
    if space == "local":
        return state.launch.local.reshape(-1), local_offsets(state, where, size)
    shared = state.launch.shared
    return shared.data.reshape(-1), shared.offsets(state, where, size, what)


def _unwritten(state: State, part: str, offsets: Array, size: int, strength: int) -> Array | None:
    """Which accesses read a byte of shared or local memory that was never written; None if none does."""
    if part == "shared":
        return state.launch.shared.check_read(state, offsets, size, strength)
    written = np.all(state.launch.local_written[offsets[:, None] + np.arange(size)], axis=1)
    return None if written.all() else np.logical_not(written)


def gather(data: Array, offsets: Array, type_: Type, count: int) -> Array:
    """``count`` elements of a type at each (aligned) offset: [offsets, count]."""
    item = type_.bytes
    limit = data.size - data.size % item
    index = offsets // item
    view = data[:limit].view(type_.unsigned)
    if count == 1:
        return view[index][:, None]
    result: Array = view[index[:, None] + np.arange(count)]
    return result


@instruction("ld", "ldu")
def _load(inst: Instruction) -> Execute:
    how = _qualifiers(inst)
    space = how.space
    vector = inst.one_of("v2", "v4", "v8", default="")
    type_ = inst.type()
    inst.need(2)
    name = getattr(getattr(inst.operands[1], "base", None), "text", "")
    if space == "param" and name in inst.kernel.local_offsets:
        space = "local"
    writes = [dest(inst, operand, type_) for operand in parts(inst.operands[0])]
    count = int(vector[1:]) if vector else 1
    if len(writes) != count:
        raise Problem(f"loads {count} elements into {len(writes)} registers")
    where, size = address(inst, inst.operands[1]), type_.bytes * count
    used, mask = used_lanes(inst), inst.used_bytes
    needed = type_.bytes if mask is None else mask.bit_length()
    element = (1 << type_.bytes) - 1
    unused = np.array([mask is None or not mask >> i * type_.bytes & element for i in range(count)])

    def execute(state: State) -> None:
        at = where(state)
        if space == "param" and state.taint is None and not state.full and not state.lanes.any():
            return
        values = np.zeros((*state.lanes.shape, count), type_.unsigned)
        undefined = None
        behind = None
        for part, lanes, local in _placed(state, space, at):
            with state.restricted(lanes):
                data, offsets = _bytes(state, part, local, size, "load", needed)
                if not offsets.size:
                    continue
                loaded = gather(data, offsets, type_, count)
                if lanes.all():
                    values = loaded.reshape(values.shape)
                else:
                    values[lanes] = loaded
                if part == "global" and count > 1:
                    missing = beyond(state, offsets, type_.bytes, count)
                    if missing is not None:
                        behind = np.zeros(values.shape, np.bool_)
                        behind[lanes] = missing & unused
                if part in ("shared", "local"):
                    bad = _unwritten(state, part, offsets, size, how.strength)
                    if bad is not None:
                        undefined = np.zeros(lanes.shape, np.bool_) if undefined is None else undefined
                        undefined[lanes] = bad
                if part == "global":
                    _note_load(state, offsets, size if behind is None and mask is None else needed, how, used)
                _note_order(state, part, offsets, how, reads=True, writes=False)
        if undefined is not None:
            state.add_taint(undefined)
        taint = state.taint
        for i, write in enumerate(writes):
            if behind is not None:
                state.taint = taint
                state.add_taint(behind[..., i])
            write(state, values[..., i].view(type_.dtype))

    return execute


@instruction("st")
def _store(inst: Instruction) -> Execute:
    if inst.flag("async"):
        return store_async(inst)
    how = _qualifiers(inst)
    space = how.space
    vector = inst.one_of("v2", "v4", "v8", default="")
    type_ = inst.type()
    inst.need(2)
    name = getattr(getattr(inst.operands[0], "base", None), "text", "")
    if space == "param":
        if name not in inst.kernel.local_offsets:
            raise Problem("parameters cannot be written")
        space = "local"
    reads = [source(inst, operand, type_) for operand in parts(inst.operands[1])]
    count = int(vector[1:]) if vector else 1
    if len(reads) != count:
        raise Problem(f"stores {count} elements from {len(reads)} registers")
    where, size = address(inst, inst.operands[0]), type_.bytes * count

    def execute(state: State) -> None:
        at = where(state)
        state.require_defined("an address")
        values = [np.broadcast_to(unsigned_of(read(state)), state.lanes.shape) for read in reads]
        undefined, state.taint = state.taint, None
        for part, lanes, local in _placed(state, space, at):
            with state.restricted(lanes):
                data, offsets = _bytes(state, part, local, size, "store")
                if not offsets.size:
                    continue
                defined: Array | bool = True
                if undefined is not None:
                    defined = ~undefined[lanes]
                    if part == "global" and not np.all(defined):
                        state.fault("the value stored depends on one that was never written", undefined)
                if part == "shared":
                    state.launch.shared.check_write(state, offsets, size, defined)
                elif part == "local":
                    for byte in range(size):
                        state.launch.local_written[offsets + byte] = defined
                taken = [value.reshape(-1) if lanes.all() else value[lanes] for value in values]
                _put(state, part, data, offsets, type_, taken, how.strength)
                _note_order(state, part, offsets, how, reads=False, writes=True)
                state.launch.effects += part != "local"

    return execute


# --- atomics ---------------------------------------------------------------------------------------


def _increment(old: Array, bound: Array) -> Array:
    return np.where(old >= bound, old.dtype.type(0), old + old.dtype.type(1))


def _decrement(old: Array, bound: Array) -> Array:
    return np.where((old == 0) | (old > bound), bound, old - old.dtype.type(1))


_ATOMICS: dict[str, Callable[..., Any]] = {
    "add": lambda old, b: old + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, b: b,
    "cas": lambda old, b, c: np.where(old == b, c, old),
    "inc": _increment,
    "dec": _decrement,
}


def atomic_function(name: str, type_: Type) -> Callable[..., Any]:
    """(old, operands...) -> new on values of ``type_``; pairs and bf16 are their bits."""
    plain = _ATOMICS[name]
    if type_.name in ("f16x2", "bf16x2"):
        part = atomic_function(name, TYPES[type_.name.removesuffix("x2")])

        def on_pairs(old: Array, b: Array) -> Array:
            dtype = TYPES[type_.name.removesuffix("x2")].dtype
            words = [
                part(
                    (old >> np.uint32(s)).astype(np.uint16).view(dtype),
                    (b >> np.uint32(s)).astype(np.uint16).view(dtype),
                )
                for s in (0, 16)
            ]
            low, high = (word.view(np.uint16).astype(np.uint32) for word in words)
            return low | high << np.uint32(16)

        return on_pairs
    if type_.name == "bf16":
        return lambda old, b: f32_to_bf16(plain(bf16_to_f32(old), bf16_to_f32(b)))
    if type_.kind == "f" and name in ("min", "max"):
        return np.fmin if name == "min" else np.fmax
    return plain


@instruction("atom", "red", ends_run=True)
def _atomic(inst: Instruction) -> Execute:
    """Lanes at the same address take turns in the order of warps and lanes."""
    returns = inst.name == "atom"
    if inst.flag("async"):
        raise Problem("red.async is not implemented")
    inst.flag("noftz")
    how = _qualifiers(inst, strong=True)
    space = how.space
    operation = inst.one_of(*_ATOMICS)
    vector = inst.one_of("v2", "v4", "v8", default="")
    type_ = inst.type()
    count = int(vector[1:]) if vector else 1
    operands = inst.operands[1:] if returns else inst.operands
    where = address(inst, operands[0])
    reads = [[source(inst, part, type_) for part in parts(operand)] for operand in operands[1:]]
    writes = [dest(inst, operand, type_) for operand in parts(inst.operands[0])] if returns else []
    function = atomic_function(operation, type_)

    def execute(state: State) -> None:
        at = where(state)
        state.require_defined("an address")
        values = [[np.broadcast_to(read(state), state.lanes.shape) for read in vector_] for vector_ in reads]
        state.require_defined("the operand of an atomic operation")
        old = np.zeros((*state.lanes.shape, count), type_.dtype)
        for part, lanes, local in _placed(state, space, at):
            with state.restricted(lanes):
                data, offsets = _bytes(state, part, local, type_.bytes * count, "atomic")
                if not offsets.size:
                    continue
                if part == "shared":
                    bad = state.launch.shared.check_read(state, offsets, type_.bytes * count, how.strength)
                    if bad is not None:
                        state.fault("an atomic operation on shared memory that was never written")
                    state.launch.shared.check_write(state, offsets, type_.bytes * count)
                if state.launch.ordering is not None and part != "local":
                    state.launch.ordering.touch(
                        state, part, offsets, type_.bytes * count, writes=True, strength=how.strength
                    )
                _note_order(state, part, offsets, how, reads=True, writes=True)
                view = data[: data.size - data.size % type_.bytes].view(type_.dtype)
                index = offsets // type_.bytes
                old[lanes] = _take_turns(view, index, [[v[lanes] for v in vs] for vs in values], function)
                changed = old[lanes] != view[index[:, None] + np.arange(count)]
                state.launch.effects += bool(changed.any())  # one that changes nothing may be a poll
        for i, write in enumerate(writes):
            write(state, np.ascontiguousarray(old[..., i]))

    return execute


def _take_turns(view: Array, index: Array, values: list[list[Array]], function: Callable[..., Any]) -> Array:
    count = len(values[0])
    old = np.zeros((len(index), count), view.dtype)
    rank = ranks(index)
    for turn in range(int(rank.max()) + 1):
        now = rank == turn
        for element in range(count):
            place = index[now] + element
            old[now, element] = view[place]
            view[place] = function(view[place], *[value[element][now] for value in values])
    return old


# --- hints -----------------------------------------------------------------------------------------


@instruction("prefetch", "prefetchu", "applypriority", "discard", "createpolicy")
def _hint(inst: Instruction) -> Execute:
    """No effect on values. ``createpolicy`` gives an opaque word."""
    inst.modifiers.clear()
    if inst.name == "createpolicy":
        write = dest(inst, inst.operands[0], "b64")
        return lambda state: write(state, np.zeros((1, 1), np.uint64))
    return lambda state: None


@instruction("isspacep")
def _is_space(inst: Instruction) -> Execute:
    space = inst.one_of("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param").partition(
        "::"
    )[0]
    write = dest(inst, inst.operands[0], "pred")
    read = source(inst, inst.operands[1], "u64")

    def execute(state: State) -> None:
        result = np.zeros(state.lanes.shape, np.bool_)
        for part, lanes, _ in split_generic(state, np.broadcast_to(read(state).view(np.int64), result.shape)):
            if part == space:
                result |= lanes
        write(state, result)

    return execute
