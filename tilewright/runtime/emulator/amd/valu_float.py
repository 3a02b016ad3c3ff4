"""Vector floating-point arithmetic (ISA chapters 6 and 12).

Arithmetic is IEEE, with denormals and rounding as MODE says (`mode`). Transcendentals are NumPy's: the
hardware's are within 1 ulp of the exact value, so compare with a tolerance of a few ulp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.amd.decode import Instruction
from tilewright.runtime.emulator.amd.mode import ADD, FUSED, MULTIPLY, REVERSED_SUBTRACT, SUBTRACT, Exactly
from tilewright.runtime.emulator.amd.mode import compute as compute_in_mode
from tilewright.runtime.emulator.amd.numerics import div_fixup, div_fmas, div_scale, fma16, fma32
from tilewright.runtime.emulator.amd.operands import KINDS, Array
from tilewright.runtime.emulator.amd.registry import define
from tilewright.runtime.emulator.amd.state import WaveState
from tilewright.runtime.emulator.amd.valu import Function, output_modifiers, valu
from tilewright.runtime.emulator.rounding import fma64

_FMA: dict[str, Function] = {"f16": fma16, "f32": fma32, "f64": fma64}
_U32 = np.uint32


def _reversed_subtract(a: Array, b: Array) -> Array:
    result: Array = b - a
    return result


def _reciprocal(a: Array) -> Array:
    result: Array = a.dtype.type(1) / a
    return result


def _reciprocal_root(a: Array) -> Array:
    result: Array = a.dtype.type(1) / np.sqrt(a)
    return result


def _fraction(a: Array) -> Array:
    below = np.nextafter(a.dtype.type(1), a.dtype.type(0))
    return np.minimum(a - np.floor(a), below)


def _ldexp(a: Array, exponent: Array) -> Array:
    return np.ldexp(a, exponent.astype(np.int32))


def _mantissa(a: Array) -> Array:
    """v_frexp_mant: in [0.5, 1); infinities and NaN pass."""
    return np.where(np.isfinite(a), np.frexp(a)[0], a)


def _exponent(a: Array) -> Array:
    """v_frexp_exp: 0 for zero, infinities and NaN."""
    return np.where(np.isfinite(a), np.frexp(a)[1], 0)


def _median(a: Array, b: Array, c: Array) -> Array:
    """v_med3: the minimum of the three where one is NaN."""
    middle = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, np.fmin(np.fmin(a, b), c), middle)


def _max3(a: Array, b: Array, c: Array) -> Array:
    return np.fmax(np.fmax(a, b), c)


def _min3(a: Array, b: Array, c: Array) -> Array:
    return np.fmin(np.fmin(a, b), c)


def _flush(function: Function) -> Function:
    """v_exp/log/rcp/rsq/sqrt_f32 read and give denormals as zero (ISA chapter 12)."""

    def compute(a: Array) -> Any:
        tiny = np.finfo(np.float32).smallest_normal
        source = np.where(np.abs(a) < tiny, np.copysign(np.float32(0), a), a)
        value: Array = function(source)
        return np.where(np.abs(value) < tiny, np.copysign(np.float32(0), value), value)

    return compute


_UNARY: dict[str, Function] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "rndne": np.rint,
    "fract": _fraction,
    "frexp_mant": _mantissa,
}
_BINARY: dict[str, tuple[Function, Exactly | None]] = {
    "add": (np.add, ADD),
    "mul": (np.multiply, MULTIPLY),
    "max": (np.fmax, None),
    "min": (np.fmin, None),
}
_TRANSCENDENTAL: dict[str, Function] = {
    "exp": np.exp2,
    "log": np.log2,
    "rcp": _reciprocal,
    "rsq": _reciprocal_root,
    "sqrt": np.sqrt,
    "sin": lambda a: np.sin(2 * np.pi * a.astype(np.float64)).astype(a.dtype),
    "cos": lambda a: np.cos(2 * np.pi * a.astype(np.float64)).astype(a.dtype),
}
for _kind in ("f16", "f32", "f64"):
    for _name, _function in _UNARY.items():
        valu(f"v_{_name}_{_kind}", f"{_kind} -> {_kind}", _function)
    _three = f"{_kind} {_kind} {_kind} -> {_kind}"
    for _name, (_function, _exactly) in _BINARY.items():
        valu(f"v_{_name}_{_kind}", f"{_kind} {_kind} -> {_kind}", _function, exactly=_exactly)
    valu(f"v_fma_{_kind}", _three, _FMA[_kind], preserves_high=_kind == "f16", exactly=FUSED)
    valu(f"v_fmac_{_kind}", f"{_kind} {_kind} old -> {_kind}", _FMA[_kind], exactly=FUSED)
    valu(
        f"v_div_fixup_{_kind}",
        f"{_kind} {_kind} {_kind} -> {_kind}",
        div_fixup,
        preserves_high=_kind == "f16",
    )
for _kind in ("f16", "f32"):
    _three = f"{_kind} {_kind} {_kind} -> {_kind}"
    valu(f"v_sub_{_kind}", f"{_kind} {_kind} -> {_kind}", np.subtract, exactly=SUBTRACT)
    valu(f"v_subrev_{_kind}", f"{_kind} {_kind} -> {_kind}", _reversed_subtract, exactly=REVERSED_SUBTRACT)
    for _name, _function in (("max3", _max3), ("min3", _min3), ("med3", _median)):
        valu(f"v_{_name}_{_kind}", _three, _function, preserves_high=_kind == "f16")
    valu(f"v_fmamk_{_kind}", _three, _FMA[_kind], exactly=FUSED)
    valu(f"v_fmaak_{_kind}", _three, _FMA[_kind], exactly=FUSED)
    for _name, _function in _TRANSCENDENTAL.items():
        flushed = _flush(_function) if _kind == "f32" and _name not in ("sin", "cos") else _function
        valu(f"v_{_name}_{_kind}", f"{_kind} -> {_kind}", flushed)
for _name in ("rcp", "rsq", "sqrt"):
    valu(f"v_{_name}_f64", "f64 -> f64", _TRANSCENDENTAL[_name])
valu("v_rcp_iflag_f32", "f32 -> f32", _flush(_reciprocal))
valu("v_mul_legacy_f32", "f32 f32 -> f32", lambda a, b: np.where((a == 0) | (b == 0), np.float32(0), a * b))
valu("v_ldexp_f16", "f16 i16 -> f16", _ldexp)
valu("v_ldexp_f32", "f32 i32 -> f32", _ldexp)
valu("v_ldexp_f64", "f64 i32 -> f64", _ldexp)
valu("v_frexp_exp_i16_f16", "f16 -> i16", _exponent)
valu("v_frexp_exp_i32_f32", "f32 -> i32", _exponent)
valu("v_frexp_exp_i32_f64", "f64 -> i32", _exponent)
valu("v_div_fmas_f32", "f32 f32 f32 vcc -> f32", div_fmas)
valu("v_div_fmas_f64", "f64 f64 f64 vcc -> f64", div_fmas)
for _name, _function in (("maximum", np.maximum), ("minimum", np.minimum)):
    valu(
        f"v_{_name}3_f32",
        "f32 f32 f32 -> f32",
        lambda a, b, c, f=_function: f(f(a, b), c),
        archs=("gfx950",),
    )


def _divide_scale(kind: str) -> Callable[[WaveState, Instruction], None]:
    """v_div_scale: D, VCC-like mask, S0, denominator, numerator."""

    def execute(state: WaveState, inst: Instruction) -> None:
        a, denominator, numerator = (state.vector(inst.operands[i], KINDS[kind]) for i in (2, 3, 4))
        value, flag = div_scale(a, denominator, numerator)
        state.write_vector(inst.operands[0], KINDS[kind], value)
        state.write_lane_mask(inst.operands[1], flag)

    return execute


define("v_div_scale_f32", _divide_scale("f32"))
define("v_div_scale_f64", _divide_scale("f64"))


def _mixed(result: str) -> Callable[[WaveState, Instruction], None]:
    """v_fma_mix: OP_SEL_HI says that a source is f16, OP_SEL which half of it (ISA chapter 12, VOP3P).

    ``result``: "f32", or "low"/"high" for the half of a register that takes the f16 result.
    In this encoding NEG_HI is the absolute value.
    """

    def execute(state: WaveState, inst: Instruction) -> None:
        half, is_half = inst.bits("op_sel", 3, 0), inst.bits("op_sel_hi", 3, 0)
        arguments = []
        for position, operand in enumerate(inst.operands[1:4]):
            if is_half[position]:
                value = state.vector(operand, KINDS["f16"], bool(half[position])).astype(np.float32)
            else:
                value = state.vector(operand, KINDS["f32"])
            arguments.append(value)
        single = KINDS["f32"]
        value = compute_in_mode(state, [single] * 3, single, fma32, FUSED, arguments)
        if result == "f32":
            state.write_vector(inst.operands[0], single, output_modifiers(state, inst, value))
            return
        narrow = output_modifiers(state, inst, value).astype(np.float16)
        state.write_vector(inst.operands[0], KINDS["f16"], narrow, result == "high")

    return execute


define("v_fma_mix_f32", _mixed("f32"))
define("v_fma_mixlo_f16", _mixed("low"))
define("v_fma_mixhi_f16", _mixed("high"))
