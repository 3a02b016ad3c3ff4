"""Halves of tensors that launches take turns at, and late signals to several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tests.support.comm_cases import all_ranks, flags, own, schedule, scheduled
from tests.support.multi_gpu_cases import SMALL, WGMMA, reduce_all
from tilewright.ir import comm_ops as c
from tilewright.ir.async_ops import AsyncDot, BulkWait, Role
from tilewright.ir.core import Function, IRError, Module, Operation
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import For, If
from tilewright.kernels.multi_gpu.all_reduce import all_reduce, all_reduce_push
from tilewright.passes.check_protocol import check
from tilewright.passes.manager import PassContext
from tilewright.runtime.errors import ArgumentError

N = 256


@tw.kernel
def pass_on(x: tw.Tensor, y: tw.Tensor, slots: tw.Symmetric, sent: tw.Symmetric):
    """y (n, N) = x of the rank before, by way of slots (2, n, N) in turn; sent: flags (2, n)."""
    i, after = tw.program_id(0), (tw.rank() + 1) % tw.world_size()
    places, told = slots[tw.turn()], sent[tw.turn()]
    token = tw.put(places.peer(after), (i, 0), tw.load(x, (i, 0), (1, N)))
    tw.signal(told[i], after, after=token)
    arrived = tw.wait(told[i])
    tw.store(y, (i, 0), tw.load(places, (i, 0), (1, N), after=arrived))


@tw.kernel
def pass_on_beside(x: tw.Tensor, y: tw.Tensor, slots: tw.Symmetric, sent: tw.Symmetric):
    """The same with flags (n,) that every launch uses."""
    i, after = tw.program_id(0), (tw.rank() + 1) % tw.world_size()
    places = slots[tw.turn()]
    token = tw.put(places.peer(after), (i, 0), tw.load(x, (i, 0), (1, N)))
    tw.signal(sent[i], after, after=token)
    arrived = tw.wait(sent[i])
    tw.store(y, (i, 0), tw.load(places, (i, 0), (1, N), after=arrived))


@tw.kernel
def tell_turn(y: tw.Tensor, told: tw.Symmetric):
    """y = the launch's turn."""
    tw.barrier(told)
    tw.store(y, 0, tw.full((4,), tw.turn(), tw.int32))


TYPES: dict[str, Any] = {"x": own("f32", 2), "y": own("f32", 2), "slots": all_ranks("f32", 3)}


def credit_of(module: Module) -> c.Credit:
    (credit,) = [op for op in module.functions[0].walk() if isinstance(op, c.Credit)]
    return credit


# --- credits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_halves_need_no_word_of_this_launch(target: str) -> None:
    module = schedule(pass_on, {**TYPES, "sent": flags(2)}, target)
    assert credit_of(module).in_turn
    assert not any(isinstance(op, c.Leave) for op in module.functions[0].walk())
    check(module.functions[0], PassContext(get_target(target)))


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_what_all_launches_use_needs_it(target: str) -> None:
    """One tensor that is not used in halves is enough."""
    module, context = schedule(pass_on_beside, {**TYPES, "sent": flags(1)}, target), PassContext(get_target(target))
    assert not credit_of(module).in_turn
    check(module.functions[0], context)
    credit_of(module).in_turn = True
    with pytest.raises(IRError, match="missing credit: 'comm.signal' .* may touch flag .* has begun the launch, while"):
        check(module.functions[0], context)


def test_a_half_needs_a_credit_too() -> None:
    module, context = schedule(pass_on, {**TYPES, "sent": flags(2)}, "sm_90a"), PassContext(get_target("sm_90a"))
    credit = credit_of(module)
    assert credit.parent is not None
    for op in module.functions[0].walk():
        if isinstance(op, c.Put | c.Signal):
            op.after = [token for token in op.after if token is not credit.result]
    credit.parent.ops.remove(credit)
    with pytest.raises(IRError, match="missing credit: .* has begun the launch before"):
        check(module.functions[0], context)


# --- launches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["interpreter", "sm_90a", "gfx942"])
def test_launches_take_turns(target: str) -> None:
    """The launches of a world, of whatever kernels; the interpreter gives the same."""
    world = tw.World.interpreter(2) if target == "interpreter" else tw.World.emulated(target, 2, races=True)
    told = world.flags(2)
    for turn in (1, 0, 1):
        y = [np.full(4, -1, np.int32) for _ in range(2)]
        world.launch(tell_turn, (1,), y, told)
        for part in y:
            np.testing.assert_array_equal(part, turn)


@pytest.mark.parametrize(("target", "ranks"), [("sm_90a", 1), ("sm_90a", 3), ("gfx942", 2), ("interpreter", 3)])
def test_halves_hold_what_was_sent(target: str, ranks: int) -> None:
    """Many blocks, few of which run at a time; the next launch meets what the last but one has left."""
    rng = np.random.default_rng(ranks)
    emulated = target != "interpreter"
    world = tw.World.emulated(target, ranks, races=True, seed=5) if emulated else tw.World.interpreter(ranks, seed=5)
    slots, sent = world.empty((2, 20, N), "f32"), world.flags(2, 20)
    for _ in range(4):
        x = [rng.standard_normal((20, N)).astype(np.float32) for _ in range(ranks)]
        y = [np.full((20, N), np.nan, np.float32) for _ in range(ranks)]
        world.launch(pass_on, (20,), x, y, slots, sent)
        for rank in range(ranks):
            np.testing.assert_array_equal(y[rank], x[rank - 1])


def test_all_reduce_again_and_again() -> None:
    with tw.World.emulated("sm_90a", 3, races=True, seed=4) as world:
        for seed in range(4):
            reduce_all(world, seed, WGMMA)
    with tw.World.interpreter(3, seed=1) as world:
        for seed in range(4):
            reduce_all(world, seed, SMALL)


@pytest.mark.parametrize(
    ("ranks", "count", "symmetric", "kernel"),
    [
        (2, 1 << 15, True, "all_reduce_packets"), (2, 1 << 18, True, "all_reduce_push"),
        (2, 1 << 22, True, "all_reduce_pull"), (2, 1 << 22, False, "all_reduce_push"),
        (3, 1 << 15, True, "all_reduce_packets"), (3, 1 << 18, True, "all_reduce_two_shot"),
    ],
)  # fmt: skip
def test_the_way_of_a_sum(
    ranks: int, count: int, symmetric: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    with tw.World.interpreter(ranks) as world:
        monkeypatch.setattr(world, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
        x, y = world.empty(count, "bf16"), world.empty(count, "bf16")
        all_reduce(world, *((x, y) if symmetric else (x.arrays, y.arrays)))
    assert launched == [kernel]


def test_a_tensor_is_used_in_halves_by_all_or_none() -> None:
    with tw.World.emulated("sm_90a", 2) as world:
        slots, sent, beside = world.empty((2, 1, N), "f32"), world.flags(2, 1), world.flags(1)
        x, y = ([np.zeros((1, N), np.float32) for _ in range(2)] for _ in range(2))
        world.launch(pass_on, (1,), x, y, slots, sent)
        world.launch(pass_on_beside, (1,), x, y, slots, beside)
        with pytest.raises(ArgumentError, match="'sent': the kernel uses all of it, and one before it its halves"):
            world.launch(pass_on_beside, (1,), x, y, slots, sent.reshape(2))
        with pytest.raises(ArgumentError, match="'slots' has 3 parts along its first dimension; the kernel uses two"):
            world.launch(pass_on, (1,), x, y, world.empty((3, 1, N), "f32"), sent)


# --- late signals -----------------------------------------------------------------------------------


def consumer_of(function: Function) -> Role:
    return next(op for op in function.body.block.ops if isinstance(op, Role) and op.kind == "consumer")


def enclosing(op: Operation, kind: Any) -> list[Any]:
    found, block = [], op.parent
    while block is not None:
        region = block.parent
        owner = region.parent if region is not None else None
        if isinstance(owner, kind):
            found.append(owner)
        block = owner.parent if isinstance(owner, Operation) else None
    return found


def test_signals_to_all_ranks_are_late_together() -> None:
    """The loop of signals runs behind the next tile's products, in both branches, and behind the last tile."""
    consumer = consumer_of(scheduled("GEMM + all-reduce", "sm_90a").functions[0])
    (tiles,) = [op for op in consumer.body.block.ops if isinstance(op, For)]
    told = [op for op in consumer.body.walk() if isinstance(op, c.Signal) and c.view_root(op.flag).hint == "done"]
    inside = [op for op in told if tiles in enclosing(op, For)]
    assert len(inside) == 2 and len(told) == 3
    for signal in told:
        loop = enclosing(signal, For)[0]
        assert loop is not tiles and not any(isinstance(op, BulkWait) and op.read for op in loop.walk())
    (products,) = {enclosing(op, For)[0] for op in tiles.walk() if isinstance(op, AsyncDot)}
    branch = enclosing(products, If)[0]
    behind = [op for op in inside if branch in enclosing(op, If) and products.parent in blocks_around(op)]
    assert len(behind) == 1, "one branch multiplies, the other waits for the sums"
    (signal,) = behind
    assert products.parent is not None
    order = products.parent.ops
    place = next(op for op in order if signal in op.walk())
    assert order.index(place) > order.index(products)


def blocks_around(op: Operation) -> list[Any]:
    found, block = [], op.parent
    while block is not None:
        found.append(block)
        owner = block.parent.parent if block.parent is not None else None
        block = owner.parent if isinstance(owner, Operation) else None
    return found


def test_push_is_in_turn() -> None:
    types = {"x": own("bf16", 1), "y": own("bf16", 1), "slots": all_ranks("bf16", 3), "sent": flags(3)}
    assert credit_of(schedule(all_reduce_push, types, "sm_90a")).in_turn
