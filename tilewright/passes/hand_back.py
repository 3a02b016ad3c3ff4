"""hand-back: warps of a consumer meet before one of their threads gives a stage back.

One thread of each warpgroup releases a stage. Where warps meet anyway between await and release, as they do for matrix
products, all have seen the stage full by then. Where the only work on a stage lies in a loop that might run no
iteration, a slow warp may not have looked yet when the stage is filled again: the barrier's phase would turn a second
time and the warp wait forever. There a barrier of the warpgroup holds them together.
"""

from __future__ import annotations

from tilewright.ir.async_ops import Acquire, AsyncDot, Await, Barrier, Release, Role
from tilewright.ir.builder import Builder
from tilewright.ir.core import Block, Function, Operation
from tilewright.passes.manager import FunctionPass, PassContext, register_pass


@register_pass("hand-back")
class HandBack(FunctionPass):
    """Runs when products are asynchronous and releases in their final places."""

    def run_on_function(self, function: Function, context: PassContext) -> None:
        refilled = {op.ring for op in function.walk() if isinstance(op, Acquire)}
        for role in [op for op in function.walk() if isinstance(op, Role) and not op.single_thread]:
            for release in [op for op in role.body.walk() if isinstance(op, Release)]:
                if release.ring in refilled and not _met(release):
                    _meet(release)


def _met(release: Release) -> bool:
    """Whether the warps surely meet between the await of the stage and its release."""
    met = True  # a stage that was awaited further out or an iteration before: what waits for its readers is in between
    for op in _block(release).ops:
        if op is release:
            return met
        if isinstance(op, Await) and op.ring is release.ring:
            met = False
        met |= isinstance(op, Barrier | AsyncDot)
    raise AssertionError("a release outside its block")


def _meet(release: Release) -> None:
    block = _block(release)
    b = Builder(block, release.loc)
    with b.at(block, block.ops.index(release)):
        b.insert(Barrier(scope="warpgroup"))


def _block(op: Operation) -> Block:
    assert op.parent is not None
    return op.parent
