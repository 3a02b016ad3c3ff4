"""8-bit floats (OCP e4m3 and e5m2) to f32 and back with integer arithmetic, for targets without instructions for them.

CDNA3's conversion instructions know another format (FNUZ, other bias and NaN), so it takes this way too.
Rounding is to nearest even and saturates: infinities and what is too large become the largest finite number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.types import DType

if TYPE_CHECKING:
    from tilewright.backends.lower.context import Lowering

_NAN = 0x7F  # of both formats


@dataclass(frozen=True)
class Format:
    """``mantissa`` bits, exponent ``bias``, largest finite number, exponent of the smallest normal number."""

    mantissa: int
    bias: int
    largest: float

    @property
    def least_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def magic(self) -> float:
        """The f32 whose last bit weighs as much as that of a subnormal number of the format."""
        return 2.0 ** (1 - self.bias - self.mantissa + 23)


FORMATS = {"f8e4m3": Format(3, 7, 448.0), "f8e5m2": Format(2, 15, 57344.0)}


def widen(lw: Lowering, value: mlir.Value, dtype: DType) -> mlir.Value:
    """A byte as f32, exactly. By way of f16, whose exponents hold those of both formats."""
    fb, types = lw.fb, lw.fb.types
    wide = fb.zext(value, types.i16)
    if dtype.name == "f8e5m2":  # the upper half of an f16
        return fb.fpext(fb.bitcast(fb.shl(wide, 8), types.f16), types.f32)
    size = fb.and_(wide, 0x7F)
    half = fb.or_(fb.shl(size, 7), fb.shl(fb.and_(wide, 0x80), 8))
    number = fb.fmul(fb.fpext(fb.bitcast(half, types.f16), types.f32), fb.f32(2.0**8))  # biases 15 and 7
    return fb.select(fb.icmp("eq", size, _NAN), fb.f32(float("nan")), number)


def round_to(lw: Lowering, value: mlir.Value, dtype: DType) -> mlir.Value:
    """An f32 as a byte."""
    fb, types, kind = lw.fb, lw.fb.types, FORMATS[dtype.name]
    bits = fb.bitcast(value, types.i32)
    size = fb.minnum(fb.fabs(value), fb.f32(kind.largest))
    shift = 23 - kind.mantissa
    exact = fb.bitcast(size, types.i32)
    odd = fb.and_(fb.lshr(exact, shift), 1)
    rounded = fb.lshr(fb.add(fb.add(exact, (1 << shift - 1) - 1), odd), shift)
    normal = fb.sub(rounded, (127 - kind.bias) << kind.mantissa)
    magic = fb.f32(kind.magic)
    small = fb.sub(fb.bitcast(fb.fadd(size, magic), types.i32), fb.bitcast(magic, types.i32))
    result = fb.select(fb.fcmp("olt", size, fb.f32(kind.least_normal)), small, normal)
    result = fb.or_(result, fb.and_(fb.lshr(bits, 24), 0x80))
    result = fb.select(fb.fcmp("uno", value, value), fb.i32(_NAN), result)
    return fb.trunc(result, types.i8)


def truncate_to_odd(lw: Lowering, value: mlir.Value) -> mlir.Value:
    """An f64 as f32, rounded to odd: rounding that to a format of half the digits is as good as rounding once.

    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".)
    """
    fb, types = lw.fb, lw.fb.types
    near = fb.fptrunc(value, types.f32)
    back, bits = fb.fpext(near, types.f64), fb.bitcast(near, types.i32)
    beyond = fb.fcmp("ogt", fb.fabs(back), fb.fabs(value))
    towards_zero = fb.sub(bits, fb.zext(beyond, types.i32))
    odd = fb.bitcast(fb.or_(towards_zero, 1), types.f32)
    return fb.select(fb.fcmp("one", back, value), odd, near)
