"""launch-overlap: a launch may begin while the one before it in its stream still runs.

Between two launches of a stream the GPU drains: the last blocks of one end before the first of the next are set up. On
hardware that lets a launch begin early ("programmatic dependent launch") each function waits itself for the one before,
in front of its first access to global memory::

    async.alloc, async.ring                // shared memory and its barriers are set up meanwhile
    async.await_grid                       // every thread
    async.release_grid                     // the next launch may begin
    tile.load ...

All threads of all blocks wait, so that a launch which has ended knows that those before it have ended, too: it is
enough that each waits for the one before. The next launch's blocks come when all blocks of this one have begun, and
then only use what these leave free.

Functions that communicate neither wait nor let others begin: what they wait for may need the room on the GPU.
"""

from __future__ import annotations

from tilewright.ir.async_ops import Alloc, AwaitGrid, Copy, MakeRing, ReleaseGrid, Role
from tilewright.ir.builder import Builder
from tilewright.ir.check_ops import Assume
from tilewright.ir.core import Block, Effect, Function, IRError, Operation
from tilewright.ir.tile_ops import Element, Load
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("launch-overlap")
class LaunchOverlap(FunctionPass):
    """Behind everything that moves operations. ``release``: start, late or never. ``maps``: fetch tensor maps ahead."""

    release: str = "start"
    maps: bool = False

    def run_on_function(self, function: Function, context: PassContext) -> None:
        if not context.target.has("dependent_launch") or function.attributes.get("communicates"):
            return
        if self.release not in ("start", "late", "never"):
            raise IRError(f"release is start, late or never, not {self.release!r}", function.loc)
        block = function.body.block
        first = next((i for i, op in enumerate(block.ops) if not _precedes(op)), len(block.ops))
        if self.release == "late":
            _release_late(block)
        _insert(block, first, AwaitGrid(maps=self.maps))
        if self.release == "start":
            _insert(block, first + 1, ReleaseGrid())


def _precedes(op: Operation) -> bool:
    """Whether neither an operation nor what it encloses can touch global memory."""
    return all(isinstance(each, Alloc | MakeRing | Assume) or each.effect == Effect.PURE for each in op.walk())


def _release_late(block: Block) -> None:
    """Behind the last operation that reads, of the role that copies where there are roles."""
    reads = [op for op in block.ops if any(isinstance(each, Load | Element | Copy) for each in op.walk())]
    if reads and isinstance(reads[0], Role):
        block = reads[0].body.block
        position = len(block.ops) - (block.terminator is not None)
    else:
        position = block.ops.index(reads[-1]) + 1 if reads else 0
    _insert(block, position, ReleaseGrid())


def _insert(block: Block, position: int, op: Operation) -> None:
    builder = Builder(block)
    with builder.at(block, position):
        builder.insert(op)
