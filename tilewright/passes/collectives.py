"""collectives: replace collectives on tiles by the puts, signals and waits that they are made of."""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.collectives import TileCollective, ViewCollective, expand
from tilewright.ir.core import Function, Value, replace_uses
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("collectives")
class Collectives(FunctionPass):
    """In front of everything else, which knows nothing of them (`tilewright.ir.collectives`)."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        results: dict[Value, Value] = {}
        for op in [op for op in function.walk() if isinstance(op, TileCollective | ViewCollective)]:
            block = op.parent
            assert block is not None
            b = Builder(block, op.loc)
            with b.at(block, block.ops.index(op)):
                results[op.result] = expand(b, op)
            block.ops.remove(op)
        replace_uses(function.body, results)
