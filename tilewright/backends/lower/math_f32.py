"""f32 functions built from what both GPUs have: fused multiply-add, exp2, division, floor.

Errors are the largest measured against float64 over the ranges given, with an exact exp2; the hardware's
ex2.approx (PTX ISA: 2 ulp) and v_exp_f32 (1 ulp) add theirs.

========  ============================================================================
function  error
========  ============================================================================
exp       1.1e-7 relative (about 1 ulp); 0 and infinity at the ends, NaN propagates
sigmoid   3 ulp
tanh      9.1e-8 absolute, 1.7e-7 relative
erf       6.4e-8 absolute, 8.6e-8 relative
sin, cos  9.1e-8 absolute for abs(x) <= 1e4; grows with abs(x) beyond (no Payne-Hanek)
========  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tilewright.backends.mlir_builder import ir as mlir

if TYPE_CHECKING:
    from tilewright.backends.lower.context import Lowering

Function = Callable[["Lowering", mlir.Value], mlir.Value]


def f32(lw: Lowering, value: float) -> mlir.Value:
    return lw.fb.f32(value)


def horner(lw: Lowering, x: mlir.Value, coefficients: Sequence[float]) -> mlir.Value:
    """The polynomial with these coefficients, highest power first."""
    result = f32(lw, coefficients[0])
    for coefficient in coefficients[1:]:
        result = lw.fb.fma(result, x, f32(lw, coefficient))
    return result


def exp(lw: Lowering, x: mlir.Value) -> mlir.Value:
    """2^f * 2^n with n = round(x log2 e) clamped to the normal exponents and f the rest in two-term precision.

    The clamp's treatment of NaN does not matter: f carries it, and infinities too.
    """
    fb = lw.fb
    log2e, log2e_low, magic = f32(lw, 1.44269502162933349609375), f32(lw, 1.925963033500011079e-08), f32(lw, 12583039.0)
    n = fb.fmul(x, log2e)
    n = fb.minnum(fb.maxnum(n, f32(lw, -126.0)), f32(lw, 126.0))
    biased = fb.fadd(n, magic)  # the low mantissa bits are n + 127
    n = fb.fsub(biased, magic)
    rest = fb.fma(x, log2e_low, fb.fma(x, log2e, fb.fneg(n)))
    scale = fb.bitcast(fb.shl(fb.bitcast(biased, fb.types.i32), fb.i32(23)), fb.types.f32)
    return fb.fmul(lw.ops.math(lw, "exp2", rest), scale)


def sigmoid(lw: Lowering, x: mlir.Value) -> mlir.Value:
    fb = lw.fb
    return lw.ops.divide(lw, f32(lw, 1.0), fb.fadd(f32(lw, 1.0), lw.ops.math(lw, "exp", fb.fneg(x))))


def tanh(lw: Lowering, x: mlir.Value) -> mlir.Value:
    """1 - 2 / (exp(2 |x|) + 1) with x's sign; near 0, where that cancels, Cephes' polynomial."""
    fb = lw.fb
    size, square = fb.fabs(x), fb.fmul(x, x)
    coefficients = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    poly = horner(lw, square, coefficients)
    small = fb.fma(fb.fmul(poly, square), x, x)
    power = lw.ops.math(lw, "exp", fb.fadd(size, size))
    large = fb.fsub(f32(lw, 1.0), lw.ops.divide(lw, f32(lw, 2.0), fb.fadd(power, f32(lw, 1.0))))
    return fb.select(fb.fcmp("olt", size, f32(lw, 0.625)), small, fb.copysign(large, x))


def erf(lw: Lowering, x: mlir.Value) -> mlir.Value:
    """N. Juffa's two ranges: 1 - exp(polynomial of |x|), and an odd polynomial near 0."""
    fb = lw.fb
    size, square = fb.fabs(x), fb.fmul(x, x)
    high = horner(lw, size, (-1.72853470e-5, 3.83197126e-4))
    low = horner(lw, size, (-3.88396438e-3, 2.42546219e-2))
    poly = fb.fma(high, square, low)
    for coefficient in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        poly = fb.fma(poly, size, f32(lw, coefficient))
    poly = fb.fma(poly, size, fb.fneg(size))
    large = fb.copysign(fb.fsub(f32(lw, 1.0), lw.ops.math(lw, "exp", poly)), x)
    coefficients = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
    small = fb.fma(horner(lw, square, coefficients), x, x)
    return fb.select(fb.fcmp("ogt", size, f32(lw, 0.927734375)), large, small)


def _sin_cos(lw: Lowering, x: mlir.Value, quadrants: int) -> mlir.Value:
    """sin(x + quadrants * pi / 2): Cody-Waite reduction in three terms, then a polynomial for each quadrant."""
    fb = lw.fb
    turn = fb.float_unary("rint", fb.fmul(x, f32(lw, 0.6366197723675814)))
    rest = x
    for part in (-1.5707962512969971, -7.5497894158615964e-08, -5.3903029534742384e-15):
        rest = fb.fma(turn, f32(lw, part), rest)
    square = fb.fmul(rest, rest)
    sine = horner(lw, square, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
    sine = fb.fma(fb.fmul(sine, square), rest, rest)
    cosine = horner(lw, square, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
    cosine = fb.fma(cosine, fb.fmul(square, square), fb.fma(square, f32(lw, -0.5), f32(lw, 1.0)))
    quadrant = fb.fptosi_sat(turn, fb.types.i32)
    if quadrants:
        quadrant = fb.add(quadrant, fb.i32(quadrants))
    odd = fb.icmp("ne", fb.and_(quadrant, fb.i32(1)), fb.i32(0))
    negative = fb.icmp("ne", fb.and_(quadrant, fb.i32(2)), fb.i32(0))
    result = fb.select(odd, cosine, sine)
    return fb.select(negative, fb.fneg(result), result)


def sin(lw: Lowering, x: mlir.Value) -> mlir.Value:
    return _sin_cos(lw, x, 0)


def cos(lw: Lowering, x: mlir.Value) -> mlir.Value:
    return _sin_cos(lw, x, 1)


#: what a `TargetOps.math` may fall back on; it provides exp2, log, log2, sqrt, rsqrt, floor and ceil itself
SOFTWARE: dict[str, Function] = {
    "exp": exp,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "erf": erf,
    "sin": sin,
    "cos": cos,
}
