"""Which part of the register file holds the accumulators.

A lane of CDNA has up to 256 ordinary registers and as many accumulation registers, which only matrix instructions
and loads reach (CDNA3 ISA guide, "VGPRs and AccVGPRs"). LLVM puts accumulators into ordinary ones while all fits
there, and its scheduler then has too few left to read operands ahead of their use. Where accumulators are touched by
nothing but their own dots, the accumulation registers are free for them: they move twice, before and after the loop.
"""

from __future__ import annotations

from tilewright.ir.core import Function, Operation, Value, uses_of
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, For, Yield
from tilewright.ir.types import TileType

#: fewer accumulators per lane leave room enough; with more than half of the file LLVM (22) spills
FEWEST, MOST = 96, 128
SIMDS = 4


def accumulation_registers(function: Function, target: Target) -> int:
    """Registers per lane of the accumulators that should not be ordinary ones; 0 where LLVM's own choice is best.

    With two waves on a SIMD a lane has 256 registers of both kinds together: dividing them costs more than it gives.
    """
    if function.attributes.get("num_warps", SIMDS) > SIMDS:
        return 0
    uses = uses_of(function.body)
    dots = [op for op in function.walk() if isinstance(op, Dot)]
    if not dots or not all(_only_accumulates(dot, uses) for dot in dots):
        return 0
    count = sum(_registers(dot.acc) for dot in dots)
    return count if FEWEST <= count <= MOST else 0


def _only_accumulates(dot: Dot, uses: dict[Value, list[Operation]]) -> bool:
    """The accumulator comes from the last iteration of the dot's loop and goes to the next, untouched."""
    block = dot.parent
    loop = block.parent.parent if block is not None and block.parent is not None else None
    if not isinstance(loop, For) or dot.acc not in loop.carried:
        return False
    position = loop.carried.index(dot.acc)
    (*others, last) = uses.get(dot.result, []) or [dot]
    return uses[dot.acc] == [dot] and not others and isinstance(last, Yield) and last.values[position] is dot.result


def _registers(value: Value) -> int:
    assert isinstance(value.type, TileType)
    words = max(1, value.type.dtype.bits // 32)
    return value.type.layout.num_registers * words if value.type.layout is not None else 0


def function_attributes(function: Function, target: Target) -> dict[str, str]:
    """LLVM attributes of the kernel."""
    count = accumulation_registers(function, target)
    return {"amdgpu-agpr-alloc": str(count)} if count else {}
