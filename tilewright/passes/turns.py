"""turns: let the warpgroups of a role issue their matrix products in turn.

In a loop with vector work between its products, two warpgroups that issue at the same time also compute at the same
time, and the matrix unit idles meanwhile. In turn, one computes while the other's products run ("ping-pong scheduling",
FlashAttention-3, arXiv 2407.08608, section 3.1). Which of the two happens without turns is up to chance: the same loop
was measured 15 % apart after different first iterations (docs/performance.md).

With two warpgroups, one issues while the other computes: where that takes longer than the products, turns only make the
issuing one wait. With more, several compute while one issues.
"""

from __future__ import annotations

from tilewright.ir.async_ops import AsyncDot, Barrier, PassTurn, Role, TakeTurn, Wait
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Operation
from tilewright.ir.tile_ops import Binary, Cast, For, Reduce, Select, Unary
from tilewright.ir.types import SlotType, TileType
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import TURNS

WARPGROUP = 4
#: products of 16-bit elements that Hopper's matrix unit sums up in a cycle
PRODUCTS_PER_CYCLE = 2048
#: elements of vector operations that a multiprocessor works on in a cycle: special functions, comparisons and
#: conversions, the rest (CUDA C++ Programming Guide, "Arithmetic Instructions": compute capability 9.0)
SPECIAL, HALF, FULL = 16, 64, 128


@register_pass("turns")
class Turns(FunctionPass):
    """Applies to loops of roles of several warpgroups, by cost unless the option ``schedule`` names a choice."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        wanted = context.options.schedule
        if wanted not in (None, TURNS):
            return
        for role in [op for op in function.walk() if isinstance(op, Role) and op.warps > WARPGROUP]:
            for loop in [op for op in role.body.walk() if isinstance(op, For)]:
                block = loop.body.block
                issued = _issued_together(block)
                if len(issued) > 1 and (wanted == TURNS or pays(block, role.warps // WARPGROUP)):
                    _take_turns(block, issued)


def pays(block: Block, groups: int) -> bool:
    """Whether no product is issued out of turn, and those of the other warpgroups cover one's vector work."""
    in_turn = len(_issued_together(block)) == sum(isinstance(op, AsyncDot) for op in block.ops)
    return in_turn and product_cycles(block) * (groups - 1) >= vector_cycles(block)


def _issued_together(block: Block) -> list[AsyncDot]:
    """The first products of a block, up to where it waits, for them or for the other warpgroups."""
    issued: list[AsyncDot] = []
    for op in block.ops:
        if isinstance(op, AsyncDot):
            issued.append(op)
        elif issued and (isinstance(op, Wait) or (isinstance(op, Barrier) and op.scope != "warpgroup")):
            break
    return issued


def _take_turns(block: Block, issued: list[AsyncDot]) -> None:
    b = Builder(block, issued[0].loc)
    with b.at(block, block.ops.index(issued[-1]) + 1):
        b.insert(PassTurn())
    with b.at(block, block.ops.index(issued[0])):
        b.insert(TakeTurn())


def product_cycles(block: Block) -> float:
    """How long the matrix unit works on one iteration of all warpgroups."""
    return sum(_products(op) for op in block.ops if isinstance(op, AsyncDot)) / PRODUCTS_PER_CYCLE


def vector_cycles(block: Block) -> float:
    """How long the busiest vector unit works on one iteration of all warpgroups."""
    busy = dict.fromkeys((SPECIAL, HALF, FULL), 0.0)
    for op in block.ops:
        rate, size = _rate(op)
        busy[rate] += size / rate
    return max(busy.values())


def _products(dot: AsyncDot) -> int:
    result, right = dot.results[0].type, dot.b.type
    assert isinstance(result, TileType) and isinstance(right, SlotType)
    return result.size * right.shape[0]


def _rate(op: Operation) -> tuple[int, int]:
    """(elements in a cycle, elements) of a vector operation on tiles."""
    type_ = op.operands[0].type if op.operands else None
    if not isinstance(type_, TileType) or not isinstance(op, Binary | Cast | Reduce | Select | Unary):
        return FULL, 0
    if isinstance(op, Unary) and op.fn in ("exp", "exp2", "log", "log2", "rsqrt", "sqrt", "tanh", "sin", "cos"):
        return SPECIAL, type_.size
    compares = isinstance(op, Select | Cast) or (isinstance(op, Binary | Reduce) and op.fn in ("max", "min"))
    return HALF if compares else FULL, type_.size
