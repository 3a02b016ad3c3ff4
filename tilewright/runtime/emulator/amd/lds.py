"""LDS instructions (ISA chapter 11, "Data Share Operations")."""

from __future__ import annotations

import numpy as np

from tilewright.runtime.emulator.amd.atomics import ATOMICS, LDS_ATOMICS, Atomic
from tilewright.runtime.emulator.amd.counters import Counter
from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.lanes import swizzle_lanes
from tilewright.runtime.emulator.amd.operands import Array
from tilewright.runtime.emulator.amd.registry import Handler, define, instruction
from tilewright.runtime.emulator.amd.state import LANES, WaveState
from tilewright.runtime.emulator.amd.vmem import Transfer, stored_words, write_loaded

_U32, _I64 = np.uint32, np.int64
_GFX950 = ("gfx950",)

_READS: dict[str, Transfer] = {
    "u8": Transfer(1),
    "i8": Transfer(1, signed=True),
    "u16": Transfer(2),
    "i16": Transfer(2, signed=True),
    "u8_d16": Transfer(1, half="low"),
    "u8_d16_hi": Transfer(1, half="high"),
    "i8_d16": Transfer(1, signed=True, half="low"),
    "i8_d16_hi": Transfer(1, signed=True, half="high"),
    "u16_d16": Transfer(2, half="low"),
    "u16_d16_hi": Transfer(2, half="high"),
    "b32": Transfer(4),
    "b64": Transfer(8),
    "b96": Transfer(12),
    "b128": Transfer(16),
}
_WRITES: dict[str, Transfer] = {
    "b8": Transfer(1),
    "b8_d16_hi": Transfer(1, half="high"),
    "b16": Transfer(2),
    "b16_d16_hi": Transfer(2, half="high"),
    "b32": Transfer(4),
    "b64": Transfer(8),
    "b96": Transfer(12),
    "b128": Transfer(16),
}


def _address(state: WaveState, inst: Instruction, position: int, offset: int) -> Array:
    address = state.raw(inst.operands[position]).astype(_I64) + offset
    return np.broadcast_to(address, state.lanes.shape)


def _read(transfer: Transfer) -> Handler:
    def execute(state: WaveState, inst: Instruction) -> None:
        address = _address(state, inst, 1, inst.number("offset"))
        words = state.memory.load(state, "lds", address, state.lanes, transfer.size)
        state.issue(Counter.LDS)
        write_loaded(state, inst.operands[0], words, transfer)

    return execute


def _write(transfer: Transfer) -> Handler:
    def execute(state: WaveState, inst: Instruction) -> None:
        address = _address(state, inst, 0, inst.number("offset"))
        words = stored_words(state, inst.operands[1], transfer)
        state.memory.store(state, "lds", address, state.lanes, words, transfer.size)
        state.issue(Counter.LDS)

    return execute


def _read2(size: int, scale: int) -> Handler:
    """ds_read2: two elements at offset0 and offset1, in units of the element (64 of them for st64)."""

    def execute(state: WaveState, inst: Instruction) -> None:
        words: list[Array] = []
        for key in ("offset0", "offset1"):
            address = _address(state, inst, 1, inst.number(key) * scale)
            words += state.memory.load(state, "lds", address, state.lanes, size)
        state.issue(Counter.LDS)
        for part, word in enumerate(words):
            state.write_vgpr(inst.operands[0].index + part, word)

    return execute


def _write2(size: int, scale: int) -> Handler:
    def execute(state: WaveState, inst: Instruction) -> None:
        for position, key in ((1, "offset0"), (2, "offset1")):
            address = _address(state, inst, 0, inst.number(key) * scale)
            words = [state.raw(inst.operands[position], part) for part in range(size // 4)]
            state.memory.store(state, "lds", address, state.lanes, words, size)
        state.issue(Counter.LDS)

    return execute


for _name, _transfer in _READS.items():
    define(f"ds_read_{_name}", _read(_transfer))
for _name, _transfer in _WRITES.items():
    define(f"ds_write_{_name}", _write(_transfer))
for _name, _size in (("b32", 4), ("b64", 8)):
    define(f"ds_read2_{_name}", _read2(_size, _size))
    define(f"ds_read2st64_{_name}", _read2(_size, 64 * _size))
    define(f"ds_write2_{_name}", _write2(_size, _size))
    define(f"ds_write2st64_{_name}", _write2(_size, 64 * _size))


def _atomic(atomic: Atomic, returns: bool, swaps_data: bool = False) -> Handler:
    """[D,] address, data. ds_cmpst takes (compare, new), the reverse of the global instruction."""

    def execute(state: WaveState, inst: Instruction) -> None:
        first = 1 if returns else 0
        address = _address(state, inst, first, inst.number("offset"))
        data = inst.operands[first + 1 :]
        if swaps_data:
            data = (data[1], data[0])
        words = [state.raw(operand, part) for operand in data for part in range(atomic.size // 4)]
        old = state.memory.atomic(state, "lds", address, state.lanes, words, atomic.size, atomic.function)
        state.issue(Counter.LDS)
        if returns:
            for part, word in enumerate(old):
                state.write_vgpr(inst.operands[0].index + part, word)

    return execute


for (_name, _kind), _operation in LDS_ATOMICS.items():
    define(f"ds_{_name}_{_kind}", _atomic(_operation, False))
    define(f"ds_{_name}_rtn_{_kind}", _atomic(_operation, True))
for _kind, _suffix in (("b32", ""), ("b64", "_x2")):
    define(f"ds_wrxchg_rtn_{_kind}", _atomic(ATOMICS[f"swap{_suffix}"], True))
    define(f"ds_cmpst_{_kind}", _atomic(ATOMICS[f"cmpswap{_suffix}"], False, True))
    define(f"ds_cmpst_rtn_{_kind}", _atomic(ATOMICS[f"cmpswap{_suffix}"], True, True))


@instruction("ds_bpermute_b32")
def _backward_permute(state: WaveState, inst: Instruction) -> None:
    """D[i] = data[address[i] / 4 mod 64]; a disabled source lane gives 0 (ISA chapter 12)."""
    lane = ((state.raw(inst.operands[1]) + _U32(inst.number("offset"))) >> _U32(2)) & _U32(63)
    lane = np.broadcast_to(lane, state.lanes.shape).astype(np.intp)
    data = np.where(state.lanes, state.raw(inst.operands[2]), _U32(0))
    state.issue(Counter.LDS)
    state.write_vgpr(inst.operands[0].index, np.take_along_axis(data, lane, axis=1))


@instruction("ds_permute_b32")
def _forward_permute(state: WaveState, inst: Instruction) -> None:
    """D[address[i] / 4 mod 64] = data[i]; lanes nobody writes get 0."""
    lane = ((state.raw(inst.operands[1]) + _U32(inst.number("offset"))) >> _U32(2)) & _U32(63)
    lane = np.broadcast_to(lane, state.lanes.shape)
    data = np.broadcast_to(state.raw(inst.operands[2]), state.lanes.shape)
    result = np.zeros(state.lanes.shape, _U32)
    wave, source = np.nonzero(state.lanes)
    result[wave, lane[wave, source]] = data[wave, source]
    state.issue(Counter.LDS)
    state.write_vgpr(inst.operands[0].index, result)


@instruction("ds_swizzle_b32")
def _swizzle(state: WaveState, inst: Instruction) -> None:
    lanes = np.array(swizzle_lanes(inst.modifiers.get("offset", "0")))
    data = np.where(state.lanes, state.raw(inst.operands[1]), _U32(0))
    state.issue(Counter.LDS)
    state.write_vgpr(inst.operands[0].index, data[:, lanes])


@instruction("ds_nop")
def _nop(state: WaveState, inst: Instruction) -> None:
    """Nothing."""


def _read_transposed(element_bits: int) -> Handler:
    """CDNA4 ds_read_b64_tr_b{16,8,4}, b96_tr_b6: each group of 16 lanes loads a matrix and receives it transposed.

    Of the elements that a lane loads, ``lanes_a_row`` lanes hold one row of 16; afterwards lane i of the
    group holds column i (CDNA4 ISA chapter 11, "LDS transpose loads").
    """
    size = 12 if element_bits == 6 else 8
    items = size * 8 // element_bits
    lanes_a_row = 16 // items
    lane, item = np.arange(LANES)[:, None], np.arange(items)[None]
    group, column = lane // 16 * 16, lane % 16
    source_lane = group + item * lanes_a_row + column // items
    source_item = np.broadcast_to(column % items, source_lane.shape)

    def execute(state: WaveState, inst: Instruction) -> None:
        address = _address(state, inst, 1, inst.number("offset"))
        words = state.memory.load(state, "lds", address, state.lanes, size)
        octets = np.ascontiguousarray(np.stack(words, axis=-1)).view(np.uint8)
        bits = np.unpackbits(octets, axis=-1, bitorder="little").reshape(*octets.shape[:2], items, element_bits)
        turned = bits[:, source_lane, source_item].reshape(*octets.shape[:2], size * 8)
        packed = np.ascontiguousarray(np.packbits(turned, axis=-1, bitorder="little")).view(_U32)
        state.issue(Counter.LDS)
        for part in range(size // 4):
            state.write_vgpr(inst.operands[0].index + part, packed[..., part])

    return execute


for _bits in (16, 8, 4):
    define(f"ds_read_b64_tr_b{_bits}", _read_transposed(_bits), archs=_GFX950)
define("ds_read_b96_tr_b6", _read_transposed(6), archs=_GFX950)
