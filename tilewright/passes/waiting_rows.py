"""waiting-rows: tiles that a program reads again behind a reduction wait for it in shared memory, not in registers.

A program that loads a row, reduces it and loads it again can have many threads' worth of rows in flight, since nothing
of them lies in registers meanwhile. Both loads become reads of one slot, which ``cp.async`` fills::

    %t = async.copy %x, [%m, %0], %slot     // all copies of the block start here
    async.wait [] token(%t)                 // this thread's are there,
    async.barrier                           // everybody's
    %row = async.local_load %slot
    ... tile.reduce ...
    %again = async.local_load %slot

A row that the cache is asked to keep (``evict_last``) waits there instead. For straight code without products; in
loops, where copies run ahead, `tilewright.passes.row_copies` does it.
"""

from __future__ import annotations

from typing import Any

from tilewright.ir.async_ops import Barrier
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import view_root
from tilewright.ir.core import Block, Function, Operation, Value, replace_uses
from tilewright.ir.target import Target
from tilewright.ir.tile_ops import Dot, Load, tile_of
from tilewright.ir.types import SlotType, TileType
from tilewright.passes.analysis import ancestor_in, written_tensors
from tilewright.passes.manager import FunctionPass, PassContext, register_pass
from tilewright.passes.matrix import PREFETCH
from tilewright.passes.placement import thread_engine
from tilewright.passes.row_copies import ENGINE, LEAST_ROW_BYTES, plain_layout
from tilewright.passes.shared_needs import SharedNeeds
from tilewright.passes.warp_count import default_warps


@register_pass("waiting-rows")
class WaitingRows(FunctionPass):
    """Only where all such tiles fit: else they are loaded twice."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        ops = list(function.walk())
        if any(isinstance(op, Dot) or op.base_name.startswith("comm.") for op in ops):
            return
        repeated = _repeated(function, context.target)
        if not repeated or not _fit(function, list(repeated), context.target):
            return
        block = function.body.block
        first = min(repeated, key=block.ops.index)
        _gather(block, [load for load in repeated if load is not first], first)
        _copy(function, repeated)
        function.attributes["schedule"] = PREFETCH
        function.attributes["num_warps"] = context.options.num_warps or default_warps(function, context.target)


def _repeated(function: Function, target: Target) -> dict[Load, list[Load]]:
    """Loads of the function's own block, and those that repeat them; nobody writes to their tensors."""
    written, found = written_tensors(function), dict[Any, list[Load]]()
    for op in function.body.block.ops:
        if not isinstance(op, Load) or op.after or op.evict == "evict_last" or view_root(op.view) in written:
            continue
        tile = tile_of(op.result)
        if tile.size * tile.dtype.bytes < LEAST_ROW_BYTES:
            continue
        op.shared = plain_layout(op)
        if thread_engine(op, target) == ENGINE:
            found.setdefault((op.view, tuple(op.index), tile, op.pad), []).append(op)
        op.shared = None
    return {loads[0]: loads[1:] for loads in found.values() if len(loads) > 1}


def _slot(load: Load) -> SlotType:
    tile = tile_of(load.result)
    return SlotType(tile.shape, tile.dtype, plain_layout(load))


def _fit(function: Function, loads: list[Load], target: Target) -> bool:
    needs, ops = SharedNeeds(function), function.body.block.ops
    life = needs.lifetime([loads[0], ops[-1]])
    return needs.bytes_with((load, _slot(load), 1, life) for load in loads) <= target.shared_bytes


def _gather(block: Block, loads: list[Load], first: Load) -> None:
    """Move loads right behind the first one, with what computes their addresses, where that is scalar code."""
    for load in loads:
        start = block.ops.index(first)
        needed: list[Operation] = []
        pending: list[Operation] = [load]
        while pending:
            op = pending.pop()
            if op in needed or block.ops.index(op) < start:
                continue
            needed.append(op)
            made = [ancestor_in(v.op, block) for v in op.operands if v.op is not None]
            pending += [o for o in made if o is not None]
        if all(op is load or (op.is_pure and not op.regions and not _has_tiles(op)) for op in needed):
            inside = [op for op in block.ops if op in needed]
            rest = [op for op in block.ops if op not in needed]
            place = rest.index(first) + 1
            before = [op for op in inside if op is not load]
            block.set_ops([*rest[: place - 1], *before, first, load, *rest[place:]])


def _uses(op: Operation) -> list[Value]:
    """What an operation and all in it use."""
    return list(dict.fromkeys(value for inner in op.walk() for value in inner.operands))


def _has_tiles(op: Operation) -> bool:
    return any(isinstance(v.type, TileType) for v in [*op.operands, *op.results])


def _copy(function: Function, repeated: dict[Load, list[Load]]) -> None:
    """Loads become copies, and reads of their slots in front of the first uses."""
    block, b = function.body.block, Builder(function.body.block)
    with b.at(block, 0):
        zero = b.index(0)
        slots = {load: b.slot(b.alloc(_slot(load), hint=load.result.hint), zero) for load in repeated}
    source = {load: first for first, others in repeated.items() for load in (first, *others)}
    token: Value | None = None
    old, reads, replacement = list(block.ops), dict[Value, Load](), dict[Value, Value]()
    block.set_ops([])
    for op in old:
        b.loc = op.loc
        if isinstance(op, Load) and op in source:
            if op in slots:
                token = b.copy(op.view, op.index, slots[op], ENGINE, op.pad, evict=op.evict)
            reads[op.result] = source[op]
            continue
        used = [value for value in _uses(op) if value in reads]
        if used and token is not None:
            b.wait([], token)
            b.insert(Barrier())
            token = None
        for value in used:
            loaded = b.local_load(slots[reads.pop(value)])
            loaded.hint = value.hint
            replacement[value] = loaded
        b.insert(op)
    replace_uses(function.body, replacement)
