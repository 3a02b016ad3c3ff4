"""Scalar, buffer, global, flat and scratch memory instructions (ISA chapters 8, 9 and 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tilewright.runtime.emulator.amd.atomics import ATOMICS, Atomic
from tilewright.runtime.emulator.amd.counters import Counter
from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.operands import (
    KINDS,
    M0,
    PRIVATE_APERTURE_HI,
    SHARED_APERTURE_HI,
    Array,
    Operand,
    Where,
)
from tilewright.runtime.emulator.amd.ordering import scope_of, scope_of_atomic
from tilewright.runtime.emulator.amd.registry import Handler, define, instruction
from tilewright.runtime.emulator.amd.state import WaveState, join64

_U16, _U32, _U64, _I64 = np.uint16, np.uint32, np.uint64, np.int64


@dataclass(frozen=True)
class Transfer:
    """One element format: bytes moved, sign extension, and the d16 half ("", "low", "high")."""

    size: int
    signed: bool = False
    half: str = ""


_LOADS: dict[str, Transfer] = {
    "ubyte": Transfer(1),
    "sbyte": Transfer(1, signed=True),
    "ushort": Transfer(2),
    "sshort": Transfer(2, signed=True),
    "ubyte_d16": Transfer(1, half="low"),
    "ubyte_d16_hi": Transfer(1, half="high"),
    "sbyte_d16": Transfer(1, signed=True, half="low"),
    "sbyte_d16_hi": Transfer(1, signed=True, half="high"),
    "short_d16": Transfer(2, half="low"),
    "short_d16_hi": Transfer(2, half="high"),
    "dword": Transfer(4),
    "dwordx2": Transfer(8),
    "dwordx3": Transfer(12),
    "dwordx4": Transfer(16),
}
_STORES: dict[str, Transfer] = {
    "byte": Transfer(1),
    "byte_d16_hi": Transfer(1, half="high"),
    "short": Transfer(2),
    "short_d16_hi": Transfer(2, half="high"),
    "dword": Transfer(4),
    "dwordx2": Transfer(8),
    "dwordx3": Transfer(12),
    "dwordx4": Transfer(16),
}


@dataclass(frozen=True)
class Access:
    """Where an instruction accesses: a space, addresses [waves, 64], and the lanes that take part.

    ``inside`` are the lanes of ``mask`` that the buffer's range check lets through, ``counters`` those
    that count it.
    """

    space: str
    address: Array
    mask: Array
    inside: Array
    counters: tuple[Counter, ...] = (Counter.VECTOR,)


def write_loaded(state: WaveState, operand: Operand, words: list[Array], transfer: Transfer) -> None:
    """Put loaded words into the destination registers: extension and d16 halves."""
    if transfer.size >= 4:
        for part, word in enumerate(words):
            state.write_vgpr(operand.index + part, word)
        return
    word = words[0]
    if transfer.signed:
        word = word.astype(np.int8 if transfer.size == 1 else np.int16).astype(np.int32).view(_U32)
    if transfer.half:
        state.write_vector(operand, KINDS["b16"], word.astype(_U16), transfer.half == "high")
    else:
        state.write_vgpr(operand.index, word)


def stored_words(state: WaveState, operand: Operand, transfer: Transfer) -> list[Array]:
    """The words a store takes from its data registers."""
    if transfer.size >= 4:
        return [state.raw(operand, part) for part in range(transfer.size // 4)]
    word = state.raw(operand)
    return [word >> _U32(16) if transfer.half == "high" else word]


# ---- addresses ------------------------------------------------------------------------------------


def _offset(inst: Instruction) -> int:
    return inst.number("offset")


def _global_access(state: WaveState, inst: Instruction, vaddr: Operand, saddr: Operand) -> Access:
    """vaddr is 64-bit with saddr off, else a 32-bit offset to the 64-bit saddr (ISA chapter 10)."""
    displacement = _U64(_offset(inst) & 0xFFFFFFFFFFFFFFFF)
    if saddr.where is Where.SCALAR:
        base = state.scalar(saddr, KINDS["u64"])[:, None]
        address = base + state.raw(vaddr).astype(_U64) + displacement
    else:
        address = state.vector(vaddr, KINDS["u64"]) + displacement
    return Access("global", np.broadcast_to(address, state.lanes.shape), state.lanes, state.lanes)


def _scratch_access(state: WaveState, inst: Instruction, vaddr: Operand, saddr: Operand) -> Access:
    address = np.full((1, 1), _offset(inst), _I64)
    for operand in (vaddr, saddr):
        if operand.where is not Where.OFF:
            address = address + state.raw(operand).astype(np.int32)
    return Access("scratch", np.broadcast_to(address, state.lanes.shape), state.lanes, state.lanes)


def _flat_access(state: WaveState, inst: Instruction, vaddr: Operand) -> Access:
    """Apertures choose LDS or scratch; the lanes of one instruction must agree (ISA chapter 10).

    Whatever they choose, both counters count.
    """
    address = state.vector(vaddr, KINDS["u64"]) + _U64(_offset(inst) & 0xFFFFFFFFFFFFFFFF)
    address = np.broadcast_to(address, state.lanes.shape)
    active = (address >> _U64(32))[state.lanes]
    both = (Counter.VECTOR, Counter.LDS)
    for space, aperture in (("lds", SHARED_APERTURE_HI), ("scratch", PRIVATE_APERTURE_HI)):
        if active.size and (active == aperture).all():
            return Access(space, address & _U64(0xFFFFFFFF), state.lanes, state.lanes, both)
        if (active == aperture).any():
            state.fault("a flat access mixes address spaces between lanes: not implemented")
    return Access("global", address, state.lanes, state.lanes, both)


def _buffer_access(
    state: WaveState, inst: Instruction, vaddr: Operand, resource: Operand, soffset: Operand, size: int
) -> Access:
    """Address and range check through a 128-bit descriptor (ISA chapter 9, "Buffer Resource").

    Raw buffers (stride 0) are checked in bytes against ``num_records - soffset``, structured ones by
    record index. An access that straddles the end faults, as documents disagree on what it returns.
    Swizzled descriptors are not implemented.
    """
    word = [state.read_sgpr(resource.index + part)[:, None] for part in range(4)]
    base = join64(word[0], word[1] & _U32(0xFFFF))
    stride = ((word[1] >> _U32(16)) & _U32(0x3FFF)).astype(_U64)
    if (word[1] >> _U32(31)).any():
        state.fault("swizzled buffer descriptors are not implemented")
    offset = np.full((1, 1), _offset(inst), _U64)
    index = np.zeros((1, 1), _U64)
    if inst.flag("offen") and inst.flag("idxen"):
        index = state.raw(vaddr).astype(_U64)
        offset = offset + state.raw(vaddr, 1)
    elif inst.flag("offen"):
        offset = offset + state.raw(vaddr)
    elif inst.flag("idxen"):
        index = state.raw(vaddr).astype(_U64)
    records = word[2].astype(_U64)
    scalar_offset = np.broadcast_to(state.raw(soffset), base.shape).astype(_U64)
    structured_ok = (index < records) & ((offset + _U64(size) <= stride) | np.bool_(not inst.flag("offen")))
    begin = offset + scalar_offset
    inside = np.where(stride == 0, begin + _U64(size) <= records, structured_ok)
    straddles = (stride == 0) & (begin < records) & ~inside & state.lanes
    if straddles.any():
        state.fault(f"a {size}-byte access straddles the end of its buffer", straddles.any(axis=1))
    address = base + begin + index * stride
    shape = state.lanes.shape
    inside = np.broadcast_to(inside, shape) & state.lanes
    return Access("global", np.broadcast_to(address, shape), state.lanes, inside)


# ---- handlers -------------------------------------------------------------------------------------

AccessFunction = Callable[[WaveState, Instruction, tuple[Operand, ...], int], Access]


def _global_operands(state: WaveState, inst: Instruction, operands: tuple[Operand, ...], size: int) -> Access:
    return _global_access(state, inst, operands[0], operands[1])


def _scratch_operands(state: WaveState, inst: Instruction, operands: tuple[Operand, ...], size: int) -> Access:
    return _scratch_access(state, inst, operands[0], operands[1])


def _flat_operands(state: WaveState, inst: Instruction, operands: tuple[Operand, ...], size: int) -> Access:
    return _flat_access(state, inst, operands[0])


def _buffer_operands(state: WaveState, inst: Instruction, operands: tuple[Operand, ...], size: int) -> Access:
    return _buffer_access(state, inst, operands[0], operands[1], operands[2], size)


def _load(transfer: Transfer, access_of: AccessFunction) -> Handler:
    """D, then the address operands."""

    def execute(state: WaveState, inst: Instruction) -> None:
        access = access_of(state, inst, inst.operands[1:], transfer.size)
        words = state.memory.load(state, access.space, access.address, access.inside, transfer.size, scope_of(inst))
        state.issue(*access.counters)
        write_loaded(state, inst.operands[0], words, transfer)

    return execute


def _store(transfer: Transfer, access_of: AccessFunction, data_position: int) -> Handler:
    """The data operand is first (buffer) or second (global, flat, scratch)."""

    def execute(state: WaveState, inst: Instruction) -> None:
        rest = inst.operands[:data_position] + inst.operands[data_position + 1 :]
        access = access_of(state, inst, rest, transfer.size)
        words = stored_words(state, inst.operands[data_position], transfer)
        state.memory.store(state, access.space, access.address, access.inside, words, transfer.size, scope_of(inst))
        state.issue(*access.counters)

    return execute


def _load_to_lds(state: WaveState, access: Access, size: int, offset: int) -> None:
    """LDS address = M0[15:0] + instruction offset + lane * size (ISA chapter 9, "Buffer load to LDS").

    Lanes outside the buffer write zero; lanes that EXEC disables write nothing. Sub-dword loads
    still take a dword of LDS each. The data lands when VM_CNT says so.
    """
    words = state.memory.load(state, access.space, access.address, access.inside, size)
    base = state.read_sgpr(M0).astype(_I64)[:, None] + offset
    step = max(size, 4)
    target = base + np.arange(64, dtype=_I64)[None] * step
    state.memory.send_to_lds(state, target, access.mask, words, step)
    state.issue(Counter.VECTOR)


def _buffer_load(transfer: Transfer) -> Handler:
    plain = _load(transfer, _buffer_operands)

    def execute(state: WaveState, inst: Instruction) -> None:
        if not inst.flag("lds"):
            plain(state, inst)
            return
        access = _buffer_operands(state, inst, inst.operands, transfer.size)
        _load_to_lds(state, access, transfer.size, _offset(inst))

    return execute


def _global_load_lds(size: int) -> Handler:
    def execute(state: WaveState, inst: Instruction) -> None:
        access = _global_operands(state, inst, inst.operands, size)
        _load_to_lds(state, access, size, _offset(inst))

    return execute


def _atomic(atomic: Atomic, access_of: AccessFunction, data_first: bool) -> Handler:
    """Old values are returned with sc0 (or glc): to the data register for buffers, to D elsewhere."""

    def execute(state: WaveState, inst: Instruction) -> None:
        returns = inst.flag("sc0") or inst.flag("glc")
        operands = inst.operands
        if data_first:
            destination, data, rest = operands[0], operands[0], operands[1:]
        else:
            destination = operands[0]
            operands = operands[1:] if returns else operands
            data, rest = operands[1], (operands[0], *operands[2:])
        access = access_of(state, inst, rest, atomic.size)
        words = [state.raw(data, part) for part in range(atomic.data_words)]
        old = state.memory.atomic(
            state,
            access.space,
            access.address,
            access.inside,
            words,
            atomic.size,
            atomic.function,
            scope_of_atomic(inst),
        )
        state.issue(*access.counters)
        if returns:
            for part, word in enumerate(old):
                state.write_vgpr(destination.index + part, word)

    return execute


def _enter() -> None:
    for name, transfer in _LOADS.items():
        define(f"global_load_{name}", _load(transfer, _global_operands))
        define(f"flat_load_{name}", _load(transfer, _flat_operands))
        define(f"scratch_load_{name}", _load(transfer, _scratch_operands))
        define(f"buffer_load_{name}", _buffer_load(transfer))
    for name, transfer in _STORES.items():
        define(f"global_store_{name}", _store(transfer, _global_operands, 1))
        define(f"flat_store_{name}", _store(transfer, _flat_operands, 1))
        define(f"scratch_store_{name}", _store(transfer, _scratch_operands, 1))
        define(f"buffer_store_{name}", _store(transfer, _buffer_operands, 0))
    for name in ("ubyte", "sbyte", "ushort", "sshort", "dword"):
        define(f"global_load_lds_{name}", _global_load_lds(_LOADS[name].size))
    for name in ("dwordx3", "dwordx4"):
        define(f"global_load_lds_{name}", _global_load_lds(_LOADS[name].size), archs=("gfx950",))
    for name, atomic in ATOMICS.items():
        if not name.endswith(("min_f32", "max_f32")):
            define(f"global_atomic_{name}", _atomic(atomic, _global_operands, False))
            define(f"flat_atomic_{name}", _atomic(atomic, _flat_operands, False))
            define(f"buffer_atomic_{name}", _atomic(atomic, _buffer_operands, True))


_enter()


def _scalar_load(words: int) -> Handler:
    """s_load_dword*: base, offset (immediate or SGPR), and an offset modifier (ISA chapter 8)."""

    def execute(state: WaveState, inst: Instruction) -> None:
        destination, base, offset = inst.operands
        address = state.scalar(base, KINDS["u64"]) + state.scalar(offset, KINDS["u32"]).astype(_U64)
        if "offset" in inst.modifiers:
            address = address + _U64(_offset(inst) & 0xFFFFFFFFFFFFFFFF)
        state.require_defined_scalar("the address of a scalar load")
        loaded = state.memory.load_scalar(state, np.asarray(address), words, state.selected)
        state.issue(Counter.SCALAR)
        for part, word in enumerate(loaded):
            state.write_sgpr(destination.index + part, word)

    return execute


def _scalar_buffer_load(words: int) -> Handler:
    """s_buffer_load_dword*: like s_load, through a descriptor; out of range gives zero."""

    def execute(state: WaveState, inst: Instruction) -> None:
        destination, resource, offset = inst.operands
        low, high, records = (state.read_sgpr(resource.index + part) for part in range(3))
        displacement = state.scalar(offset, KINDS["u32"]).astype(_U64) + _U64(_offset(inst))
        base = join64(low, high & _U32(0xFFFF))
        state.require_defined_scalar("the address of a scalar load")
        loaded = [np.zeros(base.shape, _U32) for _ in range(words)]
        for part, word in enumerate(loaded):
            inside = np.broadcast_to(displacement + _U64(4 * part + 4) <= records, base.shape)
            if inside.any():
                address = np.broadcast_to(base + displacement + _U64(4 * part), base.shape)
                word[inside] = state.memory.load_scalar(state, address[inside], 1, state.selected[inside])[0]
        state.issue(Counter.SCALAR)
        for part, word in enumerate(loaded):
            state.write_sgpr(destination.index + part, word)

    return execute


for _words in (1, 2, 3, 4, 8, 16):
    _suffix = "" if _words == 1 else f"x{_words}"
    define(f"s_load_dword{_suffix}", _scalar_load(_words))
    define(f"s_buffer_load_dword{_suffix}", _scalar_buffer_load(_words))


@instruction("buffer_wbl2")
def _write_back(state: WaveState, inst: Instruction) -> None:
    """Dirty lines of L2 go to memory at the scope of sc0 and sc1: stores before it are visible once it is finished."""
    if state.memory.order is not None:
        state.memory.order.write_back(state.selected, scope_of(inst))
    state.issue(Counter.VECTOR)


@instruction("buffer_inv")
def _invalidate(state: WaveState, inst: Instruction) -> None:
    """L1 forgets what it holds: loads after it see what finished atomic loads of that scope have acquired."""
    if state.memory.order is not None:
        state.memory.order.invalidate(state.selected, scope_of(inst))
