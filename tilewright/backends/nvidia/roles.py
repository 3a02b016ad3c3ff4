"""Roles: consecutive ranges of warps that run different code side by side.

"Warp specialization": the block branches on the warp's index once, and registers move from the roles that need few
to those that need many (PTX ISA, "setmaxnreg"; it asks for `nvvm.maxntid` and `nvvm.minctasm` on the kernel).
"""

from __future__ import annotations

from tilewright.backends.errors import BackendError
from tilewright.backends.lower.context import LOWERINGS, Lowering, Table, lowers
from tilewright.backends.mlir_builder import ir as mlir
from tilewright.backends.nvidia import ptx
from tilewright.backends.nvidia.state import (
    REGISTER_FILE,
    WARP_SIZE,
    WARPGROUP_THREADS,
    state,
    warpgroup_count,
    warpgroup_index,
)
from tilewright.ir.async_ops import AwaitGrid, Fence, PassTurn, Role, TakeTurn
from tilewright.ir.core import Function

#: ptxas allots registers in steps of 8; one thread can have 255
REGISTER_STEP, MOST_REGISTERS = 8, 255

#: hardware barriers of the warpgroups that take turns: roles have those below, warpgroups those from 8 on
#: (`AsyncState.barrier`, `NvidiaOps.barrier`)
TURN_BARRIERS = range(4, 8)

#: kinds of fences with the asynchronous proxy, by the memory that they are about
_PROXIES = {"async": "shared::cta", "async_global": "global"}

ROLE_LOWERINGS: Table = {}


@lowers(Role, table=ROLE_LOWERINGS)
def lower_role(lw: Lowering, op: Role) -> None:
    """The first role lowers all of them, so that each warp branches to its role's code and from there to the end."""
    roles = state(lw).roles
    if op is not roles[0]:
        return
    fb, warp, end = lw.fb, lw.scope.warp, lw.fb.block()
    for number, role in enumerate(roles):
        last = state(lw).first_warp(role) + role.warps
        body, other = fb.block(), end
        if number + 1 < len(roles) or last < lw.scope.num_warps:
            other = end if number + 1 == len(roles) else fb.block()
            fb.cond_br(fb.icmp("ult", warp, last), body, other)
        else:
            fb.br(body)
        fb.position_at_end(body)
        _lower_body(lw, role)
        fb.br(end)
        fb.position_at_end(other)


def _lower_body(lw: Lowering, role: Role) -> None:
    first_warp, fb = state(lw).first_warp(role), lw.fb
    if role.registers:
        blocks = int(lw.function.attributes.get("blocks_per_unit", 1))
        share = launch_registers(blocks * int(lw.function.attributes["threads"]))
        if role.registers != share:
            ptx.set_max_registers(fb, role.registers, increase=role.registers > share)
    barrier = state(lw).barrier(role)
    if any(isinstance(op, TakeTurn) for op in role.body.walk()):
        with lw.in_scope(first_warp, role.warps, barrier):
            _first_turn(lw)
    if not role.single_thread:
        with lw.in_scope(first_warp, role.warps, barrier):
            lw.lower_block(role.body.block)
        return
    first = fb.icmp("eq", lw.scope.warp, first_warp)  # of the block's warps: in its own scope the thread is alone
    with fb.if_then(first), fb.if_then(lw.ops.is_leader(lw)), lw.in_scope(first_warp, role.warps, barrier, True):
        lw.lower_block(role.body.block)


def launch_registers(threads: int) -> int:
    """Registers that each of a multiprocessor's threads starts with."""
    return min(MOST_REGISTERS, REGISTER_FILE // threads) // REGISTER_STEP * REGISTER_STEP


def check_registers(function: Function, at_launch: int) -> None:
    """Raise where roles ask for more registers than the block starts with: they would wait forever."""
    roles = [op for op in function.body.block.ops if isinstance(op, Role) and op.registers]
    threads = function.attributes.get("threads", 0)
    wanted = sum(role.registers * role.warps * WARP_SIZE for role in roles)
    granted = -(-at_launch // REGISTER_STEP) * REGISTER_STEP * threads
    if wanted > granted:
        raise BackendError("ptxas", f"roles ask for {wanted} registers, the block starts with {granted}")


@lowers(Fence, table=ROLE_LOWERINGS)
def lower_fence(lw: Lowering, op: Fence) -> None:
    if op.proxy in _PROXIES:
        ptx.fence_async_proxy(lw.fb, _PROXIES[op.proxy])
    else:
        LOWERINGS[Fence](lw, op)


@lowers(AwaitGrid, table=ROLE_LOWERINGS)
def lower_await_grid(lw: Lowering, op: AwaitGrid) -> None:
    ptx.await_grid(lw.fb)


# --- turns: each warpgroup has a barrier, where it meets the arrivals of the one before it ------------------------


def _turn_barrier(lw: Lowering, group: mlir.Value) -> mlir.Value:
    return lw.fb.add(group, TURN_BARRIERS.start)


def _first_turn(lw: Lowering) -> None:
    """The last warpgroup lets the first one begin."""
    roles = [r for r in state(lw).roles if any(isinstance(op, TakeTurn) for op in r.body.walk())]
    if len(roles) > 1 or warpgroup_count(lw) > len(TURN_BARRIERS) or len(state(lw).roles) >= TURN_BARRIERS.start:
        raise lw.error("there are too few hardware barriers for the turns of so many warpgroups or roles")
    last = warpgroup_count(lw) - 1
    with lw.fb.if_then(lw.fb.icmp("eq", warpgroup_index(lw), last)):
        ptx.arrive_at_barrier(lw.fb, _turn_barrier(lw, lw.fb.i32(0)), 2 * WARPGROUP_THREADS)


@lowers(TakeTurn, table=ROLE_LOWERINGS)
def lower_take_turn(lw: Lowering, op: TakeTurn) -> None:
    ptx.sync_at_barrier(lw.fb, _turn_barrier(lw, warpgroup_index(lw)), 2 * WARPGROUP_THREADS)


@lowers(PassTurn, table=ROLE_LOWERINGS)
def lower_pass_turn(lw: Lowering, op: PassTurn) -> None:
    fb, groups = lw.fb, warpgroup_count(lw)
    following = fb.urem(fb.add(warpgroup_index(lw), 1), groups)
    ptx.arrive_at_barrier(fb, _turn_barrier(lw, following), 2 * WARPGROUP_THREADS)
