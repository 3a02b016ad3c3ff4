"""What a program tells its user and the compiler: prints, assertions and assumptions (``tile.*``)."""

from __future__ import annotations

from tilewright.ir.core import Effect, Operation, Value, attribute, operand, operands, operation
from tilewright.ir.tile_ops import Binary, Compare, Constant
from tilewright.ir.types import ScalarType, TileType, element_type, i1


@operation("tile.print", effect=Effect.CHECK)
class Print(Operation):
    """Print ``text`` with each ``{}`` replaced by a value: one line for a program, or for each element of the tiles.

    All values are scalars, or all are tiles of one shape. Lines of tiles begin with the element's coordinates.
    """

    values: list[Value] = operands()
    text: str = attribute()

    def verify(self) -> None:
        shapes = {v.type.shape if isinstance(v.type, TileType) else () for v in self.values}
        self.require(len(shapes) <= 1, "all values have one shape")
        parts = text_parts(self.text)
        self.require(len(parts) == len(self.values) + 1, f"{len(self.values)} values for {len(parts) - 1} '{{}}'")


@operation("tile.assert", effect=Effect.CHECK)
class Assert(Operation):
    """Stop the program with ``text`` unless the condition holds, a scalar or every element of a tile."""

    condition: Value = operand()
    text: str = attribute(default="")

    def verify(self) -> None:
        self.require(element_type(self.condition.type) == i1, "the condition is i1")


@operation("tile.assume", effect=Effect.CHECK)
class Assume(Operation):
    """A promise that a scalar condition holds: the compiler may rely on it, and does not check it."""

    condition: Value = operand()

    def verify(self) -> None:
        self.require(self.condition.type == ScalarType(i1), "the condition is a scalar i1")


def promised_multiple(condition: Value) -> tuple[Value, int] | None:
    """(v, c) of a condition ``v % c == 0`` with a constant c > 0."""
    compare = condition.op
    if not isinstance(compare, Compare) or compare.fn != "eq":
        return None
    for side, other in ((compare.lhs, compare.rhs), (compare.rhs, compare.lhs)):
        rest, zero = side.op, other.op
        if isinstance(rest, Binary) and rest.fn == "mod" and isinstance(zero, Constant) and zero.value == 0:
            divisor = rest.rhs.op
            if isinstance(divisor, Constant) and isinstance(divisor.value, int) and divisor.value > 0:
                return rest.lhs, divisor.value
    return None


def text_parts(text: str) -> list[str]:
    """The text around its ``{}``; ``{{`` and ``}}`` stand for braces. ValueError for anything else in braces."""
    parts, position = [""], 0
    while position < len(text):
        pair, one = text[position : position + 2], text[position]
        if pair == "{}":
            parts.append("")
        elif pair in ("{{", "}}"):
            parts[-1] += one
        elif one in "{}":
            raise ValueError(f"'{one}' at character {position} of {text!r}: a value is written {{}}, a brace twice")
        else:
            parts[-1] += one
            position -= 1
        position += 2
    return parts
