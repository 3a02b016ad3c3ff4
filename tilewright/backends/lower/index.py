"""Integer arithmetic that folds what is known at compile time: operands are Python ints or MLIR values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TypeAlias

from tilewright.backends.mlir_builder import FunctionBuilder
from tilewright.backends.mlir_builder import ir as mlir

IntLike: TypeAlias = int | mlir.Value


class IndexMath:
    """i32 and i64 arithmetic; the width of a mixed expression is that of its MLIR operand."""

    def __init__(self, fb: FunctionBuilder):
        self.fb = fb

    def value(self, x: IntLike, bits: int = 32) -> mlir.Value:
        """An MLIR value of ``bits`` bits; i32 values are sign-extended to i64 (and i64 truncated to i32)."""
        if isinstance(x, int):
            return self.fb.i32(x) if bits == 32 else self.fb.i64(x)
        width = mlir.IntegerType(x.type).width
        if width == bits:
            return x
        type_ = self.fb.types.i32 if bits == 32 else self.fb.types.i64
        return self.fb.sext(x, type_) if width < bits else self.fb.trunc(x, type_)

    def wide(self, x: IntLike) -> IntLike:
        """The same number as an int or an i64 value."""
        return x if isinstance(x, int) else self.value(x, 64)

    def narrow(self, x: IntLike) -> IntLike:
        """The same number as an int or an i32 value."""
        return x if isinstance(x, int) else self.value(x, 32)

    def _pair(self, a: IntLike, b: IntLike) -> tuple[mlir.Value, mlir.Value]:
        bits = max(mlir.IntegerType(x.type).width for x in (a, b) if not isinstance(x, int))
        return self.value(a, bits), self.value(b, bits)

    def add(self, a: IntLike, b: IntLike) -> IntLike:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if isinstance(a, int) and a == 0:
            return b
        if isinstance(b, int) and b == 0:
            return a
        return self.fb.add(*self._pair(a, b))

    def sub(self, a: IntLike, b: IntLike) -> IntLike:
        if isinstance(b, int):
            return self.add(a, -b)
        return self.fb.sub(*self._pair(a, b))

    def mul(self, a: IntLike, b: IntLike) -> IntLike:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        for x, y in ((a, b), (b, a)):
            if isinstance(x, int) and x in (0, 1):
                return y if x else 0
        return self.fb.mul(*self._pair(a, b))

    def sum(self, terms: Sequence[IntLike]) -> IntLike:
        """The sum; ints are added last so that they can become an immediate offset."""
        constant = sum(t for t in terms if isinstance(t, int))
        values: list[IntLike] = [t for t in terms if not isinstance(t, int)]
        return self.add(reduce(self.add, values), constant) if values else constant

    def linear_map(self, value: mlir.Value, columns: Sequence[int]) -> IntLike:
        """XOR of ``columns[b]`` over the set bits b of an i32: bits that move by one distance move together."""
        masks: dict[int, int] = {}
        for bit, column in enumerate(columns):
            for out in range(column.bit_length()):
                if column >> out & 1:
                    masks[out - bit] = masks.get(out - bit, 0) | 1 << bit
        result: mlir.Value | None = None
        for distance, mask in sorted(masks.items()):
            term = self.fb.and_(value, self.fb.i32(mask))
            if distance:
                amount = self.fb.i32(abs(distance))
                term = self.fb.shl(term, amount) if distance > 0 else self.fb.lshr(term, amount)
            result = term if result is None else self.fb.xor(result, term)
        return 0 if result is None else result

    def xor(self, a: IntLike, b: IntLike) -> IntLike:
        if isinstance(a, int) and isinstance(b, int):
            return a ^ b
        if isinstance(a, int) and a == 0:
            return b
        if isinstance(b, int) and b == 0:
            return a
        return self.fb.xor(*self._pair(a, b))
