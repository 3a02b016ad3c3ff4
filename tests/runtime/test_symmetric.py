"""Worlds without GPUs: emulated and interpreted ranks, what they refuse, and how a launch passes their memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comm_kernels import all_reduce
from ring_kernel import PTX, N, ring_abi

import tilewright as tw
from tilewright.ir.abi import Control
from tilewright.kernels.multi_gpu.copy_engine import (
    _halves,
    all_gather_gemm,
    all_to_all,
    gather_columns_gemms,
    gather_gemms,
    pays,
)
from tilewright.kernels.multi_gpu.gemm_all_reduce import gemm_ar
from tilewright.kernels.multi_gpu.gemm_reduce_scatter import gemm_rs
from tilewright.runtime.device import open_device
from tilewright.runtime.errors import ArgumentError, DeviceError


def run_ring(world: Any, xs: list[np.ndarray], slots: Any, flags: Any) -> list[np.ndarray]:
    """The hand-written kernel on all ranks of an emulated world."""
    ys = [np.full((world.size, N), np.nan, np.float32) for _ in xs]
    with world.memory.together():
        for rank in world.ranks:
            device = open_device(world.memory.device(rank))
            function = device.load(b"", {"ptx": PTX}).function("ring")
            arguments = [slots.on(rank), flags.on(rank), xs[rank], ys[rank]]
            device.launch(function, ring_abi(world.size), 1, arguments)
    return ys


#: targets and ranks; each emulated one takes seconds
WORLDS = [*(("interpreter", size) for size in (1, 2, 3)), ("sm_90a", 1), ("sm_90a", 3), ("gfx942", 2)]


@pytest.mark.parametrize(("ranks", "seed"), [(1, None), (2, None), (3, 1), (4, 2)])
def test_emulated_ranks_reach_each_other(ranks: int, seed: int | None) -> None:
    rng = np.random.default_rng(0)
    with tw.World.emulated("sm_90a", ranks, races=True, seed=seed) as world:
        slots, flags = world.empty((ranks, N), "f32"), world.flags(ranks)
        for _ in range(3):
            xs = [rng.standard_normal(N).astype(np.float32) for _ in range(ranks)]
            for y in run_ring(world, xs, slots, flags):
                np.testing.assert_array_equal(y, np.stack(xs))
        assert [int(control.view(np.int32)[Control.EPOCH]) for control in world.control.owner] == [3] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_interpreter_runs_all_ranks(ranks: int) -> None:
    world = tw.World.interpreter(ranks)
    rng = np.random.default_rng(1)
    xs = [rng.standard_normal((4, 8)).astype(np.float32) for _ in range(ranks)]
    ys = [np.full((4, 8), np.nan, np.float32) for _ in range(ranks)]
    world.launch(all_reduce, (4,), xs, ys, world.empty((ranks, 4, 8), "f32"), world.flags(ranks, 4), N=8)
    for y in ys:
        np.testing.assert_allclose(y, sum(x.astype(np.float64) for x in xs), rtol=1e-6)


@pytest.mark.parametrize("target", ["interpreter", "sm_90a", "gfx942"])
def test_copies_to_all_ranks(target: str) -> None:
    size, rng = 3, np.random.default_rng(2)
    world = tw.World.interpreter(size) if target == "interpreter" else tw.World.emulated(target, size, races=True)
    xs = [rng.standard_normal((size, 5, 7)).astype(np.float32) for _ in range(size)]
    for copies in (True, False, None):
        y = world.empty((size, 5, 7), "f32")
        all_to_all(world, xs, y, copies=copies)
        for rank in range(size):
            np.testing.assert_array_equal(y[rank], np.stack([x[rank] for x in xs]))
    world.push(y, z := world.empty((size, 5, 7), "f32"))
    np.testing.assert_array_equal(z[2], xs[2])
    for wrong in (xs[0][:2], xs[0].astype(np.float64), np.zeros((5, 3, 7), np.float32)):
        with pytest.raises(ArgumentError, match="cannot be pushed"):
            world.push(wrong, y)
    with pytest.raises(ArgumentError, match="must be row-major"):
        world.push(np.zeros((7, 5, size), np.float32).T, y)


@pytest.mark.parametrize(("target", "size"), WORLDS)
def test_a_product_of_rows_that_are_copied(target: str, size: int) -> None:
    rng = np.random.default_rng(size)
    world = tw.World.interpreter(size) if target == "interpreter" else tw.World.emulated(target, size)
    parts = [rng.standard_normal((20, 24)).astype(np.float32) for _ in range(size)]
    b = [rng.standard_normal((24, 40)).astype(np.float32) for _ in range(size)]
    c = [np.full((size, 20, 40), np.nan, np.float32) for _ in range(size)]
    a = world.empty((size, 20, 24), "f32")
    for rank, part in enumerate(parts):
        a[rank][rank] = part
    all_gather_gemm(world, a, b, c, BM=32, BN=32, BK=16)
    for rank in range(size):
        exact = np.stack(parts).astype(np.float64) @ b[rank].astype(np.float64)
        np.testing.assert_allclose(c[rank], exact, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(a[rank], np.stack(parts))
    with pytest.raises(ArgumentError, match="cannot be spread"):
        world.spread(world.empty((size + 1, 4), "f32"))


@pytest.mark.parametrize(("target", "size"), WORLDS)
def test_products_of_what_is_fetched_into_ordinary_arrays(target: str, size: int) -> None:
    """Rows or columns of all ranks, several products of them, and the same buffers for the next call."""
    rng = np.random.default_rng(size)
    world = tw.World.interpreter(size) if target == "interpreter" else tw.World.emulated(target, size)
    meta, widths = {"BM": 32, "BN": 32, "BK": 16}, (40, 12)

    def arrays(*shape: int, poisoned: bool = False) -> list[np.ndarray]:
        return [np.full(shape, np.nan, np.float32) if poisoned else rng.standard_normal(shape).astype(np.float32)
                for _ in range(size)]  # fmt: skip

    for _ in range(2):
        x, whole = arrays(20, 24), arrays(size, 20, 24, poisoned=True)
        b, c = [arrays(24, n) for n in widths], [arrays(size, 20, n, poisoned=True) for n in widths]
        gather_gemms(world, x, whole, b, c, **meta)
        for rank in range(size):
            np.testing.assert_array_equal(whole[rank], np.stack(x))
            for factor, product in zip(b, c, strict=True):
                exact = np.stack(x).astype(np.float64) @ factor[rank]
                np.testing.assert_allclose(product[rank], exact, rtol=1e-4, atol=1e-4)
        b, c = [arrays(size * 24, n) for n in widths], [arrays(20, n, poisoned=True) for n in widths]
        gather_columns_gemms(world, x, whole, b, c, **meta)
        for rank in range(size):
            for factor, product in zip(b, c, strict=True):
                exact = np.concatenate(x, 1).astype(np.float64) @ factor[rank]
                np.testing.assert_allclose(product[rank], exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match="cannot be filled from"):
        world.fetch(world.empty((20, 24), "f32"), arrays(size, 20, 23))
    with pytest.raises(ArgumentError, match="cannot be copied to"):
        world.fill_own(world.empty((20, 24), "f32"), arrays(20, 23))


@pytest.mark.parametrize(("target", "size"), WORLDS)
def test_sums_of_products_by_copies(target: str, size: int) -> None:
    """Chunks of rows, and halves of the last one; the second call meets what the first has left."""
    rng, each = np.random.default_rng(size), 100 if target == "interpreter" else 40
    world = tw.World.interpreter(size) if target == "interpreter" else tw.World.emulated(target, size)
    tiles = {"BM": 16, "BN": 32, "BK": 16}
    for _ in range(2 if target == "interpreter" else 1):
        a = [rng.standard_normal((size * each, 24)).astype(np.float32) for _ in range(size)]
        b = [rng.standard_normal((24, 40)).astype(np.float32) for _ in range(size)]
        exact = sum(x.astype(np.float64) @ y.astype(np.float64) for x, y in zip(a, b, strict=True))
        c = [np.full((each, 40), np.nan, np.float32) for _ in range(size)]
        gemm_rs(world, a, b, c, copies=True, **tiles)
        whole = world.empty((size, each, 40), "f32")
        gemm_ar(world, a, b, whole, copies=True, **tiles)
        for rank in range(size):
            np.testing.assert_allclose(c[rank], exact[rank * each : (rank + 1) * each], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(whole[rank].reshape(-1, 40), exact, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(whole[rank], whole[0], "equal bits")
    if size > 1:
        with pytest.raises(ValueError, match="gemm_rs and gemm_ar take any"):
            gemm_rs(world, [x[1:] for x in a], b, c, copies=True, **tiles)


def test_where_copies_pay() -> None:
    """Where a chunk fills the SMs, of rows that divide evenly among several ranks."""
    assert [pays(n, n, 2) for n in (2048, 3072, 4096, 8192, 16384)] == [False, False, True, True, True]
    assert pays(8192, 2048, 2) and not pays(8192, 1024, 2), "what counts is the whole chunk"
    assert pays(8192, 4096, 4) and not pays(8192, 2048, 4), "and each rank has rows of its own"
    assert not pays(8193, 8192, 2) and not pays(8192, 8192, 1)
    assert not pays(64, 1 << 18, 2), "rows that make no tile each leave nothing to send beside"


def test_rows_that_become_fewer() -> None:
    assert list(_halves(0, 1024, 128, 128)) == [(0, 512), (512, 768), (768, 896), (896, 1024)]
    assert list(_halves(64, 100, 128, 16)) == [(64, 100)]
    assert list(_halves(0, 50, 16, 16)) == [(0, 32), (32, 48), (48, 50)]


@pytest.mark.parametrize("target", ["interpreter", "sm_90a"])
def test_parts_that_ranks_fetch(target: str) -> None:
    world = tw.World.interpreter(3) if target == "interpreter" else tw.World.emulated(target, 3)
    x = world.tensor([np.arange(24.0).reshape(3, 2, 4) + 100 * rank for rank in range(3)])
    before = [array.copy() for array in x.arrays]
    peers = [((rank + 1) % 3, (rank + 2) % 3) for rank in range(3)]
    copies = world.pull(lambda rank: [(x, peers[rank][0], (peers[rank][0], 1)), (x, peers[rank][1], (peers[rank][1],))])
    copies.join()
    copies.rejoin()
    for rank in range(3):
        wanted = before[rank].copy()
        first, second = peers[rank]
        wanted[first, 1], wanted[second] = before[first][first, 1], before[second][second]
        np.testing.assert_array_equal(x[rank], wanted)
    for wrong in [(3,), (0, -1), (0, 0, 0, 0)]:
        with pytest.raises(ArgumentError, match="has no part"):
            world.pull(lambda rank, index=wrong: [(x, 0, index)])


# --- tensors ----------------------------------------------------------------------------------------


def test_tensors_of_a_world() -> None:
    world = tw.World.interpreter(2)
    x = world.empty((3, 4), tw.bfloat16)
    assert (x.shape, x.dtype, x.rank, len(x.addresses)) == ((3, 4), "bf16", None, 2)
    assert np.isnan(x[0].astype(np.float32)).all(), "what nobody wrote shows"
    assert (world.zeros(5, np.float32)[1] == 0).all() and world.flags((2, 3))[0].dtype == np.int32
    assert world.flags(2, 3).shape == world.flags((2, 3)).shape == (2, 3)
    parts = world.tensor([np.arange(6.0).reshape(2, 3), -np.arange(6.0).reshape(2, 3)])
    assert parts.dtype == "f64" and parts[1][1, 2] == -5
    flat = parts.reshape(6)
    flat[0][4] = 40
    assert flat.shape == (6,) and parts[0][1, 1] == 40, "the same memory"
    assert world.empty((0, 7), "f32")[0].shape == (0, 7)
    assert repr(x) == "<symmetric bf16 tensor [3, 4] on 2 ranks>"


def test_what_tensors_refuse() -> None:
    world = tw.World.interpreter(2)
    x = world.zeros((4,), "f32")
    with pytest.raises(ArgumentError, match="has 2 ranks: write x"):
        _ = x.local
    with pytest.raises(ArgumentError, match="Rank 2 is not of this process"):
        _ = x[2]
    with pytest.raises(ArgumentError, match="cannot take the shape"):
        x.reshape(5)
    with pytest.raises(ArgumentError, match="is no dtype"):
        world.empty(4, "complex64")
    with pytest.raises(ArgumentError, match="none negative"):
        world.empty((4, -1), "f32")
    with pytest.raises(ArgumentError, match="arrays of the ranks differ"):
        world.tensor([np.zeros(3), np.zeros(4)])
    with pytest.raises(ArgumentError, match="2 ranks in this process, and 3 arrays"):
        world.tensor([np.zeros(3)] * 3)
    with pytest.raises(ArgumentError, match="none of them alone"):
        _ = world.rank
    world.close()
    with pytest.raises(DeviceError, match="has been closed"):
        world.zeros(4, "f32")
    with pytest.raises(ArgumentError, match="has been closed"):
        _ = x.on(0).view


@pytest.mark.parametrize("ranks", [0, 65])
def test_worlds_of_too_few_or_many_ranks(ranks: int) -> None:
    for make in (lambda: tw.World.interpreter(ranks), lambda: tw.World.emulated("sm_90a", ranks)):
        with pytest.raises(DeviceError, match=f"1 to 64 ranks, not {ranks}"):
            make()


# --- launches ---------------------------------------------------------------------------------------


def test_what_launches_refuse() -> None:
    world, other = tw.World.interpreter(2), tw.World.interpreter(2)
    x, slots, flags = np.zeros((4, 8), np.float32), world.empty((2, 4, 8), "f32"), world.flags(2, 4)
    with pytest.raises(tw.ArgumentError, match="a list of 3 arguments for the 2 ranks"):
        world.launch(all_reduce, (4,), [x] * 3, [x, x], slots, flags, N=8)
    with pytest.raises(tw.ArgumentError, match="tensor of another world"):
        world.launch(all_reduce, (4,), [x, x], [x, x], other.empty((2, 4, 8), "f32"), flags, N=8)
    with pytest.raises(ArgumentError, match=r"world\.launch"):
        all_reduce[(4,)](x, x, slots, flags, N=8)


def test_a_symmetric_parameter_needs_a_tensor_of_a_world() -> None:
    world = tw.World.emulated("sm_90a", 2)
    device = open_device(world.memory.device(0))
    function = device.load(b"", {"ptx": PTX}).function("ring")
    x, y, flags = np.zeros(N, np.float32), np.zeros((2, N), np.float32), world.flags(2)
    with pytest.raises(ArgumentError, match="'slots' must be a tensor that every rank has"):
        device.launch(function, ring_abi(2), 1, [y, flags.on(0), x, y])
    slots = tw.World.emulated("sm_90a", 2).zeros((2, N), "f32")
    with pytest.raises(ArgumentError, match="tensors of several worlds"):
        device.launch(function, ring_abi(2), 1, [slots.on(0), flags.on(0), x, y])


def test_an_emulated_rank_alone_is_told_who_is_missing() -> None:
    world = tw.World.emulated("sm_90a", 2)
    device = open_device(world.memory.device(1))
    function = device.load(b"", {"ptx": PTX}).function("ring")
    slots, flags = world.zeros((2, N), "f32"), world.flags(2)
    x, y = np.zeros(N, np.float32), np.zeros((2, N), np.float32)
    with pytest.raises(DeviceError, match="tensors of rank 0, which does not take part"):
        device.launch(function, ring_abi(2), 1, [slots.on(1), flags.on(1), x, y])
