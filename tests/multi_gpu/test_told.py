"""Flags that are copied behind data, and launches that wait for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tests.support.comm_cases import all_ranks, flags, own, schedule
from tilewright.compiler.errors import ExecutionError
from tilewright.ir import comm_ops as c
from tilewright.ir.target import get_target
from tilewright.kernels.multi_gpu.copy_engine import arrive, let_meet, meet
from tilewright.passes.check_protocol import check
from tilewright.passes.manager import PassContext
from tilewright.runtime.errors import ArgumentError, DeviceError

SIZE, ROWS, N = 3, 4, 64
TARGETS = ["interpreter", "sm_90a", "gfx942"]


@tw.kernel
def take(parts: tw.Symmetric, told: tw.Symmetric, y: tw.Tensor, earlier: tw.int32):
    """y (world, R, N) = what all other ranks have sent, parts; told (n, world, 2, world), of which the last is used."""
    me, world, turn = tw.rank(), tw.world_size(), (tw.turn() + earlier) % 2
    for hop in tw.range(1, world):
        source = (me + hop) % world
        arrived = tw.wait(told[told.shape[0] - 1, source, turn], earlier=earlier)
        tw.store(y[source], (0, 0), tw.load(parts[source], (0, 0), (4, 64), after=arrived))


def world_on(target: str) -> Any:
    return tw.World.interpreter(SIZE) if target == "interpreter" else tw.World.emulated(target, SIZE, races=True)


def poisoned() -> list[np.ndarray]:
    return [np.full((SIZE, ROWS, N), np.nan, np.float32) for _ in range(SIZE)]


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_launch_is_told_has_arrived(target: str) -> None:
    """With other launches between, and values that change: what was told the last time does not do."""
    world, rng = world_on(target), np.random.default_rng(0)
    parts, told = world.empty((SIZE, ROWS, N), "f32"), world.flags(2, SIZE, 2, SIZE)
    for between in (0, 1, 0) if target == "gfx942" else (0, 1, 2, 0):
        x = [rng.standard_normal((SIZE, ROWS, N)).astype(np.float32) for _ in range(SIZE)]
        here, y = let_meet(world), poisoned()
        sent = world.start_push(x, parts, tell=(here, told, 1))
        for _ in range(between):
            let_meet(world)
        world.launch(take, (1,), parts, told, y, 1 + between)
        sent.join()
        for rank in range(SIZE):
            for source in range(SIZE):
                wanted = np.full_like(x[0][0], np.nan) if source == rank else x[source][rank]
                np.testing.assert_array_equal(y[rank][source], wanted)


@pytest.mark.parametrize("before", [0, 2])
def test_who_is_not_told_waits(before: int) -> None:
    """Also where the flags are set of the times before, of either turn."""
    world = world_on("sm_90a")
    parts, told = world.tensor([np.ones((SIZE, ROWS, N), np.float32)] * SIZE), world.flags(1, SIZE, 2, SIZE)
    for number in range(before):
        here = let_meet(world)
        world.start_push(parts, parts, tell=(here, told, 0)).join()
        world.launch(take, (1,), parts, told, poisoned(), 1)
        if number:
            let_meet(world)  # the next meeting has the other turn
    let_meet(world)
    with pytest.raises(DeviceError, match="warps poll what nobody will change|wait for each other"):
        world.launch(take, (1,), parts, told, poisoned(), 1)


@pytest.mark.parametrize("target", TARGETS)
def test_some_rows_and_all_ranks(target: str) -> None:
    world = world_on(target)
    x = [np.arange(SIZE * ROWS * N, dtype=np.float32).reshape(SIZE, ROWS, N) + 1000 * rank for rank in range(SIZE)]
    y, whole = world.empty((SIZE, ROWS, N), "f32"), world.tensor(x)
    told = world.flags(1, SIZE, 2, SIZE)
    here = let_meet(world)
    pushed = world.start_push(x, y, rows=(1, 3))
    spread = world.spread(whole, rows=(2, 4), tell=(here, told, 0))
    world.launch(arrive, (1,), told, 1)
    pushed.join()
    spread.join()
    for rank in range(SIZE):
        for source in range(SIZE):
            if source != rank:
                np.testing.assert_array_equal(y[rank][source, 1:3], x[source][rank, 1:3])
                assert np.isnan(y[rank][source, [0, 3]]).all()
                np.testing.assert_array_equal(whole[rank][source, 2:], x[source][source, 2:])
                np.testing.assert_array_equal(whole[rank][source, :2], x[rank][source, :2])


def test_what_is_refused() -> None:
    world = world_on("interpreter")
    y, here = world.empty((SIZE, 4), "f32"), let_meet(world)
    for places in (world.flags(1, SIZE, SIZE), world.flags(1, SIZE + 1, 2)):
        with pytest.raises(ArgumentError, match=r"its shape must be \(n, world, \*flags.shape\)"):
            world.spread(y, tell=(here, places, 0))
    with pytest.raises(ArgumentError, match="has no part"):
        world.spread(y, tell=(here, world.flags(1, SIZE, 2, SIZE), 1))
    with pytest.raises(ExecutionError, match="flags of 0 launches ago"):
        world.launch(arrive, (1,), world.flags(1, SIZE, 2, SIZE), 0)


@tw.kernel
def wait_for_the_future(told: tw.Symmetric):
    tw.wait(told[0], earlier=0)


@tw.kernel
def wait_if(told: tw.Symmetric):
    tw.wait(told[0], tw.rank() == 0, earlier=1)


@pytest.mark.parametrize(("kernel", "message"), [(wait_for_the_future, "at least 1"), (wait_if, "takes no condition")])
def test_waits_that_do_not_compile(kernel: Any, message: str) -> None:
    with pytest.raises(tw.CompileError, match=message):
        schedule(kernel, {"told": flags(1)}, "sm_90a")


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_what_ranks_have_to_wait_for(target: str) -> None:
    """A meeting of launches in turn asks for no word of this launch; who is told by copies asks nobody."""
    module = schedule(meet, {"here": flags(2)}, target)
    (credit,) = [op for op in module.functions[0].walk() if isinstance(op, c.Credit)]
    assert credit.in_turn
    check(module.functions[0], PassContext(get_target(target)))
    types = {"parts": all_ranks("f32", 3), "told": flags(4), "y": own("f32", 3)}
    function = schedule(take, types, target).functions[0]
    assert not any(isinstance(op, c.Credit | c.Leave) for op in function.walk())
    assert any(isinstance(op, c.WaitEarlier) for op in function.walk())
