"""Every pass keeps programs that communicate valid, printable and right on several ranks, on every target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tests.support import comm_kernels
from tilewright.frontend.build import build_module
from tilewright.ir import comm_ops as c
from tilewright.ir.async_ops import Alloc, Barrier, BulkStore, BulkWait, Copy, Fence, Role
from tilewright.ir.core import Function, IRError, Module, Operation
from tilewright.ir.interpreter import run_ranks
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.target import get_target
from tilewright.ir.types import ViewType, bf16, f32, i32
from tilewright.ir.verifier import verify
from tilewright.passes.manager import PassContext, PassOptions, make_pass, parse_pipeline
from tilewright.passes.pipelines import default_pipeline
from tilewright.passes.tile_order import reuse_axes

BF16 = ml_dtypes.bfloat16
RANKS, ROWS, COLUMNS, DEPTH, TILE = 3, 128, 128, 64, 64
TILES = {"BM": TILE, "BN": TILE, "BK": 32}


def view(dtype: Any, rank: int) -> ViewType:
    return ViewType((None,) * rank, dtype, (*(None,) * (rank - 1), 1), 16)


def reduce_scatter() -> tuple[Any, dict[str, Any], Any, Any]:
    types = {"a": view(bf16, 2), "b": view(bf16, 2), "c": view(f32, 2), "parts": view(f32, 3), "flags": view(i32, 3)}

    def arguments(rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[Any]]:
        a = [rng.standard_normal((ROWS * RANKS, DEPTH), np.float32).astype(BF16) for _ in range(RANKS)]
        b = [rng.standard_normal((DEPTH, COLUMNS), np.float32).astype(BF16) for _ in range(RANKS)]
        total = sum(x.astype(np.float64) @ y.astype(np.float64) for x, y in zip(a, b, strict=True))
        ranks = [
            {
                "a": a[r], "b": b[r], "c": np.full((ROWS, COLUMNS), np.nan, np.float32),
                "parts": np.full((RANKS, ROWS, COLUMNS), np.nan, np.float32),
                "flags": np.zeros((RANKS, ROWS // TILE, COLUMNS // TILE), np.int32),
            }
            for r in range(RANKS)
        ]  # fmt: skip
        return ranks, np.split(total, RANKS)

    return comm_kernels.gemm_reduce_scatter, types, arguments, (COLUMNS // TILE, ROWS // TILE, RANKS)


def gather() -> tuple[Any, dict[str, Any], Any, Any]:
    types = {"a": view(bf16, 2), "b": view(bf16, 2), "c": view(f32, 2), "whole": view(bf16, 3), "flags": view(i32, 1)}

    def arguments(rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[Any]]:
        a = [rng.standard_normal((TILE, DEPTH), np.float32).astype(BF16) for _ in range(RANKS)]
        b = [rng.standard_normal((DEPTH, COLUMNS), np.float32).astype(BF16) for _ in range(RANKS)]
        ranks = [
            {
                "a": a[r], "b": b[r], "c": np.full((TILE * RANKS, COLUMNS), np.nan, np.float32),
                "whole": np.full((RANKS, TILE, DEPTH), np.nan, BF16), "flags": np.zeros(RANKS, np.int32),
            }
            for r in range(RANKS)
        ]  # fmt: skip
        return ranks, [np.concatenate(a).astype(np.float64) @ one.astype(np.float64) for one in b]

    return comm_kernels.gather_gemm_push, types, arguments, (COLUMNS // TILE, 1, RANKS)


CASES = {"reduce_scatter": reduce_scatter, "gather": gather}


def levels(case: str, target: str, num_ctas: int | None = None) -> Iterator[tuple[str, Module]]:
    """The module behind each pass."""
    kernel, types, _, _ = CASES[case]()
    module = build_module(kernel.definition, {**types, **TILES})
    context = PassContext(get_target(target), PassOptions(num_ctas=num_ctas))
    for pass_ in parse_pipeline(default_pipeline(context.target)):
        pass_.run(module, context)
        yield pass_.name, module


@pytest.mark.parametrize("target", ["sm_90a", "sm_80", "gfx942"])
@pytest.mark.parametrize("case", CASES)
def test_levels(case: str, target: str) -> None:
    _, _, arguments, grid = CASES[case]()
    text = ""
    for name, module in levels(case, target):
        before, text = text, print_module(module)
        if text == before:
            continue
        verify(module)
        assert print_module(parse_module(text)) == text, name
        ranks, exact = arguments(np.random.default_rng(0))
        for seed in (None, 1):
            run_ranks(module.functions[0], ranks, grid, seed=seed)
            for rank, want in zip(ranks, exact, strict=True):
                np.testing.assert_allclose(rank["c"], want, rtol=1e-4, atol=1e-3, err_msg=name)


def scheduled(case: str, target: str = "sm_90a", num_ctas: int | None = None) -> Function:
    return [module for _, module in levels(case, target, num_ctas)][-1].functions[0]


def roles(function: Function) -> dict[str, Role]:
    return {op.kind: op for op in function.body.block.ops if isinstance(op, Role)}


def found(op: Role | Function, kinds: Any) -> list[Operation]:
    inside = op.body.walk()
    return [inner for inner in inside if isinstance(inner, kinds)]


def behind(op: Operation) -> list[Operation]:
    assert op.parent is not None
    return op.parent.ops[op.parent.ops.index(op) + 1 :]


def in_front(op: Operation) -> list[Operation]:
    assert op.parent is not None
    return op.parent.ops[: op.parent.ops.index(op)][::-1]


# --- where waits, fences and signals end up -----------------------------------------------------------


def test_a_wait_goes_where_its_token_is_used() -> None:
    gathered, reduced = roles(scheduled("gather")), roles(scheduled("reduce_scatter"))
    (wait,) = found(gathered["producer"], c.WaitFlags)
    assert not found(gathered["consumer"], c.WaitFlags)
    fence = behind(wait)[0]
    assert isinstance(fence, Fence) and fence.proxy == "async_global", "one thread waits and starts the copies"
    assert any(isinstance(op, Copy) and wait.results[0] in op.after for op in found(gathered["producer"], Copy))
    assert not found(reduced["producer"], c.WaitFlags | c.Credit)
    (wait,) = found(reduced["consumer"], c.WaitFlags)
    barrier = behind(wait)[0]
    assert isinstance(barrier, Barrier) and barrier.scope == "role"


def test_puts_leave_by_the_copy_engine_and_late() -> None:
    consumer = roles(scheduled("reduce_scatter"))["consumer"]
    assert not found(consumer, c.Put)
    remote = [op for op in found(consumer, BulkStore) if c.peer_of(op.view) is not None]
    (credit,) = found(consumer, c.Credit)
    assert remote and all(credit.results[0] in op.after for op in remote)
    signals = found(consumer, c.Signal)
    assert len(signals) == 2, "in front of the next tile's stores, and behind the last tile"
    for signal in signals:
        barrier, wait = in_front(signal)[:2]
        assert isinstance(barrier, Barrier) and barrier.scope == "role"
        assert isinstance(wait, BulkWait) and wait.pending == 0 and not wait.read


def test_a_signal_that_its_own_program_waits_for_is_not_late() -> None:
    """Here the producer waits for it, in the same turn of the loop."""
    (signal,) = found(roles(scheduled("gather"))["consumer"], c.Signal)
    assert any(isinstance(op, c.Peer) for op in found(roles(scheduled("gather"))["consumer"], c.Peer))
    assert any(token.type == c.PUT for token in signal.operands)


def test_a_launch_begins_and_ends() -> None:
    for case in CASES:
        ops = scheduled(case).body.block.ops
        first = next(op for op in ops if not isinstance(op, Alloc))
        assert isinstance(first, c.Enter) and first.place is not None
        assert not any(isinstance(op, c.Leave) for op in ops), "nobody reads from others"


def test_threads_fence_for_themselves_on_amd() -> None:
    function = scheduled("reduce_scatter", "gfx942")
    for signal in found(function, c.Signal):
        assert [op.name for op in in_front(signal)[:2]] == ["async.barrier", "async.fence"]
    for wait in found(function, c.WaitFlags | c.Credit):
        assert [op.name for op in behind(wait)[:2]] == ["async.barrier", "async.fence"]


@tw.kernel
def note_order(x: tw.Symmetric, y: tw.Tensor, order: tw.Tensor, turns: tw.Tensor):
    """The loads follow the axes 0 and 2: without communication their programs would run in square windows."""
    i, k = tw.program_id(0), tw.program_id(2)
    total = tw.load(x.peer(tw.rank()), i, (8,)) + tw.load(y, k, (8,))
    tw.atomic_add(turns[i], k, tw.atomic_add(order, 0, 1) + tw.sum(total))


def test_axis_2_stays_the_slowest() -> None:
    types = {"x": view(i32, 1), "y": view(i32, 1), "order": view(i32, 1), "turns": view(i32, 2)}
    module = build_module(note_order.definition, types)
    assert reuse_axes(module.functions[0]) == (0, 2)
    make_pass("tile-order", persistent=True).run(module, PassContext(get_target("sm_90a")))
    turns = np.zeros((20, 5), np.int32)
    empty = np.zeros(0, np.int32)
    run_ranks(
        module.functions[0], [{"x": empty, "y": empty, "order": np.zeros(1, np.int32), "turns": turns}], (20, 1, 5), 1
    )
    assert (turns == np.arange(100).reshape(5, 20).T).all()


def test_clusters_are_refused() -> None:
    with pytest.raises(IRError, match="do not run in clusters"):
        scheduled("reduce_scatter", num_ctas=2)
