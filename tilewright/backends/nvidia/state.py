"""What the lowerings of asynchronous code on NVIDIA know of the function as a whole (`Lowering.backend`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilewright.backends.mlir_builder import ir as mlir
from tilewright.ir.async_ops import LocalLoad, Publish, Role, ring_of
from tilewright.ir.core import Function, Value

if TYPE_CHECKING:
    from tilewright.backends.lower.context import Lowering, SlotRef

WARP_SIZE = 32
WARPGROUP_WARPS = 4
WARPGROUP_THREADS = 128
#: threads of the block hold this many registers in all: "setmaxnreg" moves them between warps
REGISTER_FILE = 65536


@dataclass
class AsyncState:
    """Facts about one function."""

    function: Function
    roles: list[Role]
    #: token of a copy -> the operation that announces it
    publishes: dict[Value, Publish]
    #: rings with slots that threads read themselves
    read_by_threads: set[Value]
    #: operands that wait in shared memory for their dot: value -> `SlotRef`
    deferred: dict[Value, SlotRef] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Function) -> AsyncState:
        ops = list(function.walk())
        publishes = {token: op for op in ops if isinstance(op, Publish) for token in op.tokens}
        loads = (ring_of(op.slot) for op in ops if isinstance(op, LocalLoad))
        read = {ring for ring in loads if ring is not None}
        return cls(function, [op for op in function.body.block.ops if isinstance(op, Role)], publishes, read)

    def barrier(self, role: Role) -> int:
        """The role's hardware barrier: number 0 is the whole block's, 8 to 15 are the warpgroups'."""
        return 1 + self.roles.index(role)

    def first_warp(self, role: Role) -> int:
        """Roles take consecutive warps in program order."""
        return sum(r.warps for r in self.roles[: self.roles.index(role)])


def state(lw: Lowering) -> AsyncState:
    """The state of the function being lowered."""
    if not isinstance(lw.backend, AsyncState):
        lw.backend = AsyncState.of(lw.function)
    return lw.backend


# --- which threads do what ------------------------------------------------------------------------


def leader(lw: Lowering) -> mlir.Value | None:
    """i1: the thread that acts for the scope; None where one thread runs the code anyway."""
    if lw.scope.single_thread:
        return None
    return lw.fb.icmp("eq", lw.scope.thread, lw.fb.i32(0))


def warpgroup_leader(lw: Lowering) -> mlir.Value | None:
    """i1: the thread that acts for its warpgroup; None where one thread runs the code anyway."""
    if lw.scope.single_thread:
        return None
    return lw.fb.icmp("eq", warpgroup_thread(lw), lw.fb.i32(0))


def warpgroup_thread(lw: Lowering) -> mlir.Value:
    """The thread's index in its warpgroup (i32)."""
    return lw.fb.and_(lw.scope.thread, WARPGROUP_THREADS - 1)


def warpgroup_count(lw: Lowering) -> int:
    """Warpgroups of the scope."""
    return max(1, lw.scope.num_warps // WARPGROUP_WARPS)


def warpgroup_index(lw: Lowering) -> mlir.Value:
    """The warpgroup's index in the scope (i32), the same in all lanes of a warp."""
    return lw.fb.lshr(lw.scope.warp, WARPGROUP_WARPS.bit_length() - 1)
