"""Shared memory: what may share it, where barriers are added, and what the error says."""

from __future__ import annotations

import amd_programs as amd
import numpy as np
import pytest

from tests.support.comm_cases import scheduled
from tilewright.ir.async_ops import Alloc, Barrier, LocalLoad, LocalStore
from tilewright.ir.builder import Builder
from tilewright.ir.comm_ops import Enter
from tilewright.ir.core import Block, Function, IRError, Module, Region, Value
from tilewright.ir.layout import SharedLayout, blocked
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import For
from tilewright.ir.types import SlotType, TileType, f32
from tilewright.kernels.mlp import mlp, reference
from tilewright.passes.manager import PassContext, PassManager, PassOptions

SLOT = SlotType((64, 64), f32, SharedLayout((64, 64), 32, (1, 0)))
LAYOUT = blocked((64, 64), 32, 4, 64, (1, 0))
TILE = TileType((64, 64), f32, LAYOUT)
OTHER = blocked((64, 64), 32, 4, 64, (0, 1))


class Program:
    """A function of local stores and loads, built operation by operation."""

    def __init__(self) -> None:
        self.function = Function("f", Region(Block()), {"num_warps": 4, "threads": 256})
        self.b = Builder(self.function.body.block, self.function.loc)
        self.zero = self.b.index(0)
        self.tile = self.b.constant(0.0, TILE)

    def buffer(self, name: str) -> Value:
        return self.b.alloc(SLOT, hint=name)

    def write(self, buffer: Value, barrier: bool = True) -> None:
        self.b.insert(LocalStore(self.tile, self.b.slot(buffer, self.zero)))
        if barrier:
            self.b.insert(Barrier())

    def read(self, buffer: Value) -> None:
        self.b.insert(LocalLoad(self.b.slot(buffer, self.zero), types=[TILE]))

    def plan(self, target: str = "gfx942") -> Function:
        context = PassContext(get_target(target), PassOptions())
        return PassManager("shared-plan", context).run(Module([self.function])).functions[0]


def offsets(function: Function) -> list[int]:
    return [op.offset for op in function.walk() if isinstance(op, Alloc)]


def barriers(function: Function) -> int:
    return sum(isinstance(op, Barrier) for op in function.walk())


def test_buffers_used_one_after_the_other_share_memory_behind_a_barrier():
    p = Program()
    first, second = p.buffer("first"), p.buffer("second")
    p.write(first)
    p.read(first)
    p.write(second)  # whoever still reads the first must be waited for
    p.read(second)
    function = p.plan()
    assert offsets(function) == [0, 0] and function.attributes["shared_bytes"] == SLOT.bytes
    assert barriers(function) == 3


def test_no_barrier_is_added_where_there_is_one():
    p = Program()
    first, second = p.buffer("first"), p.buffer("second")
    p.write(first)
    p.read(first)
    p.b.insert(Barrier())
    p.write(second)
    p.read(second)
    assert barriers(p.plan()) == 3


def test_buffers_alive_together_do_not_share():
    p = Program()
    first, second = p.buffer("first"), p.buffer("second")
    p.write(first)
    p.write(second)
    p.read(first)
    p.read(second)
    function = p.plan()
    assert sorted(offsets(function)) == [0, SLOT.bytes] and barriers(function) == 2


def loop(p: Program) -> For:
    op = For(p.zero, p.b.index(4), p.b.index(1), [], regions=[Region(Block([("i", p.zero.type)]))])
    p.b.insert(op)
    return op


def test_around_a_loop_the_last_reader_is_waited_for():
    """Second's readers of one iteration meet first's writer of the next."""
    p = Program()
    first, second = p.buffer("first"), p.buffer("second")
    body = loop(p).body.block
    with p.b.at(body, 0):
        for buffer in (first, second):
            p.write(buffer)
            p.read(buffer)
        p.b.yield_([])
    function = p.plan()
    assert offsets(function) == [0, 0]
    assert barriers(function) == 4  # one in front of either write


def test_content_that_stays_for_the_next_iteration_keeps_its_memory():
    p = Program()
    first, second = p.buffer("first"), p.buffer("second")
    p.write(first)
    body = loop(p).body.block
    with p.b.at(body, 0):
        p.read(first)
        p.write(second)
        p.read(second)
        p.b.yield_([])
    assert sorted(offsets(p.plan())) == [0, SLOT.bytes]


def test_scratch_shares_with_buffers_that_are_not_alive():
    p = Program()
    first = p.buffer("first")
    p.write(first)
    p.read(first)
    p.b.convert(p.tile, OTHER)  # begins with a barrier of its own
    function = p.plan()
    assert function.attributes["shared_bytes"] == SLOT.bytes and barriers(function) == 1


def test_running_out_names_every_buffer():
    p = Program()
    buffers = [p.buffer(f"part{i}") for i in range(5)]
    for buffer in buffers:
        p.write(buffer)
    for buffer in buffers:
        p.read(buffer)
    with pytest.raises(IRError) as caught:
        p.plan()
    for i in range(5):
        assert f"part{i}: {SLOT.bytes} bytes (1 x 64x64 f32)" in str(caught.value)


def test_chained_products_fit_a_small_lds_with_default_tiles():
    arrays = {"x": (128, 64), "w1": (64, 128), "w2": (128, 128)}
    views = {name: amd.matrix() for name in (*arrays, "y")}
    function = amd.scheduled(amd.module_of(mlp, **views), "gfx942")
    assert function.attributes["shared_bytes"] <= 65536
    x, w1, w2 = (amd.normal(*s, seed=i, scale=0.3) for i, s in enumerate(arrays.values()))
    y = np.full((128, 128), np.nan, x.dtype)
    amd.emulate(amd.compiled(function, "gfx942"), "gfx942", [x, w1, w2, y], (1,))
    exact = reference(x, w1, w2)
    assert np.linalg.norm(y.astype(np.float64) - exact) < 5e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize(("name", "lent"), [("small GEMM + reduce-scatter", True), ("small all-reduce", False)])
def test_the_number_of_a_launch_takes_a_place_of_its_own_where_there_is_one(name: str, lent: bool) -> None:
    """Else that of a buffer that is used behind it."""
    function = scheduled(name, "gfx942").functions[0]
    (enter,) = [op for op in function.walk() if isinstance(op, Enter)]
    assert enter.lent == lent and (function.attributes["shared_bytes"] == 65536) == lent
