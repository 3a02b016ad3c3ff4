"""The MODE register of each wave: rounding, denormals, clamping (CDNA3 and CDNA4 ISA section 3.5, "Mode register").

Vector instructions on floats take denormal sources as zeros, or give zeros for denormal results, where FP_DENORM says
so, and round as FP_ROUND says: one pair of bits each for f32, and for f16 and f64. Transcendental functions and
conversions to 8 bits and fewer do not ask for the rounding mode, matrix instructions for neither but denormals of f32
sources. Almost always all waves have the mode that needs none of this, which costs nothing.

Not modelled: IEEE (quiet and signalling NaN), exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.runtime.emulator import exact
from tilewright.runtime.emulator.amd.operands import Array, Kind
from tilewright.runtime.emulator.rounding import fma_to_odd, round_from_odd, signed_zero, sum_to_odd

if TYPE_CHECKING:
    from tilewright.runtime.emulator.amd.decode import Kernel
    from tilewright.runtime.emulator.amd.state import WaveState

DX10_CLAMP, FP16_OVFL = 1 << 8, 1 << 23
#: bits that would change the execution in ways that are not emulated
REFUSED = {"DEBUG": 1 << 11, "GPR_IDX_EN": 1 << 27, "VSKIP": 1 << 28}
_ROUNDING = ("rn", "rp", "rm", "rz")
#: FP_ROUND, FP_DENORM and FP16_OVFL, and their values that need nothing done
_CALCULATION, _PLAIN = 0xFF | FP16_OVFL, 0xF0
Function = Callable[..., Any]


def initial_mode(kernel: Kernel) -> int:
    """MODE when a kernel starts (LLVM AMDGPU usage: the descriptor's directives and their defaults)."""
    fields = (
        ("float_round_mode_32", 0, 0), ("float_round_mode_16_64", 0, 2), ("float_denorm_mode_32", 0, 4),
        ("float_denorm_mode_16_64", 3, 6), ("dx10_clamp", 1, 8), ("ieee_mode", 1, 9), ("fp16_overflow", 0, 23),
    )  # fmt: skip
    return sum(kernel.get(name, default) << position for name, default, position in fields)


def is_plain(modes: Array) -> bool:
    """Whether all of these round to nearest, keep denormals and let f16 overflow to infinity."""
    return bool(((modes & np.uint32(_CALCULATION)) == _PLAIN).all())


@dataclass(frozen=True)
class Exactly:
    """How a result is computed that can be rounded in any mode.

    ``odd``: sources -> float64, exact or rounded to odd. ``remainder``: what `exact.directed` takes, for f64.
    ``addends``: the two values of which it is a sum, whose zero has a sign of its own.
    """

    odd: Function
    remainder: Function | None = None
    addends: Function | None = None

    def rounded(self, dtype: Any, mode: str, nearest: Function, values: Sequence[Array]) -> Array:
        """The result for sources ``values``; ``nearest`` computes it rounded to nearest."""
        if dtype == np.float64:
            plain = np.asarray(nearest(*values))
            return plain if self.remainder is None else exact.directed(plain, self.remainder, mode, *values)
        wide = self.odd(*(np.asarray(value, np.float64) for value in values))
        if self.addends is not None:
            first, second = self.addends(*values)
            wide = signed_zero(wide, first, second, mode)
        return round_from_odd(wide, dtype, mode)


ADD = Exactly(sum_to_odd, exact.total, lambda a, b: (a, b))
SUBTRACT = Exactly(lambda a, b: sum_to_odd(a, -b), None, lambda a, b: (a, -b))
REVERSED_SUBTRACT = Exactly(lambda a, b: sum_to_odd(b, -a), None, lambda a, b: (b, -a))
MULTIPLY = Exactly(lambda a, b: a * b, exact.product)
FUSED = Exactly(fma_to_odd, exact.fused, lambda a, b, c: (a * b, c))
CONVERT = Exactly(lambda a: a)


def _shift(kind: Kind) -> int:
    """Where the pair of bits of a float kind lies within FP_ROUND and FP_DENORM."""
    return 0 if kind.bits == 32 else 2


def flush(value: Array) -> Array:
    """Denormals -> zeros of their sign."""
    tiny = np.finfo(value.dtype).smallest_normal
    zero = value.dtype.type(0)
    result: Array = np.where(np.abs(value) < tiny, np.copysign(zero, value), value)
    return result


def _sources(mode: int, kinds: Sequence[Kind | None], values: Sequence[Array]) -> list[Array]:
    def drops(kind: Kind | None) -> bool:
        return kind is not None and kind.is_float and not mode >> 4 + _shift(kind) & 1

    return [flush(value) if drops(kind) else value for kind, value in zip(kinds, values, strict=True)]


def _under(
    mode: int, kinds: Sequence[Kind | None], result: Kind, nearest: Function, exactly: Exactly | None,
    values: Sequence[Array],
) -> Array:  # fmt: skip
    sources = _sources(mode, kinds, values)
    rounding = _ROUNDING[mode >> _shift(result) & 3] if result.is_float else "rn"
    if exactly is None or rounding == "rn":
        value = np.asarray(nearest(*sources))
    else:
        value = exactly.rounded(result.dtype, rounding, nearest, sources)
    if not result.is_float:
        return value
    value = value.astype(result.dtype, copy=False)
    if not mode >> 5 + _shift(result) & 1:
        value = flush(value)
    if mode & FP16_OVFL and result.bits == 16 and exactly is not None:
        finite = np.logical_and.reduce([np.isfinite(source) for source in sources])
        value = np.where(np.isinf(value) & finite, np.copysign(np.finfo(np.float16).max, value), value)
    return value


def compute(
    state: WaveState, kinds: Sequence[Kind | None], result: Kind, nearest: Function, exactly: Exactly | None,
    values: Sequence[Array],
) -> Array:  # fmt: skip
    """``nearest(*values)`` as the MODE of each selected wave has it; ``kinds`` of the values (None: no number)."""
    if state.plain_mode:
        return np.asarray(nearest(*values))
    modes = state.mode[state.w] & np.uint32(_CALCULATION)
    merged: Array | None = None
    for mode in np.unique(modes):
        value = _under(int(mode), kinds, result, nearest, exactly, values)
        merged = value if merged is None else np.where((modes == mode)[:, None], value, merged)
    assert merged is not None
    return merged


def sources(state: WaveState, kind: Kind, *values: Array) -> list[Array]:
    """Sources of a comparison or of a matrix instruction, [waves, ...], without the denormals that MODE drops."""
    if state.plain_mode or not kind.is_float:
        return list(values)
    drops = state.mode[state.w] >> np.uint32(4 + _shift(kind)) & np.uint32(1) == 0
    return [np.where(drops.reshape(-1, *[1] * (value.ndim - 1)), flush(value), value) for value in values]
