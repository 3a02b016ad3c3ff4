"""own-copies: threads copy ahead what they read themselves, and need not meet behind their copies.

`tilewright.passes.copy_ahead` lets all threads of a block meet between the wait for a stage's copies and the reads of
its slots: a thread waits for its own copies only, and reads what others copied. Here layouts are known. Where all
readers of a buffer give each thread the same elements, and nobody else, the copies take that layout, if it serves
global memory as well. Then a thread's wait speaks for all that it reads; and no other thread can overwrite a slot that
it still reads, or read what it overwrites. `check-schedule` compares the layouts, whoever chose them.
"""

from __future__ import annotations

from tilewright.ir.async_ops import Alloc, Barrier, Copy, LocalLoad, Slot, Wait, buffer_of
from tilewright.ir.core import Block, Function, Operation, Value, uses_of
from tilewright.ir.layout import LinearLayout, access_cost
from tilewright.ir.scratch import exchange_places, scratch_bytes
from tilewright.ir.tile_ops import For
from tilewright.ir.types import SlotType, TileType, TokenType, ViewType
from tilewright.passes.copy_layouts import VECTOR_BYTES, copy_layouts
from tilewright.passes.manager import FunctionPass, PassContext, register_pass

KIND = TokenType("cp_async")


@register_pass("own-copies")
class OwnCopies(FunctionPass):
    """Sets ``layout`` of copies, and removes the barriers of loops whose copies all have one."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        uses = uses_of(function.body)
        owned = {op.result for op in function.walk() if isinstance(op, Alloc) and _own(op, uses, context)}
        for loop in [op for op in function.walk() if isinstance(op, For)]:
            _meet_no_more(loop.body.block, owned)


def _own(buffer: Alloc, uses: dict[Value, list[Operation]], context: PassContext) -> bool:
    """Give the copies into a buffer its readers' layout; whether they can have it."""
    slots = uses.get(buffer.result, [])
    users = [op for slot in slots for op in uses.get(slot.results[0], [])] if buffer.ring is None else []
    copies, loads = [op for op in users if isinstance(op, Copy)], [op for op in users if isinstance(op, LocalLoad)]
    if not copies or not loads or len(copies) + len(loads) != len(users):
        return False
    if not all(isinstance(op, Slot) for op in slots) or not all(op.result.type == KIND for op in copies):
        return False
    layouts = [op.result.type.layout if isinstance(op.result.type, TileType) else None for op in loads]
    layout = layouts[0]
    if layout is None or layout.owners is None or any(x is None or x.owners != layout.owners for x in layouts):
        return False
    if not all(_serves(copy, layout, context) for copy in copies):
        return False
    for copy in copies:
        copy.layout = layout
    return True


def _serves(copy: Copy, layout: LinearLayout, context: PassContext) -> bool:
    """Whether a copy in a layout costs no more than in the one made for it."""
    view, slot = copy.view.type, copy.slot.type
    assert isinstance(view, ViewType) and isinstance(slot, SlotType)
    axis, bits = view.contiguous_axis, slot.dtype.bits
    if axis is None or layout.contiguity(axis) * bits < VECTOR_BYTES * 8:
        return False
    usual = copy_layouts(slot.shape, bits, axis, axis, layout.num_warps, context.target.warp_size).load
    return access_cost(layout, axis, bits, VECTOR_BYTES) <= access_cost(usual, axis, bits, VECTOR_BYTES)


def _meet_no_more(block: Block, owned: set[Value]) -> None:
    """Remove the barrier behind a loop's wait for its copies.

    It stays where it serves another buffer, or an exchange through scratch memory, which would need one of its own.
    """
    ops = [op for op in block.ops for op in op.walk()]
    buffers = {buffer_of(v) for op in ops for v in op.operands if isinstance(v.type, SlotType)}
    if not buffers or not buffers <= owned or any(scratch_bytes(op) and exchange_places(op) == 1 for op in ops):
        return
    for wait, barrier in zip(block.ops, block.ops[1:], strict=False):
        if isinstance(barrier, Barrier) and isinstance(wait, Wait) and wait.token and wait.token.type == KIND:
            block.ops.remove(barrier)
            return
