"""Loops over rows that meet once an iteration: each thread copies what it reads, sums take turns with two places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tilewright.frontend.build import build_module
from tilewright.ir.async_ops import Barrier, Copy, LocalLoad, Wait
from tilewright.ir.builder import Builder
from tilewright.ir.core import Function, IRError, Module
from tilewright.ir.layout import LinearLayout
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.target import get_target
from tilewright.ir.tile_ops import For, Reduce
from tilewright.ir.types import DTYPES, ViewType
from tilewright.passes.check_schedule import Result, check
from tilewright.passes.manager import PassContext, PassManager, PassOptions
from tilewright.passes.pipelines import default_pipeline

BF16 = ml_dtypes.bfloat16


@tw.kernel
def scaled(x: tw.Tensor, y: tw.Tensor, *, BN: tw.constexpr = 1024):
    for m in tw.range(tw.program_id(0), x.shape[0], tw.num_programs(0)):
        row = tw.load(x, (m, 0), (1, BN)).to(tw.float32)
        tw.store(y, (m, 0), (row * tw.sum(row, axis=1)[:, None]).to(y.dtype))


@tw.kernel
def centred(x: tw.Tensor, y: tw.Tensor, *, BN: tw.constexpr = 1024):
    for m in tw.range(tw.program_id(0), x.shape[0], tw.num_programs(0)):
        row = tw.load(x, (m, 0), (1, BN)).to(tw.float32)
        row = row - (tw.sum(row, axis=1) / BN)[:, None]
        tw.store(y, (m, 0), (row * tw.sum(row * row, axis=1)[:, None]).to(y.dtype))


@tw.kernel
def blockwise(x: tw.Tensor, y: tw.Tensor, *, BN: tw.constexpr = 1024):
    """Sums of blocks of a row, in a loop in a loop: the inner one begins again with an even turn."""
    for m in tw.range(tw.program_id(0), x.shape[0], tw.num_programs(0)):
        for j in tw.range(tw.cdiv(x.shape[1], BN)):
            row = tw.load(x, (m, j), (1, BN)).to(tw.float32)
            tw.store(y, (m, j), (row * tw.sum(row, axis=1)[:, None]).to(y.dtype))


def scheduled(
    kernel: tw.Kernel, target: str = "sm_90a", result: str = "bf16", skip: str = "", **options: int
) -> Module:
    matrices = {n: ViewType((None, None), DTYPES[t], (None, 1), 16) for n, t in (("x", "bf16"), ("y", result))}
    module = build_module(kernel.definition, {**matrices, "BN": 1024})
    pipeline = ",".join(p for p in default_pipeline(get_target(target), False).split(",") if p != skip)
    PassManager(pipeline, PassContext(get_target(target), PassOptions(num_warps=4, **options))).run(module)
    return module


def checked(module: Module, target: str = "sm_90a") -> Result:
    return check(module.functions[0], PassContext(get_target(target)))


def loops(function: Function) -> list[For]:
    return [op for op in function.walk() if isinstance(op, For)]


def inside(module: Module, kind: type) -> list:
    """The operations of a kind in the innermost loop."""
    return [op for op in loops(module.functions[0])[-1].body.walk() if isinstance(op, kind)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("stages", [None, 2, 3])
def test_one_meeting_an_iteration(target: str, stages: int | None) -> None:
    module = scheduled(scaled, target, **({} if stages is None else {"num_stages": stages}))
    assert not inside(module, Barrier)
    assert [op.turn is not None for op in inside(module, Reduce)] == [True]
    owners = {op.result.type.layout.owners for op in inside(module, LocalLoad)}
    copies = [op for op in module.walk() if isinstance(op, Copy)]
    assert len(copies) == (stages or 4)
    assert {op.layout.owners for op in copies} == owners
    assert None not in owners
    assert not checked(module, target).missed
    text = print_module(module)
    assert print_module(parse_module(text)) == text


def test_two_exchanges_keep_the_meeting_that_the_first_needs_too() -> None:
    module = scheduled(centred)
    assert len(inside(module, Barrier)) == 1
    assert [op.turn for op in inside(module, Reduce)] == [None, None]
    checked(module)


def test_a_loop_that_begins_again_begins_with_a_meeting() -> None:
    module = scheduled(blockwise)
    assert not inside(module, Barrier)
    outer = loops(module.functions[0])[0].body.block
    meetings = [op for op in outer.ops if isinstance(op, Barrier)]
    assert meetings
    checked(module)
    for barrier in meetings:
        outer.ops.remove(barrier)
    with pytest.raises(IRError, match=r"race: 'tile\.reduce\.sum'"):
        checked(module)


def test_readers_of_a_layout_that_does_not_suit_copies_keep_the_barrier() -> None:
    """Four elements at a time, as float32 is stored: copies move eight."""
    module = scheduled(scaled, result="f32")
    assert len(inside(module, Barrier)) == 1
    assert not any(op.layout for op in module.walk() if isinstance(op, Copy))
    checked(module)


def with_lanes_swapped(layout: LinearLayout) -> LinearLayout:
    bases = {dim: list(layout.basis(dim)) for dim in ("register", "lane", "warp")}
    bases["lane"][:2] = bases["lane"][1::-1]
    return LinearLayout.make(bases, layout.shape, layout.repeat)


def test_readers_that_disagree_keep_the_barrier() -> None:
    module = scheduled(scaled, skip="own-copies")
    one = inside(module, LocalLoad)[0]
    b = Builder(one.parent)
    with b.at(one.parent, one.parent.ops.index(one)):
        other = b.local_load(one.slot)
    owner = PassManager("own-copies", PassContext(get_target("sm_90a")))
    other.type = replace(one.result.type, layout=with_lanes_swapped(one.result.type.layout))
    owner.run(module)
    assert len(inside(module, Barrier)) == 1
    assert not any(op.layout for op in module.walk() if isinstance(op, Copy))
    checked(module)
    other.type = one.result.type
    owner.run(module)
    assert not inside(module, Barrier)
    checked(module)


# --- what the checker finds -------------------------------------------------------------------------


def without_wait(module: Module) -> None:
    for wait in inside(module, Wait):
        wait.parent.ops.remove(wait)


def early_wait(module: Module) -> None:
    for wait in inside(module, Wait):
        wait.pending += 1


def of_other_threads(module: Module) -> None:
    """Two warps copy what the other reads."""
    for copy in [op for op in module.walk() if isinstance(op, Copy)]:
        bases = {dim: list(copy.layout.basis(dim)) for dim in ("register", "lane", "warp")}
        bases["warp"].reverse()
        copy.layout = LinearLayout.make(bases, copy.layout.shape, copy.layout.repeat)


def by_nobody_in_particular(module: Module) -> None:
    for copy in [op for op in module.walk() if isinstance(op, Copy)]:
        copy.layout = None


def even_turns(module: Module) -> None:
    """One place for all exchanges."""
    for reduction in inside(module, Reduce):
        b = Builder(reduction.parent)
        with b.at(reduction.parent, reduction.parent.ops.index(reduction)):
            reduction.turn = b.add(reduction.turn, reduction.turn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_wait, "race: 'async.local_load'"),
        (early_wait, "race: 'async.local_load'"),
        (of_other_threads, "race: 'async.copy'.*'async.local_load'"),
        (by_nobody_in_particular, "race: 'async.copy'.*'async.local_load'"),
        (even_turns, "race: 'tile.reduce.sum'"),
    ],
)
def test_faults_are_found(change: Callable[[Module], None], message: str) -> None:
    module = scheduled(scaled)
    change(module)
    with pytest.raises(IRError, match=message):
        checked(module)


# --- what runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kernel", [scaled, centred, blockwise])
def test_no_races_in_the_emulator(kernel: tw.Kernel, seed: int) -> None:
    """An odd number of rows for one program, so that turns end differently, and blocks that stick out."""
    x = np.random.default_rng(seed).standard_normal((7, 1000 if kernel is not blockwise else 3000)).astype(BF16)
    y = np.full(x.shape, np.nan, BF16)
    tw.emulate("sm_90a", races=True, seed=seed).launch(kernel, (2,), x, y, num_warps=4)
    exact = x.astype(np.float64)
    if kernel is scaled:
        exact = exact * exact.sum(1, keepdims=True)
    elif kernel is blockwise:
        exact = np.concatenate([p * p.sum(1, keepdims=True) for p in np.split(exact, [1024, 2048], 1)], 1)
    else:
        exact = exact - exact.sum(1, keepdims=True) / 1024
        outside = 24 * (x.astype(np.float64).sum(1, keepdims=True) / 1024) ** 2  # zeros that are centred, too
        exact = exact * ((exact**2).sum(1, keepdims=True) + outside)
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_other_targets(target: str) -> None:
    x = np.random.default_rng(0).standard_normal((7, 1024)).astype(BF16)
    y = np.full(x.shape, np.nan, BF16)
    tw.emulate(target).launch(scaled, (2,), x, y, num_warps=4)
    exact = x.astype(np.float64)
    exact = exact * exact.sum(1, keepdims=True)
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=2**-8, atol=1e-3)
