"""Lowering of `tile.convert`: a renaming of registers, or a round trip through scratch memory."""

from __future__ import annotations

from tilewright.backends.lower.context import Lowering, lowers
from tilewright.backends.lower.coordinates import sole_holder
from tilewright.backends.lower.memory import run_if
from tilewright.backends.lower.shared import SharedAccess, shared_address
from tilewright.ir import tile_ops
from tilewright.ir.scratch import convert_layout
from tilewright.ir.types import element_type


@lowers(tile_ops.Convert)
def lower_convert(lw: Lowering, op: tile_ops.Convert) -> None:
    source, result = lw.layout(op.source), lw.layout(op.result)
    permutation = source.register_permutation(result)
    held = lw.registers(op.source)
    if permutation is not None:
        lw.define(op.result, [held[position] for position in permutation])
        return
    shared = convert_layout(op)
    if shared is None or op.scratch is None:
        raise lw.error("the conversion goes through shared memory, but no scratch is set: run the shared-memory plan")
    base, dtype = shared_address(lw, op.scratch), element_type(op.source.type)
    lw.ops.barrier(lw, "role")  # whoever used the scratch before has read it
    writer = SharedAccess(lw, base, shared, source, dtype)
    run_if(lw, sole_holder(lw, source), lambda: writer.store(held))
    lw.ops.barrier(lw, "role")
    lw.define(op.result, SharedAccess(lw, base, shared, result, dtype).load())
