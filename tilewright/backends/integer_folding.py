"""Integer operations on constants, as LLVM would fold them, and their neutral elements."""

from __future__ import annotations

from collections.abc import Callable


def _truncating_division(x: int, y: int) -> int:
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


def signed(value: int, bits: int) -> int:
    """``value`` wrapped to ``bits`` bits and read as two's complement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


#: What an operation does to two signed constants of equal width (and whether it is defined).
_FOLD: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda x, y, bits: x + y,
    "sub": lambda x, y, bits: x - y,
    "mul": lambda x, y, bits: x * y,
    "and": lambda x, y, bits: x & y,
    "or": lambda x, y, bits: x | y,
    "xor": lambda x, y, bits: x ^ y,
    "shl": lambda x, y, bits: x << y,
    "ashr": lambda x, y, bits: x >> y,
    "lshr": lambda x, y, bits: (x % (1 << bits)) >> y,
    "sdiv": lambda x, y, bits: _truncating_division(x, y),
    "srem": lambda x, y, bits: x - y * _truncating_division(x, y),
    "udiv": lambda x, y, bits: (x % (1 << bits)) // (y % (1 << bits)),
    "urem": lambda x, y, bits: (x % (1 << bits)) % (y % (1 << bits)),
}
_SHIFTS = frozenset({"shl", "ashr", "lshr"})
_DIVISIONS = frozenset({"sdiv", "srem", "udiv", "urem"})
COMMUTATIVE = frozenset({"add", "mul", "and", "or", "xor"})
#: x op neutral == x
NEUTRAL = {
    **dict.fromkeys(["add", "sub", "or", "xor", "shl", "ashr", "lshr"], 0),
    **dict.fromkeys(["mul", "sdiv", "udiv"], 1),
    "and": -1,
}
#: x op absorbing == 0
ABSORBING = {"mul": 0, "and": 0, "urem": 1, "srem": 1}

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


def fold_integers(name: str, x: int, y: int, bits: int) -> int | None:
    """The value of ``x name y``, or None where LLVM calls it poison or undefined."""
    if name in _SHIFTS and not 0 <= y < bits:
        return None
    if name in _DIVISIONS and (y == 0 or (x, y) == (-(1 << (bits - 1)), -1)):
        return None
    return _FOLD[name](x, y, bits)


def fold_compare(predicate: str, x: int, y: int, bits: int) -> bool:
    if predicate in ("eq", "ne"):
        return _COMPARE[predicate](x, y)
    if predicate[0] == "u":
        x, y = x % (1 << bits), y % (1 << bits)
    return _COMPARE[predicate[1:]](x, y)
