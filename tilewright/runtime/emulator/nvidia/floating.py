"""Floating-point arithmetic, and the opcodes that integers share with it (PTX ISA 9.7.1, 9.7.3 to 9.7.5).

Addition, multiplication, fma, division and square root are rounded once, in the mode asked for.
Approximate functions (ex2, lg2, rcp, rsqrt, sin, cos, tanh ``.approx``, ``div.approx``, ``div.full``)
are NumPy's, within 1 ulp of the exact value: the hardware's differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator import exact
from tilewright.runtime.emulator.exact import directed
from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.integer import divide, elementwise, halves, integer_add, integer_multiply
from tilewright.runtime.emulator.nvidia.numerics import (
    bf16_to_f32,
    canonical_nan,
    f32_to_bf16,
    flush,
    flush16,
    narrow,
    quotient_to_odd,
    root_to_odd,
    to_f64,
)
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.types import TYPES, Array, Type
from tilewright.runtime.emulator.rounding import fma64, fma_to_odd, signed_zero, sum_to_odd

_U32, _U16 = np.uint32, np.uint16
_FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
_QUIET64 = np.uint64(0x0008000000000000)
_INFINITY = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000, "f64": 0x7FF0000000000000}
Function = Callable[..., Any]


class Format:
    """The modifiers that float instructions share, taken off ``inst``, and the type they apply to."""

    def __init__(self, inst: Instruction) -> None:
        self.inst = inst
        self.mode = inst.one_of("rn", "rz", "rm", "rp", default="rn")
        self.ftz, self.saturate, self.relu = inst.flag("ftz"), inst.flag("sat"), inst.flag("relu")
        self.full = inst.type()
        if self.full.name not in _FLOATS:
            raise Problem(f"type .{self.full.name} is not a float type that is implemented")
        self.packed = self.full.name.endswith("x2")
        self.type = TYPES[self.full.name.removesuffix("x2")]

    def bind(self, function: Function, operands: int) -> Execute:
        """D = function(operands) on values of ``type``; pairs half by half."""
        compute = self.wrapped(function)
        if self.packed:
            compute = halves(compute, self.type)
        return elementwise(self.inst, self.full, [self.full] * operands, compute)

    def wrapped(self, function: Function) -> Function:
        ftz = self.ftz
        flushes = flush if self.type.name == "f32" else flush16 if self.type.name == "f16" else None
        if flushes is None:
            ftz = False
        finish = self._finish
        if not (ftz or self.saturate or self.relu):
            return lambda *values: canonical_nan(function(*values))

        def compute(*values: Array) -> Array:
            if ftz and flushes is not None:
                values = tuple(flushes(value) for value in values)
            result = function(*values)
            if ftz and flushes is not None:
                result = flushes(result)
            return finish(result)

        return compute

    def _finish(self, value: Array) -> Array:
        """.sat: to [0, 1] with NaN as 0; .relu: negative as 0, NaN stays."""
        if self.type.name == "bf16":
            wide = bf16_to_f32(value)
            return f32_to_bf16(self._clamp(wide))
        return canonical_nan(self._clamp(value))

    def _clamp(self, value: Array) -> Array:
        zero, one = value.dtype.type(0), value.dtype.type(1)
        if self.saturate:
            value = np.where(value > zero, np.minimum(value, one), zero)
        if self.relu:
            value = np.where(value < zero, zero, value)
            value = np.where(value == zero, zero, value)
        return value


def _is_float(inst: Instruction) -> bool:
    return any(modifier in _FLOATS for modifier in inst.modifiers)


# --- sums and products -----------------------------------------------------------------------------


def _sum(form: Format, sign: int) -> Function:
    type_, mode = form.type, form.mode
    if type_.bits >= 32 and mode == "rn":
        return (lambda a, b: a + b) if sign > 0 else (lambda a, b: a - b)
    if type_.name == "f16" and mode == "rn":
        return (lambda a, b: a + b) if sign > 0 else (lambda a, b: a - b)

    if type_.name == "f64":
        return lambda a, b: directed(a + sign * b, exact.total, mode, a, sign * b)

    def compute(a: Array, b: Array) -> Array:
        wide_a, wide_b = to_f64(a, type_), to_f64(b, type_)
        total = sum_to_odd(wide_a, wide_b if sign > 0 else -wide_b)
        other = wide_b if sign > 0 else -wide_b
        return narrow(signed_zero(total, wide_a, other, mode), type_, mode)

    return compute


def _mixed(inst: Instruction) -> Type | None:
    """Take the smaller type of add, sub and fma ``.f32.f16`` and ``.f32.bf16`` (PTX ISA 9.7.5)."""
    if "f32" in inst.modifiers:
        for name in ("f16", "bf16"):
            if inst.flag(name):
                return TYPES[name]
    return None


def _bind_mixed(form: Format, small: Type, widened: int, function: Function) -> Execute:
    """D = function(operands) in f32, of which the first ``widened`` are ``small``."""
    inst = form.inst
    types: list[Type | str] = [*[small] * widened, form.full]
    compute = form.wrapped(function)

    def widen(*values: Array) -> Any:
        wide = [to_f64(value, small).astype(np.float32) for value in values[:widened]]
        return compute(*wide, *values[widened:])

    return elementwise(inst, form.full, types, widen)


@instruction("add", "sub")
def _add(inst: Instruction) -> Execute:
    sign = 1 if inst.name == "add" else -1
    if not _is_float(inst):
        return integer_add(inst, sign)
    small = _mixed(inst)
    form = Format(inst)
    if small is not None:
        return _bind_mixed(form, small, 1, _sum(form, sign))
    return form.bind(_sum(form, sign), 2)


def _flush_tiny(rounded: Array, exact: Array) -> Array:
    """float16 products and their sums as zeros where 11 digits of them are below the smallest normal number.

    So an H200 has them: what only the coarser steps of subnormal numbers would round up to it is flushed.
    """
    return np.where(np.abs(exact) < 2.0**-14 - 2.0**-26, np.copysign(np.float16(0), rounded), rounded)


@instruction("mul")
def _mul(inst: Instruction) -> Execute:
    if not _is_float(inst):
        return integer_multiply(inst, adds=False)
    form = Format(inst)
    type_, mode = form.type, form.mode
    if type_.name == "f64":
        return form.bind(lambda a, b: directed(a * b, exact.product, mode, a, b), 2)
    if type_.name == "f16" and form.ftz:
        return form.bind(lambda a, b: _flush_tiny(a * b, to_f64(a, type_) * to_f64(b, type_)), 2)
    if type_.name != "bf16" and mode == "rn":
        return form.bind(lambda a, b: a * b, 2)
    return form.bind(lambda a, b: narrow(to_f64(a, type_) * to_f64(b, type_), type_, mode), 2)


@instruction("fma", "mad")
def _fma(inst: Instruction) -> Execute:
    if not _is_float(inst):
        return integer_multiply(inst, adds=True)
    small = _mixed(inst)
    form = Format(inst)
    type_, mode = form.type, form.mode
    if type_.name == "f64":
        return form.bind(lambda a, b, c: directed(fma64(a, b, c), exact.fused, mode, a, b, c), 3)

    def compute(a: Array, b: Array, c: Array) -> Array:
        x, y, z = (to_f64(value, type_) for value in (a, b, c))
        rounded = narrow(signed_zero(fma_to_odd(x, y, z), x * y, z, mode), type_, mode)
        return _flush_tiny(rounded, x * y + z) if type_.name == "f16" and form.ftz else rounded

    if small is not None:
        return _bind_mixed(form, small, 2, compute)
    return form.bind(compute, 3)


@instruction("div")
def _div(inst: Instruction) -> Execute:
    if not _is_float(inst):
        type_ = inst.type()
        return elementwise(inst, type_, [type_, type_], divide)
    approximate = inst.one_of("approx", "full", default="")
    form = Format(inst)
    if approximate or form.mode == "rn":
        return form.bind(lambda a, b: a / b, 2)
    if form.type.name == "f64":
        return form.bind(lambda a, b: directed(a / b, exact.quotient, form.mode, a, b), 2)
    return form.bind(lambda a, b: narrow(quotient_to_odd(a, b), form.type, form.mode), 2)


@instruction("abs")
def _abs(inst: Instruction) -> Execute:
    if not _is_float(inst):
        type_ = inst.type()
        return elementwise(inst, type_, [type_], np.abs)
    return _sign_bit(inst, lambda bits, sign: bits & ~sign)


@instruction("neg")
def _neg(inst: Instruction) -> Execute:
    if not _is_float(inst):
        type_ = inst.type()
        return elementwise(inst, type_, [type_], lambda a: -a)
    return _sign_bit(inst, lambda bits, sign: bits ^ sign)


def _sign_bit(inst: Instruction, function: Function) -> Execute:
    """A NaN becomes the canonical one; of f64 it stays but for its quiet bit (measured, the PTX ISA leaves it open)."""
    ftz, type_ = inst.flag("ftz"), inst.type(*_FLOATS)
    single = TYPES[type_.name.removesuffix("x2")]
    bits = TYPES[f"b{single.bits}"]
    sign, infinity = bits.dtype(1 << (single.bits - 1)), bits.dtype(_INFINITY[single.name])

    def compute(a: Array) -> Array:
        if ftz and single.name in ("f32", "f16"):
            flushes = flush if single.name == "f32" else flush16
            a = flushes(a.view(single.dtype)).view(bits.dtype)
        nan = (a & ~sign) > infinity
        kept = a | _QUIET64 if single.bits == 64 else bits.dtype((1 << (single.bits - 1)) - 1)
        return np.where(nan, kept, function(a, sign))

    if single is not type_:
        return elementwise(inst, "b32", ["b32"], halves(compute, bits))
    return elementwise(inst, bits, [bits], compute)


@instruction("copysign")
def _copysign(inst: Instruction) -> Execute:
    """The sign of a on the magnitude of b (9.7.3.2)."""
    type_ = inst.type("f32", "f64")
    return elementwise(inst, type_, [type_, type_], lambda a, b: np.copysign(b, a))


# --- minimum and maximum ---------------------------------------------------------------------------


def _extreme(largest: bool, nan: bool, xorsign: bool) -> Function:
    """-0 is below +0; with .NaN a NaN operand decides, else the other operand does (9.7.3.11)."""

    def compute(a: Array, b: Array) -> Array:
        if xorsign:
            negative = np.signbit(a) ^ np.signbit(b)
            a, b = np.abs(a), np.abs(b)
        a, b = np.broadcast_arrays(a, b)
        first = (a > b) if largest else (a < b)
        tie = (a == b) & (np.signbit(b) if largest else np.signbit(a))
        result = np.where(first | tie | np.isnan(b), a, b)
        if nan:
            result = np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), result)
        if xorsign:
            result = np.copysign(result, np.where(negative, -1, 1).astype(result.dtype))
        return result

    return compute


@instruction("min", "max")
def _min_max(inst: Instruction) -> Execute:
    largest = inst.name == "max"
    if not _is_float(inst):
        relu = inst.flag("relu")
        type_ = inst.type()
        extreme: Function = np.maximum if largest else np.minimum
        chosen = (lambda a, b: np.maximum(extreme(a, b), 0)) if relu else extreme
        if type_.name.endswith("x2"):
            chosen = halves(chosen, TYPES[type_.name.removesuffix("x2")])
        return elementwise(inst, type_, [type_, type_], chosen)
    nan, xorsign = inst.flag("NaN"), inst.flag("xorsign") and inst.flag("abs")
    form = Format(inst)
    compute = _extreme(largest, nan, xorsign)
    operands = len(inst.operands) - 1
    function = compute if operands == 2 else lambda a, b, c: compute(compute(a, b), c)
    if form.type.name == "bf16":
        return form.bind(lambda *v: f32_to_bf16(function(*[bf16_to_f32(x) for x in v])), operands)
    return form.bind(function, operands)


# --- functions -------------------------------------------------------------------------------------


@instruction("rcp")
def _rcp(inst: Instruction) -> Execute:
    inst.flag("approx")
    form = Format(inst)
    if form.mode == "rn":
        return form.bind(lambda a: a.dtype.type(1) / a, 1)
    if form.type.name == "f64":
        return form.bind(lambda a: directed(1 / a, exact.quotient, form.mode, np.ones_like(a), a), 1)
    return form.bind(lambda a: narrow(quotient_to_odd(np.ones_like(a), a), form.type, form.mode), 1)


@instruction("sqrt")
def _sqrt(inst: Instruction) -> Execute:
    inst.flag("approx")
    form = Format(inst)
    if form.mode == "rn":
        return form.bind(np.sqrt, 1)
    if form.type.name == "f64":
        return form.bind(lambda a: directed(np.sqrt(a), exact.root, form.mode, a), 1)
    return form.bind(lambda a: narrow(root_to_odd(a), form.type, form.mode), 1)


def _approximate(function: Function) -> Callable[[Instruction], Execute]:
    """Computed in float64 and rounded once."""

    def bind(inst: Instruction) -> Execute:
        inst.flag("approx")
        form = Format(inst)
        return form.bind(lambda a: narrow(function(to_f64(a, form.type)), form.type), 1)

    return bind


_FUNCTIONS: dict[str, Function] = {
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
for _name, _function in _FUNCTIONS.items():
    instruction(_name)(_approximate(_function))


@instruction("testp")
def _testp(inst: Instruction) -> Execute:
    test = inst.one_of("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    type_ = inst.type("f32", "f64")
    tiny = np.finfo(type_.dtype).smallest_normal
    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & ((np.abs(a) >= tiny) | (a == 0)),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }
    return elementwise(inst, "pred", [type_], tests[test])
