"""The arithmetic of atomic instructions, shared by global, buffer, flat and LDS forms (ISA chapter 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.runtime.emulator.amd.memory import AtomicFunction
from tilewright.runtime.emulator.amd.numerics import bf16_to_f32, f32_to_bf16
from tilewright.runtime.emulator.amd.operands import Array

_U16, _U32 = np.uint16, np.uint32


@dataclass(frozen=True)
class Atomic:
    """An operation: bytes of memory, 32-bit words of the data operand, old and data words -> new words."""

    size: int
    data_words: int
    function: AtomicFunction


def _typed(dtype: Any, operation: Callable[[Array, Array], Array]) -> AtomicFunction:
    words = np.dtype(dtype).itemsize // 4

    def join(parts: list[Array]) -> Array:
        return np.ascontiguousarray(np.stack(parts, axis=-1)).view(dtype)[..., 0]

    def apply(old: list[Array], data: list[Array]) -> list[Array]:
        value = np.asarray(operation(join(old), join(data))).astype(dtype)
        packed = np.ascontiguousarray(value)[..., None].view(_U32)
        return [packed[..., part] for part in range(words)]

    return apply


def _halves(operation: Callable[[Array, Array], Array]) -> AtomicFunction:
    """Two 16-bit operations side by side; ``operation`` maps uint16 patterns."""

    def apply(old: list[Array], data: list[Array]) -> list[Array]:
        parts = [
            operation((old[0] >> _U32(shift)).astype(_U16), (data[0] >> _U32(shift)).astype(_U16)).astype(_U32)
            for shift in (0, 16)
        ]
        return [parts[0] | (parts[1] << _U32(16))]

    return apply


def _add_f16(a: Array, b: Array) -> Array:
    return (a.view(np.float16) + b.view(np.float16)).view(_U16)


def _add_bf16(a: Array, b: Array) -> Array:
    return f32_to_bf16(bf16_to_f32(a) + bf16_to_f32(b))


def _increment(a: Array, limit: Array) -> Array:
    return np.where(a >= limit, a.dtype.type(0), a + a.dtype.type(1))


def _decrement(a: Array, limit: Array) -> Array:
    return np.where((a == 0) | (a > limit), limit, a - a.dtype.type(1))


def _compare_swap(words: int) -> AtomicFunction:
    """The data is the new value, then the value compared against."""

    def apply(old: list[Array], data: list[Array]) -> list[Array]:
        equal = np.ones(old[0].shape, np.bool_)
        for part in range(words):
            equal &= old[part] == data[words + part]
        return [np.where(equal, data[part], old[part]) for part in range(words)]

    return apply


_INTEGER: dict[str, tuple[str, Callable[[Array, Array], Array]]] = {
    "swap": ("u", lambda a, b: b),
    "add": ("u", np.add),
    "sub": ("u", np.subtract),
    "smin": ("i", np.minimum),
    "umin": ("u", np.minimum),
    "smax": ("i", np.maximum),
    "umax": ("u", np.maximum),
    "and": ("u", np.bitwise_and),
    "or": ("u", np.bitwise_or),
    "xor": ("u", np.bitwise_xor),
    "inc": ("u", _increment),
    "dec": ("u", _decrement),
}


def _build() -> dict[str, Atomic]:
    table: dict[str, Atomic] = {}
    for name, (sign, operation) in _INTEGER.items():
        table[name] = Atomic(4, 1, _typed(np.dtype(f"{sign}4"), operation))
        table[f"{name}_x2"] = Atomic(8, 2, _typed(np.dtype(f"{sign}8"), operation))
    table["cmpswap"] = Atomic(4, 2, _compare_swap(1))
    table["cmpswap_x2"] = Atomic(8, 4, _compare_swap(2))
    table["add_f32"] = Atomic(4, 1, _typed(np.float32, np.add))
    table["add_f64"] = Atomic(8, 2, _typed(np.float64, np.add))
    table["min_f32"] = Atomic(4, 1, _typed(np.float32, np.fmin))
    table["max_f32"] = Atomic(4, 1, _typed(np.float32, np.fmax))
    table["min_f64"] = Atomic(8, 2, _typed(np.float64, np.fmin))
    table["max_f64"] = Atomic(8, 2, _typed(np.float64, np.fmax))
    table["pk_add_f16"] = Atomic(4, 1, _halves(_add_f16))
    table["pk_add_bf16"] = Atomic(4, 1, _halves(_add_bf16))
    return table


#: by the suffix of the global instruction: global_atomic_<name>
ATOMICS = _build()

#: ds_<name>[_rtn]_<type> -> the operation above
LDS_ATOMICS: dict[tuple[str, str], Atomic] = {
    ("add", "u32"): ATOMICS["add"],
    ("sub", "u32"): ATOMICS["sub"],
    ("inc", "u32"): ATOMICS["inc"],
    ("dec", "u32"): ATOMICS["dec"],
    ("min", "i32"): ATOMICS["smin"],
    ("max", "i32"): ATOMICS["smax"],
    ("min", "u32"): ATOMICS["umin"],
    ("max", "u32"): ATOMICS["umax"],
    ("and", "b32"): ATOMICS["and"],
    ("or", "b32"): ATOMICS["or"],
    ("xor", "b32"): ATOMICS["xor"],
    ("add", "f32"): ATOMICS["add_f32"],
    ("min", "f32"): ATOMICS["min_f32"],
    ("max", "f32"): ATOMICS["max_f32"],
    ("pk_add", "f16"): ATOMICS["pk_add_f16"],
    ("pk_add", "bf16"): ATOMICS["pk_add_bf16"],
    ("add", "u64"): ATOMICS["add_x2"],
    ("sub", "u64"): ATOMICS["sub_x2"],
    ("min", "i64"): ATOMICS["smin_x2"],
    ("max", "i64"): ATOMICS["smax_x2"],
    ("min", "u64"): ATOMICS["umin_x2"],
    ("max", "u64"): ATOMICS["umax_x2"],
    ("inc", "u64"): ATOMICS["inc_x2"],
    ("dec", "u64"): ATOMICS["dec_x2"],
    ("and", "b64"): ATOMICS["and_x2"],
    ("or", "b64"): ATOMICS["or_x2"],
    ("xor", "b64"): ATOMICS["xor_x2"],
    ("add", "f64"): ATOMICS["add_f64"],
    ("min", "f64"): ATOMICS["min_f64"],
    ("max", "f64"): ATOMICS["max_f64"],
}
