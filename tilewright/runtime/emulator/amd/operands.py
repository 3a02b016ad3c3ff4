"""Operands of an instruction: their text, and the data kinds in which an instruction reads them.

An operand does not know its type; the instruction does. ``1.0`` is 0x3f800000 to a 32-bit
instruction, 0x3c00 to a 16-bit one (ISA chapter 6, "Vector ALU operands": inline constants).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: any numeric array; the shapes in use are [waves, 64], [waves, 1] and [1, 1]
Array = NDArray[Any]

VCC, M0, EXEC = 106, 124, 126
SHARED_APERTURE_HI, PRIVATE_APERTURE_HI = 0x00010000, 0x00020000


@dataclass(frozen=True)
class Kind:
    """How an instruction reads the bits of an operand: ``bits`` wide, as ``dtype``."""

    name: str
    bits: int
    dtype: Any
    is_float: bool = False


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("b32", 32, np.uint32),
        Kind("u32", 32, np.uint32),
        Kind("i32", 32, np.int32),
        Kind("f32", 32, np.float32, True),
        Kind("b64", 64, np.uint64),
        Kind("u64", 64, np.uint64),
        Kind("i64", 64, np.int64),
        Kind("f64", 64, np.float64, True),
        Kind("b16", 16, np.uint16),
        Kind("u16", 16, np.uint16),
        Kind("i16", 16, np.int16),
        Kind("f16", 16, np.float16, True),
    )
}


class Where(enum.Enum):
    """The place an operand names."""

    VECTOR = "vector register"
    SCALAR = "scalar register"
    CONSTANT = "constant"
    SCC = "src_scc"
    OFF = "off"
    LABEL = "label"
    VALUE = "computed value"


@dataclass(frozen=True, eq=False)
class Operand:
    """One parsed operand. ``index``/``count`` for registers, ``value`` for integer constants.

    ``value`` of ``Where.VALUE`` are the arrays (low, high or None) that DPP or SDWA selection computed.
    """

    where: Where
    text: str
    index: int = 0
    count: int = 1
    value: Any = 0
    real: float | None = None
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False


_SPECIAL = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
    "m0": (M0, 1),
    "flat_scratch": (102, 2),
    "flat_scratch_lo": (102, 1),
    "flat_scratch_hi": (103, 1),
    "xnack_mask": (104, 2),
}
_APERTURES = {
    "src_shared_base": SHARED_APERTURE_HI << 32,
    "src_private_base": PRIVATE_APERTURE_HI << 32,
    "src_shared_limit": 0xFFFFFFFF,
    "src_private_limit": 0xFFFFFFFF,
}
_REGISTER = re.compile(r"^([vsa])(?:(\d+)|\[(\d+)(?::(\d+))?\])$")
_INTEGER = re.compile(r"^[+-]?(0x[0-9a-fA-F]+|\d+)$")
_REAL = re.compile(r"^-?\d+\.\d*(e[+-]?\d+)?$")


def parse_operand(text: str, accum_offset: int) -> Operand | None:
    """Parse one operand; None if it is none that we know. AGPR a0 is vector register ``accum_offset``.

    The unified register file of CDNA3 (ISA chapter 3, "VGPRs") puts the accumulation registers
    after the ``.amdhsa_accum_offset`` architectural ones.
    """
    body, negate, absolute = text.strip(), False, False
    if wrapped := re.match(r"^(neg|abs|sext)\((.*)\)$", body):
        inner = parse_operand(wrapped[2], accum_offset)
        if inner is None:
            return None
        return replace(
            inner,
            text=text,
            negate=inner.negate or wrapped[1] == "neg",
            absolute=inner.absolute or wrapped[1] == "abs",
            sign_extend=wrapped[1] == "sext",
        )
    if body.startswith("-") and not (_INTEGER.match(body) or _REAL.match(body)):
        negate, body = True, body[1:]
    if body.startswith("|") and body.endswith("|"):
        absolute, body = True, body[1:-1]

    def make(where: Where, **fields: Any) -> Operand:
        return Operand(where, text, negate=negate, absolute=absolute, **fields)

    if match := _REGISTER.match(body):
        letter, single, low, high = match.groups()
        first = int(single if single is not None else low)
        count = int(high) - first + 1 if high else 1
        if letter == "s":
            return make(Where.SCALAR, index=first, count=count)
        return make(Where.VECTOR, index=first + (accum_offset if letter == "a" else 0), count=count)
    if body in _SPECIAL:
        return make(Where.SCALAR, index=_SPECIAL[body][0], count=_SPECIAL[body][1])
    if body in _APERTURES:
        return make(Where.CONSTANT, value=_APERTURES[body])
    if body in ("src_scc", "scc"):
        return make(Where.SCC)
    if body == "off":
        return make(Where.OFF)
    if _INTEGER.match(body):
        return make(Where.CONSTANT, value=int(body, 0))
    if _REAL.match(body):
        return make(Where.CONSTANT, real=float(body))
    if re.match(r"^\.?L?[A-Za-z_.$][\w.$]*$", body):
        return make(Where.LABEL)
    return None


@lru_cache(maxsize=65536)
def _encode(value: int, real: float | None, kind_name: str) -> int:
    kind = KINDS[kind_name]
    if real is not None:
        if kind.bits == 64:
            return int(np.array(real, np.float64).view(np.uint64))
        if kind.bits == 16:
            return int(np.array(real, np.float16).view(np.uint16))
        return int(np.array(real, np.float32).view(np.uint32))
    if kind_name == "f64" and not -16 <= value <= 64:
        return (value & 0xFFFFFFFF) << 32  # a 32-bit literal is the upper half of a double
    return value & ((1 << kind.bits) - 1)


@lru_cache(maxsize=65536)
def _constant_array(value: int, real: float | None, kind_name: str) -> Array:
    kind = KINDS[kind_name]
    array = np.array([[_encode(value, real, kind_name)]], dtype=f"u{kind.bits // 8}").view(kind.dtype)
    array.setflags(write=False)
    return array


def constant_array(operand: Operand, kind: Kind) -> Array:
    """A constant as a read-only [1, 1] array of ``kind``'s dtype."""
    return _constant_array(operand.value, operand.real, kind.name)


@lru_cache(maxsize=65536)
def _constant_part(value: int, real: float | None, part: int) -> Array:
    bits = _encode(value, None, "b64") >> (32 * part) if real is None else _encode(0, real, "b32")
    array = np.array([[bits & 0xFFFFFFFF]], np.uint32)
    array.setflags(write=False)
    return array


def constant_part(operand: Operand, part: int) -> Array:
    """32-bit part ``part`` of a constant as [1, 1]: integers are sign-extended, reals are 32-bit and repeat."""
    return _constant_part(operand.value, operand.real, part)
