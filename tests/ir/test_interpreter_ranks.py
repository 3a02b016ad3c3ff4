"""The interpreter runs all ranks of a world side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tilewright as tw
from tests.support import comm_kernels
from tilewright.compiler.errors import ExecutionError
from tilewright.compiler.launch import interpret_ranks
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_function
from tilewright.ir.types import ViewType, f32, i32
from tilewright.ir.verifier import verify_function

RANKS = (1, 2, 3, 4)


def poisoned(*shape: int) -> np.ndarray[Any, Any]:
    return np.full(shape, np.nan, np.float32)


def unset(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.int32)


def launch(kernel: Any, grid: Any, ranks: list[dict[str, Any]], **meta: Any) -> None:
    interpret_ranks(kernel, grid, [()] * len(ranks), [{**arguments, **meta} for arguments in ranks])


@pytest.mark.parametrize("size", RANKS)
def test_all_reduce(size: int) -> None:
    rng, rows, columns = np.random.default_rng(size), 5, 16
    xs = [rng.standard_normal((rows, columns), np.float32) for _ in range(size)]
    ranks = [
        {"x": x, "y": poisoned(rows, columns), "slots": poisoned(size, rows, columns), "flags": unset(size, rows)}
        for x in xs
    ]  # fmt: skip
    launch(comm_kernels.all_reduce, (rows,), ranks, N=columns)
    for rank in ranks:
        np.testing.assert_array_equal(rank["y"], sum(xs))
        assert not rank["flags"].any(), "what flags hold is the device's business"


@pytest.mark.parametrize("size", RANKS)
def test_gemm_reduce_scatter(size: int) -> None:
    rng, rows, columns, depth = np.random.default_rng(size), 16, 24, 20
    a = [rng.standard_normal((rows * size, depth), np.float32) for _ in range(size)]
    b = [rng.standard_normal((depth, columns), np.float32) for _ in range(size)]
    ranks = [
        {
            "a": a[r], "b": b[r], "c": poisoned(rows, columns), "parts": poisoned(size, rows, columns),
            "flags": unset(size, rows // 8, columns // 8),
        }
        for r in range(size)
    ]  # fmt: skip
    launch(comm_kernels.gemm_reduce_scatter, (columns // 8, rows // 8, size), ranks, BM=8, BN=8, BK=8)
    total = sum(x @ y for x, y in zip(a, b, strict=True))
    for number, rank in enumerate(ranks):
        np.testing.assert_allclose(rank["c"], total[number * rows : (number + 1) * rows], rtol=1e-4, atol=1e-4)


def test_the_text_form_keeps_communication() -> None:
    tensor = ViewType((None, None), f32, (None, 1), 16)
    slots, flags = ViewType((None,) * 3, f32, (None, None, 1), 16), ViewType((None, None), i32, (None, 1), 4)
    types = {"x": tensor, "y": tensor, "slots": slots, "flags": flags, "N": 16}
    function = comm_kernels.all_reduce.function(types)
    verify_function(function)
    text = print_function(function)
    assert print_function(parse_module(text).functions[0]) == text
    assert "symmetric>" in text and "after(%token)" in text


# --- what may go wrong --------------------------------------------------------------------------


@tw.kernel
def exchange(x: tw.Tensor, y: tw.Tensor, buffer: tw.Symmetric, flags: tw.Symmetric, *, signals: tw.constexpr):
    """Rank r's row goes to rank r + 1; ``signals`` times too many or too few are told."""
    me, world = tw.rank(), tw.world_size()
    there = (me + 1) % world
    token = tw.put(buffer.peer(there), (0, 0), tw.load(x, (0, 0), (1, 8)))
    for _ in tw.static_range(signals):
        tw.signal(flags[0], there, after=token)
    if signals == 0 and me < 0:
        tw.signal(flags[0], there, after=token)
    arrived = tw.wait(flags[0])
    tw.store(y, (0, 0), tw.load(buffer, (0, 0), (1, 8), after=arrived))


def _exchange(signals: int, size: int = 2) -> list[dict[str, Any]]:
    ranks = [
        {"x": np.full((1, 8), r, np.float32), "y": poisoned(1, 8), "buffer": poisoned(1, 8), "flags": unset(2)}
        for r in range(size)
    ]  # fmt: skip
    launch(exchange, (1,), ranks, signals=signals)
    return ranks


def test_a_ring_shift() -> None:
    for number, rank in enumerate(_exchange(1, 3)):
        assert (rank["y"] == (number - 1) % 3).all()


def test_a_missing_signal_is_a_deadlock_with_lines() -> None:
    with pytest.raises(ExecutionError) as caught:
        _exchange(0)
    text = str(caught.value)
    assert "deadlock" in text and "flag [0] of %flags of rank 1 to be signalled" in text
    assert f":{exchange.definition.first_line + 10}:" in text


def test_a_flag_is_signalled_once() -> None:
    with pytest.raises(ExecutionError, match=r"flag \[0\] of %flags of rank 1 is signalled twice in a launch"):
        _exchange(2)


@tw.kernel
def publish_the_wrong_put(x: tw.Tensor, y: tw.Tensor, buffer: tw.Symmetric, flags: tw.Symmetric):
    me, world = tw.rank(), tw.world_size()
    there = (me + 1) % world
    first = tw.put(buffer.peer(there), (0, 0), tw.load(x, (0, 0), (1, 8)))
    second = tw.put(buffer.peer(there), (1, 0), tw.load(x, (1, 0), (1, 8)))
    tw.signal(flags[0], there, after=first)
    arrived = tw.wait(flags[0])
    tw.store(y, (0, 0), tw.load(buffer, (1, 0), (1, 8), after=arrived))
    tw.signal(flags[1], there, after=second)


def test_a_put_lands_at_its_own_signal_only() -> None:
    ranks = [
        {"x": np.ones((2, 8), np.float32), "y": poisoned(1, 8), "buffer": poisoned(2, 8), "flags": unset(2)}
        for _ in range(2)
    ]  # fmt: skip
    launch(publish_the_wrong_put, (1,), ranks)
    assert np.isnan(ranks[1]["y"]).all()
    assert all((rank["buffer"] == 1).all() for rank in ranks), "in the end all puts have landed"


@tw.kernel
def add_up(x: tw.Tensor, total: tw.Symmetric, flags: tw.Symmetric):
    token = tw.reduce_put(total.peer(0), (0, 0), tw.load(x, (0, 0), (1, 8)))
    tw.signal(flags[tw.rank()], 0, after=token)


def test_reduce_put_adds() -> None:
    ranks = [
        {"x": np.full((1, 8), r + 1, np.float32), "total": np.ones((1, 8), np.float32), "flags": unset(3)}
        for r in range(3)
    ]
    launch(add_up, (1,), ranks)
    assert (ranks[0]["total"] == 7).all() and (ranks[1]["total"] == 1).all()


def test_barrier() -> None:
    ranks = [{"y": np.zeros((3, 6), np.int32), "places": np.zeros(6, np.int32), "flags": unset(6, 3)} for _ in range(3)]
    launch(comm_kernels.meet, (6,), ranks)
    for rank in ranks:
        assert (rank["y"] == np.arange(1, 4)[:, None]).all()


def test_ranks_must_not_share_symmetric_memory() -> None:
    shared = np.zeros(8, np.int32)
    ranks = [{"y": np.zeros((2, 6), np.int32), "places": shared, "flags": unset(6, 2)} for _ in range(2)]
    with pytest.raises(ExecutionError, match="ranks 0 and 1 share its memory"):
        launch(comm_kernels.meet, (6,), ranks)
