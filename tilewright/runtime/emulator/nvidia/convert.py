"""cvt and cvta (PTX ISA 9.7.9.20, 9.7.9.21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.emulator.nvidia.decode import Instruction, Problem
from tilewright.runtime.emulator.nvidia.integer import elementwise
from tilewright.runtime.emulator.nvidia.numerics import (
    NAN32,
    bf16_to_f32,
    canonical_nan,
    f32_to_bf16,
    f32_to_fp8,
    float_to_int,
    flush,
    fp8_to_f32,
    int_to_float,
    narrow,
    round_to_integer,
    to_f64,
    to_tf32,
)
from tilewright.runtime.emulator.nvidia.operands import dest, location
from tilewright.runtime.emulator.nvidia.registry import Execute, instruction
from tilewright.runtime.emulator.nvidia.spaces import LOCAL_WINDOW, SHARED_WINDOW
from tilewright.runtime.emulator.nvidia.state import State
from tilewright.runtime.emulator.nvidia.types import TYPES, Array, Type

_U16, _U32 = np.uint16, np.uint32
_INTEGER_MODES, _FLOAT_MODES = ("rni", "rzi", "rmi", "rpi"), ("rn", "rz", "rm", "rp", "rna")
_PAIRS = ("f16x2", "bf16x2", "e4m3x2", "e5m2x2")
_LARGEST = {"f16": 65504.0, "bf16": 3.3895313892515355e38}
Function = Callable[..., Any]


@instruction("cvt")
def _cvt(inst: Instruction) -> Execute:
    if inst.flag("pack"):
        return _pack_integers(inst)
    integral = inst.one_of(*_INTEGER_MODES, default="")
    mode = inst.one_of(*_FLOAT_MODES, default="rn")
    ftz, saturate, finite, relu = (inst.flag(name) for name in ("ftz", "sat", "satfinite", "relu"))
    result, type_ = inst.types()
    if result.name in _PAIRS:
        return _to_pair(inst, result, type_, mode, finite, relu)
    if result.name == "tf32":
        return elementwise(inst, result, [type_], lambda a: _to_tf32(a, mode, relu))
    if type_.kind == "f" and result.kind == "f":
        function = _float_to_float(result, type_, integral, mode, ftz, saturate, finite, relu)
    elif type_.kind == "f":
        function = _float_to_integer(result, type_, integral or "rzi", ftz)
    elif result.kind == "f":
        function = _integer_to_float(result, mode, saturate)
    else:
        function = _integer_to_integer(result, saturate)
    return elementwise(inst, result, [type_], function)


def _to_tf32(a: Array, mode: str, relu: bool) -> Array:
    """``.rna`` keeps what it can of a NaN, the other modes give the canonical one (as measured on an H200)."""
    value = to_tf32(np.maximum(a, np.float32(0)) if relu else a, mode)
    return value if mode == "rna" else np.where(np.isnan(a), NAN32 & _U32(0xFFFFE000), value)


def _integer_to_integer(result: Type, saturate: bool) -> Function:
    """Truncation or extension by the source's sign; .sat clamps."""
    if not saturate:
        return lambda a: a.astype(result.dtype)
    info = np.iinfo(result.dtype)

    def compute(a: Array) -> Array:
        source_info = np.iinfo(a.dtype)
        low, high = max(info.min, source_info.min), min(info.max, source_info.max)
        return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(result.dtype)

    return compute


def _integer_to_float(result: Type, mode: str, saturate: bool) -> Function:
    def compute(a: Array) -> Array:
        value = int_to_float(a, result, mode)
        return np.clip(value, result.dtype(0), result.dtype(1)) if saturate else value

    return compute


def _float_to_integer(result: Type, type_: Type, mode: str, ftz: bool) -> Function:
    def compute(a: Array) -> Array:
        wide = to_f64(flush(a) if ftz and type_.name == "f32" else a, type_)
        return float_to_int(wide, mode, result, type_.name == "f64")

    return compute


def _float_to_float(
    result: Type, type_: Type, integral: str, mode: str, ftz: bool, saturate: bool, finite: bool, relu: bool
) -> Function:
    """Widening is exact; narrowing rounds once. ``.rni`` and the like round to an integral value of the same type."""
    single_in, single_out = type_.name == "f32", result.name == "f32"
    plain = not (integral or ftz or saturate or finite or relu)

    def compute(a: Array) -> Array:
        if plain and type_ is result:
            return a
        if ftz and single_in:
            a = canonical_nan(flush(a))
        if integral:
            value = round_to_integer(to_f64(a, type_), integral)
            value = narrow(value, result)
        elif result.bits >= type_.bits and type_.name != "bf16" and result.name != "bf16":
            value = a.astype(result.dtype)
        elif type_.name == "bf16" and single_out:
            value = bf16_to_f32(a)
        else:
            value = narrow(to_f64(a, type_), result, mode)
        if ftz and single_out:
            value = flush(value)
        if saturate or finite or relu:
            value = _limit(value, result, saturate, finite, relu)
        if (type_.name, result.name) in _KEEPS_NAN:
            return value
        if type_.name == "f64" and result.bits == 16:
            return _keep_nan(a, value, result)
        if result.name == "f64":
            return np.where(np.isnan(value), value.view(np.uint64) | _QUIET, value.view(np.uint64)).view(np.float64)
        return canonical_nan(value)

    return compute


#: conversions that keep what they can of a NaN's sign and payload, as measured on an H100
_KEEPS_NAN = {("f64", "f32"), ("bf16", "f32")}
_QUIET = np.uint64(0x0008000000000000)


def _keep_nan(a: Array, value: Array, result: Type) -> Array:
    """The same for float64 to 16 bits: the sign and the upper bits of the payload."""
    bits, digits = a.view(np.uint64) | _QUIET, 7 if result.name == "bf16" else 10
    kept = bits >> np.uint64(48) & np.uint64(0x8000) | bits >> np.uint64(52 - digits) & np.uint64(0x7FFF)
    return np.where(np.isnan(a), kept.astype(_U16), value.view(_U16)).view(result.dtype)


def _limit(value: Array, type_: Type, saturate: bool, finite: bool, relu: bool) -> Array:
    wide = to_f64(value, type_)
    if saturate:
        wide = np.where(wide > 0, np.minimum(wide, 1), 0)
    if finite:
        wide = np.clip(wide, -_LARGEST[type_.name], _LARGEST[type_.name])
    if relu:
        wide = np.where(wide <= 0, 0.0, wide)
    return narrow(wide, type_)


def _to_pair(inst: Instruction, result: Type, type_: Type, mode: str, finite: bool, relu: bool) -> Execute:
    """cvt.bf16x2.f32 d, a, b: a is the upper half. From a pair: both halves."""
    part = result.name.removesuffix("x2")
    if type_.name == "f32":
        inst.need(3)
        one = _one_of_pair(part, mode, finite, relu)
        shift = result.dtype(result.bits // 2)

        def compute(a: Array, b: Array) -> Array:
            return one(a).astype(result.dtype) << shift | one(b).astype(result.dtype)

        return elementwise(inst, result, [type_, type_], compute)
    source_part = type_.name.removesuffix("x2")
    if source_part in ("e4m3", "e5m2") and part == "f16":
        return elementwise(inst, result, [type_], lambda a: _widen(a, source_part, relu))
    if source_part in ("f16", "bf16") and part in ("e4m3", "e5m2"):
        one = _one_of_pair(part, mode, finite, relu)
        return elementwise(inst, result, [type_], lambda a: _shrink(a, TYPES[source_part], one))
    raise Problem(f"conversion from .{type_.name} is not implemented")


def _one_of_pair(part: str, mode: str, finite: bool, relu: bool) -> Function:
    def compute(a: Array) -> Array:
        if relu:
            a = np.where(a <= 0, np.float32(0), a)
        if part in ("e4m3", "e5m2"):
            return f32_to_fp8(a, part)
        type_ = TYPES[part]
        if part == "bf16" and mode == "rn" and not finite:
            return f32_to_bf16(a)
        value = narrow(a.astype(np.float64), type_, mode)
        if finite:
            value = _limit(value, type_, False, True, False)
        return canonical_nan(value).view(_U16)

    return compute


def _widen(a: Array, name: str, relu: bool) -> Array:
    words = []
    for octets in (a & _U16(0xFF), a >> _U16(8)):
        value = fp8_to_f32(octets.astype(np.uint8), name).astype(np.float16)
        if relu:
            value = np.where(value <= 0, np.float16(0), value)
        words.append(canonical_nan(value).view(_U16).astype(_U32))
    return words[0] | words[1] << _U32(16)


def _shrink(a: Array, type_: Type, one: Function) -> Array:
    low, high = (to_f64((a >> _U32(s)).astype(_U16).view(type_.dtype), type_).astype(np.float32) for s in (0, 16))
    return one(low).astype(_U16) | one(high).astype(_U16) << _U16(8)


def _pack_integers(inst: Instruction) -> Execute:
    """cvt.pack.sat: two (or, with c, more) integers side by side, saturated (9.7.9.22)."""
    inst.flag("sat")
    types = inst.types()
    result, type_ = types[0], types[1]
    info = np.iinfo(result.dtype)
    mask, shift = _U32((1 << result.bits) - 1), _U32(result.bits)

    def clamp(value: Array) -> Array:
        return np.clip(value.astype(np.int64), info.min, info.max).astype(_U32) & mask

    if len(types) == 3:
        keep = _U32(2 * result.bits)
        return elementwise(inst, "b32", [type_, type_, "b32"], lambda a, b, c: c << keep | clamp(a) << shift | clamp(b))
    return elementwise(inst, "b32", [type_, type_], lambda a, b: clamp(a) << shift | clamp(b))


@instruction("cvta")
def _cvta(inst: Instruction) -> Execute:
    """Addresses of a state space <-> generic ones. Global and constant ones are generic already."""
    back = inst.flag("to")
    space = inst.one_of("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param", "param::entry")
    type_ = inst.type("u64", "u32")
    write = dest(inst, inst.operands[0], type_)
    operand = inst.operands[1]
    read = location(inst, operand, getattr(operand, "offset", 0))
    fixed = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space.partition("::")[0], 0)
    parameters = space.startswith("param")

    def execute(state: State) -> None:
        base = state.launch.param_address if parameters else fixed
        value = read(state) - base if back else read(state) + base
        write(state, value.astype(type_.unsigned))

    return execute
