"""Small kernels that communicate, on emulated GPUs with the race detector on."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright as tw
from tests.support import comm_kernels

BF16 = ml_dtypes.bfloat16


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def poisoned(*shape: int) -> np.ndarray[Any, Any]:
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("target", "seed"),
    [
        ("sm_90a", None),
        ("sm_90a", 1),
        ("sm_80", 1),
        ("gfx942", 1),
        pytest.param("gfx950", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_all_reduce(target: str, size: int, seed: int | None) -> None:
    rng, rows, columns = np.random.default_rng(size), 5, 16
    with tw.World.emulated(target, size, seed=seed, races=True) as world:
        slots, flags = world.empty((size, rows, columns), "f32"), world.flags((size, rows))
        for _ in range(3):  # flags and slots serve again, with nothing in between
            x = [normal(rng, rows, columns) for _ in range(size)]
            y = [poisoned(rows, columns) for _ in range(size)]
            world.launch(comm_kernels.all_reduce, (rows,), x, y, slots, flags, N=columns)
            for result in y:
                np.testing.assert_array_equal(result, sum(x))


@pytest.mark.parametrize(
    ("target", "size", "seed"),
    [("sm_90a", 1, None), ("sm_90a", 2, None), *((target, 3, 1) for target in ("sm_90a", "sm_80", "gfx942"))],
)
def test_gemm_reduce_scatter(target: str, size: int, seed: int | None) -> None:
    rng, rows, columns, depth, tile = np.random.default_rng(size), 128, 64, 96, 64
    a = [normal(rng, rows * size, depth, dtype=BF16) for _ in range(size)]
    b = [normal(rng, depth, columns, dtype=BF16) for _ in range(size)]
    c = [poisoned(rows, columns) for _ in range(size)]
    with tw.World.emulated(target, size, seed=seed, races=True) as world:
        parts = world.empty((size, rows, columns), "f32")
        flags = world.flags((size, rows // tile, columns // tile))
        grid = (columns // tile, rows // tile, size)
        world.launch(comm_kernels.gemm_reduce_scatter, grid, a, b, c, parts, flags, BM=tile, BN=tile, BK=32)
    total = sum(x.astype(np.float64) @ y.astype(np.float64) for x, y in zip(a, b, strict=True))
    for number, result in enumerate(c):
        np.testing.assert_allclose(result, total[number * rows : (number + 1) * rows], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("target", "seed", "pull"),
    [
        *(("sm_90a", 3, pull) for pull in (True, False)),
        ("gfx942", 3, False),
        pytest.param("gfx942", 3, True, marks=pytest.mark.exhaustive),
    ],
)
def test_all_gather_gemm(target: str, seed: int | None, pull: bool) -> None:
    """``pull``: products read the peers' tensors; else the shards are pushed into a local copy first."""
    rng, size, rows, columns, depth, tile = np.random.default_rng(0), 3, 64, 64, 64, 64
    shards = [normal(rng, rows, depth, dtype=BF16) for _ in range(size)]
    b = [normal(rng, depth, columns, dtype=BF16) for _ in range(size)]
    c = [poisoned(rows * size, columns) for _ in range(size)]
    with tw.World.emulated(target, size, seed=seed, races=True) as world:
        a = world.tensor(shards)
        whole, flags = world.empty((size, rows, depth), "bf16"), world.flags((size,))
        kernel = comm_kernels.gather_gemm_pull if pull else comm_kernels.gather_gemm_push
        more = () if pull else (whole, flags)
        world.launch(kernel, (columns // tile, 1, size), a, b, c, *more, BM=tile, BN=tile, BK=32)
    for own, result in zip(b, c, strict=True):
        exact = np.concatenate(shards).astype(np.float64) @ own.astype(np.float64)
        np.testing.assert_allclose(result, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "i32"])
@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_reduce_put(target: str, dtype: str) -> None:
    """Small whole numbers, whose sum does not depend on the order."""
    size, rows, columns = 3, 6, 20
    with tw.World.emulated(target, size, races=True) as world:
        total, flags = world.zeros((rows, columns), dtype), world.flags((size,))
        kind = total[0].dtype
        x = [np.arange(rows * columns).reshape(rows, columns).astype(kind) % 7 + r for r in range(size)]
        y = [np.zeros((rows, columns), kind) for _ in range(size)]
        world.launch(comm_kernels.add_to_first, (1,), x, y, total, flags, M=8, N=32)
        assert (y[0] == sum(one.astype(np.float32) for one in x).astype(kind)).all()
        assert not total[1].any()


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_barrier_and_get(target: str) -> None:
    size, programs = 3, 4
    with tw.World.emulated(target, size, races=True) as world:
        places, flags = world.empty((programs,), "i32"), world.flags((programs, size))
        y = [np.zeros((size, programs), np.int32) for _ in range(size)]
        world.launch(comm_kernels.meet, (programs,), y, places, flags)
        for result in y:
            assert (result == np.arange(1, size + 1)[:, None]).all()


@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
def test_waiting_in_vain_is_reported(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At run time, too, where nobody has proved the protocol."""
    monkeypatch.setenv("TILEWRIGHT_CHECK_SCHEDULE", "0")
    with tw.World.emulated(target, 2) as world:
        flags = world.flags((4,))
        with pytest.raises(tw.DeviceError, match="livelock|deadlock") as caught:
            world.launch(comm_kernels.wait_in_vain, (1,), flags)
    assert "comm_kernels.py" in str(caught.value)


@pytest.mark.parametrize("where", ["interpreter", "sm_90a", "gfx942"])
def test_collectives(where: str) -> None:
    size, programs, columns = 3, 2, 16
    rng = np.random.default_rng(0)
    x = [normal(rng, programs, columns) for _ in range(size)]
    parts = [normal(rng, size, programs, columns) for _ in range(size)]
    outputs = [[poisoned(programs, columns) for _ in range(size)] for _ in range(3)]
    gathered, exchanged = ([poisoned(size, programs, columns) for _ in range(size)] for _ in range(2))
    world = tw.World.interpreter(size) if where == "interpreter" else tw.World.emulated(where, size, seed=1, races=True)
    with world:
        buffers, flags = world.empty((5, programs, size, 1, columns), "f32"), world.flags((5, programs, size))
        summed, shifted, scattered = outputs
        given = (x, parts, summed, shifted, gathered, scattered, exchanged, buffers, flags)
        world.launch(comm_kernels.collectives, (programs,), *given, N=columns)
    for rank in range(size):
        np.testing.assert_array_equal(summed[rank], sum(x))
        np.testing.assert_array_equal(shifted[rank], x[rank - 1])
        np.testing.assert_array_equal(gathered[rank], np.stack(x))
        np.testing.assert_array_equal(scattered[rank], sum(part[rank] for part in parts))
        np.testing.assert_array_equal(exchanged[rank], np.stack([part[rank] for part in parts]))
