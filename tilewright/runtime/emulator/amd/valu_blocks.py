"""Conversions of 32 elements at a time between fp6 or bf6 and wider floats, with a scale (CDNA4 ISA chapter 12).

The 32 elements of 6 bits fill six registers, the first in the lowest bits; wider ones fill 16 or 32. Two sources of 16
f32 are interleaved: the first gives the even elements. In stochastic rounding each element takes the next random number
(ISA section 7.3: "an updated random number is generated every pass").
"""

from __future__ import annotations

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.operands import Array, Operand
from tilewright.runtime.emulator.amd.registry import Handler, define
from tilewright.runtime.emulator.amd.small_floats import (
    decode,
    encode,
    from_half,
    next_random,
    scale_factor,
    stochastic,
    to_half,
)
from tilewright.runtime.emulator.amd.state import WaveState

_U8, _U16, _U32, _F32, _F64 = np.uint8, np.uint16, np.uint32, np.float32, np.float64
_COUNT, _WORDS, _BITS = 32, 6, 6
_GFX950 = ("gfx950",)


def _read_wide(state: WaveState, operand: Operand, wide: str, count: int = _COUNT) -> list[Array]:
    """``count`` elements in consecutive registers, as float64."""
    if wide == "f32":
        return [state.raw(operand, part).view(_F32).astype(_F64) for part in range(count)]
    words = [state.raw(operand, part) for part in range(count // 2)]
    return [from_half((word >> _U32(shift)).astype(_U16), wide).astype(_F64) for word in words for shift in (0, 16)]


def _write_wide(state: WaveState, register: int, values: list[Array], wide: str) -> None:
    if wide == "f32":
        words = [value.astype(_F32).view(_U32) for value in values]
    else:
        halves = [to_half(value, wide).astype(_U32) for value in values]
        words = [low | high << _U32(16) for low, high in zip(halves[::2], halves[1::2], strict=True)]
    for part, word in enumerate(words):
        state.write_vgpr(register + part, word)


def _write_codes(state: WaveState, register: int, codes: list[Array]) -> None:
    """32 codes of 6 bits to six registers."""
    words = [np.zeros(np.broadcast_shapes(codes[0].shape, state.lanes.shape), _U32) for _ in range(_WORDS)]
    for item, code in enumerate(codes):
        word, shift = divmod(_BITS * item, 32)
        words[word] |= code.astype(_U32) << _U32(shift)
        if shift + _BITS > 32:
            words[word + 1] |= code.astype(_U32) >> _U32(32 - shift)
    for part, value in enumerate(words):
        state.write_vgpr(register + part, value)


def _read_codes(state: WaveState, operand: Operand) -> list[Array]:
    words = [state.raw(operand, part).astype(np.uint64) for part in range(_WORDS)]
    codes = []
    for item in range(_COUNT):
        word, shift = divmod(_BITS * item, 32)
        pair = words[word] | (words[word + 1] << np.uint64(32) if word + 1 < _WORDS else np.uint64(0))
        codes.append((pair >> np.uint64(shift)).astype(_U8) & _U8(63))
    return codes


def _narrow(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_pk32_{fp6,bf6}_{f16,bf16} and 2xpk16_{fp6,bf6}_f32: D = sources / scale."""

    def execute(state: WaveState, inst: Instruction) -> None:
        sources, factor = inst.operands[1:-1], scale_factor(state, inst.operands[-1])
        read = [_read_wide(state, source, wide, _COUNT // len(sources)) for source in sources]
        values = [value for group in zip(*read, strict=True) for value in group]
        _write_codes(state, inst.operands[0].index, [encode(state, value / factor, name) for value in values])

    return execute


def _stochastic(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_sr_pk32_{fp6,bf6}_{f32,f16,bf16}: D, source, first random number, scale."""

    def execute(state: WaveState, inst: Instruction) -> None:
        source, seed, scale = inst.operands[1:]
        factor, random, codes = scale_factor(state, scale), state.raw(seed), []
        for value in _read_wide(state, source, wide):
            codes.append(encode(state, stochastic(state, value / factor, random, name), name))
            random = next_random(random)
        _write_codes(state, inst.operands[0].index, codes)

    return execute


def _widen(name: str, wide: str) -> Handler:
    """v_cvt_scalef32_pk32_{f32,f16,bf16}_{fp6,bf6}: D = source * scale."""

    def execute(state: WaveState, inst: Instruction) -> None:
        factor = scale_factor(state, inst.operands[2])
        values = [decode(code, name) * factor for code in _read_codes(state, inst.operands[1])]
        _write_wide(state, inst.operands[0].index, values, wide)

    return execute


for _name in ("fp6", "bf6"):
    define(f"v_cvt_scalef32_2xpk16_{_name}_f32", _narrow(_name, "f32"), archs=_GFX950)
    for _wide in ("f16", "bf16"):
        define(f"v_cvt_scalef32_pk32_{_name}_{_wide}", _narrow(_name, _wide), archs=_GFX950)
    for _wide in ("f32", "f16", "bf16"):
        define(f"v_cvt_scalef32_sr_pk32_{_name}_{_wide}", _stochastic(_name, _wide), archs=_GFX950)
        define(f"v_cvt_scalef32_pk32_{_wide}_{_name}", _widen(_name, _wide), archs=_GFX950)
